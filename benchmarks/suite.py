"""The measuring loop: sections of cases that are timed in turn, each checked before it is timed.

A `Run` alone writes its `Record`, and saves it as it goes. A section is the unit: its cases run
interleaved, so only they are divided by one another. A run that is started again skips the sections
that its file holds, and drops the rows of an interrupted one. command.py parses the arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import measure
import numpy as np
import peers
import record as records
import tables
import workloads
from prepared import Prepared
from record import Record, Row
from workloads import Workload

ROUNDS = 9
QUICK_ROUNDS = 3
AT_LEAST = 3  # rounds, however slow the machine
SECONDS = 15.0  # no further round of a section is begun after this long

Step = tuple[str, Callable[[], None]]  # the name of a section, and what measures it
Judge = Callable[[Record], list[Row]]  # what a record says of each claim


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


@dataclasses.dataclass(frozen=True)
class Ready:
    """A case that is compiled, warm and checked.

    Attributes:
        prepared: times and closes it.
        facts: what its row says beside the times.
        seconds: of each round so far.
    """

    prepared: Prepared
    facts: Row
    seconds: list[float] = dataclasses.field(default_factory=list)


class LostError(RuntimeError):
    """The device is lost to this process: begin again in another one."""


def make_sections(
    name: str,
    workload: Workload,
    names: Iterable[str],
    *,
    passes: Sequence[bool] = (False, True),
    seconds: float = SECONDS,
) -> list[Section]:
    """One workload by some peers: a section forward, and another with the gradients."""
    passes = (False,) if workload.decode else passes
    return [
        Section(
            f"{name}, {name_pass(backward)}",
            tuple(Case(peer, workload, backward) for peer in names),
            seconds,
        )
        for backward in passes
    ]


def name_pass(backward: bool) -> str:
    """The pass in words."""
    return "forward+backward" if backward else "forward"


# The cases of a section share a workload, and float64 takes longer than most of them.
@functools.lru_cache(maxsize=4)
def compute_reference(workload: Workload, backward: bool) -> dict[str, np.ndarray]:
    """The result in float64, computed on a GPU if JAX has one."""
    if jax.default_backend() != "gpu":
        return workloads.reference(workload, backward=backward)
    with jax.enable_x64(True):
        return workloads.reference(workload, backward=backward, xp=jnp)


def compute_error(workload: Workload, results: dict[str, np.ndarray], backward: bool) -> float:
    """The largest relative error of the output and of each gradient."""
    reference = compute_reference(workload, backward)
    return max(
        measure.relative_error(x.reshape(reference[name].shape), reference[name])
        for name, x in workloads.part_of(results, workload).items()
    )


class Run:
    """A run of some sections, and the record of it.

    Attributes:
        record: what was measured so far; only methods of the run write to it.
        path: the file that `finish` leaves, or None to keep nothing.
        quick: whether workloads are made tiny.
        repeat: rounds of every section, or None for each section's own.
        deadline: no section is begun after this, by the monotonic clock.
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
        self.record = Record.begin(name, command, quick=quick)
        if path is not None and not fresh:
            self._resume(path)

    def _resume(self, path: Path) -> None:
        """Take over what an earlier run of the same code on the same machine completed."""
        # The working file is the newer one: it is there only while a run is not complete.
        for candidate in (records.working_path(path), path):
            try:
                earlier = records.read(candidate)
            except (OSError, ValueError):
                continue
            if not self.record.can_resume(earlier):
                continue
            self.record.resume(earlier)
            count = len(self.record.sections)
            if count:
                report(f"Going on from {candidate}: {count} sections are done.")
            return

    def resize(self, workload: Workload) -> Workload:
        """The workload as this run measures it."""
        return workload.quick() if self.quick else workload

    def measure_rates(self) -> None:
        """Measure what the machine can do, unless the record has it."""
        if self.record.rates is None:
            self.record.rates = measure.measure_rates(quick=self.quick)
        rates = self.record.rates
        report(
            f"matrix product {tables.operations(rates['matmul'])}, "
            f"copy {rates['copy'] / 1e9:.0f} GB/s"
        )

    def take(self, steps: Iterable[Step], *, judge: Judge | None = None) -> None:
        """Take every step that is not done, until the time is over; Ctrl-C keeps what there is.

        Args:
            steps: the name of each and what it does.
            judge: makes the claims anew before each time that the record is written.
        """
        left: list[str] = []
        try:
            for name, measure_step in steps:
                if name in self.record.sections:
                    continue
                if time.monotonic() > self.deadline:
                    left.append(name)
                    continue
                measure_step()
                self.record.sections.append(name)
                self._judge_and_save(judge)
        except KeyboardInterrupt:
            self.record.interrupted = True
            report("Interrupted. These rows were done:")
        self.record.attempting = None
        self.record.left = left
        if left:
            report(f"Out of time: {len(left)} sections are left. Run the command again to go on.")
        self._judge_and_save(judge)

    def _judge_and_save(self, judge: Judge | None) -> None:
        if judge is not None:
            self.record.claims = judge(self.record)
        self.save()

    def save(self) -> None:
        """Write the record beside the file that was asked for."""
        if self.path is not None:
            records.write(self.record.to_json(), records.working_path(self.path))

    def finish(self) -> None:
        """Replace the file that was asked for by this record."""
        if self.path is not None:
            self.save()
            records.working_path(self.path).replace(self.path)

    def add_build(self, row: Row) -> None:
        """Keep what compiling a call took, or why it failed."""
        self.record.builds.append(row)

    def describe(self, case: Case) -> Row:
        """The columns of a row that say what its case is."""
        sized = self.resize(case.workload)
        return {
            "peer": case.peer,
            "workload": case.workload.name,
            "words": sized.words,
            "pass": name_pass(case.backward),
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

    # --- one section -------------------------------------------------------------------------

    def time_section(self, section: Section) -> None:
        """Check every case, time them in turn, and add a row for each."""
        ready: dict[Case, Ready] = {}
        reasons: dict[Case, str] = {}  # of the cases that are not timed
        try:
            for case in section.cases:
                outcome = self._prepare(section, case)
                if isinstance(outcome, Ready):
                    ready[case] = outcome
                else:
                    reasons[case] = outcome
                    _report_row(section, case, {"why_not": outcome})
            self._note_attempt(section, None)
            self._time_rounds(section, ready, reasons)
            for case, entry in ready.items():
                device_s = None if case in reasons else entry.prepared.device_seconds()
                entry.facts["device_s"] = device_s
        finally:  # an interrupted section shows its whole rounds
            self._add_samples(section, ready, reasons)
            for entry in ready.values():
                entry.prepared.close()
            self.record.attempting = None

    def _time_rounds(
        self, section: Section, ready: dict[Case, Ready], reasons: dict[Case, str]
    ) -> None:
        """Add the seconds of each round; a case that fails gets a reason instead."""
        rounds = self.repeat or min(section.rounds, QUICK_ROUNDS if self.quick else ROUNDS)
        timers = {case: _guard(case, entry.prepared, reasons) for case, entry in ready.items()}
        for seconds in measure.interleave(
            timers,
            rounds,
            at_least=rounds if self.repeat else min(AT_LEAST, rounds),
            seconds=section.seconds,
        ):
            for case, taken in seconds.items():
                ready[case].seconds.append(taken)

    def _add_samples(
        self, section: Section, ready: dict[Case, Ready], reasons: dict[Case, str]
    ) -> None:
        """Add a row for each case that was timed or has a reason not to be."""
        for case in section.cases:
            row: Row = {"section": section.name, **self.describe(case)}
            if case in reasons:
                row["why_not"] = reasons[case]
            elif case in ready and ready[case].seconds:
                row |= _summarize(ready[case])
                _report_row(section, case, row)
            else:  # interrupted before its first round was complete
                continue
            self.record.samples.append(row)

    def _prepare(self, section: Section, case: Case) -> Ready | str:
        """A warm and checked case, or why there is none."""
        peer, workload = peers.find(case.peer), self.resize(case.workload)
        for lost in self.record.lost:
            # Without a peer the process died while all were timed, and any may be the cause.
            if lost["section"] == section.name and lost["peer"] in (case.peer, None):
                return "failed: it ended the process"
        reason = peer.why_not(workload, case.backward)
        if reason is not None:
            return reason
        self._note_attempt(section, case)
        prepared = None
        try:
            prepared = peer.prepare(workload, case.backward)
            facts: Row = {
                "temp_bytes": prepared.temp_bytes,
                "peak_bytes": prepared.peak_bytes,
                "compile_s": prepared.compile_seconds,
            }
            if workload.dropout:
                return Ready(prepared, facts | {"error": None, "unchecked": "dropout is random"})
            error = compute_error(workload, prepared.results(), case.backward)
        except Exception as error:  # whatever a peer raises is a row that says so
            if prepared is not None:
                prepared.close()
            if measure.is_fatal(error):
                raise LostError(measure.describe_failure(error)) from error
            return measure.describe_failure(error)
        # JSON has no infinity; tables take None for wrong.
        return Ready(prepared, facts | {"error": error if np.isfinite(error) else None})

    def _note_attempt(self, section: Section, case: Case | None) -> None:
        """Save what is about to be tried, so that a process that dies of it is not the next too."""
        peer = None if case is None else case.peer
        self.record.attempting = {"section": section.name, "peer": peer}
        self.save()


def _guard(case: Case, prepared: Prepared, reasons: dict[Case, str]) -> Callable[[], float]:
    """Time a case; if it fails, give it a reason and let the other cases go on."""

    def time_once() -> float:
        if case in reasons:
            return float("nan")
        try:
            return prepared.time()
        except Exception as error:  # as when it was prepared
            if measure.is_fatal(error):
                raise LostError(measure.describe_failure(error)) from error
            reasons[case] = measure.describe_failure(error)
            return float("nan")

    return time_once


def _summarize(entry: Ready) -> Row:
    """The columns of a row that say what was measured."""
    summary = measure.summarize(entry.seconds)
    times = {"seconds": entry.seconds, "median_s": summary.median}
    return times | {"low_s": summary.low, "high_s": summary.high, **entry.facts}


def _report_row(section: Section, case: Case, row: Row) -> None:
    report(f"{section.name}: {case.peer}, {case.workload.name}: {tables.in_short(row)}")


def report(line: str) -> None:
    """Print a line of progress, apart from the tables on standard output."""
    print(line, file=sys.stderr, flush=True)
