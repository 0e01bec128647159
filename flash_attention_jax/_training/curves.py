"""The record of a training run: a row of numbers for each step, and pictures of them."""

from __future__ import annotations

import csv
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from flash_attention_jax._core.optional import needs
from flash_attention_jax.data import replacing

__all__ = ["COLUMNS", "Curves", "draw", "read"]

COLUMNS = (
    "step",  # from 1: how many steps are done
    "bits_per_byte",
    "gradient_norm",  # before it is clipped
    "learning_rate",
    "tokens_per_second",
    "validation",  # bits per byte on held-out text; empty where it was not measured
)
SMOOTHED = 0.05  # of the run: the width of the mean that the picture shows


class Curves:
    """The file `log.csv` of a run, which has each step's row before the next step begins.

    The same numbers go to TensorBoard's files in `tensorboard`, if it is installed.

    Attributes:
        path: the file.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> with Curves(folder, done=0) as curves:
        ...     curves.add(step=1, bits_per_byte=8.0, learning_rate=0.1)
        >>> read(folder)["bits_per_byte"]
        array([8.])
    """

    def __init__(self, folder: Path, *, done: int) -> None:
        """Opens the log of `folder`, and forgets what came after step `done`.

        Args:
            folder: that of the run.
            done: how many steps the checkpoint has that the run goes on from. A run that was killed
                has rows beyond it, which will be written again.
        """
        self.path = folder / "log.csv"
        kept = [row for row in _rows(self.path) if int(row["step"]) <= done]
        with replacing(self.path) as file:
            lines = [COLUMNS, *([row[name] for name in COLUMNS] for row in kept)]
            file.write("".join(",".join(line) + "\n" for line in lines).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._board = _board(folder / "tensorboard")

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def add(self, *, step: int, **values: float | np.floating[Any]) -> None:
        """Writes the row of a step.

        Args:
            step: how many steps are done.
            **values: numbers for some of `COLUMNS`; others stay empty. A float32 is written with as
                many digits as tell it from all others.
        """
        row = {"step": str(step), **{name: str(value) for name, value in values.items()}}
        self._file.write(",".join(row.get(name, "") for name in COLUMNS) + "\n")
        self._file.flush()  # to the system, which keeps it when this process is killed
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)

    def sync(self) -> None:
        """Waits until all rows are on the disk, as a checkpoint that comes after them will be."""
        os.fsync(self._file.fileno())


def read(folder: Path) -> dict[str, Float[np.ndarray, " steps"]]:
    """The curves of a run.

    Args:
        folder: that of the run, with its `log.csv`.

    Returns:
        A float64 array for each of `COLUMNS`, one element per step; NaN where nothing was measured.
    """
    rows = _rows(folder / "log.csv")
    return {
        name: np.asarray([float(row[name] or "nan") for row in rows], np.float64)
        for name in COLUMNS
    }


def draw(folder: Path, title: str) -> Path:
    """Draws the curves of a run.

    Args:
        folder: that of the run, with its `log.csv`.
        title: stands above them.

    Returns:
        The picture, `curves.png` in `folder`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with needs("flash_attention_jax.train", "matplotlib", extra="train"):
        from matplotlib.figure import Figure  # without pyplot, which would choose a window system

    curves = read(folder)
    step, bits = curves["step"], curves["bits_per_byte"]
    measured = ~np.isnan(curves["validation"])
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    left, right = figure.subplots(1, 2)
    left.plot(step, bits, color="C0", alpha=0.3, linewidth=0.8)
    left.plot(step, _smooth(bits), color="C0", label="training")
    if measured.any():
        left.plot(step[measured], curves["validation"][measured], "o-", color="C1", ms=4, lw=1,
                  label="held-out text")  # fmt: skip
    left.set(xlabel="step", ylabel="bits per byte")
    left.legend()
    right.semilogy(step, curves["gradient_norm"], color="C2", linewidth=0.8)
    right.set(xlabel="step", ylabel="norm of the gradient")
    rate = right.twinx()
    rate.plot(step, curves["learning_rate"], color="C3")
    rate.set_ylabel("learning rate", color="C3")
    path = folder / "curves.png"
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)
    return path


def _rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a log, without one that a kill cut short; none where there is no log."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    whole, _, _ = text.rpartition("\n")
    return list(csv.DictReader(whole.splitlines()))


def _smooth(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The mean over the last few values, of fewer at the beginning."""
    width = max(1, round(SMOOTHED * len(values)))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _board(folder: Path) -> Any:
    """A writer of TensorBoard's files; `None` where it is not installed."""
    if find_spec("tensorboard") is None:
        return None
    # Not a part of any extra, and anyone's other version may be the one that is installed.
    try:
        from tensorboard.summary import Writer  # pyright: ignore[reportMissingImports]
    except (ImportError, AttributeError) as error:
        print(f"TensorBoard is installed and does not import, so it gets no curves: {error}")
        return None
    return Writer(str(folder))
