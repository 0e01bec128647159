"""A small set on this CPU in under two minutes, which only prints: for a look at a change.

python benchmarks/micro.py                  print the table
python benchmarks/micro.py --out a.json     keep it, for flash-attention-jax bench --compare a b
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import suite
import tables
from suite import Section
from workloads import WORKLOADS

MINUTES = 1.5  # no section is begun after these
PEERS = ("blocked", "jax.nn", "torch SDPA")
NAMES = (
    ("seed-512", (False, True)),
    ("full-4k", (False,)),
    ("causal-4k", (False,)),
    ("window-16k", (False,)),
    ("llama-1k", (False,)),
    ("vit-4x197", (False, True)),
    ("gpt-oss-1k", (False,)),
    ("decode-4k", (False,)),
)


def sections() -> Iterator[Section]:
    """What is timed: at most half a second in each round."""
    for name, passes in NAMES:
        # jax.nn's logits of the long window would take 8 GiB.
        peers = PEERS[:1] if name == "window-16k" else PEERS
        workload = WORKLOADS[name]
        if name in ("full-4k", "causal-4k"):
            workload = dataclasses.replace(workload, heads=2)
        yield from suite.sections_of(name, workload, peers, passes=passes, seconds=2.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    every = {section.name: section for section in sections()}
    parser = suite.parser("Measure a small set on this CPU, and print it.", minutes=MINUTES)
    chosen = parser.parse_args(arguments)
    reason = suite.chosen_or_reason("micro.py", chosen, list(every))
    if reason is not None:
        return suite.refuse(reason)
    jax.config.update("jax_platforms", "cpu")
    run = suite.begun("micro.py", chosen)

    def step(name: str) -> tuple[str, Callable[[], None]]:
        return name, lambda: run.timed(suite.without(every[name], chosen))

    run.each(map(step, suite.selected(chosen, list(every))), then=lambda: None)
    print(tables.page(run.record, folded=False))
    run.finish()
    return 130 if run.record["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
