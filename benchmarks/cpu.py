"""Measure speed, memory and compile time on this CPU, against other libraries, in one run.

python benchmarks/cpu.py                                      all, in less than twelve minutes
python benchmarks/cpu.py --out benchmarks/results/cpu.json    and keep it; again: goes on
python benchmarks/cpu.py --only forward memory                some sections
python benchmarks/cpu.py --quick                              tiny sizes: only shows that it runs

Each ratio is the median over rounds in which its two sides ran in turn. Nothing else should run on
the machine meanwhile. A target that is missed stays in the table. Ctrl-C ends the run early and
keeps what was done.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import command
import jax
import measure
import peers
import suite
import workloads
from record import Record, Row
from suite import Case, Run, Section, Step, name_pass
from workloads import SEED_LENGTHS, WORKLOADS

MINUTES = 11.0  # no section is begun after these; the longest takes less than one
BUILD_WORKLOADS = ("full-4k", "dropout-4k", "causal-4k", "key-mask-4k", "segments-4k")
QUICK_BUILDS = 2  # of these
DOUBLINGS = 2
DOUBLED = 2.1  # linear growth, and some slack for the sizes of blocks
COMPILE_SECONDS = 3.0
# One block, a prime (the last block is short), a power of two, and long.
BUILD_LENGTHS = (127, 4099, 8192, 65536)


@dataclasses.dataclass(frozen=True)
class Claim:
    """A ratio of two times of one section.

    Attributes:
        what: the ratio in words.
        above: divided by `below`.
        below: what `above` is divided by.
        target: what the ratio must reach; None = only shown.
        at_most: whether it must stay below the target instead.
    """

    what: str
    above: Case
    below: Case
    target: float | None = None
    at_most: bool = False


# --- what is measured ------------------------------------------------------------------------

OLDER = ("flash-attention-jax 0.3.1", "memory-efficient-attention-pytorch")
SWEPT = ("blocked", "jax.nn", "torch SDPA", *OLDER)
NAMED = ("blocked", "dense", "jax.nn", "torch SDPA", *OLDER)
# Of the named ones, what two cores compute in seconds.
ON_CPU = (
    "llama-1k",
    "packed-1k",
    "gemma-1k",
    "gpt-oss-1k",
    "alphafold-16x256",
    "vit-4x197",
    "vit-4x577",
    "bert-masked-512",
    "bert-dropout-512",
    "decode-1k",
    "decode-16k",
    "decode-128k",
)


def _claim_against_peers(call: str, *, backward: bool, jax_nn: float) -> list[Claim]:
    """Claims of one call at 4096 against every peer, and of cosine against dot product."""
    workload = WORKLOADS[f"{call}-4k"]

    def case(peer: str) -> Case:
        return Case(peer, workload, backward)

    name = f"cosine-{call}-4k".replace("-full", "")
    cosine = Case("blocked", WORKLOADS[name], backward)
    ours, theirs = case("blocked"), case("jax.nn")
    claims = [
        Claim("jax.nn / ours", theirs, ours, jax_nn),
        Claim("jax.nn / ours, in jax.nn's layout", theirs, case("blocked, heads last")),
        Claim("torch SDPA / ours", case("torch SDPA"), ours, 0.7),
        Claim("softmax / cosine, both ours", ours, cosine, 1.05),
    ]
    if not backward:  # with gradients they are slow, and in the sweep by length
        claims += [Claim(f"{peer} / ours", case(peer), ours) for peer in OLDER]
    if call == "full" and not backward:
        claims.append(Claim("dense / ours", case("dense"), ours))
    return claims


def _claim_share(part: str, whole: str, target: float, passes: Sequence[bool]) -> list[Claim]:
    """Claims of what a call costs that sees only a part of the keys."""
    what = f"{part.partition('-')[0]} / {whole.partition('-')[0]}, both ours"

    def case(name: str, backward: bool) -> Case:
        return Case("blocked", WORKLOADS[name], backward)

    return [Claim(what, case(part, b), case(whole, b), target, True) for b in passes]


CLAIMS = {
    "forward": _claim_against_peers("full", backward=False, jax_nn=2.5),
    "causal-forward": _claim_against_peers("causal", backward=False, jax_nn=3.5),
    "forward-backward": _claim_against_peers("full", backward=True, jax_nn=1.5),
    "causal-forward-backward": _claim_against_peers("causal", backward=True, jax_nn=2.5),
    "causal-share": _claim_share("causal-8k", "full-8k", 0.6, (False, True)),
    "window-share": _claim_share("window-16k", "full-16k", 0.1, (False,)),
}


def plan_sections() -> Iterator[Section]:
    """What is timed: the targets, then the sweep by length, then the named workloads."""
    for name, claims in CLAIMS.items():
        cases = dict.fromkeys(case for claim in claims for case in (claim.above, claim.below))
        yield Section(name, tuple(cases))
    for length in SEED_LENGTHS:
        name = f"seed-{workloads.said(length)}"
        fewer = (*SWEPT[:3], OLDER[1])  # flash-attention-jax 0.3.1 is by far the slowest
        peers_of = {2048: fewer, 4096: fewer, 8192: ("blocked", "torch SDPA")}
        yield from suite.make_sections(
            name,
            WORKLOADS[name],
            peers_of.get(length, SWEPT),
            passes=(False, True) if length <= 2048 else (False,),
            seconds=6.0,
        )
    for name in ON_CPU:
        yield from suite.make_sections(name, WORKLOADS[name], NAMED, seconds=4.0)


# --- memory and compile time: nothing is run, so lengths cost nothing ------------------------


def build_for_memory(run: Run) -> None:
    """Compile at doubling lengths, forward and with gradients."""
    names = BUILD_WORKLOADS[:QUICK_BUILDS] if run.quick else BUILD_WORKLOADS
    doublings = 1 if run.quick else DOUBLINGS
    for peer, names_of_peer in (("blocked", names), ("jax.nn", names[:1])):
        for name, backward in itertools.product(names_of_peer, (False, True)):
            base = run.resize(WORKLOADS[name]).length
            for doubling in range(doublings + 1):
                build(run, "memory", peer, name, base * 2**doubling, backward)


def build_for_compile_times(run: Run) -> None:
    """Compile value and gradients at some lengths."""
    names = BUILD_WORKLOADS[:QUICK_BUILDS] if run.quick else BUILD_WORKLOADS
    for name in names:
        for length in (127,) if run.quick else BUILD_LENGTHS:
            build(run, "compile", "blocked", name, length, backward=True)


BUILDS: dict[str, Callable[[Run], None]] = {
    "memory": build_for_memory,
    "compile": build_for_compile_times,
}


def build(run: Run, section: str, peer: str, name: str, length: int, backward: bool) -> None:
    """Compile a peer of JAX for a length, and add what that took or why it failed."""
    suite.report(f"{section}: compiling {peer}, {name} at {length}, {name_pass(backward)}")
    workload = run.resize(WORKLOADS[name]).at(length)
    row: Row = {"section": section, **run.describe(Case(peer, WORKLOADS[name], backward))}
    row |= {"length": length, "kv_length": length}
    for counted in ("flops", "bytes"):  # they are of the workload at its own length
        del row[counted]
    try:
        compiled = peers.compile_peer(peer, workload, backward)
        row |= {"temp_bytes": compiled.temp_bytes, "compile_s": compiled.seconds}
    except measure.FAILURES as error:
        row["why_not"] = measure.describe_failure(error)
    run.add_build(row)


# --- what is claimed of it -------------------------------------------------------------------


def judge(record: Record) -> list[Row]:
    """Each claim with what the record holds of it, in the order in which it was measured."""
    rows = [
        row for section, claims in CLAIMS.items() for row in _judge_ratios(record, section, claims)
    ]
    rows += _judge_growth(record)
    rows += _judge_compilations(record)
    if record.quick:  # tiny sizes decide nothing
        return rows
    for row in rows:
        if row["target"] is not None and "value" in row:
            value, target = row["value"], row["target"]
            row["met"] = value <= target if row["at_most"] else value >= target
    return rows


def _judge_ratios(record: Record, section: str, claims: Sequence[Claim]) -> Iterator[Row]:
    rows = {
        (row["peer"], row["workload"], row["pass"]): row
        for row in record.samples
        if row["section"] == section
    }
    for claim in claims:
        above, below = (
            rows.get((case.peer, case.workload.name, name_pass(case.backward)))
            for case in (claim.above, claim.below)
        )
        if above is None or below is None:
            continue
        kind = "causal " if claim.below.workload.causal else ""
        row = {
            "section": section,
            "what": f"{kind}{below['pass']}, {below['length']}: {claim.what}",
            "unit": "x",
            "target": claim.target,
            "at_most": claim.at_most,
        }
        missing = [side["why_not"] for side in (above, below) if side.get("why_not") is not None]
        if missing:
            row["why_not"] = missing[0]
        else:
            ratio = measure.ratio(above["seconds"], below["seconds"])
            row |= {"value": ratio.median, "low": ratio.low, "high": ratio.high}
        yield row


def _judge_growth(record: Record) -> Iterator[Row]:
    """How temporary memory grows when the length doubles: the largest of the doublings."""
    for (peer, words, kind), builds in _group_builds(record, "memory").items():
        lengths = [row["length"] for row in builds]
        who = "" if peer == "blocked" else f", {peer}"
        row: Row = {
            "section": "memory",
            "what": f"temporary memory when the length doubles, {lengths[0]} to {lengths[-1]}: "
            f"{words}, {kind}{who}",
            "unit": "x",
            "target": DOUBLED if peer == "blocked" else None,
            "at_most": True,
        }
        failed = [row["why_not"] for row in builds if row.get("why_not") is not None]
        sizes = [row.get("temp_bytes") for row in builds]
        if failed:
            row["why_not"] = failed[0]
        elif None in sizes:
            row["why_not"] = "the compiler does not say"
        else:
            counts = [max(size or 0, 1) for size in sizes]
            row["value"] = max(b / a for a, b in itertools.pairwise(counts))
        yield row


def _judge_compilations(record: Record) -> Iterator[Row]:
    """The longest that value and gradients take to compile at any of some lengths."""
    for (_, words, kind), builds in _group_builds(record, "compile").items():
        lengths = ", ".join(str(row["length"]) for row in builds)
        row: Row = {
            "section": "compile",
            "what": f"compile time, the longest at {lengths}: {words}, {kind}",
            "unit": "s",
            "target": COMPILE_SECONDS,
            "at_most": True,
        }
        failed = [row["why_not"] for row in builds if row.get("why_not") is not None]
        if failed:
            row["why_not"] = failed[0]
        else:
            row["value"] = max(row["compile_s"] for row in builds)
        yield row


def _group_builds(record: Record, section: str) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in record.builds:
        if row["section"] == section:
            groups.setdefault((row["peer"], row["words"], row["pass"]), []).append(row)
    return groups


# --- the command -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    sections = {section.name: section for section in plan_sections()}
    names = [*CLAIMS, *BUILDS, *(name for name in sections if name not in CLAIMS)]
    parser = command.make_parser(
        "Measure speed, memory and compile time on this CPU.",
        minutes=MINUTES,
        epilog=command.list_sections(names, "seed"),
    )
    options = parser.parse_args(arguments)
    reason = command.check_options("cpu.py", options, names)
    if reason is not None:
        return command.refuse(reason)
    jax.config.update("jax_platforms", "cpu")
    run = command.begin("cpu.py", options)

    def make_step(name: str) -> Step:
        if name in BUILDS:
            return name, functools.partial(BUILDS[name], run)
        return command.make_step(run, sections[name], options)

    steps = map(make_step, command.select_sections(options, names))
    return command.carry_out(run, steps, judge=judge)


if __name__ == "__main__":
    sys.exit(main())
