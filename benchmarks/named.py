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
import functools
import sys
from collections.abc import Iterator, Sequence

import command
import peers
import suite
import tables
import workloads
from suite import Section
from workloads import DTYPES, SEED_LENGTHS, WORKLOADS, Workload

MINUTES = 60.0


def select_workloads(options: argparse.Namespace) -> Iterator[Workload]:
    """The workloads that the options name, changed as they say.

    Raises:
        ValueError: If a name is none, or an option leaves nothing that makes sense.
    """
    for name in ("seq_lens", "num_times"):
        values = getattr(options, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                flag = name.replace("_", "-")
                raise ValueError(f"--{flag} must be at least 1, got {value}.")
    if not 0 <= options.mask_prob < 1:
        raise ValueError(f"--mask-prob must be at least 0 and under 1, got {options.mask_prob:g}.")
    if options.only_forwards and options.only_backwards:
        raise ValueError("--only-forwards and --only-backwards leave nothing to measure.")
    base: list[Workload] = []
    for name in command.split_names(options.workloads):
        matches = command.match_sections(name, list(WORKLOADS))
        base += [WORKLOADS[match] for match in matches] or [workloads.named(name)]
    if not options.workloads:
        seed = WORKLOADS["seed-1k"]
        for n in options.seq_lens or SEED_LENGTHS:
            base.append(dataclasses.replace(seed, name=f"seed-{workloads.said(n)}", length=n))
    dtypes = options.dtypes or (None if options.workloads else ["float32", "float16"])
    for workload in base:
        for dtype in dtypes or [workload.dtype]:
            changed = dataclasses.replace(workload, dtype=dtype)
            if options.causal:
                changed = dataclasses.replace(changed, causal=True)
            if options.mask_prob:
                changed = dataclasses.replace(changed, mask_prob=options.mask_prob)
            yield changed


def plan_sections(options: argparse.Namespace, selected: Sequence[Workload]) -> Iterator[Section]:
    """A section for each workload, dtype and pass."""
    passes = (False,) if options.only_forwards else (True,) if options.only_backwards else None
    every = command.split_names(options.peers) or list(peers.PEERS)
    for workload in selected:
        for section in suite.make_sections(
            f"{workload.name}, {workload.dtype}",
            workload,
            every,
            passes=passes or (False, True),
            seconds=10.0,
        ):
            rounds = options.num_times or suite.ROUNDS
            yield dataclasses.replace(section, rounds=rounds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = command.make_parser("Measure any named workloads by any peers.", minutes=MINUTES)
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
    options = parser.parse_args(arguments)
    if options.list:
        print(
            tables.markdown(
                ("workload", "source"), [(w.name, w.source) for w in WORKLOADS.values()]
            )
        )
        print(f"\nPeers: {', '.join(peers.PEERS)}")
        return 0
    reason = command.check_options("named.py", options, [])
    if reason is not None:
        return command.refuse(reason)
    try:
        sections = {s.name: s for s in plan_sections(options, list(select_workloads(options)))}
    except ValueError as error:
        return command.refuse(f"named.py: {error}")
    # The shared options alone would not repeat this command.
    words = map(str, sys.argv[1:] if arguments is None else arguments)
    spelled = " ".join(["python benchmarks/named.py", *words])
    run = command.begin("named.py", options, command=spelled)
    steps = [(name, functools.partial(run.time_section, s)) for name, s in sections.items()]
    return command.carry_out(run, steps)


if __name__ == "__main__":
    sys.exit(main())
