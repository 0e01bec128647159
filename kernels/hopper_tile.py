"""One tile inside a Hopper kernel: its logits in base 2, its mask and its dropout, in registers.

The forward pass and dq hold a tile as (queries, keys); dk and dv hold it as (keys, queries), so
that probabilities feed the next product from registers. `Grid.queries` says which axis the queries
are; all else is written once.

    logits2 = log2(e) * softcap(scale * product + alibi + bias),  -inf where not visible
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flash_attention_jax._core import dropout
from flash_attention_jax._core.call import ROLES, Call
from flash_attention_jax.kernels.operands import LOG2E

Refs = dict[str, Any]
Vectors = dict[str, Any]

WGMMA = plgpu.Layout.WGMMA

# Up to jax 0.10 `load` asks for an index besides the reference, which later versions deprecate.
_load: Any = plgpu.load
_index = inspect.signature(plgpu.load).parameters.get("idx")
_NO_INDEX = ((),) if _index is not None and _index.default is inspect.Parameter.empty else ()


def tiled(inner: int) -> tuple[Any, ...]:
    """How tiles lie in shared memory: a wgmma over `inner` rows wants swizzled lines no longer."""
    line = next(line for line in (64, 32, 16) if inner % line == 0)
    return plgpu.TilingTransform((8, line)), plgpu.SwizzleTransform(2 * line)


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a tile lies: its sizes, and which axis the queries are.

    Attributes:
        rows: Rows of the tile, the 64 of a warpgroup.
        columns: Columns of the tile.
        queries: Axis of the queries, 0 or 1.
    """

    rows: int
    columns: int
    queries: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.rows, self.columns

    def spread(self, vector: Any, axis: int) -> Any:
        """A vector along `axis`, or a scalar, over the whole tile."""
        if not getattr(vector, "ndim", 0):
            return vector
        return lax.broadcast_in_dim(vector, self.shape, [axis])

    def load(self, ref: Any, start: Any, axis: int) -> jax.Array:
        """Part of a vector in device memory, laid out along `axis` of the tile."""
        part = ref.at[pl.ds(start, self.shape[axis])]
        return _load(part, *_NO_INDEX, layout=WGMMA.reduce(1 - axis), optimized=False)

    def of_pairs(self, ref: Any, place: tuple[Any, Any, Any, Any]) -> Any:
        """The tile's part of a term that broadcasts to (b, h, rows, columns), spread over it.

        `place` is the batch, the head, the first row and the first column.
        """
        part = ref.at[
            tuple(n if size > 1 else 0 for n, size in zip(place[:2], ref.shape[:2], strict=True))
        ]
        row, column = place[2:]
        if 1 not in part.shape:
            part = part.at[pl.ds(row, self.rows), pl.ds(column, self.columns)]
            return _load(part, *_NO_INDEX, layout=WGMMA, optimized=False)
        if part.shape[1] > 1:
            return self.spread(self.load(part.at[0], column, 1), 1)
        if part.shape[0] > 1:
            return self.spread(self.load(part.at[:, 0], row, 0), 0)
        return part[0, 0]

    def positions(self, start: Any, axis: int) -> jax.Array:
        """Position of each element along `axis`."""
        iota = plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=WGMMA)
        return iota + start


def row_index(call: Call, name: str, b: Any, h: Any, rows: Any) -> tuple[Any, ...]:
    """Where the rows of one head lie in q, k, v or out of either layout."""
    at = {"b": b, "n": h, "k": h, "i": rows, "j": rows}
    return tuple(at[letter] for letter in ROLES[name][call.layout][:-1])


def of_batch(ref: Any, b: Any) -> Any:
    """One batch of an array that may stand for all of them."""
    return ref.at[b if ref.shape[0] > 1 else 0]


def query_vectors(
    call: Call, grid: Grid, refs: Refs, place: tuple[Any, Any, Any], *, masked: bool = True
) -> Vectors:
    """What the added terms, dropout and, where `masked`, the mask need of the tile's queries.

    `place` is the batch, the head and the first query.
    """
    b, h, start = place
    axis = grid.queries
    names = ("low", "high", "q_segments") if masked else ()
    found = {
        name: grid.load(of_batch(refs[name], b), start, axis)
        for name in (*names, "diagonal")
        if name in refs
    }
    if call.dropout_rate:
        i = plgpu.layout_cast(
            lax.broadcasted_iota(jnp.int32, (grid.shape[axis],), 0), WGMMA.reduce(1 - axis)
        )
        words = refs["words"][0], refs["words"][1]
        origin = [refs["origin"][n] for n in range(5)] if "origin" in refs else None
        first, second = dropout.row_words(words, call.heads, b, h, i + start, origin)
        found |= {"first": first, "second": second}
    return found


def key_vectors(grid: Grid, refs: Refs, b: Any, start: Any) -> Vectors:
    """What the mask needs of the tile's keys."""
    return {
        name: grid.load(of_batch(refs[name], b), start, 1 - grid.queries)
        for name in ("kv_segments", "kept")
        if name in refs
    }


def head_terms(refs: Refs, factor: float, h: Any) -> tuple[Any, Any]:
    """What makes base-2 logits of a product, and log2(e) times the ALiBi slope or None."""
    scale = refs["scale"][h] * np.float32(LOG2E) if "scale" in refs else factor
    return scale, refs["slopes"][h] if "slopes" in refs else None


def visible(grid: Grid, queries: Vectors, keys: Vectors, j: Any, mask: Any = None) -> jax.Array:
    """Which elements of the tile may be seen; `mask` is the tile's part of a dense one."""
    q, k = grid.queries, 1 - grid.queries
    seen = j < grid.spread(queries["high"], q)
    if "low" in queries:
        seen = seen & (j >= grid.spread(queries["low"], q))
    if "kv_segments" in keys:
        seen = seen & (grid.spread(queries["q_segments"], q) == grid.spread(keys["kv_segments"], k))
    if "kept" in keys:
        seen = seen & (grid.spread(keys["kept"], k) != 0)
    return seen if mask is None else seen & (mask != 0)


def logits2(
    call: Call,
    grid: Grid,
    refs: Refs,
    place: tuple[Any, Any, Any, Any],
    terms: tuple[Any, Any],
    queries: Vectors,
    product: Any,
    *,
    masked: bool,
    keys: Vectors | None = None,
) -> tuple[Any, Any, Any]:
    """Logits in base 2, their derivative by factor * product (None = 1), and the keys' positions.

    Args:
        call: The call.
        grid: How the tile lies.
        refs: References, by name.
        place: The batch, the head, the first row and the first column of the tile.
        terms: Of `head_terms`.
        queries: Of `query_vectors`.
        product: q . k.
        masked: Whether anything of the tile may be hidden.
        keys: Of `key_vectors`, where they were read already.

    Returns:
        The positions are None where nothing asks for them.
    """
    start = place[3 - grid.queries]
    asked = masked or "slopes" in refs or call.dropout_rate > 0
    j = grid.positions(start, 1 - grid.queries) if asked else None
    if masked and keys is None:
        keys = key_vectors(grid, refs, place[0], start)
    factor, slope = terms

    def seen() -> Any:
        if keys is None:
            return None
        mask = grid.of_pairs(refs["mask"], place) if "mask" in refs else None
        return visible(grid, queries, keys, j, mask)

    x = product if isinstance(factor, float) and factor == 1.0 else product * factor
    if slope is not None:
        distance = jnp.abs(grid.spread(queries["diagonal"], grid.queries) - j)
        x = x - slope * distance.astype(jnp.float32)
    shown = seen() if "bias" in refs else None
    if "bias" in refs:
        bias = grid.of_pairs(refs["bias"], place).astype(jnp.float32)
        # What is hidden may be NaN, and the derivative of a softcap would keep it.
        x = x + _in_base_2(bias if shown is None else jnp.where(shown, bias, np.float32(0)))
    derivative = None
    if call.softcap is not None:
        cap = float(call.softcap * LOG2E)
        # tanh by exp2, whose approximation is exact to two units; the one of tanh is 11 bits.
        t = 1.0 - 2.0 / (jnp.exp2(x * float(2.0 * LOG2E / cap)) + 1.0)
        x, derivative = t * cap, 1.0 - t * t
    if masked:
        x = jnp.where(seen() if shown is None else shown, x, np.float32(-np.inf))
    return x, derivative, j


def _in_base_2(term: Any) -> Any:
    """A term of the logits. What was finite stays so: masks by the lowest float32 are common."""
    scaled = term * np.float32(LOG2E)
    return jnp.where(jnp.abs(scaled) == np.inf, term, scaled)


def kept(call: Call, grid: Grid, queries: Vectors, j: Any) -> jax.Array:
    """Which probabilities dropout keeps: the bits of every other engine."""
    words = tuple(grid.spread(queries[name], grid.queries) for name in ("first", "second"))
    return dropout.keep(words, j, call.dropout_rate)
