"""A run: sections of cases that are timed in turn, each checked before it is timed.

What was found is a record, ready for JSON, written as the run goes. A section is the unit: its
cases run interleaved, so only they are divided by one another; a run that is begun again skips the
sections that its file holds already, and drops what an interrupted one left.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import peers
import tables
import workloads
from prepared import Prepared
from workloads import Workload

ROUNDS = 9
QUICK_ROUNDS = 3
AT_LEAST = 3  # rounds, however slow the machine
SECONDS = 15.0  # no further round of a section is begun after this long
RESULTS = Path(__file__).parent / "results"
SAME = ("name", "quick", "git", "versions")  # in records that a run may go on from


@dataclasses.dataclass(frozen=True)
class Case:
    """A peer on a workload, with its gradients or without."""

    peer: str
    workload: Workload
    backward: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """Cases that are timed in turn.

    Attributes:
        name: what the command line calls it.
        cases: what is timed.
        seconds: no further round is begun after this long.
        rounds: at most.
    """

    name: str
    cases: tuple[Case, ...]
    seconds: float = SECONDS
    rounds: int = ROUNDS


def sections_of(
    name: str,
    workload: Workload,
    names: Iterable[str],
    *,
    passes: Sequence[bool] = (False, True),
    seconds: float = SECONDS,
) -> list[Section]:
    """One workload by some peers: a section forward, and one with the gradients."""
    passes = (False,) if workload.decode else passes
    return [
        Section(
            f"{name}, {said(backward)}",
            tuple(Case(peer, workload, backward) for peer in names),
            seconds,
        )
        for backward in passes
    ]


def said(backward: bool) -> str:
    """The pass in words."""
    return "forward+backward" if backward else "forward"


@functools.lru_cache(maxsize=4)
def answer(workload: Workload, backward: bool) -> dict[str, np.ndarray]:
    """The right answer, computed on a GPU where there is one."""
    if jax.default_backend() != "gpu":
        return workloads.reference(workload, backward=backward)
    with jax.enable_x64(True):
        return workloads.reference(workload, backward=backward, xp=jnp)


def error_of(workload: Workload, results: dict[str, np.ndarray], backward: bool) -> float:
    """The largest relative error of the output and of each gradient."""
    right = answer(workload, backward)
    found = workloads.part_of(results, workload)
    errors = [
        measure.relative_error(x.reshape(right[name].shape), right[name])
        for name, x in found.items()
    ]
    return max(errors)


def header(name: str, command: str, *, quick: bool = False) -> dict[str, Any]:
    """What every record begins with: what ran, when, where and with what."""
    return {
        "format": tables.FORMAT,
        "name": name,
        "command": command,
        "quick": quick,
        "interrupted": False,
        "date": measure.now(),
        "git": measure.commit(),
        "machine": measure.machine(),
        "versions": measure.versions(),
    }


def write(record: dict[str, Any], path: Path) -> None:
    """Write a record in one piece: whoever reads meanwhile sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.writing.tmp")
    partial.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


class LostError(RuntimeError):
    """The device is lost to this process: begin again in another one."""


class Run:
    """One run, and what it found so far.

    Attributes:
        record: what was found, ready for JSON.
        path: the file that it is written to as the run goes, or None.
    """

    def __init__(
        self,
        name: str,
        *,
        command: str,
        quick: bool = False,
        repeat: int | None = None,
        path: Path | None = None,
        fresh: bool = False,
        deadline: float = float("inf"),
    ) -> None:
        self.quick, self.repeat, self.path, self.deadline = quick, repeat, path, deadline
        self.record: dict[str, Any] = {
            **header(name, command, quick=quick),
            "rates": None,
            "sections": [],
            "lost": [],
            "claims": [],
            "samples": [],
            "builds": [],
        }
        if not fresh:
            self._go_on()

    def _go_on(self) -> None:
        """Take over what an earlier run of the same code on the same machine had finished."""
        for path in () if self.path is None else (working(self.path), self.path):
            try:
                before = tables.load(path)
            except (OSError, ValueError):
                continue
            of = ("gpu", "cpu")
            same = all(before.get(name) == self.record[name] for name in SAME) and all(
                before["machine"].get(name) == self.record["machine"].get(name) for name in of
            )
            if not same:
                continue
            done = before.get("sections", [])
            for name in ("samples", "builds"):
                kept = [row for row in before[name] if row["section"] in done]
                self.record[name] = kept
            self.record |= {"sections": done, "rates": before.get("rates")}
            lost = before.get("lost", [])
            attempted = before.get("attempting")
            self.record["lost"] = lost + ([attempted] if attempted else [])
            if done:
                progress(f"Going on from {path}: {len(done)} sections are done.")
            return

    def sized(self, workload: Workload) -> Workload:
        """The workload as this run measures it."""
        return workload.quick() if self.quick else workload

    def rates(self) -> None:
        """Measure what the machine can do, unless the record has it."""
        if self.record["rates"] is None:
            self.record["rates"] = measure.rates(quick=self.quick)
        found = self.record["rates"]
        progress(
            f"matrix product {tables.operations(found['matmul'])}, "
            f"copy {found['copy'] / 1e9:.0f} GB/s"
        )

    def each(
        self, steps: Iterable[tuple[str, Callable[[], None]]], *, then: Callable[[], None]
    ) -> None:
        """Take every step that is not done, until the time is over; Ctrl-C keeps what there is.

        Args:
            steps: the name of each and what it does.
            then: called before each time that the record is written.
        """
        left: list[str] = []
        try:
            for name, step in steps:
                if name in self.record["sections"]:
                    continue
                if time.monotonic() > self.deadline:
                    left.append(name)
                    continue
                step()
                self.record["sections"].append(name)
                then()
                self.save()
        except KeyboardInterrupt:
            self.record["interrupted"] = True
            progress("Interrupted. These rows were done:")
        self.record["attempting"] = None
        self.record["left"] = left
        if left:
            progress(f"Out of time: {len(left)} sections are left. Run the command again to go on.")
        then()
        self.save()

    def save(self) -> None:
        """Write the record beside the file that was asked for."""
        if self.path is not None:
            write(self.record, working(self.path))

    def finish(self) -> None:
        """Let the record take the place of the one before it."""
        if self.path is not None:
            self.save()
            working(self.path).replace(self.path)

    # one section

    def timed(self, section: Section) -> None:
        """Check every case, time them in turn, and add what came out."""
        ready: dict[Case, tuple[Prepared, dict[str, Any]]] = {}
        reasons: dict[Case, str] = {}
        times: dict[Case, list[float]] = {}
        try:
            for case in section.cases:
                found = self._prepared(section, case)
                if isinstance(found, str):
                    reasons[case] = found
                    self._tell(section, case, {"why_not": found})
                else:
                    ready[case] = found
                    times[case] = []
            self._attempt(section, None)
            rounds = self.repeat or min(section.rounds, QUICK_ROUNDS if self.quick else ROUNDS)
            for seconds in measure.interleaved(
                {case: self._guarded(case, ready[case][0], reasons) for case in ready},
                rounds,
                at_least=rounds if self.repeat else min(AT_LEAST, rounds),
                seconds=section.seconds,
            ):
                for case, taken in seconds.items():
                    times[case].append(taken)
            for case, (prepared, facts) in ready.items():
                facts["device_s"] = None if case in reasons else prepared.device_seconds()
        finally:  # an interrupted section shows its whole rounds
            for case in section.cases:
                row = {"section": section.name, **self.named(case.workload, case)}
                if case in reasons:
                    row["why_not"] = reasons[case]
                elif times.get(case):
                    row |= _timed_row(ready[case][1], times[case])
                    self._tell(section, case, row)
                else:
                    continue
                self.record["samples"].append(row)
            for prepared, _ in ready.values():
                prepared.close()
            self.record["attempting"] = None

    def _prepared(self, section: Section, case: Case) -> tuple[Prepared, dict[str, Any]] | str:
        """A warm case and what is known of it; or why there is none."""
        peer, workload = peers.named(case.peer), self.sized(case.workload)
        for lost in self.record["lost"]:
            if lost["section"] == section.name and lost["peer"] in (case.peer, None):
                return "failed: it ended the process"
        reason = peer.why_not(workload, case.backward)
        if reason is not None:
            return reason
        self._attempt(section, case)
        prepared = None
        try:
            prepared = peer.prepare(workload, case.backward)
            facts: dict[str, Any] = {
                "temp_bytes": prepared.temp_bytes,
                "peak_bytes": prepared.peak_bytes,
                "compile_s": prepared.compile_seconds,
            }
            if workload.dropout:
                return prepared, facts | {"error": None, "unchecked": "dropout is random"}
            error = error_of(workload, prepared.results(), case.backward)
        except Exception as error:  # whatever a peer raises is a row that says so
            if prepared is not None:
                prepared.close()
            if measure.is_fatal(error):
                raise LostError(measure.failure(error)) from error
            return measure.failure(error)
        return prepared, facts | {"error": error if np.isfinite(error) else None}

    @staticmethod
    def _guarded(case: Case, prepared: Prepared, reasons: dict[Case, str]) -> Callable[[], float]:
        """Its time; one that fails while others run gets a reason, and the others go on."""

        def time_once() -> float:
            if case in reasons:
                return float("nan")
            try:
                return prepared.time()
            except Exception as error:  # as when it was prepared
                if measure.is_fatal(error):
                    raise LostError(measure.failure(error)) from error
                reasons[case] = measure.failure(error)
                return float("nan")

        return time_once

    def _attempt(self, section: Section, case: Case | None) -> None:
        """Note what is about to be tried, for the run after a process that did not survive it."""
        peer = None if case is None else case.peer
        self.record["attempting"] = {"section": section.name, "peer": peer}
        self.save()

    def named(self, workload: Workload, case: Case) -> dict[str, Any]:
        """What a row says of its case."""
        sized = self.sized(workload)
        return {
            "peer": case.peer,
            "workload": workload.name,
            "words": sized.words,
            "pass": said(case.backward),
            "batch": sized.batch,
            "heads": sized.heads,
            "kv_heads": sized.key_heads,
            "dim": sized.dim,
            "length": sized.length,
            "kv_length": sized.keys,
            "dtype": sized.dtype,
            "flops": sized.flops(backward=case.backward),
            "bytes": sized.bytes(backward=case.backward),
        }

    def _tell(self, section: Section, case: Case, row: dict[str, Any]) -> None:
        progress(f"{section.name}: {case.peer}, {case.workload.name}: {tables.in_short(row)}")


def _timed_row(facts: dict[str, Any], seconds: Sequence[float]) -> dict[str, Any]:
    summary = measure.summarize(seconds)
    row = {"seconds": list(seconds), "median_s": summary.median}
    return row | {"low_s": summary.low, "high_s": summary.high, **facts}


def working(path: Path) -> Path:
    """The file that a run writes, until it takes the name that was asked for."""
    return path.with_name(f"{path.name}.tmp")


def progress(line: str) -> None:
    """Tell whoever waits."""
    print(line, file=sys.stderr, flush=True)


# --- what the commands share -----------------------------------------------------------------


def begun(program: str, chosen: argparse.Namespace) -> Run:
    """A run with the options of its command, that has measured what the machine can do."""
    jax.config.update("jax_enable_compilation_cache", False)
    run = Run(
        program.removesuffix(".py"),
        command=command(program, chosen),
        quick=chosen.quick,
        repeat=chosen.repeat,
        path=chosen.out,
        fresh=chosen.fresh,
        deadline=until(chosen.minutes),
    )
    run.rates()
    return run


def parser(description: str, *, minutes: float, epilog: str = "") -> argparse.ArgumentParser:
    """The options of every command that measures."""
    found = argparse.ArgumentParser(description=description, epilog=epilog, allow_abbrev=False)
    add = found.add_argument
    add("--quick", action="store_true", help="tiny sizes: only shows that it runs")
    add("--only", nargs="+", metavar="NAME", help="sections, instead of all")
    add("--peers", nargs="+", metavar="NAME", help="peers, instead of all")
    add("--repeat", type=int, help=f"rounds; {ROUNDS} without it, and fewer on a slow machine")
    add("--minutes", type=float, default=minutes, help="begin no section after these")
    add("--out", type=Path, help="JSON to write as the run goes, and to go on from")
    add("--fresh", action="store_true", help="measure again what --out holds already")
    return found


def chosen_or_reason(
    program: str, chosen: argparse.Namespace, sections: Sequence[str]
) -> str | None:
    """What is wrong with the options, in one line, or None."""
    unknown = [name for name in names(chosen.only) if not covered(name, sections)]
    if unknown:
        return f"{program}: --only must name {', '.join(sections)}; got {', '.join(unknown)}."
    unknown = [name for name in names(chosen.peers) if name not in peers.PEERS]
    if unknown:
        known = ", ".join(peers.PEERS)
        return f"{program}: --peers must name {known}; got {', '.join(unknown)}."
    for name in ("repeat", "minutes"):
        value = getattr(chosen, name)
        if value is not None and value <= 0:
            least = "at least 1" if name == "repeat" else "over 0"
            return f"{program}: --{name} must be {least}, got {value:g}."
    if chosen.out is not None:
        try:
            chosen.out.parent.mkdir(parents=True, exist_ok=True)
            working(chosen.out).open("a").close()
        except OSError as error:
            return f"{program}: --out must be a file that can be written, got {chosen.out}: {error}"
    return None


def names(words: Sequence[str] | None) -> list[str]:
    """The names of an option, with commas or spaces between, unless a name has a comma itself."""
    found: list[str] = []
    for word in words or ():
        found += [word] if word in peers.PEERS else [n for n in word.split(",") if n]
    return found


def covered(name: str, sections: Sequence[str]) -> list[str]:
    """The section of that name, or else those whose names begin so."""
    if name in sections:
        return [name]
    return [s for s in sections if s.startswith((f"{name}, ", f"{name}-"))]


def selected(chosen: argparse.Namespace, sections: Sequence[str]) -> list[str]:
    """The sections that were asked for, in their own order."""
    wanted = {section for name in names(chosen.only) for section in covered(name, sections)}
    return [s for s in sections if s in wanted] if chosen.only else list(sections)


def without(section: Section, chosen: argparse.Namespace) -> Section:
    """The section with the peers that were asked for."""
    wanted = names(chosen.peers)
    if not wanted:
        return section
    cases = tuple(case for case in section.cases if case.peer in wanted)
    return dataclasses.replace(section, cases=cases)


def command(program: str, chosen: argparse.Namespace) -> str:
    """The command that repeats this run anywhere."""
    words = [f"python benchmarks/{program}"]
    words += ["--quick"] if chosen.quick else []
    for name in ("only", "peers"):
        if getattr(chosen, name):
            words += [f"--{name}", *(_quoted(n) for n in getattr(chosen, name))]
    words += [f"--repeat {chosen.repeat}"] if chosen.repeat else []
    if chosen.out is not None and not chosen.out.is_absolute():
        words.append(f"--out {chosen.out.as_posix()}")
    return " ".join(words)


def _quoted(name: str) -> str:
    return f"'{name}'" if " " in name else name


def until(minutes: float) -> float:
    """The time, by the monotonic clock, after so many minutes."""
    return time.monotonic() + 60 * minutes


def refuse(message: str) -> int:
    """Say in one line what is wrong with the command, for exit code 2."""
    print(message, file=sys.stderr)
    return 2
