"""Draw every table and picture of README.md from the committed results.

python benchmarks/redraw.py            write them
python benchmarks/redraw.py --check    say whether they are current; nothing is written

What has no results yet has its table all the same, with empty cells and the reason.
"""

from __future__ import annotations

import argparse
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
# Where the pictures lie, seen from README.md.
PICTURES = "benchmarks/results/plots"

Draw = Callable[[dict[str, Any]], str]
# By the name of the markers and of the results; `gpu` can be drawn without any.
PAGES: dict[str, Draw] = {
    "cpu": tables.page,
    "gpu": gpu.page,
    "training": training.page,
    "crossing": crossing.page,
}
EMPTY: dict[str, Callable[[], str]] = {"gpu": gpu.empty_page}


def drawn(text: str, results: Path = RESULTS) -> tuple[str, list[plots.Picture]]:
    """The page with all that the results give, and the pictures that belong to it.

    Args:
        text: the page; only what lies between markers is replaced.
        results: the folder of the records.

    Raises:
        ValueError: If a marker is missing, or a record is none.
    """
    pictures: list[plots.Picture] = []
    for name, draw in PAGES.items():
        path = results / f"{name}.json"
        if path.exists():
            record = tables.load(path)
            found = plots.pictures(record) if "samples" in record else []
            shown = "\n\n".join(picture.html(PICTURES) for picture in found)
            page = f"{shown}\n\n{draw(record)}" if shown else draw(record)
            text = tables.redraw(text, name, page)
            pictures += found
        elif name in EMPTY:
            text = tables.redraw(text, name, EMPTY[name]())
    return text, pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Draw README.md's figures from the results.")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the page")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of the records")
    parser.add_argument("--check", action="store_true", help="only say whether they are current")
    chosen = parser.parse_args(arguments)
    try:
        text = chosen.readme.read_text(encoding="utf-8")
        page, pictures = drawn(text, chosen.results)
    except (OSError, ValueError) as error:
        print(f"redraw.py: {error}", file=sys.stderr)
        return 2
    if chosen.check:
        if page != text:
            print("redraw.py: README.md is not what the results give. Run `make plots`.")
        return int(page != text)
    chosen.readme.write_text(page, encoding="utf-8")
    folder = chosen.readme.parent / PICTURES
    for picture in pictures:
        picture.write(folder)
    print(f"Drew {len(PAGES)} tables and {len(pictures)} pictures.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
