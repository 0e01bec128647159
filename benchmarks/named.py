"""Measure any named workloads by any peers; without names, the benchmark of the older libraries.

python benchmarks/named.py --list                                          names, with their sources
python benchmarks/named.py --workloads llama-2k vit --peers blocked jax.nn
python benchmarks/named.py --seq-lens 1024 4096 --dtypes float16 --causal --mask-prob 0.2

Without --workloads these are batch 4, 8 heads of 64, at lengths 128 to 8192 in float32 and float16,
as flash-cosine-sim-attention measured. Every case is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import peers
import suite
import tables
import workloads
from suite import Section
from workloads import DTYPES, SEED_LENGTHS, WORKLOADS, Workload

MINUTES = 60.0


def chosen_workloads(chosen: argparse.Namespace) -> Iterator[Workload]:
    """The workloads that the options name, changed as they say.

    Raises:
        ValueError: If a name is none, or an option leaves nothing that makes sense.
    """
    for name in ("seq_lens", "num_times"):
        values = getattr(chosen, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least 1, got {value}.")
    if not 0 <= chosen.mask_prob < 1:
        raise ValueError(f"--mask-prob must be at least 0 and under 1, got {chosen.mask_prob:g}.")
    if chosen.only_forwards and chosen.only_backwards:
        raise ValueError("--only-forwards and --only-backwards leave nothing to measure.")
    base: list[Workload] = []
    for name in suite.names(chosen.workloads):
        found = suite.covered(name, list(WORKLOADS))
        base += [WORKLOADS[each] for each in found] if found else [workloads.named(name)]
    if not chosen.workloads:
        seed = WORKLOADS["seed-1k"]
        for n in chosen.seq_lens or SEED_LENGTHS:
            base.append(dataclasses.replace(seed, name=f"seed-{workloads.said(n)}", length=n))
    dtypes = chosen.dtypes or (None if chosen.workloads else ["float32", "float16"])
    for workload in base:
        for dtype in dtypes or [workload.dtype]:
            changed = dataclasses.replace(workload, dtype=dtype)
            if chosen.causal:
                changed = dataclasses.replace(changed, causal=True)
            if chosen.mask_prob:
                changed = dataclasses.replace(changed, mask_prob=chosen.mask_prob)
            yield changed


def sections(chosen: argparse.Namespace, found: Sequence[Workload]) -> Iterator[Section]:
    """A section for each workload, dtype and pass."""
    passes = (False,) if chosen.only_forwards else (True,) if chosen.only_backwards else None
    every = suite.names(chosen.peers) or list(peers.PEERS)
    for workload in found:
        for section in suite.sections_of(
            f"{workload.name}, {workload.dtype}",
            workload,
            every,
            passes=passes or (False, True),
            seconds=10.0,
        ):
            rounds = chosen.num_times or suite.ROUNDS
            yield dataclasses.replace(section, rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = suite.parser("Measure any named workloads by any peers.", minutes=MINUTES)
    add = parser.add_argument
    add("--list", action="store_true", help="print the workloads and the peers, and stop")
    add("--workloads", nargs="+", metavar="NAME", help="workloads, or how their names begin")
    add("--seq-lens", nargs="+", type=int, metavar="N", help="lengths, where no workload is named")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="instead of each workload's own")
    add("--causal", action="store_true", help="with causal masking")
    add("--mask-prob", type=float, default=0.0, metavar="P", help="share of the keys to mask")
    add("--only-forwards", action="store_true", help="without the gradients")
    add("--only-backwards", action="store_true", help="with the gradients only")
    add("--num-times", type=int, metavar="N", help="rounds at most")
    chosen = parser.parse_args(arguments)
    if chosen.list:
        print(
            tables.markdown(
                ("workload", "source"), [(w.name, w.source) for w in WORKLOADS.values()]
            )
        )
        print(f"\nPeers: {', '.join(peers.PEERS)}")
        return 0
    reason = suite.chosen_or_reason("named.py", chosen, [])
    if reason is not None:
        return suite.refuse(reason)
    try:
        every = {s.name: s for s in sections(chosen, list(chosen_workloads(chosen)))}
    except ValueError as error:
        return suite.refuse(f"named.py: {error}")
    run = suite.begun("named.py", chosen)
    said = map(str, sys.argv[1:] if arguments is None else arguments)
    run.record["command"] = " ".join(["python benchmarks/named.py", *said])

    def step(name: str) -> tuple[str, Callable[[], None]]:
        return name, lambda: run.timed(every[name])

    run.each(map(step, every), then=lambda: None)
    print(tables.page(run.record, folded=False))
    run.finish()
    return 130 if run.record["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
