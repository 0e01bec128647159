"""The kit of the command line: parsers, their errors, and a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import NoReturn

PROG = "flash_attention_jax"
"""What a command calls itself in its messages."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Dtypes that a command takes."""


def on_terminal() -> bool:
    """Whether stderr can redraw a line: in a pipe or a log each carriage return would stay."""
    return sys.stderr is not None and sys.stderr.isatty()


class Bar:
    """A progress bar on a terminal's stderr: tqdm's where it is installed, else a plain one."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._label = total, 0, ""
        self._shown, self._tqdm = on_terminal(), None
        if not self._shown:
            return
        # A broken tqdm counts as an absent one: the plain bar serves.
        with contextlib.suppress(Exception):
            from tqdm import tqdm

            self._tqdm = tqdm(total=total, leave=False, file=sys.stderr)

    def label(self, text: str) -> None:
        """Say what is being done."""
        self._label = text
        self._show()

    def step(self, text: str | None = None) -> None:
        """One step is done."""
        self._done += 1
        self._label = self._label if text is None else text
        if self._tqdm is not None:
            self._tqdm.update()
        self._show()

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        self.clear()
        print(line, flush=True)
        self._show()

    def clear(self) -> None:
        """Take the bar off the screen."""
        if self._tqdm is not None:
            self._tqdm.clear()
        elif self._shown:
            print(f"\r{'':<70}\r", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The end."""
        self.clear()
        if self._tqdm is not None:
            self._tqdm.close()

    def _show(self) -> None:
        if self._tqdm is not None:
            self._tqdm.set_description(self._label)
            return
        if not self._shown:
            return
        full = 30 * self._done // self._total
        text = f"[{'#' * full}{'.' * (30 - full)}] {self._done}/{self._total} {self._label}"
        print(f"\r{text:<70}", end="", file=sys.stderr, flush=True)


class UsageError(Exception):
    """Arguments that a command cannot use, in one line."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are exceptions of one line."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for arguments that it cannot use."""
        raise UsageError(f"{self.prog}: error: {message}")


def lengths(text: str) -> list[int]:
    """Lengths from "512,1024"."""
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(found):
        raise argparse.ArgumentTypeError(
            f"must be positive integers with commas between, got {text!r}"
        )
    return found


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)
