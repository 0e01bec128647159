"""Draw every table and picture of the pages from the committed results.

python benchmarks/redraw.py            write them
python benchmarks/redraw.py --check    say whether they are current; nothing is written

README.md shows two pictures and three figures, benchmarks/RESULTS.md everything. Where nothing was
measured yet there is no table, but a sentence that says so.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import crossing
import gpu
import plots
import tables
import training

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Where the pictures are written, seen from the folder of README.md.
PICTURES = "benchmarks/results/plots"

Draw = Callable[[dict[str, Any], str], str]


def _pictures(record: dict[str, Any]) -> list[plots.Picture]:
    return plots.pictures(record) if "samples" in record else []


def _illustrated(draw: Callable[[dict[str, Any]], str]) -> Draw:
    """All pictures that a record has the rows for, and then what `draw` makes of it."""

    def page(record: dict[str, Any], folder: str) -> str:
        return "\n\n".join([*(each.html(folder) for each in _pictures(record)), draw(record)])

    return page


def front(record: dict[str, Any], folder: str) -> str:
    """The first screen of README.md: speed and memory side by side, and three figures."""
    shown = [
        each.html(folder)
        for kind in ("speed", "memory")
        for each in _pictures(record)
        if each.name == f"{record['name']}-{kind}"
    ]
    cells = "".join(f"<td>\n{picture}\n</td>" for picture in shown)
    claims = {claim["what"]: claim for claim in record["claims"]}
    peers = {
        name: claims.get(f"forward+backward, 4096: {name} / ours", {})
        for name in ("jax.nn", "torch SDPA")
    }
    temporary = {
        build["peer"]: build["temp_bytes"] / 2**20
        for build in record["builds"]
        if (build["section"], build["workload"]) == ("memory", "full-4k")
        and (build["pass"], build["length"]) == ("forward+backward", 16384)
        and build.get("why_not") is None
    }
    rows = [
        (f"time of {name} / ours, length 4096", f"{tables.figure(claim['value'], claim['unit'])}")
        for name, claim in peers.items()
        if "value" in claim
    ]
    if {"blocked", "jax.nn"} <= set(temporary):
        memory = f"{temporary['blocked']:.0f} MiB, of jax.nn {temporary['jax.nn']:.0f} MiB"
        rows.append(("temporary memory of ours, length 16384", memory))
    machine = f"{record['machine']['cpu']}, {record['machine']['cores']} cores"
    header = ("forward and backward, float32, 8 heads of 64", machine)
    table = tables.markdown(header, rows)
    return f"<table><tr>{cells}</tr></table>\n\n{table}"


# Page -> what it shows, by the name of the markers: the results' name, and who draws them.
PAGES: dict[str, dict[str, tuple[str, Draw]]] = {
    "README.md": {"front": ("cpu", front)},
    "benchmarks/RESULTS.md": {
        "cpu": ("cpu", _illustrated(tables.page)),
        "gpu": ("gpu", _illustrated(gpu.page)),
        "training": ("training", _illustrated(training.page)),
        "crossing": ("crossing", _illustrated(crossing.page)),
    },
}
EMPTY: dict[str, Callable[[], str]] = {"gpu": gpu.empty_page}


def drawn(
    page: str, text: str, results: Path = RESULTS, root: Path = ROOT
) -> tuple[str, list[plots.Picture]]:
    """A page with all that the results give, and the pictures that belong to it.

    Args:
        page: its name in `PAGES`.
        text: the page; only what lies between markers is replaced.
        results: the folder of the records.
        root: the folder of README.md.

    Raises:
        ValueError: If a marker is missing, or a record is none.
    """
    pictures: list[plots.Picture] = []
    folder = os.path.relpath(root / PICTURES, (root / page).parent).replace(os.sep, "/")
    for marker, (name, draw) in PAGES[page].items():
        path = results / f"{name}.json"
        if path.exists():
            record = tables.load(path)
            text = tables.redraw(text, marker, draw(record, folder))
            pictures += _pictures(record)
        elif marker in EMPTY:
            text = tables.redraw(text, marker, EMPTY[marker]())
    return text, pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Draw the pages' figures from the results.")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the records")
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    chosen = parser.parse_args(arguments)
    pages: dict[str, str] = {}
    pictures: dict[str, plots.Picture] = {}
    old = []
    try:
        for name in PAGES:
            text = (chosen.root / name).read_text(encoding="utf-8")
            pages[name], found = drawn(name, text, chosen.results, chosen.root)
            pictures |= {picture.name: picture for picture in found}
            if pages[name] != text:
                old.append(name)
    except (OSError, ValueError) as error:
        print(f"redraw.py: {error}", file=sys.stderr)
        return 2
    if chosen.check:
        for name in old:
            print(f"redraw.py: {name} is not what the results give. Run `make plots`.")
        return int(bool(old))
    for name, page in pages.items():
        (chosen.root / name).write_text(page, encoding="utf-8")
    for picture in pictures.values():
        picture.write(chosen.root / PICTURES)
    print(f"Drew {len(pages)} pages and {len(pictures)} pictures.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
