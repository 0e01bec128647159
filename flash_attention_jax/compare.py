"""Comparisons of attention functions: with each other, and of every engine here with float64.

`value_and_grad_difference` compares two functions; `python -m flash_attention_jax check` prints a
table of all engines on this machine (`check_main`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax import _attention, _check, _cosine, _dispatch, _explain

__all__ = [
    "Difference",
    "Gradients",
    "PRNGKeyGenerator",
    "check_main",
    "value_and_grad_difference",
]

ENTRIES = 2**24
"""Logits that the float64 reference holds at once: 128 MiB of each of a few matrices."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
GROSS = 10.0
"""An engine's error over that of the dense engine in the same dtype from which it is wrong.

Rounding alone stays within 2 for most inputs; a wrong mask or a missing term is off by thousands.
"""


# --- two functions -------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """The largest elementwise differences of the gradients of two attention functions.

    Attributes:
        dq: Of those with respect to the queries.
        dk: With respect to the keys.
        dv: With respect to the values.
    """

    dq: float
    dk: float
    dv: float


class Difference(NamedTuple):
    """The largest elementwise differences of two attention functions; print it, or unpack it.

    Attributes:
        o: Of the outputs.
        gradients: Of the gradients, (dq, dk, dv).
    """

    o: float
    gradients: Gradients

    def __str__(self) -> str:
        """The four on a line."""
        four = {"o": self.o, **self.gradients._asdict()}
        return "  ".join(f"{name} {x:.1e}" for name, x in four.items())


class PRNGKeyGenerator:
    """An endless iterator of independent random keys: `next(keys)`.

    Args:
        seed: Where it starts; the same seed gives the same keys in the same order.

    Raises:
        TypeError: If `seed` is not an integer.
        ValueError: If `seed` is negative.

    Example:
        >>> import jax
        >>> from flash_attention_jax import PRNGKeyGenerator
        >>> keys = PRNGKeyGenerator(seed=42)
        >>> jax.random.normal(next(keys), (2, 3)).shape
        (2, 3)
    """

    def __init__(self, seed: int = 42) -> None:
        self._key = jax.random.key(_check.whole("seed", seed, least=0))

    def __iter__(self) -> Iterator[jax.Array]:
        return self

    def __next__(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key


def value_and_grad_difference(
    fn1: Callable[..., Any],
    fn2: Callable[..., Any],
    seed: int = 42,
    batch: int = 2,
    heads: int = 4,
    q_seq_len: int = 4096,
    k_seq_len: int = 8192,
    add_key_mask: bool = True,
    dim: int = 512,
) -> Difference:
    """Compare the outputs and gradients of two attention functions on random float32 inputs.

        o = max |fn1(q, k, v, mask) - fn2(q, k, v, mask)|,  dq, dk, dv likewise

    The gradients are those under a random cotangent of the output, so each entry of each is
    compared on its own: a sum of outputs could hide differences that cancel.

    The default sizes are heavy: 2e12 floating-point operations per function (about a minute on two
    CPU cores), and for a function that holds its logits several matrices of 1 GiB. Of the first
    function, out, dq, dk and dv are kept while the second runs, and nothing else.

    Args:
        fn1: A function of this library, or any that is called as fn(q, k, v) or, with
            `add_key_mask`, fn(q, k, v, mask), heads first. A function whose first parameter is
            named `query` is called as `jax.nn.dot_product_attention` is. Options are bound with
            `functools.partial`. Of a pair (out, lse) the first counts.
        fn2: As fn1.
        seed: Of the inputs, the mask and the cotangent.
        batch: Batch size.
        heads: Heads of queries, keys and values.
        q_seq_len: Queries.
        k_seq_len: Keys.
        add_key_mask: Whether to pass a padding mask (batch, k_seq_len) that keeps the first keys
            of each batch entry, 1 .. k_seq_len of them at random.
        dim: Dimension of queries, keys and values.

    Returns:
        (o, (dq, dk, dv)), the largest differences, as a named pair and a named triple; NaN where
        either function gives NaN.

    Raises:
        TypeError: If fn1 or fn2 is no function, or a size no integer.
        ValueError: If a size is not positive, or an output has not the shape of the queries.

    Example:
        >>> from flash_attention_jax import attention, flash_attention, value_and_grad_difference
        >>> sizes = {"batch": 1, "heads": 2, "q_seq_len": 30, "k_seq_len": 40, "dim": 16}
        >>> diff, (dq, dk, dv) = value_and_grad_difference(
        ...     attention, flash_attention, seed=42, **sizes
        ... )
        >>> max(diff, dq, dk, dv) < 1e-5
        True
    """
    for name, fn in (("fn1", fn1), ("fn2", fn2)):
        if not callable(fn):
            advice = "Pass one such as `flash_attention`."
            _check.fail(name, "be a function", _check.shown(fn), advice, TypeError)
    sizes = {"batch": batch, "heads": heads, "q_seq_len": q_seq_len, "k_seq_len": k_seq_len}
    for name, size in (sizes | {"dim": dim}).items():
        _check.whole(name, size, least=1)
    keys = PRNGKeyGenerator(seed)

    def normal(length: int) -> jax.Array:
        return jax.random.normal(next(keys), (batch, heads, length, dim), jnp.float32)

    q, k, v, dout = map(normal, (q_seq_len, k_seq_len, k_seq_len, q_seq_len))
    mask = None
    if _check.flag("add_key_mask", add_key_mask):
        lengths = jax.random.randint(next(keys), (batch, 1), 1, k_seq_len + 1, jnp.int32)
        mask = jnp.arange(k_seq_len, dtype=jnp.int32) < lengths
    first = list(_results("fn1", fn1, mask)(q, k, v, dout))
    second = list(_results("fn2", fn2, mask)(q, k, v, dout))
    # From the last to the first, so that both are freed as soon as they are compared.
    dv, dk, dq, o = (_largest_difference(first.pop(), second.pop()) for _ in range(4))
    return Difference(o, Gradients(dq, dk, dv))


def _results(name: str, fn: Callable[..., Any], mask: jax.Array | None) -> Callable[..., Any]:
    """(q, k, v, dout) -> out, dq, dk, dv, compiled, of a function of either convention."""
    try:
        heads_last = next(iter(inspect.signature(fn).parameters), "") == "query"
    except (TypeError, ValueError):
        heads_last = False

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if heads_last:
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
            out = fn(q, k, v, **({} if mask is None else {"mask": mask[:, None, None]}))
        else:
            out = fn(q, k, v, *(() if mask is None else (mask,)))
        out = out[0] if isinstance(out, tuple) else out
        if out.shape != q.shape:
            requirement = f"return an output of the queries' shape {q.shape}"
            _check.fail(name, requirement, str(out.shape), "Bind its options with partial.")
        return jnp.swapaxes(out, 1, 2) if heads_last else out

    return jax.jit(functools.partial(_value_and_grads, attend))


def _value_and_grads(attend: Callable[..., Any], q: Any, k: Any, v: Any, dout: Any) -> Any:
    out, backward = jax.vjp(attend, q, k, v)
    return out, *backward(dout.astype(out.dtype))


@jax.jit
def _largest_difference_jit(a: jax.Array, b: jax.Array) -> jax.Array:
    wide = np.promote_types(np.promote_types(a.dtype, b.dtype), np.float32)
    return jnp.abs(a.astype(wide) - b.astype(wide)).max()


def _largest_difference(a: jax.Array, b: jax.Array) -> float:
    return float(_largest_difference_jit(a, b))


# --- every engine on this machine ----------------------------------------------------------------


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
        function = _cosine.cosine_sim_flash_attention if cosine else _attention.flash_attention
        options = {"causal": self.causal, "implementation": name, **options}
        return functools.partial(function, **options)

    def why_not(self, name: str) -> str | None:
        """Why an engine declines, None where it does not."""
        q = jax.ShapeDtypeStruct((self.batch, self.heads, self.length, self.dim), self.dtype)
        call = _explain.explain(q, q, q, causal=self.causal, similarity=self.similarity).call
        return _dispatch.named(name).why_not(call)


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
            return _value_and_grads(attend, q, k, v, dout)

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
    both = jax.jit(functools.partial(_value_and_grads, attend)).lower(q, k, v, dout).compile()
    analysis = both.memory_analysis()
    row.memory = None if analysis is None else int(analysis.temp_size_in_bytes)
    free = _free_memory()
    if row.memory is not None and free is not None and row.memory > free:
        row.reason = f"needs {_size(row.memory)} of temporary memory, {_size(free)} are free"
        return
    row.run = forward, both


def _measure(rows: list[_Row], arrays: list[np.ndarray], rounds: int, bar: _Bar) -> None:
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


def _check_length(problem: _Problem, rounds: int, bar: _Bar) -> list[_Row]:
    """Every engine at one length."""
    rows = [_Row(name, problem.why_not(name)) for name in _dispatch.NAMES]
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


def on_terminal() -> bool:
    """Whether stderr can redraw a line: in a pipe or a log each carriage return would stay."""
    return sys.stderr is not None and sys.stderr.isatty()


class _Bar:
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


def _parser() -> Parser:
    parser = Parser(
        prog="flash_attention_jax check",
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
    bar = _Bar(len(args.lengths) * (1 + len(_dispatch.NAMES) + args.rounds))
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
