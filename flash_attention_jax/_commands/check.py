"""The command `check`: every engine on this machine beside dense attention in float64."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._api.attention import flash_attention
from flash_attention_jax._api.cosine import cosine_sim_flash_attention
from flash_attention_jax._api.explain import explain
from flash_attention_jax._commands.line import (
    DTYPES,
    PROG,
    Bar,
    Parser,
    UsageError,
    lengths,
    positive,
)
from flash_attention_jax._engines import dispatch
from flash_attention_jax.compare import value_and_grads

ENTRIES = 2**24
"""Logits that the float64 reference holds at once: 128 MiB of each of a few matrices."""

GROSS = 10.0
"""An engine's error over that of the dense engine in the same dtype from which it is wrong.

Rounding alone stays within 2 for most inputs; a wrong mask or a missing term is off by thousands.
"""


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What the engines are checked on: self-attention of one length."""

    length: int
    batch: int
    heads: int
    dim: int
    dtype: str
    causal: bool
    similarity: str
    seed: int

    def arrays(self) -> list[np.ndarray]:
        """q, k, v and dout; what an engine is given, rounded to the dtype."""
        rng = np.random.default_rng(self.seed)
        shape = (self.batch, self.heads, self.length, self.dim)
        normal = functools.partial(rng.standard_normal, shape, np.float32)
        return [normal().astype(jnp.dtype(self.dtype)) for _ in range(4)]

    def attend(self, name: str | None, **options: Any) -> Callable[..., Any]:
        """The attention function (q, k, v) of an engine."""
        cosine = self.similarity == "cosine"
        function = cosine_sim_flash_attention if cosine else flash_attention
        options = {"causal": self.causal, "implementation": name, **options}
        return functools.partial(function, **options)

    def why_not(self, name: str) -> str | None:
        """Why an engine declines, None where it does not."""
        q = jax.ShapeDtypeStruct((self.batch, self.heads, self.length, self.dim), self.dtype)
        call = explain(q, q, q, causal=self.causal, similarity=self.similarity).call
        return dispatch.named(name).why_not(call)


@dataclasses.dataclass
class _Row:
    """One engine at one length: figures, or the reason why there are none."""

    name: str
    reason: str | None = None
    errors: list[float] = dataclasses.field(default_factory=list)
    forward: list[float] = dataclasses.field(default_factory=list)
    both: list[float] = dataclasses.field(default_factory=list)
    memory: int | None = None
    run: tuple[Callable[..., Any], Callable[..., Any]] | None = None


def _reference(problem: _Problem, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """out, dq, dk and dv by the dense engine in float64, a block of queries at a time."""
    rows = max(1, min(problem.length, ENTRIES // (problem.batch * problem.heads * problem.length)))
    with jax.enable_x64(True):
        q, k, v, dout = (np.asarray(x).astype(np.float64) for x in arrays)

        @jax.jit
        def block(q: Any, k: Any, v: Any, dout: Any, start: Any) -> Any:
            attend = problem.attend("dense", q_offset=start)
            return value_and_grads(attend, q, k, v, dout)

        out, dq, dk, dv = (np.zeros(x.shape, np.float64) for x in (q, q, k, v))
        for start in range(0, problem.length, rows):
            at = (slice(None), slice(None), slice(start, start + rows))
            part = block(q[at], k, v, dout[at], np.int32(start))
            out[at], dq[at] = np.asarray(part[0]), np.asarray(part[1])
            dk += np.asarray(part[2])
            dv += np.asarray(part[3])
    return [out, dq, dk, dv]


def _compile(problem: _Problem, row: _Row, arrays: list[np.ndarray]) -> None:
    """Compile forward, and forward with backward; see whether they fit into memory."""
    attend = problem.attend(row.name)
    q, k, v, dout = arrays
    forward = jax.jit(attend).lower(q, k, v).compile()
    both = jax.jit(functools.partial(value_and_grads, attend)).lower(q, k, v, dout).compile()
    analysis = both.memory_analysis()
    row.memory = None if analysis is None else int(analysis.temp_size_in_bytes)
    free = _free_memory()
    if row.memory is not None and free is not None and row.memory > free:
        row.reason = f"needs {_size(row.memory)} of temporary memory, {_size(free)} are free"
        return
    row.run = forward, both


def _measure(rows: list[_Row], arrays: list[np.ndarray], rounds: int, bar: Bar) -> None:
    """Time what was compiled, in turn within each round, so that drift meets all alike."""
    q, k, v, dout = (jnp.asarray(x) for x in arrays)
    for _ in range(rounds):
        for row in rows:
            if row.run is not None:
                forward, both = row.run
                row.forward.append(_seconds(forward, q, k, v))
                row.both.append(_seconds(both, q, k, v, dout))
        bar.step("times")


def _seconds(run: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start


def _check_length(problem: _Problem, rounds: int, bar: Bar) -> list[_Row]:
    """Every engine at one length."""
    rows = [_Row(name, problem.why_not(name)) for name in dispatch.NAMES]
    # Inputs and results: 8 arrays in the dtype and, for the reference, 8 in float64.
    entries = problem.batch * problem.heads * problem.length * problem.dim
    needed, free = entries * 8 * (8 + jnp.dtype(problem.dtype).itemsize), _free_memory()
    if free is not None and needed > free:
        for row in rows:
            need = f"inputs and reference need {_size(needed)}, {_size(free)} are free"
            row.reason = row.reason or need
        return rows
    arrays = problem.arrays()
    bar.label("float64 reference")
    right = _reference(problem, arrays)
    bar.step()
    for row in rows:
        bar.label(row.name)
        if row.reason is None:
            try:
                _compile(problem, row, arrays)
                if row.run is not None:  # the first run is not timed: it may still allocate
                    jax.block_until_ready(row.run[0](*arrays[:3]))
                    found = row.run[1](*arrays)
                    pairs = zip(found, right, strict=True)
                    row.errors = [_largest_error(np.asarray(x), y) for x, y in pairs]
                    del found
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                row.reason, row.run = "out of memory", None
        bar.step()
    _measure(rows, arrays, rounds, bar)
    return rows


def _largest_error(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(found.astype(np.float64) - right).max())


def _free_memory() -> int | None:
    """Bytes that are free where JAX computes; None where nobody says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    found = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kib = dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]
        found.append(int(kib) * 1024)
    with contextlib.suppress(OSError, ValueError):  # a container may have less
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{x}").read_text()) for x in ("max", "current"))
        found.append(limit - used)
    return min(found, default=None)


def _size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.3g} {unit}"


# --- the table -----------------------------------------------------------------------------------

HEADER = (
    f"{'length':>8}  {'engine':<12}  {'out':>7} {'dq':>7} {'dk':>7} {'dv':>7}"
    f"  {'forward':>10} {'fwd+bwd':>10} {'memory':>9}  {'forward':>8} {'fwd+bwd':>8} {'memory':>8}"
)
ABOVE = f"{'':>22}  {'largest error':^31}  {'time and temporary memory':^31}  {'over dense':^26}"


def _lines(length: int, rows: list[_Row]) -> Iterator[str]:
    """A line per engine; ratios are the engine's figure over that of the dense engine."""
    dense = next(row for row in rows if row.name == "dense")
    for row in rows:
        start = f"{length:>8}  {row.name:<12}"
        if row.run is None:
            yield f"{start}  -  {row.reason}"
            continue
        errors = " ".join(f"{x:>7.0e}" for x in row.errors)
        times = [statistics.median(x) for x in (row.forward, row.both)]
        figures = " ".join(f"{1e3 * x:>7.2f} ms" for x in times)
        memory = "-" if row.memory is None else _size(row.memory)
        # A time over dense is taken within each round, so that the machine's drift cancels.
        pairs = ((row.forward, dense.forward), (row.both, dense.both))
        ratios = [
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True)) if theirs else None
            for mine, theirs in pairs
        ]
        ratios.append(row.memory / dense.memory if row.memory and dense.memory else None)
        shown = " ".join(f"{'-' if x is None else f'{x:.2f}x':>8}" for x in ratios)
        yield f"{start}  {errors}  {figures} {memory:>9}  {shown}"


def _wrong(rows: list[_Row], dtype: str) -> list[str]:
    """Engines whose error is not one of rounding; without dense, those that are not finite."""
    dense = next(row for row in rows if row.name == "dense").errors or [np.inf] * 4
    # Where dense is exact, as for a single key, others may still round.
    bounds = [GROSS * max(error, float(jnp.finfo(dtype).eps)) for error in dense]
    return [
        row.name
        for row in rows
        if row.errors
        and not all(
            np.isfinite(error) and error <= bound
            for error, bound in zip(row.errors, bounds, strict=True)
        )
    ]


def _parser() -> Parser:
    parser = Parser(
        prog=f"{PROG} check",
        description="Compare every engine on this machine with dense attention in float64: the "
        "largest error of the output and of the gradients under a random cotangent, the median "
        "time, and the temporary memory of forward + backward.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--lengths", type=lengths, default="512,1024", help="sequence lengths, commas between")
    add("--batch", type=positive, default=1, help="batch size")
    add("--heads", type=positive, default=8, help="heads")
    add("--dim", type=positive, default=64, help="dimension of a head")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of q, k and v")
    add("--similarity", choices=("dot", "cosine"), default="dot", help="of queries and keys")
    add("--causal", action="store_true", help="with causal masking")
    add("--rounds", type=positive, default=5, help="timed runs of each engine")
    add("--seed", type=int, default=42, help="of the inputs")
    return parser


def check_main(argv: list[str]) -> int:
    """The command `check`: a table of every engine on this machine.

    Args:
        argv: Arguments after `check`; ["--help"] lists them.

    Returns:
        The exit code: 0; 1 if an engine is wrong; 2 for arguments that it cannot use.
    """
    try:
        args = _parser().parse_args(argv)
        if args.seed < 0:
            raise UsageError(
                f"{_parser().prog}: error: argument --seed: must be at least 0, got {args.seed}"
            )
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    # Only float64 needs it; the others are run as they would be run without this command.
    with jax.enable_x64(True) if args.dtype == "float64" else contextlib.nullcontext():
        return _check_lengths(args)


def _check_lengths(args: argparse.Namespace) -> int:
    device = jax.local_devices()[0]
    kind = "" if device.platform == "cpu" else f" ({device.device_kind})"
    options = f"{'causal ' if args.causal else ''}{args.similarity} {args.dtype}"
    print(
        f"{options}, batch {args.batch}, {args.heads} heads of {args.dim}, on {device.platform}"
        f"{kind}, jax {jax.__version__}, medians of {args.rounds}\n\n{ABOVE}\n{HEADER}"
    )
    bar = Bar(len(args.lengths) * (1 + len(dispatch.NAMES) + args.rounds))
    wrong = []
    try:
        for length in args.lengths:
            problem = _Problem(
                length,
                args.batch,
                args.heads,
                args.dim,
                args.dtype,
                args.causal,
                args.similarity,
                args.seed,
            )
            rows = _check_length(problem, args.rounds, bar)
            for line in _lines(length, rows):
                bar.write(line)
            wrong += [f"{name} at length {length}" for name in _wrong(rows, args.dtype)]
    finally:
        bar.close()
    for what in wrong:
        print(f"wrong: {what} is off by more than {GROSS:.0f} times the error of dense")
    return 1 if wrong else 0
