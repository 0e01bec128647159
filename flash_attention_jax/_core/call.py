"""The words that every layer shares: the frozen record of one attention call, and its arrays.

A `Call` holds what is known when the function is traced (shapes, dtypes, options); it is hashable,
so it serves as a static argument and as the key of every choice. The `Arrays` hold the values. The
front (`_api.attention`) makes both; below it nothing is named twice and nothing is checked again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax.export import is_symbolic_dim

Layout = Literal["heads_first", "heads_last"]
Similarity = Literal["dot", "cosine"]
Differentiation = Literal["reverse", "any"]

ROLES: dict[str, dict[Layout, str]] = {
    "q": {"heads_first": "bnid", "heads_last": "bind"},
    "k": {"heads_first": "bkjd", "heads_last": "bjkd"},
    "v": {"heads_first": "bkje", "heads_last": "bjke"},
    "out": {"heads_first": "bnie", "heads_last": "bine"},
    "lse": {"heads_first": "bni", "heads_last": "bin"},
    "low": {"heads_first": "bni", "heads_last": "bin"},
}
"""Axis letters of the arrays whose order depends on the layout.

b batch, n query heads, k key heads, i query position, j key position, d key dimension, e value
dimension.
"""

TERM_ROLES: dict[str, str] = {
    "mask": "bnij",
    "bias": "bnij",
    "scale": "n",
    "q_offset": "bi",
    "q_segment_ids": "bi",
    "kv_segment_ids": "bj",
    "q_lengths": "b",
    "kv_lengths": "b",
    "sinks": "n",
    "alibi_slopes": "n",
    "relative_bias": "ng",
    "dropout_key": "w",
    "dropout_origin": "o",
}
"""Axis letters of the other arrays, the same in both layouts. An axis of size 1 broadcasts.

g: diagonal j - i + q_len - 1, w: word of the dropout key, o: what `_core.dropout.row_words` says.
"""


def roles(layout: Layout, name: str) -> str:
    """Axis letters of an array of a call or of its results."""
    return ROLES[name][layout] if name in ROLES else TERM_ROLES[name]


class Arrays(NamedTuple):
    """The arrays of one call, in its layout and never copied for it; None where absent.

    Axes as `ROLES` and `TERM_ROLES` say. `mask` is boolean, ids, lengths and offsets are int32,
    `dropout_key` is two uint32 words. `dropout_origin` is there where the call is a part of a
    larger one: where its first entry lies in that.
    """

    q: Any
    k: Any
    v: Any
    mask: Any = None
    bias: Any = None
    scale: Any = None
    q_offset: Any = None
    q_segment_ids: Any = None
    kv_segment_ids: Any = None
    q_lengths: Any = None
    kv_lengths: Any = None
    sinks: Any = None
    alibi_slopes: Any = None
    relative_bias: Any = None
    dropout_key: Any = None
    dropout_origin: Any = None


COSINE_SCALE = 10.0
"""The scale of cosine similarity where none is given, of all functions but those that say 8."""

DIFFERENTIABLE = ("q", "k", "v", "bias", "scale", "sinks", "alibi_slopes", "relative_bias")
"""Names of the arrays that receive gradients."""


Size: TypeAlias = Any
"""A Python int, or an expression in symbols of `jax.export.symbolic_shape` (see `symbolic`)."""


def symbolic(size: Size) -> bool:
    """Whether a size is an expression in symbols of `jax.export.symbolic_shape`, not a number.

    Such sizes add, multiply, hash and compare equal to themselves alone; whether one is less than
    another can often not be told, and the question then raises. So nothing here asks.
    """
    return is_symbolic_dim(size)


def known(size: Size, otherwise: int) -> int:
    """The size, or `otherwise` where it is symbolic."""
    return otherwise if symbolic(size) else size


def as_index(size: Size) -> Any:
    """A size to compute positions with: a symbolic one as an int32 scalar, a number as it is."""
    return jnp.asarray(size, jnp.int32) if symbolic(size) else size


@dataclasses.dataclass(frozen=True)
class Call:
    """What is static in one attention call: the key of the choice and of every engine's plan.

    Attributes:
        layout: Order of the axes of q, k, v, out and lse (`ROLES`).
        similarity: "dot", or "cosine" (q and k are l2-normalised by the engine when `l2norm`).
        l2norm: Whether cosine still has to normalise q and k.
        groups: Chunks of the dimension that are normalised apart.
        batch: B.
        q_len: T.
        k_len: S.
        heads: Query heads N.
        kv_heads: Key heads K; N is a multiple of it.
        dim: Dimension of q and k.
        v_dim: Dimension of v and out.
        dtype: Name of the dtype of q, k, v and out.
        scale: The logits' factor, None when it is an array.
        causal: Keys after the diagonal are invisible.
        window: (left, right) about the diagonal, both inclusive, None = unbounded; already cut at 0
            on the right when causal.
        offset: The diagonal is j = i + offset; ignored where the array `q_offset` is given.
        softcap: Logits are bounded by softcap * tanh(logits / softcap).
        dropout_rate: Probability of dropping a normalised probability.
        terms: Names, shapes and dtype names of the arrays present besides q, k and v.
        block_q: Queries per block, None = the engine's own.
        block_kv: Keys per block, None = the engine's own.
        precision: As in `jax.lax.dot_general`; None never means less than the dtype of the inputs.
        differentiation: "reverse", or "any" for forward mode and mixed orders.
        deterministic_backward: Whether the same inputs have to give the same bits each time.
        platform: "cpu", "gpu" or "tpu": what the call is traced for.
        capability: CUDA compute capability such as (9, 0), None elsewhere.
        interpret: Whether kernels run under their interpreter instead of on the platform.
    """

    layout: Layout
    similarity: Similarity
    l2norm: bool
    groups: int
    batch: Size
    q_len: Size
    k_len: Size
    heads: Size
    kv_heads: Size
    dim: Size
    v_dim: Size
    dtype: str
    scale: float | None
    causal: bool
    window: tuple[int | None, int | None]
    offset: Size
    softcap: float | None
    dropout_rate: float
    terms: tuple[tuple[str, tuple[Size, ...], str], ...]
    block_q: int | None = None
    block_kv: int | None = None
    precision: Any = None
    differentiation: Differentiation = "reverse"
    deterministic_backward: bool = True
    platform: str = "cpu"
    capability: tuple[int, int] | None = None
    interpret: bool = False

    @property
    def group_size(self) -> Size:
        """Query heads per key head."""
        return self.heads // max(self.kv_heads, 1)

    @property
    def acc_dtype(self) -> np.dtype:
        """Dtype of logits, sums, maxima, lse and accumulators: float32, or float64 for float64."""
        return np.promote_types(jnp.dtype(self.dtype), np.float32)

    @property
    def banded(self) -> bool:
        """Whether a diagonal bounds what is visible."""
        return self.causal or self.window != (None, None)

    def has(self, name: str) -> bool:
        """Whether the array `name` (a field of `Arrays`) is present."""
        return any(name == term for term, _, _ in self.terms)

    def holding(self, arrays: Mapping[str, Any], **changes: Any) -> Call:
        """The record of a call with these arrays, by the names of `Arrays`, and other changes."""
        terms = tuple(
            (name, x.shape, str(x.dtype)) for name, x in arrays.items() if name in TERM_ROLES
        )
        return dataclasses.replace(self, terms=terms, **changes)

    def shape_of(self, name: str) -> tuple[Size, ...] | None:
        """Shape of the term `name`, None where it is absent."""
        return next((shape for term, shape, _ in self.terms if term == name), None)

    @property
    def symbols(self) -> dict[str, Size]:
        """The sizes that are symbolic, by their names."""
        names = ("batch", "heads", "kv_heads", "q_len", "k_len", "dim", "v_dim")
        sizes = {name: getattr(self, name) for name in names}
        return {name: size for name, size in sizes.items() if symbolic(size)}

    @property
    def symbolic_length(self) -> str | None:
        """Why nothing can cut this call's lengths into blocks, None where both are numbers."""
        lengths = {name: size for name, size in self.symbols.items() if name in ("q_len", "k_len")}
        for name, size in lengths.items():
            return f"its length is symbolic ({name} = {size}), and blocks are cut when it is traced"
        return None

    @property
    def bound(self) -> float | None:
        """A bound of the absolute logits that is known before any array is seen, or None.

        Cosine similarity is bounded by scale (times groups) as long as nothing unbounded is added;
        softcap bounds whatever was added.
        """
        if self.softcap is not None:
            return self.softcap
        added = any(self.has(name) for name in ("bias", "alibi_slopes", "relative_bias"))
        if self.similarity == "cosine" and self.l2norm and self.scale is not None and not added:
            return abs(self.scale) * self.groups
        return None

    def sizes(self) -> dict[str, Size]:
        """Sizes of the axis letters of `ROLES` and `TERM_ROLES`."""
        return {
            "b": self.batch,
            "n": self.heads,
            "k": self.kv_heads,
            "i": self.q_len,
            "j": self.k_len,
            "d": self.dim,
            "e": self.v_dim,
            "g": self.q_len + self.k_len - 1,
        }

    def shape(self, roles: str) -> tuple[Size, ...]:
        """The full shape of an array with these axes."""
        sizes = self.sizes()
        return tuple(sizes[letter] for letter in roles)
