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
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import measure
import peers
import suite
import tables
from suite import Case, Run, Section, said
from workloads import SEED_LENGTHS, WORKLOADS
from workloads import said as spoken

MINUTES = 11.0  # no section is begun after these; the longest takes less than one
BUILT = ("full-4k", "dropout-4k", "causal-4k", "key-mask-4k", "segments-4k")
QUICK_BUILT = 2  # of these
DOUBLINGS = 2
DOUBLED = 2.1  # linear growth, and some slack for the sizes of blocks
COMPILE_SECONDS = 3.0
# One block, a prime (the last block is short), a power of two, and long.
COMPILED_LENGTHS = (127, 4099, 8192, 65536)


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


def _against_peers(call: str, *, backward: bool, jax_nn: float) -> list[Claim]:
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


def _share(part: str, whole: str, target: float, passes: Sequence[bool]) -> list[Claim]:
    """Claims of what a call costs that sees only a part of the keys."""
    what = f"{part.partition('-')[0]} / {whole.partition('-')[0]}, both ours"

    def case(name: str, backward: bool) -> Case:
        return Case("blocked", WORKLOADS[name], backward)

    return [Claim(what, case(part, b), case(whole, b), target, True) for b in passes]


TIMED = {
    "forward": _against_peers("full", backward=False, jax_nn=2.5),
    "causal-forward": _against_peers("causal", backward=False, jax_nn=3.5),
    "forward-backward": _against_peers("full", backward=True, jax_nn=1.5),
    "causal-forward-backward": _against_peers("causal", backward=True, jax_nn=2.5),
    "causal-share": _share("causal-8k", "full-8k", 0.6, (False, True)),
    "window-share": _share("window-16k", "full-16k", 0.1, (False,)),
}


def sections() -> Iterator[Section]:
    """What is timed: the targets, then the sweep by length, then the named workloads."""
    for name, claims in TIMED.items():
        cases = dict.fromkeys(case for claim in claims for case in (claim.above, claim.below))
        yield Section(name, tuple(cases))
    for length in SEED_LENGTHS:
        name = f"seed-{spoken(length)}"
        fewer = (*SWEPT[:3], OLDER[1])  # flash-attention-jax 0.3.1 is by far the slowest
        peers_of = {2048: fewer, 4096: fewer, 8192: ("blocked", "torch SDPA")}
        yield from suite.sections_of(
            name,
            WORKLOADS[name],
            peers_of.get(length, SWEPT),
            passes=(False, True) if length <= 2048 else (False,),
            seconds=6.0,
        )
    for name in ON_CPU:
        yield from suite.sections_of(name, WORKLOADS[name], NAMED, seconds=4.0)


# --- memory and compile time: nothing is run, so lengths cost nothing ------------------------


def memory(run: Run) -> None:
    """Compile at doubling lengths, forward and with gradients."""
    built = BUILT[:QUICK_BUILT] if run.quick else BUILT
    doublings = 1 if run.quick else DOUBLINGS
    for peer, names in (("blocked", built), ("jax.nn", built[:1])):
        for name, backward in itertools.product(names, (False, True)):
            base = run.sized(WORKLOADS[name]).length
            for doubling in range(doublings + 1):
                build(run, "memory", peer, name, base * 2**doubling, backward)


def compile_times(run: Run) -> None:
    """Compile value and gradients at some lengths."""
    built = BUILT[:QUICK_BUILT] if run.quick else BUILT
    for name in built:
        for length in (127,) if run.quick else COMPILED_LENGTHS:
            build(run, "compile", "blocked", name, length, backward=True)


BUILDS: dict[str, Callable[[Run], None]] = {"memory": memory, "compile": compile_times}


def build(run: Run, section: str, peer: str, name: str, length: int, backward: bool) -> None:
    """Compile a peer of JAX for a length, and add what that took or why it failed."""
    suite.progress(f"{section}: compiling {peer}, {name} at {length}, {said(backward)}")
    workload = run.sized(WORKLOADS[name]).at(length)
    case = Case(peer, WORKLOADS[name], backward)
    entry = {"section": section, **run.named(WORKLOADS[name], case)}
    entry |= {"length": length, "kv_length": length}
    for counted in ("flops", "bytes"):  # of the workload, at its own length
        del entry[counted]
    try:
        found = peers.compiled(peer, workload, backward)
        entry |= {"temp_bytes": found.temp_bytes, "compile_s": found.seconds}
    except measure.FAILURES as error:
        entry["why_not"] = measure.failure(error)
    run.record["builds"].append(entry)


# --- what is claimed of it -------------------------------------------------------------------


def claims(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each claim with what the record holds of it, in the order in which it was measured."""
    found = [row for section, each in TIMED.items() for row in _ratios(record, section, each)]
    found += _growths(record)
    found += _longest_compilations(record)
    if not record["quick"]:
        for row in found:
            if row["target"] is not None and "value" in row:
                value, target = row["value"], row["target"]
                row["met"] = value <= target if row["at_most"] else value >= target
    return found


def _ratios(
    record: dict[str, Any], section: str, each: Sequence[Claim]
) -> Iterator[dict[str, Any]]:
    rows = {
        (row["peer"], row["workload"], row["pass"]): row
        for row in record["samples"]
        if row["section"] == section
    }
    for claim in each:
        above, below = (
            rows.get((case.peer, case.workload.name, said(case.backward)))
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


def _growths(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """How temporary memory grows when the length doubles: the largest of the doublings."""
    for (peer, words, kind), builds in _grouped(record, "memory").items():
        lengths = [row["length"] for row in builds]
        who = "" if peer == "blocked" else f", {peer}"
        row: dict[str, Any] = {
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


def _longest_compilations(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The longest that value and gradients take to compile at any of some lengths."""
    for (_, words, kind), builds in _grouped(record, "compile").items():
        lengths = ", ".join(str(row["length"]) for row in builds)
        row: dict[str, Any] = {
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


def _grouped(record: dict[str, Any], section: str) -> dict[tuple[str, str, str], list[Any]]:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for row in record["builds"]:
        if row["section"] == section:
            groups.setdefault((row["peer"], row["words"], row["pass"]), []).append(row)
    return groups


# --- the command -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    timed = {section.name: section for section in sections()}
    known = [*TIMED, *BUILDS, *(name for name in timed if name not in TIMED)]
    shown = dict.fromkeys(name.partition(", ")[0] for name in known)
    parser = suite.parser(
        "Measure speed, memory and compile time on this CPU.",
        minutes=MINUTES,
        epilog=f"Sections: {', '.join(shown)}; or how some begin, such as seed.",
    )
    chosen = parser.parse_args(arguments)
    reason = suite.chosen_or_reason("cpu.py", chosen, known)
    if reason is not None:
        return suite.refuse(reason)
    jax.config.update("jax_platforms", "cpu")
    run = suite.begun("cpu.py", chosen)

    def step(name: str) -> tuple[str, Callable[[], None]]:
        if name in BUILDS:
            return name, lambda: BUILDS[name](run)
        return name, lambda: run.timed(suite.without(timed[name], chosen))

    def judge() -> None:
        run.record["claims"] = claims(run.record)

    run.each(map(step, suite.selected(chosen, known)), then=judge)
    print(tables.page(run.record, folded=False))
    run.finish()
    return 130 if run.record["interrupted"] else 0


if __name__ == "__main__":
    sys.exit(main())
