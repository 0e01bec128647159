"""The pictures of a benchmark: speed by length, memory by length, and the roofline.

Each is drawn twice, for a light and for a dark page, without a background. The same record gives
the same files, byte for byte.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from flash_attention_jax._commands.bench import OURS, wrong

THEMES = {
    "light": {
        "ink": "#1f2328",
        "grid": "#d1d9e0",
        "lines": ["#0550ae", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#7d4e00", "#57606a"],
    },
    "dark": {
        "ink": "#e6edf3",
        "grid": "#3d444d",
        "lines": ["#79c0ff", "#ffa657", "#56d364", "#d2a8ff", "#ff9bce", "#e3b341", "#b1bac4"],
    },
}
MARKERS = "osD^vPX"
# The workloads that a curve by length is made of: how their names begin, the best first.
FAMILIES = {"cpu": ("seed", "full"), "gpu": ("sweep-d128-causal", "sweep-d64-causal")}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn picture.

    Attributes:
        name: of its files, with "-light.svg" and "-dark.svg" after it.
        words: what it shows, for who cannot see it.
        draw: draws it onto a figure, in the colours of a theme.
        size: in inches.
    """

    name: str
    words: str
    draw: Callable[[Figure, Sequence[str]], None]
    size: tuple[float, float] = (8.0, 3.4)

    def svg(self, theme: str) -> bytes:
        """The picture as an SVG, the same each time."""
        ink, grid = str(THEMES[theme]["ink"]), str(THEMES[theme]["grid"])
        names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        settings: dict[str, Any] = {
            **dict.fromkeys(names, ink),
            "axes.grid": True,
            "grid.color": grid,
            "grid.linewidth": 0.6,
            "axes.titlesize": "medium",
            "font.size": 9,
            "svg.fonttype": "none",  # letters stay letters
            "svg.hashsalt": self.name,  # names inside the file do not change from run to run
        }
        with mpl.rc_context(settings):  # pyright: ignore[reportArgumentType]
            figure = Figure(figsize=self.size, layout="constrained")
            self.draw(figure, list(THEMES[theme]["lines"]))
            file = io.BytesIO()
            metadata = {"Date": None, "Creator": None}
            figure.savefig(file, format="svg", transparent=True, metadata=metadata)
        return file.getvalue()

    def write(self, folder: Path) -> None:
        """Write both files."""
        folder.mkdir(parents=True, exist_ok=True)
        for theme in THEMES:
            (folder / f"{self.name}-{theme}.svg").write_bytes(self.svg(theme))

    def html(self, folder: str) -> str:
        """What shows the one that suits the page."""
        dark = f"{folder}/{self.name}-dark.svg"
        return (
            "<picture>\n"
            f'  <source media="(prefers-color-scheme: dark)" srcset="{dark}">\n'
            f'  <img alt="{self.words}" src="{folder}/{self.name}-light.svg">\n'
            "</picture>"
        )


def pictures(record: dict[str, Any]) -> list[Picture]:
    """Every picture that a record has the rows for."""
    return [each for draw in (speed, memory, roofline) if (each := draw(record)) is not None]


def _family(record: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one workload at several lengths."""
    for start in FAMILIES.get(record["name"], FAMILIES["cpu"]):
        found = [row for row in rows if row["workload"].rpartition("-")[0] == start]
        if len({row["length"] for row in found if row.get("why_not") is None}) > 1:
            return found
        found = [row for row in rows if row["words"] == start]
        if len({row["length"] for row in found if row.get("why_not") is None}) > 1:
            return found
    return []


def _peers(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Ours first, so that it has the same colour in every picture."""
    found = dict.fromkeys(row["peer"] for row in rows if row.get("why_not") is None)
    return sorted(found, key=lambda name: OURS.index(name) if name in OURS else len(OURS))


def _call(row: dict[str, Any]) -> str:
    shape = f"{row['heads']} heads of {row['dim']}"
    return f"{row['words']}, {shape}, {row.get('dtype', 'float32')}"


# --- speed by length -------------------------------------------------------------------------


def speed(record: dict[str, Any]) -> Picture | None:
    """Operations per second by length, a panel for each pass."""
    rows = _family(record, record["samples"])
    timed = [row for row in rows if row.get("why_not") is None]
    if not timed:
        return None
    scale, unit = (1e12, "TFLOP/s") if record["machine"].get("gpu") else (1e9, "GFLOP/s")
    peers, passes = _peers(timed), list(dict.fromkeys(row["pass"] for row in timed))

    def draw(figure: Figure, colours: Sequence[str]) -> None:
        panels = figure.subplots(1, len(passes), squeeze=False)[0]
        for axis, kind in zip(panels, passes, strict=True):
            for index, peer in enumerate(peers):
                mine = sorted(
                    (row for row in timed if row["peer"] == peer and row["pass"] == kind),
                    key=lambda row: row["length"],
                )
                rates = [
                    [_flops(r) / r[n] / scale for r in mine]
                    for n in ("median_s", "high_s", "low_s")
                ]
                below = [a - b for a, b in zip(rates[0], rates[1], strict=True)]
                above = [b - a for a, b in zip(rates[0], rates[2], strict=True)]
                axis.errorbar(
                    [row["length"] for row in mine],
                    rates[0],
                    yerr=[below, above],
                    label=_label(peer, [row for row in mine if wrong(row)]),
                    **_style(index, colours),
                )
            axis.set_xscale("log", base=2)
            axis.set(xlabel="length (tokens)", ylabel=unit, title=kind, ylim=(0, None))
            axis.xaxis.set_major_formatter("{x:.0f}")
        _legend(figure, panels)

    words = f"Speed by length: {_call(timed[0])}; {', '.join(peers)}"
    return Picture(f"{record['name']}-speed", words, draw)


def _flops(row: dict[str, Any]) -> float:
    if row.get("flops"):
        return row["flops"]
    full = 4.0 * row["batch"] * row["heads"] * row["length"] ** 2 * row["dim"]
    return full * (3.5 if "backward" in row["pass"] else 1.0)


def _label(peer: str, wrong_rows: Sequence[Any]) -> str:
    return f"{peer} (wrong)" if wrong_rows else peer


def _style(index: int, colours: Sequence[str]) -> dict[str, Any]:
    return {
        "color": colours[index % len(colours)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.4,
    }


def _legend(figure: Figure, panels: Sequence[Any], columns: int = 4) -> None:
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(len(labels), columns), frameon=False
    )


# --- memory by length ------------------------------------------------------------------------


def memory(record: dict[str, Any]) -> Picture | None:
    """Temporary memory of a call and its gradients, by length."""
    rows = [
        row for row in record["builds"] if row["section"] == "memory" and row["words"] == "full"
    ]
    rows = rows or _family(record, record["samples"])
    kept = [row for row in rows if "backward" in row["pass"] and row.get("temp_bytes")]
    if len({row["length"] for row in kept}) < 2:
        return None
    peers = _peers(kept)

    def draw(figure: Figure, colours: Sequence[str]) -> None:
        axis = figure.subplots()
        for index, peer in enumerate(peers):
            mine = sorted(
                (row for row in kept if row["peer"] == peer), key=lambda row: row["length"]
            )
            axis.plot(
                [row["length"] for row in mine],
                [row["temp_bytes"] / 2**20 for row in mine],
                label=peer,
                **_style(index, colours),
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set(xlabel="length (tokens)", ylabel="temporary memory (MiB)")
        axis.set_title("forward+backward")
        axis.xaxis.set_major_formatter("{x:.0f}")
        _legend(figure, [axis])

    words = f"Temporary memory by length: {_call(kept[0])}; {', '.join(peers)}"
    return Picture(f"{record['name']}-memory", words, draw, (5.0, 3.4))


# --- roofline --------------------------------------------------------------------------------


def roofline(record: dict[str, Any]) -> Picture | None:
    """Operations per second by operations per byte, under the rates of the same run."""
    rates = record.get("rates")
    rows = [
        row
        for row in record["samples"]
        if row.get("why_not") is None and row.get("flops") and not wrong(row)
    ]
    if not rates or not rows:
        return None
    scale, unit = (1e12, "TFLOP/s") if record["machine"].get("gpu") else (1e9, "GFLOP/s")
    inside = [name for name in OURS if any(row["peer"] == name for row in rows)]
    others = [name for name in _peers(rows) if name in ("jax.nn", "jax.nn cuDNN", "torch SDPA")]

    def draw(figure: Figure, colours: Sequence[str]) -> None:
        axis = figure.subplots()
        intensities = [row["flops"] / row["bytes"] for row in rows]
        low, high = min(intensities) / 2, max(intensities) * 2
        ridge = rates["matmul"] / rates["copy"]
        corners = [low, *([ridge] if low < ridge < high else []), high]
        roof = [min(rates["matmul"], x * rates["copy"]) / scale for x in corners]
        # What a call with little to compute moves may lie in a cache, so points may be above.
        axis.plot(corners, roof, color=mpl.rcParams["text.color"], linewidth=1.2)
        for index, peer in enumerate([*inside, *others]):
            for kind, filled in (("forward", False), ("forward+backward", True)):
                mine = [row for row in rows if row["peer"] == peer and row["pass"] == kind]
                if not mine:
                    continue
                colour = colours[index % len(colours)]
                axis.plot(
                    [row["flops"] / row["bytes"] for row in mine],
                    [row["flops"] / row["median_s"] / scale for row in mine],
                    MARKERS[index % len(MARKERS)],
                    markersize=5,
                    color=colour,
                    markerfacecolor=colour if filled else "none",
                    label=f"{peer}, {kind}",
                )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set(xlabel="operations per byte (FLOP/B)", ylabel=unit)
        axis.set_title("the line: a matrix product's rate, and a copy's, in the same run")
        _legend(figure, [axis], columns=3)

    words = "Roofline: operations per second by operations per byte, under the machine's rates"
    return Picture(f"{record['name']}-roofline", words, draw, (7.0, 4.2))
