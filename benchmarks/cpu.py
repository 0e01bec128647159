"""Measure speed, memory and compile time on this CPU, against jax.nn and PyTorch, in one run.

python benchmarks/cpu.py                                      all, in less than eight minutes
python benchmarks/cpu.py --out benchmarks/results/cpu.json    and keep it
python benchmarks/cpu.py --only forward memory                some sections
python benchmarks/cpu.py --quick                              tiny sizes: only shows that it runs

Each ratio is the median over rounds in which its two sides ran in turn. Nothing else should run on
the machine meanwhile. A target that is missed stays in the table. Ctrl-C ends the run early and
keeps what was done.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import measure
import numpy as np
import peers
import tables
import workloads
from workloads import WORKLOADS, Workload

ROUNDS = 9
QUICK_ROUNDS = 3
AT_LEAST = 3  # rounds, however slow the machine
SECONDS = 35.0  # no further round of a section is begun after this long
DOUBLED = 2.1  # linear growth, and some slack for the sizes of blocks
COMPILE_SECONDS = 3.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A peer on a workload, with its gradients or without."""

    peer: str
    workload: str
    backward: bool = False


@dataclasses.dataclass(frozen=True)
class Claim:
    """A ratio of two times.

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


def _against_peers(call: str, *, backward: bool, jax_nn: float, dense: bool = False) -> list[Claim]:
    """Claims of one call at 4096 against every peer, and of cosine against dot product."""
    name = f"{call}-4k"
    ours = Case("blocked", name, backward)
    last = Case("blocked, heads last", name, backward)
    theirs = Case("jax.nn", name, backward)
    cosine = Case("blocked", f"cosine-{name}".replace("-full", ""), backward)
    claims = [
        Claim("jax.nn / ours", theirs, ours, jax_nn),
        Claim("jax.nn / ours, in jax.nn's layout", theirs, last),
        Claim("torch SDPA / ours", Case("torch SDPA", name, backward), ours, 0.7),
        Claim("softmax / cosine, both ours", ours, cosine, 1.05),
    ]
    if dense:
        claims.append(Claim("dense / ours", Case("dense", name, backward), ours))
    return claims


def _share(part: str, whole: str, target: float, passes: Sequence[bool]) -> list[Claim]:
    """Claims of what a call costs that sees only a part of the keys."""
    what = f"{part.partition('-')[0]} / {whole.partition('-')[0]}, both ours"
    return [
        Claim(what, Case("blocked", part, backward), Case("blocked", whole, backward), target, True)
        for backward in passes
    ]


TIMED = {
    "forward": _against_peers("full", backward=False, jax_nn=2.5, dense=True),
    "causal-forward": _against_peers("causal", backward=False, jax_nn=3.5),
    "forward-backward": _against_peers("full", backward=True, jax_nn=1.5),
    "causal-forward-backward": _against_peers("causal", backward=True, jax_nn=2.5),
    "causal-share": _share("causal-8k", "full-8k", 0.6, (False, True)),
    "window-share": _share("window-16k", "full-16k", 0.1, (False,)),
}
BUILT = ("full-4k", "dropout-4k", "causal-4k", "key-mask-4k", "segments-4k")
QUICK_BUILT = 2  # of these
DOUBLINGS = 2
# One block, a prime (the last block is short), a power of two, and long.
COMPILED_LENGTHS = (127, 4099, 8192, 65536)


# --- the run ---------------------------------------------------------------------------------


class Run:
    """One run: measures sections and collects what it found in `record`, ready for JSON."""

    def __init__(self, *, quick: bool, repeat: int | None, command: str) -> None:
        self.quick = quick
        self.repeat = repeat
        self.built = BUILT[:QUICK_BUILT] if quick else BUILT
        self.record: dict[str, Any] = {
            "format": tables.FORMAT,
            "name": "cpu",
            "command": command,
            "quick": quick,
            "interrupted": False,
            "date": measure.now(),
            "git": measure.commit(),
            "machine": {**measure.machine(), "threads": peers.thread_count()},
            "versions": measure.versions(),
            "claims": [],
            "samples": [],
            "builds": [],
        }

    def workload(self, name: str) -> Workload:
        """The workload as this run measures it."""
        return WORKLOADS[name].quick() if self.quick else WORKLOADS[name]

    # time

    def timed(self, section: str, claims: Sequence[Claim]) -> None:
        """Measure every case that the claims speak of, interleaved, and add what came out."""
        cases = list(dict.fromkeys(case for claim in claims for case in (claim.above, claim.below)))
        ready: dict[Case, tuple[peers.Prepared, float | None]] = {}
        reasons: dict[Case, str] = {}
        for case in cases:
            progress(f"{section}: preparing {case.peer}, {case.workload}")
            found = self._prepared(case)
            if isinstance(found, str):
                reasons[case] = found
            else:
                ready[case] = found
        times: dict[Case, list[float]] = {case: [] for case in ready}
        rounds = self.repeat or (QUICK_ROUNDS if self.quick else ROUNDS)
        try:
            for index, seconds in enumerate(
                measure.interleaved(
                    {case: prepared.run for case, (prepared, _) in ready.items()},
                    rounds,
                    at_least=rounds if self.repeat else AT_LEAST,
                    seconds=SECONDS,
                )
            ):
                for case, taken in seconds.items():
                    times[case].append(taken)
                progress(f"{section}: round {index + 1}, {sum(seconds.values()):.2f} s")
        finally:  # an interrupted section keeps its whole rounds
            if any(times.values()):
                self._add_samples(section, cases, ready, reasons, times)
                for claim in claims:
                    self._add_ratio(section, claim, reasons, times)

    def _prepared(self, case: Case) -> tuple[peers.Prepared, float | None] | str:
        """A warm case and the error of its results; or why there is none."""
        peer, workload = peers.PEERS[case.peer], self.workload(case.workload)
        reason = peer.why_not(workload)
        if reason is not None:
            return reason
        arrays = workloads.inputs(workload)
        try:
            prepared = peer.prepare(workload, arrays, case.backward)
            results = prepared.results()
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            return failure(error)
        last = workload.batch - 1, workload.heads - 1
        right = reference_of_last_head(workload, case.backward)
        error = max(measure.relative_error(found[last], right[n]) for n, found in results.items())
        return prepared, error if np.isfinite(error) else None

    def _add_samples(
        self,
        section: str,
        cases: Sequence[Case],
        ready: dict[Case, tuple[peers.Prepared, float | None]],
        reasons: dict[Case, str],
        times: dict[Case, list[float]],
    ) -> None:
        for case in cases:
            sample = {"section": section, **self._named(case.peer, case.workload, case.backward)}
            if case in reasons:
                sample["why_not"] = reasons[case]
            else:
                prepared, error = ready[case]
                summary = measure.summarize(times[case])
                sample |= {
                    "seconds": times[case],
                    "median_s": summary.median,
                    "low_s": summary.low,
                    "high_s": summary.high,
                    "temp_bytes": prepared.temp_bytes,
                    "compile_s": prepared.compile_seconds,
                    "error": error,
                }
            self.record["samples"].append(sample)

    def _add_ratio(
        self,
        section: str,
        claim: Claim,
        reasons: dict[Case, str],
        times: dict[Case, list[float]],
    ) -> None:
        workload = self.workload(claim.below.workload)
        what = f"{_pass(claim.below.backward)}, {workload.length}"
        what = f"{'causal ' if workload.causal else ''}{what}: {claim.what}"
        missing = [reasons[case] for case in (claim.above, claim.below) if case in reasons]
        if missing:
            row: dict[str, Any] = {"why_not": missing[0]}
        else:
            summary = measure.ratio(times[claim.above], times[claim.below])
            row = {"value": summary.median, "low": summary.low, "high": summary.high}
        self._add_claim(section, what, row, "x", claim.target, claim.at_most)

    # memory and compile time: nothing is run, so lengths cost nothing

    def memory(self, section: str) -> None:
        """How temporary memory grows when the length doubles, forward and with gradients."""
        doublings = 1 if self.quick else DOUBLINGS
        for peer, names in (("blocked", self.built), ("jax.nn", self.built[:1])):
            for name in names:
                base = self.workload(name)
                for backward in (False, True):
                    lengths = [base.length * 2**n for n in range(doublings + 1)]
                    builds = [self._build(section, peer, name, n, backward) for n in lengths]
                    self._add_growth(section, peer, base, backward, lengths, builds)

    def _add_growth(
        self,
        section: str,
        peer: str,
        workload: Workload,
        backward: bool,
        lengths: Sequence[int],
        builds: Sequence[measure.Build | str],
    ) -> None:
        who = "" if peer == "blocked" else f", {peer}"
        what = (
            f"temporary memory when the length doubles, {lengths[0]} to {lengths[-1]}: "
            f"{workload.words}, {_pass(backward)}{who}"
        )
        row: dict[str, Any] = {"why_not": "the compiler does not say"}
        failed = [build for build in builds if isinstance(build, str)]
        sizes = [build.temp_bytes for build in builds if isinstance(build, measure.Build)]
        if failed:
            row = {"why_not": failed[0]}
        elif None not in sizes:
            counts = [max(size or 0, 1) for size in sizes]
            row = {"value": max(b / a for a, b in itertools.pairwise(counts))}
        target = DOUBLED if peer == "blocked" else None
        self._add_claim(section, what, row, "x", target, at_most=True)

    def compile(self, section: str) -> None:
        """The longest that value and gradients take to compile at any of some lengths."""
        lengths = (127,) if self.quick else COMPILED_LENGTHS
        for name in self.built:
            builds = [self._build(section, "blocked", name, length, True) for length in lengths]
            failed = [build for build in builds if isinstance(build, str)]
            if failed:
                row: dict[str, Any] = {"why_not": failed[0]}
            else:
                row = {"value": max(b.seconds for b in builds if isinstance(b, measure.Build))}
            said = ", ".join(str(length) for length in lengths)
            what = f"compile time, the longest at {said}: {WORKLOADS[name].words}, {_pass(True)}"
            self._add_claim(section, what, row, "s", COMPILE_SECONDS, at_most=True)

    def _build(
        self, section: str, peer: str, name: str, length: int, backward: bool
    ) -> measure.Build | str:
        """Compile a peer of JAX for a length; or why that failed."""
        progress(f"{section}: compiling {peer}, {name} at {length}, {_pass(backward)}")
        workload = self.workload(name).at(length)
        entry = {"section": section, **self._named(peer, name, backward), "length": length}
        try:
            build = peers.compiled(peer, workload, backward)
            entry |= {"temp_bytes": build.temp_bytes, "compile_s": build.seconds}
        except (RuntimeError, MemoryError, NotImplementedError) as error:
            build = failure(error)
            entry["why_not"] = build
        self.record["builds"].append(entry)
        return build

    # what both add

    def _named(self, peer: str, name: str, backward: bool) -> dict[str, Any]:
        workload = self.workload(name)
        return {
            "peer": peer,
            "workload": name,
            "words": workload.words,
            "pass": _pass(backward),
            "batch": workload.batch,
            "heads": workload.heads,
            "dim": workload.dim,
            "length": workload.length,
        }

    def _add_claim(
        self,
        section: str,
        what: str,
        row: dict[str, Any],
        unit: str,
        target: float | None,
        at_most: bool,
    ) -> None:
        claim = {"section": section, "what": what, **row, "unit": unit, "target": target}
        claim["at_most"] = at_most
        if target is not None and "value" in row and not self.quick:
            claim["met"] = row["value"] <= target if at_most else row["value"] >= target
        self.record["claims"].append(claim)
        shown = [tables.figure(row["value"], unit)] if "value" in row else []
        progress(" ".join([f"{section}: {what}:", *shown, tables.verdict(claim)]).rstrip())


SECTIONS: dict[str, Callable[[Run], None]] = {
    **{
        name: functools.partial(Run.timed, section=name, claims=claims)
        for name, claims in TIMED.items()
    },
    "memory": functools.partial(Run.memory, section="memory"),
    "compile": functools.partial(Run.compile, section="compile"),
}


def _pass(backward: bool) -> str:
    return "forward+backward" if backward else "forward"


@functools.lru_cache(maxsize=4)
def reference_of_last_head(workload: Workload, backward: bool) -> dict[str, np.ndarray]:
    """The right answer; heads are alike, so one is computed."""
    return workloads.reference(
        workload,
        workloads.inputs(workload),
        batch=workload.batch - 1,
        head=workload.heads - 1,
        backward=backward,
    )


def failure(error: Exception) -> str:
    """What a table says of a case that could not run."""
    said = str(error).strip().splitlines() or [type(error).__name__]
    out_of_memory = ("RESOURCE_EXHAUSTED", "out of memory", "allocate memory")
    if isinstance(error, MemoryError) or any(words in str(error) for words in out_of_memory):
        return "out of memory"
    return f"failed: {said[0]}"


def progress(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


# --- the command -----------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description="Measure speed, memory and compile time on this CPU.",
        epilog=f"Sections: {', '.join(SECTIONS)}.",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="sections, instead of all")
    parser.add_argument(
        "--repeat", type=int, help=f"rounds; {ROUNDS} without it, and fewer on a slow machine"
    )
    parser.add_argument("--out", type=Path, help="JSON to write, which tables.py draws")
    chosen = parser.parse_args(arguments)

    names = [n for names in chosen.only or () for n in names.split(",") if n] or list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        return refuse(f"--only must name {', '.join(SECTIONS)}; got {', '.join(unknown)}.")
    if chosen.repeat is not None and chosen.repeat < 1:
        return refuse(f"--repeat must be at least 1, got {chosen.repeat}.")
    # Written as the run goes; takes the name that was asked for at the end, so that a run which is
    # killed leaves the results before it alone.
    partial = None if chosen.out is None else chosen.out.with_name(f"{chosen.out.name}.tmp")
    if partial is not None:
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
        except OSError as error:
            return refuse(f"--out must be a file that can be written, got {chosen.out}: {error}")

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    run = Run(quick=chosen.quick, repeat=chosen.repeat, command=command(chosen))
    measure.compiled(lambda x: x + x, np.float32(1))  # the first compilation starts the compiler
    try:
        for name in dict.fromkeys(names):
            SECTIONS[name](run)
            if partial is not None:
                save(run.record, partial)
    except KeyboardInterrupt:
        run.record["interrupted"] = True
        progress("Interrupted. These rows were done:")
    print(tables.page(run.record, folded=False))
    if partial is not None:
        save(run.record, partial)
        partial.replace(chosen.out)
    return 130 if run.record["interrupted"] else 0


def command(chosen: argparse.Namespace) -> str:
    """The command that repeats this run anywhere."""
    words = ["python benchmarks/cpu.py"]
    words += ["--quick"] if chosen.quick else []
    words += ["--only", *chosen.only] if chosen.only else []
    words += [f"--repeat {chosen.repeat}"] if chosen.repeat else []
    if chosen.out is not None and not chosen.out.is_absolute():
        words.append(f"--out {chosen.out.as_posix()}")
    return " ".join(words)


def refuse(message: str) -> int:
    """Say in one line what is wrong with the command, for exit code 2."""
    print(f"cpu.py: {message}", file=sys.stderr)
    return 2


def save(record: dict[str, Any], path: Path) -> None:
    """Write what was found."""
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
