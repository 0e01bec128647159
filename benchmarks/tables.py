"""The tables of a benchmark as Markdown; redraw.py puts them into RESULTS.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import measure

from flash_attention_jax._commands.bench import FORMAT, OURS, load, wrong

__all__ = ["FORMAT", "OURS", "load", "wrong"]

# Other ways that this library computes the same, which are no other library's.
INSIDE = (*OURS, "blocked, heads last", "checkpointed", "dense")


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
    """Every peer's time, rate, ratios, temporary memory and error."""
    header = ["workload", "pass", "length", "peer", "median", "quartiles", "runs"]
    unit = "TFLOP/s" if record["machine"].get("gpu") else "GFLOP/s"
    header += ["on the device", unit, "of matmul", "of copy", "theirs / ours", "temporary", "error"]
    rows = [_sample(record, sample) for sample in record["samples"]]
    # What an older benchmark did not measure, or a CPU cannot tell, needs no column.
    kept = [i for i in range(len(header)) if i < 4 or any(row[i] for row in rows)]
    return markdown([header[i] for i in kept], [[row[i] for i in kept] for row in rows])


def ratios(record: dict[str, Any]) -> list[tuple[dict[str, Any], measure.Summary]]:
    """Every other library's row with the ratio of its time to ours, taken within the rounds."""
    found = []
    for sample in record["samples"]:
        mine = ours_beside(record, sample)
        if mine is None or sample["peer"] in INSIDE or sample.get("why_not") is not None:
            continue
        found.append((sample, measure.ratio(sample["seconds"], mine["seconds"])))
    return found


def ours_beside(record: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any] | None:
    """The library's own row of the same call in the same section, or None."""
    call = ("section", "workload", "pass", "length", "dtype")
    beside = {
        row["peer"]: row
        for row in record["samples"]
        if row.get("why_not") is None and all(row.get(name) == sample.get(name) for name in call)
    }
    return next((beside[name] for name in OURS if name in beside), None)


def worst_table(record: dict[str, Any], count: int = 3) -> str:
    """The cases in which another library is furthest ahead, or least behind."""
    sound = [each for each in ratios(record) if not wrong(each[0])]
    rows = sorted(sound, key=lambda each: each[1].median)[:count]
    return markdown(
        ("theirs / ours", "quartiles", "peer", "workload", "pass", "length"),
        [
            (
                f"{ratio.median:.2f}x",
                f"{ratio.low:.2f}x – {ratio.high:.2f}x",
                row["peer"],
                row["words"],
                row["pass"],
                _length(row),
            )
            for row, ratio in rows
        ],
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
    if record.get("quick"):
        notes.append("a quick run, whose figures mean nothing")
    if record.get("interrupted"):
        notes.append("interrupted before its end")
    if record.get("left"):
        notes.append(f"{len(record['left'])} sections not reached in its time")
    rates = record.get("rates")
    if rates:
        copied = f"{rates['copy'] / 1e9:.0f} GB/s"
        notes.append(f"matrix product {operations(rates['matmul'])}, copy {copied} in this run")
    where = f"{machine['gpu']}, " if machine.get("gpu") else ""
    return (
        f"{where}{machine['cpu']}, {machine['cores']} cores; {versions}; {record['date']}; "
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
    if ratios(record):
        parts += ["The cases in which another library is furthest ahead of ours, or least behind:"]
        parts += [worst_table(record)]
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


def in_short(row: dict[str, Any]) -> str:
    """A row in a line, for whoever waits."""
    if row.get("why_not") is not None:
        return f"– {row['why_not']}"
    rate = f", {operations(row['flops'] / row['median_s'])}" if row.get("flops") else ""
    return f"{_milliseconds(row['median_s'])}{rate}, error {_error(row)}"


def operations(rate: float) -> str:
    """A rate of operations: in TFLOP/s, or GFLOP/s where it is under one."""
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.1f} GFLOP/s"


def _sample(record: dict[str, Any], sample: dict[str, Any]) -> tuple[str, ...]:
    head = sample["words"], sample["pass"], _length(sample), sample["peer"]
    if sample.get("why_not") is not None:
        return (*head, f"– {sample['why_not']}", *[""] * 9)
    unit = 1e12 if record["machine"].get("gpu") else 1e9
    rates, median, mine = record.get("rates"), sample["median_s"], ours_beside(record, sample)
    flops, moved = sample.get("flops"), sample.get("bytes")
    quotient = ""
    if mine is not None and mine is not sample:
        quotient = f"{measure.ratio(sample['seconds'], mine['seconds']).median:.2f}x"
    return (
        *head,
        _milliseconds(median),
        f"{_milliseconds(sample['low_s'])} – {_milliseconds(sample['high_s'])}",
        str(len(sample["seconds"])),
        _milliseconds(sample["device_s"]) if sample.get("device_s") else "",
        "" if not flops else f"{flops / median / unit:.3g}",
        "" if not (flops and rates) else f"{flops / median / rates['matmul']:.0%}",
        "" if not (moved and rates) else f"{moved / median / rates['copy']:.0%}",
        quotient,
        _mebibytes(sample["temp_bytes"]),
        _error(sample),
    )


def _length(row: dict[str, Any]) -> str:
    keys = row.get("kv_length", row["length"])
    return str(row["length"]) if keys == row["length"] else f"{row['length']} x {keys}"


def _error(row: dict[str, Any]) -> str:
    if row.get("unchecked"):
        return f"– {row['unchecked']}"
    error = float("inf") if row["error"] is None else row["error"]
    return f"**{error:.1e}, wrong**" if wrong(row) else f"{error:.1e}"


def _milliseconds(seconds: float) -> str:
    milliseconds = 1e3 * seconds
    digits = max(0, 2 - math.floor(math.log10(milliseconds))) if milliseconds > 0 else 0
    return f"{milliseconds:.{digits}f} ms"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:.1f} MiB"
