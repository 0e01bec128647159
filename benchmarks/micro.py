"""A small set on this CPU in under two minutes, which only prints: for a look at a change.

python benchmarks/micro.py                  print the table
python benchmarks/micro.py --out a.json     keep it, for flash-attention-jax bench --compare a b
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

import command
import jax
import suite
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


def plan_sections() -> Iterator[Section]:
    """What is timed: at most half a second in each round."""
    for name, passes in NAMES:
        # jax.nn's logits of the long window would take 8 GiB.
        peers = PEERS[:1] if name == "window-16k" else PEERS
        workload = WORKLOADS[name]
        if name in ("full-4k", "causal-4k"):
            workload = dataclasses.replace(workload, heads=2)
        yield from suite.make_sections(name, workload, peers, passes=passes, seconds=2.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    sections = {section.name: section for section in plan_sections()}
    parser = command.make_parser("Measure a small set on this CPU, and print it.", minutes=MINUTES)
    options = parser.parse_args(arguments)
    reason = command.check_options("micro.py", options, list(sections))
    if reason is not None:
        return command.refuse(reason)
    jax.config.update("jax_platforms", "cpu")
    run = command.begin("micro.py", options)
    return command.carry_out(run, command.make_steps(run, sections, options))


if __name__ == "__main__":
    sys.exit(main())
