"""How things are measured: interleaved rounds, medians with quartiles, what the compiler says.

On a shared or warming machine the speed of everything drifts. So the cases that will be compared
run in turn within each round, in an order shuffled per round, and a ratio is taken within the
round: the drift cancels. Figures of different runs are never divided.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import importlib.metadata
import math
import os
import platform
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[1]
Key = TypeVar("Key", bound=Hashable)

SHORTEST = 0.02  # seconds; a case is called as often as fills them, for a clock to see
MOST_CALLS = 200
# Seconds before a case is timed: idle threads of the library before it (torch's, above all) go on
# spinning for a moment, and would take a core from whichever case comes next.
PAUSE = 0.01
# Inputs rotate through as much memory as this, so that none waits in a cache that belongs to this
# process alone: twice the private cache of a server's core, five times the L2 of an H200.
ROTATED_BYTES = {"cpu": 2**26, "gpu": 2**28}
MOST_SETS = 16


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


def relative_error(result: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference over the largest magnitude; infinite where anything is not finite."""
    if not np.isfinite(result).all():
        return float("inf")
    return float(np.abs(result - reference).max() / np.abs(reference).max())


# --- time ------------------------------------------------------------------------------------


def time_call(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """How long one call takes that returns when its work is done."""
    start = clock()
    run()
    return clock() - start


def make_timer(
    run: Callable[[int], Any], clock: Callable[[], float] = time.perf_counter
) -> Callable[[], float]:
    """A function that measures one call of `run`, which is warm and returns when it is done.

    Short calls are repeated in each round, as often as fills SHORTEST.

    Args:
        run: does its work as many times as it is told.
        clock: tells the time in seconds.
    """
    calls: list[int] = []

    def time_once() -> float:
        if not calls:
            first = max(time_call(lambda: run(1), clock), 1e-9)
            calls.append(min(max(math.ceil(SHORTEST / first), 1), MOST_CALLS))
            if calls == [1]:
                return first
        return time_call(lambda: run(calls[0]), clock) / calls[0]

    return time_once


def repeat(run: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> Callable[[int], None]:
    """A function that calls one of JAX as often as told, on one set of arguments after another."""
    waits = jax.default_backend() == "cpu"  # a GPU works through a queue; a CPU's calls overlap

    def calls(count: int) -> None:
        done = None
        for index in range(count):
            done = run(*sets[index % len(sets)])
            if waits:
                jax.block_until_ready(done)
        jax.block_until_ready(done)

    return calls


def interleave(
    cases: Mapping[Key, Callable[[], float]],
    rounds: int,
    *,
    at_least: int | None = None,
    seconds: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[Key, float]]:
    """Time every case once per round, in an order shuffled anew; yield the seconds of each round.

    Args:
        cases: each runs what it times and returns the seconds that one call took, as the function
            that `make_timer` makes.
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
            time.sleep(PAUSE)
            times[name] = cases[name]()
        yield {name: times[name] for name in cases}


def count_sets(nbytes: int, platform_name: str) -> int:
    """How many sets of inputs of a size to rotate through."""
    wanted = ROTATED_BYTES.get(platform_name, ROTATED_BYTES["cpu"])
    return min(max(math.ceil(wanted / max(nbytes, 1)), 1), MOST_SETS)


# --- what the machine can do -----------------------------------------------------------------


def measure_rates(*, quick: bool = False) -> dict[str, Any]:
    """The rate of a matrix product and of a copy on JAX's default device, in this run.

    Returns:
        "matmul" (operations per second) in "dtype", and "copy" (bytes read and written per second).
    """
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    n, size = (64, 2**12) if quick else (8192, 2**28) if gpu else (2048, 2**26)
    a, b = (jax.random.normal(key, (n, n), dtype) for key in jax.random.split(jax.random.key(1)))
    x = jax.random.normal(jax.random.key(2), (size,), dtype)

    def median(function: Callable[..., jax.Array], *operands: jax.Array) -> float:
        run = repeat(jax.jit(function), [operands])
        run(1)  # compiles
        time_once = make_timer(run)
        return summarize([time_once() for _ in range(3 if quick else 7)]).median

    product = median(lambda a, b: a @ b, a, b)
    copy = median(lambda x: x + jnp.ones((), dtype), x)
    return {
        "dtype": jnp.dtype(dtype).name,
        "matmul": 2.0 * n**3 / product,
        "copy": 2.0 * x.nbytes / copy,
    }


def device_seconds(run: Any, arguments: Sequence[Any], calls: int = 5) -> float | None:
    """Median seconds that the GPU's kernels take in one call, by CUPTI; None where it is not told.

    Args:
        run: compiled by JAX.
        arguments: of it.
        calls: how many are looked at.
    """
    if jax.default_backend() != "gpu":
        return None
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, milliseconds = profiler.measure(run, iterations=calls)(*arguments)
    except Exception:  # noqa: BLE001 (a profiler that fails leaves a cell empty)
        return None
    return None if milliseconds is None else summarize(milliseconds).median / 1e3


def available_bytes() -> int | None:
    """Memory that a new case may take on this machine; None where it is not told."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(
            next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        )
    except (OSError, StopIteration):
        return None


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not ru_maxrss: Linux lets a process begin with that of the one that started it.
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def thread_count() -> int:
    """The cores that this process may use: as many threads as JAX's CPU backend has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- what goes wrong -------------------------------------------------------------------------

FAILURES = (RuntimeError, MemoryError, NotImplementedError, TypeError, ValueError, OSError)
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "allocate memory")
# After these no later call of the process can be trusted.
FATAL = (
    "ILLEGAL_ADDRESS",
    "illegal memory access",
    "LAUNCH_FAILED",
    "LAUNCH_TIMEOUT",
    "misaligned",
)


def describe_failure(error: BaseException) -> str:
    """What a table says of a case that could not run."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return "oom"
    kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
    return f"failed: {kind}{lines[0][:200]}"


def is_fatal(error: BaseException) -> bool:
    """Whether the device is lost to this process."""
    return any(words.lower() in str(error).lower() for words in FATAL)


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


def compile_cold(function: Callable[..., Any], *arguments: Any) -> Build:
    """Compile for these arguments (arrays, or their shapes), from cold caches."""
    jax.clear_caches()
    start = time.perf_counter()
    run = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = run.memory_analysis()
    return Build(run, seconds, None if memory is None else int(memory.temp_size_in_bytes))


# --- where and with what ---------------------------------------------------------------------


def list_versions() -> dict[str, str | None]:
    """The versions of Python and of what the benchmark runs; None for what is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("flash-attention-jax", "jax", "jaxlib", "numpy", "torch", "tokamax", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def describe_machine() -> dict[str, Any]:
    """The processor, its cores and its load, and the settings that change speed."""
    gpu = jax.default_backend() == "gpu"
    settings = ("XLA_FLAGS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC")
    return {
        "cpu": _cpu_model(),
        **({"gpu": jax.devices()[0].device_kind} if gpu else {}),
        "cores": os.cpu_count(),
        "threads": thread_count(),
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


def read_commit() -> dict[str, Any]:
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
