"""The command `bench`: what moved between two benchmarks, and the benchmarks of a clone.

The benchmarks themselves are in the repository's folder `benchmarks/`, beside the package, and are
not installed with it. What they wrote can be compared anywhere.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

FORMAT = 1  # of the JSON; raised when a reader of the old one would misread the new
OURS = ("hopper", "triton", "blocked")  # which stands for the library: the first that ran
WRONG = {"float32": 1e-3}  # relative error beyond which a result is no rounding
WRONG_HALF = 2e-2

MOVED = 0.05  # a time that moved by less is noise whatever the quartiles say
GREW = 0.01  # temporary memory is counted, not measured
FEWEST = 3  # rounds, without which quartiles say nothing

SUITES = {
    "cpu": "this CPU: the targets, the sweep by length, the named workloads",
    "gpu": "an NVIDIA GPU: the kernels beside cuDNN, tokamax and torch",
    "micro": "a small set in under two minutes, which only prints",
    "named": "any workload by any peer, with the flags of the older benchmarks",
    "long": "one long sequence",
    "crossing": "what a call from PyTorch costs",
    "training": "training, dense against blocked and cosine against dot",
    "redraw": "draw the tables and plots of the pages from the committed results",
}
_USAGE = "\n".join(
    [
        "usage: flash_attention_jax bench SUITE [OPTIONS]",
        "       flash_attention_jax bench --compare A.json B.json",
        "",
        *(f"  {name:<10} {text}" for name, text in SUITES.items()),
        "",
        "SUITE --help lists the options of one; they need a clone. --compare says what moved from",
        "A to B beyond the noise; its exit code is 1 if anything got slower, larger or wrong.",
    ]
)


def bench_main(argv: list[str]) -> int:
    """The command `bench`.

    Args:
        argv: Arguments after `bench`; ["--help"] lists them.

    Returns:
        The exit code: 0, 1 if a comparison found anything worse, 2 for arguments that cannot be
        used, or what the suite returns.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if argv[0] == "--compare":
        if len(argv) != 3:
            return _refuse(f"--compare takes two files, got {len(argv) - 1}")
        return _compare(Path(argv[1]), Path(argv[2]))
    suite, *rest = argv
    if suite not in SUITES:
        return _refuse(f"no suite {suite!r}; there are {', '.join(SUITES)}, and --compare A B")
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    if not (folder / f"{suite}.py").is_file():
        return _refuse(
            f"{suite} is a program of the repository, which is not installed with the package, and "
            f"this package is not in a clone. Clone it, `pip install --editable .`, and try again"
        )
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(suite).main(rest)
    finally:
        sys.path.remove(str(folder))


def _refuse(message: str) -> int:
    print(f"flash_attention_jax bench: error: {message}.", file=sys.stderr)
    return 2


# --- records ---------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """Read what a benchmark wrote.

    Raises:
        ValueError: If it is none, or of a format that is not known here.
        OSError: If it cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be a benchmark's JSON, got other text: {error}.") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} must be a benchmark of format {FORMAT}, got format {found}.")
    return record


def row_key(row: dict[str, Any]) -> tuple[Hashable, ...]:
    """What a row is about: equal in two records for the same case."""
    names = ("section", "workload", "pass", "length", "peer")
    return *(row.get(name) for name in names), row.get("dtype", "float32")


def wrong(row: dict[str, Any]) -> bool:
    """Whether a row's result is no rounding of the right one."""
    if row.get("why_not") is not None or row.get("unchecked"):
        return False
    limit = WRONG.get(row.get("dtype", "float32"), WRONG_HALF)
    return row["error"] is None or not row["error"] <= limit


# --- the comparison --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """One row that moved from one record to another.

    Attributes:
        what: the row in words.
        before: in the first record.
        after: in the second.
        verdict: "slower", "faster", "larger", "smaller", "wrong", "right", "stopped" or "runs".
        ratio: after / before, where both are numbers.
    """

    what: str
    before: str
    after: str
    verdict: str
    ratio: float | None = None

    @property
    def worse(self) -> bool:
        """Whether it is a regression."""
        return self.verdict in ("slower", "larger", "wrong", "stopped")


def changes(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[Change], int]:
    """What moved from A to B beyond the noise, and how many rows both hold.

    A time has moved if the quartiles of the two do not overlap and the medians are more than 5 %
    apart; temporary memory, which the compiler counts, if it differs by more than 1 %.

    Args:
        a: what a benchmark wrote.
        b: what it wrote later, or elsewhere.

    Returns:
        The changes, and the number of rows that were compared.
    """
    found, compared = [], 0
    for kind in ("samples", "builds"):
        before = {row_key(row): row for row in a.get(kind, ())}
        for row in b.get(kind, ()):
            old = before.get(row_key(row))
            if old is not None:
                compared += 1
                found += _row_changes(old, row)
    return found, compared


def _row_changes(a: dict[str, Any], b: dict[str, Any]) -> Iterable[Change]:
    what = ", ".join(str(part) for part in (b["peer"], b["workload"], b["length"], b["pass"]))
    stopped = a.get("why_not"), b.get("why_not")
    if stopped[0] is not None or stopped[1] is not None:
        if stopped[0] is None:
            yield Change(what, "measured", stopped[1] or "", "stopped")
        elif stopped[1] is None:
            yield Change(what, stopped[0], "measured", "runs")
        return
    if "error" in a and "error" in b and wrong(a) != wrong(b):
        verdict = "wrong" if wrong(b) else "right"
        yield Change(what, _scientific(a["error"]), _scientific(b["error"]), verdict)
    if a.get("seconds") and b.get("seconds"):
        ratio = b["median_s"] / a["median_s"]
        apart = a["high_s"] < b["low_s"] or b["high_s"] < a["low_s"]
        enough = min(len(a["seconds"]), len(b["seconds"])) >= FEWEST
        if enough and apart and abs(ratio - 1) > MOVED:
            verdict = "slower" if ratio > 1 else "faster"
            yield Change(what, _milliseconds(a), _milliseconds(b), verdict, ratio)
    before, after = a.get("temp_bytes"), b.get("temp_bytes")
    if before and after is not None and abs(after / before - 1) > GREW:
        ratio = after / before
        verdict = "larger" if ratio > 1 else "smaller"
        yield Change(what, _mebibytes(before), _mebibytes(after), verdict, ratio)


def _milliseconds(row: dict[str, Any]) -> str:
    return f"{1e3 * row['median_s']:.3g} ms"


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _scientific(error: float | None) -> str:
    return "not finite" if error is None else f"error {error:.1e}"


def _compare(first: Path, second: Path) -> int:
    try:
        a, b = load(first), load(second)
    except (OSError, ValueError) as error:
        return _refuse(str(error).rstrip("."))
    for name, path, record in (("A", first, a), ("B", second, b)):
        commit = record["git"]["commit"] or "no commit"
        machine = record["machine"].get("gpu") or record["machine"]["cpu"]
        print(f"{name}: {path}: {record['date'][:16]}, {commit[:12]}, {machine}")
    for name in ("gpu", "cpu", "cores"):
        here = [record["machine"].get(name) for record in (a, b)]
        if here[0] != here[1]:
            print(f"Take times with care: {name} was {here[0]} and is {here[1]}.")
    for name, unit in (("matmul", "matrix product"), ("copy", "copy")):
        before, after = ((record.get("rates") or {}).get(name) for record in (a, b))
        if before and after:
            print(f"The machine's {unit} ran at {after / before:.2f}x the rate.")
    found, compared = changes(a, b)
    print()
    for change in sorted(found, key=lambda change: not change.worse):
        times = "" if change.ratio is None else f"  {change.ratio:.2f}x"
        print(f"{change.verdict:<8} {change.what}: {change.before} -> {change.after}{times}")
    worse = sum(change.worse for change in found)
    print(
        f"{compared} rows compared: {worse} worse, {len(found) - worse} better, the others within "
        "the noise (quartiles that overlap, or medians within 5 %)."
    )
    return 1 if worse else 0
