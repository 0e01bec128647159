"""Draw the tables of a benchmark from its JSON: as Markdown, or into README.md between its markers.

python benchmarks/tables.py benchmarks/results/cpu.json                       print them
python benchmarks/tables.py benchmarks/results/cpu.json --readme README.md    write them there
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

FORMAT = 1  # of the JSON; raised when a reader of the old one would misread the new
WRONG = 1e-3  # relative error beyond which a float32 result is no rounding


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with its columns padded, so that it reads as plain text too."""
    lines = [list(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    drawn = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([drawn[0], rule, *drawn[1:]])


def claims_table(record: dict[str, Any]) -> str:
    """What is claimed, what was measured, and whether that is met; missed ones included."""
    return markdown(
        ("measure", "value", "quartiles", "target", "result"),
        [
            (
                claim["what"],
                figure(claim["value"], claim["unit"]) if "value" in claim else "–",
                _spread(claim),
                _target(claim),
                verdict(claim),
            )
            for claim in record["claims"]
        ],
    )


def samples_table(record: dict[str, Any]) -> str:
    """Every peer's time, temporary memory and error."""
    return markdown(
        ("workload", "pass", "length", "peer", "median", "quartiles", "runs", "temporary", "error"),
        [_sample(sample) for sample in record["samples"]],
    )


def builds_table(record: dict[str, Any]) -> str:
    """Temporary memory and compile time of what was compiled and not run."""
    return markdown(
        ("workload", "pass", "length", "peer", "temporary", "compile time"),
        [
            (
                build["words"],
                build["pass"],
                str(build["length"]),
                build["peer"],
                *(
                    (_mebibytes(build["temp_bytes"]), f"{build['compile_s']:.2f} s")
                    if build.get("why_not") is None
                    else (f"– {build['why_not']}", "")
                ),
            )
            for build in record["builds"]
        ],
    )


def caption(record: dict[str, Any]) -> str:
    """Where, when and with what the figures were measured, and the command that made them."""
    versions = ", ".join(f"{n} {v}" for n, v in record["versions"].items() if v is not None)
    machine, git = record["machine"], record["git"]
    commit = "no commit" if git["commit"] is None else f"commit {git['commit'][:12]}"
    notes = [f"{commit}{' with changes' if git['dirty'] else ''}"]
    if record["quick"]:
        notes.append("a quick run, whose figures mean nothing")
    if record["interrupted"]:
        notes.append("interrupted before its end")
    return (
        f"{machine['cpu']}, {machine['cores']} cores; {versions}; {record['date']}; "
        f"{'; '.join(notes)}. Made by `{record['command']}`."
    )


def page(record: dict[str, Any], *, folded: bool = True) -> str:
    """The caption and every table that has rows, as Markdown.

    Args:
        record: what a benchmark wrote.
        folded: whether all but the claims is folded away, for a page that has more to say.
    """
    parts = [caption(record)]
    if record["claims"]:
        parts.append(claims_table(record))
    for name, title, draw in (
        ("samples", "Time, temporary memory and error against float64 of each peer", samples_table),
        ("builds", "Temporary memory and compile time by length", builds_table),
    ):
        if not record[name]:
            continue
        table = draw(record)
        if folded:
            table = f"<details><summary>{title}</summary>\n\n{table}\n\n</details>"
        parts.append(table)
    return "\n\n".join(parts)


def redraw(text: str, name: str, table: str) -> str:
    """Replace what lies between `<!-- benchmark:NAME -->` and `<!-- /benchmark:NAME -->`.

    Args:
        text: the Markdown page.
        name: of the markers.
        table: goes between them, on lines of its own.

    Returns:
        The page; the same once more if redrawn from the same record.

    Raises:
        ValueError: Unless each marker is there once, in this order.
    """
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    counts = text.count(begin), text.count(end)
    if counts != (1, 1) or text.index(begin) > text.index(end):
        raise ValueError(
            f"the page must hold the markers {begin} and {end} once each, in this order, "
            f"got {counts[0]} and {counts[1]} of them."
        )
    before, after = text.partition(begin)[0], text.partition(end)[2]
    return f"{before}{begin}\n\n{table.strip()}\n\n{end}{after}"


def load(path: Path) -> dict[str, Any]:
    """Read a benchmark's JSON.

    Raises:
        ValueError: If it is none, or of a format that is not known here.
        OSError: If it cannot be read.
    """
    record = json.loads(path.read_text())
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} must be a benchmark of format {FORMAT}, got format {found}.")
    return record


def verdict(claim: dict[str, Any]) -> str:
    """Whether the target is met, or why that cannot be said; nothing where there is no target."""
    if claim.get("why_not") is not None:
        return claim["why_not"]
    if claim.get("target") is None:
        return ""
    if "met" not in claim:
        return "not judged"  # a quick run
    return "met" if claim["met"] else "**missed**"


def figure(number: float, unit: str) -> str:
    """A ratio or a time, with the digits that mean something."""
    if unit == "s":
        return f"{number:.2f} s"
    return f"{number:.3f}x" if number < 0.1 else f"{number:.2f}x"


def _spread(claim: dict[str, Any]) -> str:
    if "low" not in claim:
        return ""
    return f"{figure(claim['low'], claim['unit'])} – {figure(claim['high'], claim['unit'])}"


def _target(claim: dict[str, Any]) -> str:
    if claim.get("target") is None:
        return ""
    unit = " s" if claim["unit"] == "s" else "x"
    return f"{'≤' if claim['at_most'] else '≥'} {claim['target']:g}{unit}"


def _sample(sample: dict[str, Any]) -> tuple[str, ...]:
    head = sample["words"], sample["pass"], str(sample["length"]), sample["peer"]
    if sample.get("why_not") is not None:
        return (*head, f"– {sample['why_not']}", "", "", "", "")
    error = float("inf") if sample["error"] is None else sample["error"]
    return (
        *head,
        _milliseconds(sample["median_s"]),
        f"{_milliseconds(sample['low_s'])} – {_milliseconds(sample['high_s'])}",
        str(len(sample["seconds"])),
        _mebibytes(sample["temp_bytes"]),
        f"{error:.1e}" if error <= WRONG else f"**{error:.1e}, wrong**",
    )


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    digits = max(0, 2 - math.floor(math.log10(milliseconds))) if milliseconds > 0 else 0
    return f"{milliseconds:.{digits}f} ms"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Draw the tables of a benchmark from its JSON.")
    parser.add_argument("record", type=Path, help="what a benchmark wrote, such as cpu.json")
    parser.add_argument("--readme", type=Path, help="the page to write them into, else print")
    chosen = parser.parse_args(arguments)
    try:
        record = load(chosen.record)
        if chosen.readme is None:
            print(page(record))
        else:
            text = chosen.readme.read_text()
            chosen.readme.write_text(redraw(text, record["name"], page(record)))
    except (OSError, ValueError) as error:  # json's errors are ValueErrors
        print(f"tables.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
