"""The record of a run: what was measured, when, where and with what, as JSON files hold it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measure
import tables

Row = dict[str, Any]

# A run resumes a record only where these agree: other code or packages have other times.
SAME_CODE = ("name", "quick", "git", "versions")
SAME_MACHINE = ("gpu", "cpu")


def describe_run(name: str, command: str, *, quick: bool = False) -> dict[str, Any]:
    """The keys that every benchmark's JSON begins with: what ran, when, where and with what."""
    return {
        "format": tables.FORMAT,
        "name": name,
        "command": command,
        "quick": quick,
        "interrupted": False,
        "date": measure.now(),
        "git": measure.read_commit(),
        "machine": measure.describe_machine(),
        "versions": measure.list_versions(),
    }


@dataclasses.dataclass
class Record:
    """What a run has measured so far. The fields are the keys of its JSON, in the same order.

    Attributes:
        name: of the program, which is that of the file too.
        command: repeats the run.
        quick: whether the sizes were tiny, so that the times mean nothing.
        interrupted: whether Ctrl-C ended the run.
        date: when it began, UTC.
        git: the commit, and whether files differed from it.
        machine: the processor, its cores and load.
        versions: of Python and of the packages.
        rates: of a matrix product and a copy on this machine; None until they are measured.
        sections: names of the sections that are complete.
        lost: what was being tried when a process died: a section, and a peer or None.
        claims: the ratios that are promised, each with its target.
        samples: a row for each case that was timed, or why it was not.
        builds: a row for each call that was compiled and not run.
        attempting: what is being tried now, for the process that follows one that dies.
        left: names of the sections that the time did not reach.
    """

    name: str
    command: str
    quick: bool
    interrupted: bool
    date: str
    git: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str | None]
    rates: dict[str, Any] | None = None
    sections: list[str] = dataclasses.field(default_factory=list)
    lost: list[Row] = dataclasses.field(default_factory=list)
    claims: list[Row] = dataclasses.field(default_factory=list)
    samples: list[Row] = dataclasses.field(default_factory=list)
    builds: list[Row] = dataclasses.field(default_factory=list)
    attempting: Row | None = None
    left: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def begin(cls, name: str, command: str, *, quick: bool = False) -> Record:
        """An empty record of this moment, commit and machine."""
        return cls.from_json(describe_run(name, command, quick=quick))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Record:
        """The record that `to_json` wrote.

        Raises:
            ValueError: If it is no record of a run, such as that of another benchmark.
        """
        fields = dataclasses.fields(cls)
        try:
            return cls(
                **{field.name: values[field.name] for field in fields if field.name in values}
            )
        except TypeError as error:  # names the fields that are missing
            raise ValueError(f"the record of a run must hold every field: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The values as JSON has them, not copied."""
        fields = dataclasses.fields(self)
        return {"format": tables.FORMAT, **{f.name: getattr(self, f.name) for f in fields}}

    def can_resume(self, earlier: Record) -> bool:
        """Whether the earlier record is of the same code on the same machine."""
        return all(getattr(self, name) == getattr(earlier, name) for name in SAME_CODE) and all(
            self.machine.get(name) == earlier.machine.get(name) for name in SAME_MACHINE
        )

    def resume(self, earlier: Record) -> None:
        """Take over the complete sections of an earlier record, and what its process died of."""
        complete = earlier.sections
        self.sections, self.rates = complete, earlier.rates
        # An interrupted section is measured again, so its rows are dropped.
        self.samples = [row for row in earlier.samples if row["section"] in complete]
        self.builds = [row for row in earlier.builds if row["section"] in complete]
        self.lost = earlier.lost + ([earlier.attempting] if earlier.attempting else [])


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        OSError: If there is no such file.
        ValueError: If it holds no record of a run.
    """
    return Record.from_json(tables.load(path))


def write(values: Mapping[str, Any], path: Path) -> None:
    """Write JSON in one piece: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.writing.tmp")
    partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def working_path(path: Path) -> Path:
    """The file that a run writes until it is complete and replaces `path`."""
    return path.with_name(f"{path.name}.tmp")
