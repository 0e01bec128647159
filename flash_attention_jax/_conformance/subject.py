"""The function under test: called in its own convention, answering in the reference's.

A `Subject` knows what a function calls the options, where its axes are and where its causal
diagonal lies, so that one claim serves every function. How far an answer may be from the reference
is decided here too (`compare`).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._api.plain import attention, plain_cosine_sim_attention
from flash_attention_jax._conformance.reference import Problem, Result, reference

__all__ = ["Failure", "NotOffered", "Subject"]

JAX_NAMES = {
    "causal": "is_causal",
    "window": "local_window_size",
    "softcap": "logits_soft_cap",
    "q_lengths": "query_seq_lengths",
    "kv_lengths": "key_value_seq_lengths",
    "return_lse": "return_residual",
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options for programs that run once: quicker to compile, the same arithmetic."""

DIFFERENTIABLE = ("bias", "scale", "sinks", "alibi_slopes", "relative_bias")


class Failure(AssertionError):  # noqa: N818 (what pytest calls it too)
    """A claim that does not hold, with the numbers."""


class NotOffered(Exception):  # noqa: N818 (no error: an answer)
    """The function does not take what the claim is about."""


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """An attention function, and how to call it.

    Attributes:
        function: Called as function(q, k, v, **options).
        layout: "heads_last" for jax.nn's convention and names, "heads_first" for
            `flash_attention`'s.
        dtype: Dtype in which claims that name none are tried.
        cosine: Whether the function's own similarity is the cosine.
        default_scale: The function's scale where none is passed; None = 1 / sqrt(d).
        alignment: Where the causal diagonal ends ("end") or starts ("start") without an offset.
        names: What the function calls the options where it differs from `flash_attention`.
        fixed: Options passed with every call.
        compiler_options: As in `jax.jit`.
        x64: Whether the claims run with 64-bit types enabled, as those about float64 need.
    """

    function: Callable[..., Any]
    layout: str = "heads_last"
    dtype: str = "float32"
    cosine: bool = False
    default_scale: float | None = None
    alignment: str | None = None
    names: dict[str, str] = dataclasses.field(default_factory=dict)
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiler_options: dict[str, Any] | None = None
    x64: bool = True

    def name(self, option: str) -> str:
        """What the function calls an option."""
        own = JAX_NAMES if self.layout == "heads_last" else {}
        return self.names.get(option, own.get(option, option))

    @functools.cached_property
    def parameters(self) -> tuple[frozenset[str], bool]:
        """Names of the function's parameters, and whether it takes any keyword."""
        try:
            found = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            return frozenset(), True
        anything = any(p.kind is p.VAR_KEYWORD for p in found)
        return frozenset(p.name for p in found), anything

    def takes(self, option: str) -> bool:
        """Whether the signature has room for an option."""
        names, anything = self.parameters
        return anything or self.name(option) in names

    def needs(self, options: Iterable[str]) -> None:
        """Raise `NotOffered` for the first option that the signature lacks."""
        for option in options:
            if not self.takes(option):
                raise NotOffered(f"no argument `{self.name(option)}`")

    def aligned(self, problem: Problem) -> Problem:
        """The problem with its offset written out, where this function's own is not 0."""
        if "q_offset" in problem.options:
            return problem
        alignment = self.alignment or ("start" if self.layout == "heads_last" else "end")
        offset = problem.k.shape[2] - problem.q.shape[2] if alignment == "end" else 0
        return dataclasses.replace(problem, options={**problem.options, "q_offset": offset})

    # --- calling ---

    def arguments(self, problem: Problem, dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The problem as (arrays, static options), in the function's layout and dtype."""
        arrays: dict[str, Any] = {}
        static: dict[str, Any] = dict(self.fixed)
        for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v)):
            turned = np.swapaxes(x, 1, 2) if self.layout == "heads_last" else x
            arrays[name] = jnp.asarray(turned, dtype)
        if problem.cosine != self.cosine:
            self.needs(["similarity"])
            static["similarity"] = "cosine" if problem.cosine else "dot"
        if problem.groups != 1:
            self.needs(["groups"])
            static["groups"] = problem.groups
        for name, x in problem.options.items():
            self.needs([name])
            if isinstance(x, np.ndarray) and x.dtype.kind == "f":
                # Terms of the logits in float32 at least, so that their rounding is not what is
                # measured.
                arrays[name] = jnp.asarray(x, np.promote_types(jnp.dtype(dtype), np.float32))
            elif isinstance(x, (np.ndarray, jax.Array)):
                arrays[name] = x
            else:
                static[name] = x
        # Ids and lengths as one gives them: per batch.
        batch = problem.q.shape[0]
        for name in ("q_segment_ids", "kv_segment_ids"):
            if name in arrays:
                arrays[name] = jnp.broadcast_to(arrays[name], (batch, arrays[name].shape[-1]))
        if "q_offset" in arrays and arrays["q_offset"].shape[-1:] == (1,):
            arrays["q_offset"] = jnp.broadcast_to(arrays["q_offset"][:, 0], (batch,))
        return arrays, static

    def call(self, arrays: dict[str, Any], static: dict[str, Any]) -> tuple[Any, Any]:
        """Output and lse (None where not asked for), heads first."""
        options = {
            self.name(name): x for name, x in {**arrays, **static}.items() if name not in "qkv"
        }
        try:
            result = self.function(arrays["q"], arrays["k"], arrays["v"], **options)
        except (NotImplementedError, TypeError, ValueError) as error:
            raise NotOffered(str(error).splitlines()[0] if str(error) else repr(error)) from error
        out, lse = result if static.get("return_lse") else (result, None)
        if self.layout == "heads_last":
            out = jnp.swapaxes(out, 1, 2)
            lse = None if lse is None else jnp.swapaxes(lse, 1, 2)
        return out, lse

    def program(self, problem: Problem, dtype: Any = None) -> tuple[Callable[..., Any], Any]:
        """A function (floats, others) -> out, or (out, lse), and those two dicts of arrays."""
        arrays, static = self.arguments(problem, dtype or self.dtype)
        floats = {name: x for name, x in arrays.items() if name in ("q", "k", "v", *DIFFERENTIABLE)}
        others = {name: x for name, x in arrays.items() if name not in floats}

        def run(floats: dict[str, Any], others: dict[str, Any]) -> Any:
            out, lse = self.call({**floats, **others}, static)
            return out if lse is None else (out, lse)

        return run, (floats, others)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`jax.jit` as this subject is to be compiled."""
        return jax.jit(function, compiler_options=self.compiler_options)

    def run(self, problem: Problem, dtype: Any = None, *, gradients: bool = True) -> Result:
        """Call the function under `jax.jit`, and pull the problem's cotangents back."""
        run, (floats, others) = self.program(problem, dtype)
        if gradients:

            def both(floats: Any, others: Any, cotangents: Any) -> Any:
                result, pull = jax.vjp(lambda floats: run(floats, others), floats)
                cotangents = cotangents if isinstance(result, tuple) else cotangents[0]
                same = jax.tree.map(lambda x, y: x.astype(y.dtype), cotangents, result)
                return result, pull(same)[0]

            result, pulled = self.jit(both)(floats, others, problem.cotangents)
        else:
            result, pulled = self.jit(run)(floats, others), {}
        out, lse = result if isinstance(result, tuple) else (result, None)
        found = {name: np.asarray(x, np.float64) for name, x in pulled.items()}
        if self.layout == "heads_last":
            found |= {name: np.swapaxes(found[name], 1, 2) for name in found if name in "qkv"}
        return Result(
            np.asarray(out, np.float64),
            None if lse is None else np.asarray(lse, np.float64),
            found,
        )

    # --- comparing ---

    def expected(
        self, problem: Problem, *, gradients: bool = True, keep: np.ndarray | None = None
    ) -> Result:
        """The reference's answer."""
        problem = self.aligned(problem)
        if keep is not None:
            return reference(problem, self.default_scale, keep, gradients=gradients)
        return _answer(problem, self.default_scale, gradients)

    def check(
        self,
        problem: Problem,
        *,
        dtype: str | None = None,
        gradients: bool = True,
        keep: np.ndarray | None = None,
        like: Problem | None = None,
    ) -> Result:
        """Compare with the reference: out, lse where asked for, and every gradient.

        With `like`, with the reference's answer to that problem, which is the same but for terms
        that should not matter.

        An error may be twice that of the plain formula computed by XLA in the same dtype
        (`attention`), plus a few units in the last place of the accumulator, and of the largest
        logit: rounded there, it moves a probability by as much relative to its size. What has q's
        dtype may also miss by half a unit in its own last place, as the exact value rounded does.

        Raises:
            Failure: With what differs, by how much, and what was allowed.
            NotOffered: If the function does not take the problem.
        """
        dtype = dtype or self.dtype
        problem = rounded(problem, dtype)
        got = self.run(problem, dtype, gradients=gradients)
        problem = problem if like is None else rounded(like, dtype)
        expected = self.expected(problem, gradients=gradients, keep=keep)
        plain = self.aligned(problem).but(dropout_rate=None, dropout_key=None)
        errors = _plain_errors(plain, dtype, self.default_scale, gradients)
        growth = 1 / (1 - problem.options.get("dropout_rate", 0.0))
        unit = float(jnp.finfo(dtype).eps)
        eps = min(unit, float(jnp.finfo(jnp.float32).eps))
        floor = (16 + 2 * expected.largest_logit) * eps
        problems = []
        for name, have, want in _pairs(got, expected):
            if have.shape != want.shape:
                raise Failure(f"{name} has the shape {have.shape}, not {want.shape}")
            size = np.where(np.isfinite(want), np.abs(want), 0).max(initial=1.0)
            # The plain formula may round, but not be wrong: it shares code with the engines.
            plain_error = min(errors.get(name, 0.0), size * min(1000 * unit, 0.1))
            rounding = unit / 2 if name in ("out", "dq", "dk", "dv") else 0.0
            allowed = 2 * growth * plain_error + (floor + rounding) * size
            off = difference(have, want)
            if not off <= allowed:
                problems.append(f"{name} is off by {off:.2g} (allowed {allowed:.2g})")
        if problems:
            raise Failure(", ".join(problems))
        return got


def rounded(problem: Problem, dtype: str) -> Problem:
    """The problem as stored in `dtype`: q, k and v in it, the rest in float32 at least."""
    wide = np.promote_types(jnp.dtype(dtype), np.float32)
    problem = problem.map(lambda x: x.astype(wide).astype(np.float64))
    narrow = (
        x.astype(jnp.dtype(dtype)).astype(np.float64) for x in (problem.q, problem.k, problem.v)
    )
    return problem.but(**dict(zip("qkv", narrow, strict=True)))


def difference(have: np.ndarray, want: np.ndarray) -> float:
    """Largest elementwise difference; equal infinities differ by 0, and NaN by infinity."""
    with np.errstate(invalid="ignore"):
        off = np.where(have == want, 0.0, np.abs(have - want))
    return float(np.where(np.isnan(off), np.inf, off).max(initial=0.0))


def _pairs(got: Result, expected: Result) -> list[tuple[str, np.ndarray, np.ndarray]]:
    pairs = [("out", got.out, expected.out)]
    if got.lse is not None and expected.lse is not None:
        pairs.append(("lse", got.lse, expected.lse))
    return pairs + [(f"d{name}", x, expected.gradients[name]) for name, x in got.gradients.items()]


@functools.lru_cache(maxsize=512)
def _answer(problem: Problem, default_scale: float | None, gradients: bool) -> Result:
    return reference(problem, default_scale, gradients=gradients)


@functools.lru_cache(maxsize=512)
def _plain_errors(
    problem: Problem, dtype: str, default_scale: float | None, gradients: bool
) -> dict[str, float]:
    """Errors of `attention`, the formula itself, in this dtype."""
    if problem.cosine and "scale" not in problem.options:
        problem = problem.but(scale=default_scale)
    plain = Subject(_plain, layout="heads_first", dtype=dtype, compiler_options=QUICK)
    expected = _answer(problem, default_scale, gradients)
    pairs = _pairs(plain.run(problem, gradients=gradients), expected)
    return {name: difference(have, want) for name, have, want in pairs}


def _plain(q: Any, k: Any, v: Any, *, similarity: str = "dot", **options: Any) -> Any:
    if similarity == "dot":
        return attention(q, k, v, **options)
    return plain_cosine_sim_attention(q, k, v, attn_bias=options.pop("bias", None), **options)
