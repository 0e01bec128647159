"""Attention and its gradients in NumPy, float64, one row at a time: slow, plain, independent.

It is what the conformance suite compares with. Everything is written out from the definition, so
that a mistake in the library's masks, blocks or derivatives cannot be here as well.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

__all__ = ["Problem", "Result", "reference"]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """One attention problem, always heads first and with four axes.

    Attributes:
        q: Queries (b, h, n, d).
        k: Keys (b, hk, j, d).
        v: Values (b, hk, j, e).
        options: Arrays and options by the names of `flash_attention`. Beside `mask` and `bias`
            (four axes, each full or 1), offsets are (b | 1, n | 1), ids (b | 1, n) and (b | 1, j),
            per-head terms (h | 1,), `relative_bias` (h | 1, n + j - 1), and a `scale` that is to be
            differentiated is an array.
        cosine: Whether the similarity is the cosine.
        groups: Chunks of the dimension that cosine normalises apart.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    options: dict[str, Any]
    cosine: bool = False
    groups: int = 1

    @functools.cached_property
    def contents(self) -> tuple[Any, ...]:
        """Everything in it, hashable."""

        def content(x: Any) -> Any:
            return (x.shape, str(x.dtype), x.tobytes()) if isinstance(x, np.ndarray) else repr(x)

        options = tuple(sorted((name, content(x)) for name, x in self.options.items()))
        return *map(content, (self.q, self.k, self.v)), options, self.cosine, self.groups

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Problem) and self.contents == other.contents

    def __hash__(self) -> int:
        return hash(self.contents)

    def but(self, **options: Any) -> Problem:
        """The problem with other options (None = without), or another q, k, v, cosine or groups."""
        fields = {
            name: options.pop(name)
            for name in ("q", "k", "v", "cosine", "groups")
            if name in options
        }
        merged = {name: x for name, x in {**self.options, **options}.items() if x is not None}
        return dataclasses.replace(self, options=merged, **fields)

    @property
    def cotangents(self) -> tuple[np.ndarray, np.ndarray]:
        """Random cotangents of out and lse (zero where it is not asked for), one pair per shape."""
        rng = np.random.default_rng(20220527)
        shape = self.q.shape[:3]
        dout = rng.standard_normal((*shape, self.v.shape[-1]))
        return dout, rng.standard_normal(shape) * bool(self.options.get("return_lse"))

    def map(self, change: Any) -> Problem:
        """The problem with `change(array)` for each of its float arrays."""

        def changed(x: Any) -> Any:
            return change(x) if isinstance(x, np.ndarray) and x.dtype.kind not in "iub" else x

        options = {name: changed(x) for name, x in self.options.items()}
        return dataclasses.replace(
            self, q=change(self.q), k=change(self.k), v=change(self.v), options=options
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """What came out, heads first.

    Attributes:
        out: (b, h, n, e).
        lse: (b, h, n), None where the function gives none.
        gradients: By name, each of its array's shape; empty where no cotangent was given.
        largest_logit: The largest magnitude of a finite logit before the softcap. A logit rounded
            to `eps` moves its probability by this times `eps`.
    """

    out: np.ndarray
    lse: np.ndarray | None
    gradients: dict[str, np.ndarray]
    largest_logit: float = 0.0


def reference(
    problem: Problem,
    default_scale: float | None = None,
    keep: np.ndarray | None = None,
    *,
    gradients: bool = True,
) -> Result:
    """Attention by the definition.

    Args:
        problem: What to compute. Where it has no `q_offset`, the diagonal is j = i.
        default_scale: Scale where the problem has none; None = 1 / sqrt(d).
        keep: Which probabilities dropout keeps (b, h, n, j), where the problem has a
            `dropout_rate`.
        gradients: Whether to pull the problem's cotangents back too.

    Returns:
        out, lse and gradients, all float64.
    """
    problem = problem.map(lambda x: np.asarray(x, np.float64))
    with np.errstate(invalid="ignore"):  # what no query sees may hold anything
        return _reference(problem, default_scale, keep, problem.cotangents if gradients else None)


def _reference(
    problem: Problem,
    default_scale: float | None,
    keep: np.ndarray | None,
    cotangents: tuple[np.ndarray, np.ndarray] | None,
) -> Result:
    options = {name: x for name, x in problem.options.items() if x is not None}
    q, k, v = problem.q, problem.k, problem.v
    q_unit, k_unit = q, k
    if problem.cosine:
        q_unit, k_unit = _unit(q, problem.groups), _unit(k, problem.groups)
    scale = q.shape[-1] ** -0.5 if default_scale is None else default_scale
    rows = _Rows(options, q_unit, k_unit, v, scale, keep)
    b, h, n = q.shape[:3]
    out, lse = np.zeros((b, h, n, v.shape[-1])), np.full((b, h, n), -np.inf)
    gradients = rows.zeros()
    largest = 0.0
    for at in itertools.product(range(b), range(h), range(n)):
        row = rows.forward(*at)
        out[at], lse[at] = row.out, row.lse
        largest = max(largest, row.largest_logit)
        if cotangents is not None:
            rows.backward(gradients, at, row, cotangents[0][at], cotangents[1][at])
    if cotangents is None:
        return Result(out, lse, {}, largest)
    if problem.cosine:
        gradients["q"] = _through_unit(q, gradients["q"], problem.groups)
        gradients["k"] = _through_unit(k, gradients["k"], problem.groups)
    return Result(out, lse, gradients, largest)


@dataclasses.dataclass(frozen=True)
class _Row:
    """What the forward pass of one query leaves for its backward; along the keys it sees."""

    keys: list[int]
    similarity: np.ndarray
    slope: np.ndarray  # of softcap, in the logits before it
    probs: np.ndarray
    factor: np.ndarray  # of dropout
    sink: float  # probability that the sink takes
    out: np.ndarray
    lse: float
    largest_logit: float


@dataclasses.dataclass(frozen=True)
class _Rows:
    options: dict[str, Any]
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    default_scale: float
    keep: np.ndarray | None

    def zeros(self) -> dict[str, np.ndarray]:
        """A zero gradient for each differentiable array."""
        named = {"q": self.q, "k": self.k, "v": self.v}
        for name in ("bias", "scale", "sinks", "alibi_slopes", "relative_bias"):
            if isinstance(self.options.get(name), np.ndarray):
                named[name] = self.options[name]
        return {name: np.zeros(x.shape) for name, x in named.items()}

    def key_head(self, h: int) -> int:
        return h // (self.q.shape[1] // self.k.shape[1])

    def scale(self, h: int) -> float:
        scale = self.options.get("scale", self.default_scale)
        return scale[_at(scale, h)] if isinstance(scale, np.ndarray) else scale

    def diagonal(self, b: int, i: int) -> int:
        offset = np.asarray(self.options.get("q_offset", 0))
        return i + int(offset if offset.ndim == 0 else offset[_at(offset, b, i)])

    def sees(self, b: int, h: int, i: int, j: int) -> bool:
        """Whether query i may attend to key j, one reason not to after the other."""
        options, diagonal = self.options, self.diagonal(b, i)
        left, right = options.get("window") or (None, None)
        if options.get("causal") and j > diagonal:
            return False
        if left is not None and left >= 0 and j < diagonal - left:
            return False
        if right is not None and right >= 0 and j > diagonal + right:
            return False
        if "q_lengths" in options and i >= options["q_lengths"][b]:
            return False
        if "kv_lengths" in options and j >= options["kv_lengths"][b]:
            return False
        if "q_segment_ids" in options:
            mine, theirs = options["q_segment_ids"], options["kv_segment_ids"]
            if mine[_at(mine, b, i)] != theirs[_at(theirs, b, j)]:
                return False
        mask = options.get("mask")
        return mask is None or bool(mask[_at(mask, b, h, i, j)])

    def forward(self, b: int, h: int, i: int) -> _Row:
        options, g = self.options, self.key_head(h)
        keys = [j for j in range(self.k.shape[2]) if self.sees(b, h, i, j)]
        similarity = np.array([self.q[b, h, i] @ self.k[b, g, j] for j in keys])
        logits = similarity * self.scale(h)
        for n, j in enumerate(keys):
            if "alibi_slopes" in options:
                slopes = options["alibi_slopes"]
                logits[n] -= slopes[_at(slopes, h)] * abs(self.diagonal(b, i) - j)
            if "relative_bias" in options:
                relative = options["relative_bias"]
                logits[n] += relative[_at(relative, h, j - i + self.q.shape[2] - 1)]
            if "bias" in options:
                bias = options["bias"]
                logits[n] += bias[_at(bias, b, h, i, j)]
        largest = np.abs(logits[np.isfinite(logits)]).max(initial=0.0)
        slope = np.ones_like(logits)
        if "softcap" in options:
            capped = np.tanh(logits / options["softcap"])
            logits, slope = options["softcap"] * capped, 1 - capped**2
        sink = -np.inf
        if "sinks" in options:
            sink = options["sinks"][_at(options["sinks"], h)]
        top = max([sink, *logits])
        factor = np.ones_like(logits)
        if self.keep is not None:
            factor = self.keep[b, h, i, keys] / (1 - options["dropout_rate"])
        if top == -np.inf:
            none = np.zeros(0)
            out = np.zeros(self.v.shape[-1])
            return _Row([], none, none, none, none, 0.0, out, -np.inf, largest)
        total = np.exp(logits - top).sum() + np.exp(sink - top)
        lse = top + np.log(total)
        probs = np.exp(logits - lse)
        out = np.zeros(self.v.shape[-1])
        for n, j in enumerate(keys):
            out += probs[n] * factor[n] * self.v[b, g, j]
        share = float(np.exp(sink - lse))
        return _Row(keys, similarity, slope, probs, factor, share, out, lse, largest)

    def backward(
        self,
        gradients: dict[str, np.ndarray],
        at: tuple[int, int, int],
        row: _Row,
        dout: np.ndarray,
        dlse: float,
    ) -> None:
        b, h, i = at
        g = self.key_head(h)
        if "sinks" in gradients:
            # d out / d sink = -out * p_sink, d lse / d sink = p_sink.
            share = row.sink * ((dlse - row.out @ dout) if row.sink else 0.0)
            gradients["sinks"][_at(gradients["sinks"], h)] += share
        mean = row.out @ dout
        for n, j in enumerate(row.keys):
            gradients["v"][b, g, j] += row.probs[n] * row.factor[n] * dout
            dprob = row.factor[n] * (self.v[b, g, j] @ dout)
            dlogit = row.probs[n] * (dprob - mean + dlse) * row.slope[n]
            gradients["q"][b, h, i] += dlogit * self.scale(h) * self.k[b, g, j]
            gradients["k"][b, g, j] += dlogit * self.scale(h) * self.q[b, h, i]
            for name, where, weight in (
                ("scale", (h,), row.similarity[n]),
                ("alibi_slopes", (h,), -abs(self.diagonal(b, i) - j)),
                ("relative_bias", (h, j - i + self.q.shape[2] - 1), 1.0),
                ("bias", (b, h, i, j), 1.0),
            ):
                if name in gradients:
                    gradients[name][_at(gradients[name], *where)] += dlogit * weight


def _at(x: np.ndarray, *where: int) -> tuple[int, ...]:
    """An index into an array some of whose axes have size 1 and stand for every position."""
    return tuple(0 if size == 1 else n for size, n in zip(x.shape, where, strict=True))


def _unit(x: np.ndarray, groups: int) -> np.ndarray:
    chunks = x.reshape(*x.shape[:-1], groups, -1)
    norm = np.sqrt((chunks**2).sum(-1, keepdims=True))
    return (chunks / np.where(norm == 0, 1, norm)).reshape(x.shape)


def _through_unit(x: np.ndarray, dunit: np.ndarray, groups: int) -> np.ndarray:
    """Gradient of x from that of its unit vectors: the part across, divided by the norm."""
    chunks, d = (y.reshape(*x.shape[:-1], groups, -1) for y in (x, dunit))
    norm = np.sqrt((chunks**2).sum(-1, keepdims=True))
    unit = chunks / np.where(norm == 0, 1, norm)
    across = (d - unit * (unit * d).sum(-1, keepdims=True)) / np.where(norm == 0, 1, norm)
    # Zero where the vector is zero, and where nothing saw it, whatever it then holds.
    return np.where((norm == 0) | (d == 0).all(-1, keepdims=True), 0, across).reshape(x.shape)
