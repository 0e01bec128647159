"""How things are measured: interleaved rounds, medians with quartiles, what the compiler says.

On a shared or warming machine the speed of everything drifts. So the cases that will be compared
run in turn within each round, in an order shuffled per round, and a ratio is taken within the
round: the drift cancels. Figures of different runs are never divided.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import os
import platform
import random
import subprocess
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

ROOT = Path(__file__).parents[1]
Key = TypeVar("Key", bound=Hashable)


# --- summaries -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Summary:
    """The middle of some numbers and how they spread.

    Attributes:
        median: half lie below.
        low: the first quartile.
        high: the third quartile.
        count: how many numbers there were.
    """

    median: float
    low: float
    high: float
    count: int


def summarize(values: Sequence[float]) -> Summary:
    """Median and quartiles, interpolated between the values as NumPy does.

    Raises:
        ValueError: If there are no values.
    """
    if not values:
        raise ValueError("`values` must hold at least one number, got none.")
    low, median, high = np.quantile(np.asarray(values, np.float64), [0.25, 0.5, 0.75])
    return Summary(float(median), float(low), float(high), len(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Summary:
    """Summary of above / below, each taken within one round.

    Raises:
        ValueError: Unless both ran in the same rounds.
    """
    return summarize([a / b for a, b in zip(above, below, strict=True)])


def relative_error(found: np.ndarray, right: np.ndarray) -> float:
    """The largest difference over the largest magnitude; infinite where anything is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - right).max() / np.abs(right).max())


# --- time ------------------------------------------------------------------------------------


def interleaved(
    cases: Mapping[Key, Callable[[], Any]],
    rounds: int,
    *,
    at_least: int | None = None,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[Key, float]]:
    """Run every case once per round, in an order shuffled anew; yield the seconds of each round.

    Args:
        cases: what to run; each returns when its work is done, and is warm already.
        rounds: rounds to run.
        at_least: rounds that are run even beyond `seconds`; None = all.
        seconds: no round is begun after this long.
        clock: tells the time in seconds.
    """
    order = list(cases)
    shuffle = random.Random(0).shuffle
    begin = clock()
    for index in range(rounds):
        if index >= (rounds if at_least is None else at_least) and clock() - begin > seconds:
            return
        shuffle(order)
        times = {}
        for name in order:
            start = clock()
            cases[name]()
            times[name] = clock() - start
        yield {name: times[name] for name in cases}


# --- the compiler ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Build:
    """A compiled function.

    Attributes:
        run: the function.
        seconds: to trace, lower and compile.
        temp_bytes: temporary memory beside arguments and results, None where XLA does not say.
    """

    run: Callable[..., Any]
    seconds: float
    temp_bytes: int | None


def compiled(function: Callable[..., Any], *arguments: Any) -> Build:
    """Compile for these arguments (arrays, or their shapes), from cold caches."""
    jax.clear_caches()
    start = time.perf_counter()
    run = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = run.memory_analysis()
    return Build(run, seconds, None if memory is None else int(memory.temp_size_in_bytes))


# --- where and with what ---------------------------------------------------------------------


def versions() -> dict[str, str | None]:
    """Of Python and of what the benchmark runs; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("flash-attention-jax", "jax", "jaxlib", "numpy", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def machine() -> dict[str, Any]:
    """The processor, its cores and its load, and the settings that change speed."""
    settings = ("XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "environment": {name: os.environ[name] for name in settings if name in os.environ},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> dict[str, Any]:
    """The git commit that is measured, and whether the files differ from it; None where unknown."""
    head, status = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return {"commit": head, "dirty": None if status is None else bool(status)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], check=False, cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def now() -> str:
    """The date and time, UTC."""
    return dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
