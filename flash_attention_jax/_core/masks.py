"""Which key is visible to which query: the one definition, by element and by block.

    visible = mask & causal & window & (i < q_length) & (j < kv_length) & (q_segment == kv_segment)

By element (`visible`) for a tile that has to be masked; by block (`Visits`) to tell an engine which
blocks are empty (never visited), which are full (visited without any mask) and which are partial.
The tables of blocks are O(n / block) long; only a dense mask of the user is ever of size T * S, and
only he holds it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core.call import TERM_ROLES, Arrays, Call, Size, as_index
from flash_attention_jax._core.tiles import Axis, Plan, Tile, int32_starts

EMPTY, PARTIAL, FULL = np.int8(0), np.int8(1), np.int8(2)


class Positions(NamedTuple):
    """Integer positions of a tile's batches, heads, queries and keys, to broadcast over a block."""

    b: Any
    n: Any
    i: Any
    j: Any
    diagonal: Any  # i + offset: the key on the causal diagonal


def positions(call: Call, arrays: Arrays, tile: Tile, axes: str) -> Positions:
    """Positions in the tile, along the axes "bhrij" in the order of `axes`."""

    def along(letter: str, start: Any, size: Size) -> jax.Array:
        values = jnp.arange(size, dtype=jnp.int32) + jnp.asarray(start, jnp.int32)
        return values.reshape([size if axis == letter else 1 for axis in axes])

    i = along("i", *tile.queries)
    offset = (
        as_index(call.offset)
        if arrays.q_offset is None
        else tile.take(arrays.q_offset, TERM_ROLES["q_offset"], axes)
    )
    n = along("h", *tile.kv_heads) * as_index(call.group_size) + along("r", 0, call.group_size)
    return Positions(along("b", *tile.batch), n, i, along("j", *tile.keys), i + offset)


def masks_anything(call: Call) -> bool:
    """Whether any feature of the call can hide a key."""
    return call.banded or any(
        call.has(name) for name in ("mask", "q_segment_ids", "q_lengths", "kv_lengths")
    )


def visible(call: Call, arrays: Arrays, tile: Tile, at: Positions, axes: str) -> jax.Array | None:
    """Boolean block, True where the query may attend, None where nothing is hidden; broadcasts."""

    def cut(name: str) -> jax.Array:
        return tile.take(getattr(arrays, name), TERM_ROLES[name], axes)

    seen = []
    if tile.fresh_queries is not None:
        seen.append(at.i >= tile.fresh_queries)
    if tile.fresh_keys is not None:
        seen.append(at.j >= tile.fresh_keys)
    left, right = band(call)
    if left is not None:
        seen.append(at.j >= at.diagonal - left)
    if right is not None:
        seen.append(at.j <= at.diagonal + right)
    if call.has("q_lengths"):
        seen.append(at.i < cut("q_lengths"))
    if call.has("kv_lengths"):
        seen.append(at.j < cut("kv_lengths"))
    if call.has("q_segment_ids"):
        seen.append(cut("q_segment_ids") == cut("kv_segment_ids"))
    if call.has("mask"):
        seen.append(cut("mask"))
    return conjunction(seen)


def key_ranges(call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """The keys low <= j < high that causal, window and lengths leave each query, (B | 1, T) int32.

    What `visible` says by element, for engines that compare positions with a range per row.
    """
    i = jnp.arange(call.q_len, dtype=jnp.int32)[None]
    diagonal = i + (call.offset if arrays.q_offset is None else arrays.q_offset)
    low, high = jnp.zeros_like(diagonal), jnp.full_like(diagonal, call.k_len)
    left, right = band(call)
    if left is not None:
        low = jnp.maximum(low, diagonal - left)
    if right is not None:
        high = jnp.minimum(high, diagonal + right + 1)
    if arrays.kv_lengths is not None:
        high = jnp.minimum(high, arrays.kv_lengths[:, None])
    if arrays.q_lengths is not None:
        high = jnp.where(i < arrays.q_lengths[:, None], high, jnp.zeros_like(high))
    return low, high


def conjunction(parts: list[jax.Array]) -> jax.Array | None:
    """All of the parts, None where there are none."""
    if not parts:
        return None
    result = parts[0]
    for part in parts[1:]:
        result = result & part
    return result


def band(call: Call) -> tuple[int | None, int | None]:
    """How far left and right of the diagonal a key is visible, inclusive; None = any distance."""
    left, right = call.window
    if call.causal:
        right = 0 if right is None else min(right, 0)
    return left, right


def sees(block: jax.Array, axes: str, letter: str) -> jax.Array:
    """Whether a row (`letter` = "i") or a column ("j") of a visible block has any True.

    For columns the heads of a group are reduced too: they share the key.
    """
    over = "j" if letter == "i" else "ri"
    return block.any(axis=[axes.index(axis) for axis in over], keepdims=True)


def cleaned(x: jax.Array, axes: str, seen: jax.Array, seen_axes: str) -> jax.Array:
    """Replace by zero what takes no part in a block, so that 0 * NaN cannot arise in a product.

    `x` has the axes `axes` and `seen` is a result of `sees` with the axes `seen_axes`.
    """
    shared = [n for n, letter in enumerate(seen_axes) if letter not in axes]
    flat = lax.squeeze(seen, shared)
    kept = "".join(letter for letter in seen_axes if letter in axes)
    flat = lax.transpose(flat, [kept.index(letter) for letter in axes if letter in kept])
    flat = lax.expand_dims(flat, [n for n, letter in enumerate(axes) if letter not in kept])
    return jnp.where(flat, x, jnp.zeros((), x.dtype))


# --- by block ---


class Summary(NamedTuple):
    """What a block of queries or keys holds, (B | 1, count): enough to class pairs of blocks."""

    low: Any  # queries: lowest diagonal; keys: first owned position
    high: Any  # queries: highest diagonal; keys: last owned position
    some: Any  # any position within the length
    every: Any  # every position within the length, and none repeated from the block before
    segment_low: Any
    segment_high: Any


@dataclasses.dataclass(frozen=True)
class Visits:
    """The class of every pair of blocks of a plan: made once a call, asked once an outer step."""

    plan: Plan
    queries: Summary | None
    keys: Summary | None
    mask: jax.Array | None  # (B | 1, N | 1, queries, keys) classes of the user's mask

    @classmethod
    def of(cls, plan: Plan, arrays: Arrays) -> Visits:
        """Summarise the arrays of a call."""
        call = plan.call
        if not (masks_anything(call) or plan.keys.overlaps or plan.hides_queries):
            return cls(plan, None, None, None)
        offset = (
            jnp.full((1, 1), as_index(call.offset), jnp.int32)
            if arrays.q_offset is None
            else arrays.q_offset
        )
        i = jnp.arange(call.q_len, dtype=jnp.int32)
        j = jnp.arange(call.k_len, dtype=jnp.int32)[None]
        return cls(
            plan,
            _summary(
                plan.queries,
                i[None] + offset,
                i,
                arrays.q_lengths,
                arrays.q_segment_ids,
                plan.sums_queries,
            ),
            _summary(plan.keys, j, j[0], arrays.kv_lengths, arrays.kv_segment_ids, True),
            None if arrays.mask is None else _mask_classes(plan, arrays.mask),
        )

    @property
    def all_full(self) -> bool:
        """Whether no pair can be anything but full, known before any array is seen."""
        return self.queries is None

    def along_keys(self, tile: Tile, query_block: Any) -> Route:
        """The key blocks to visit for one block of queries."""
        return self._order(tile, query_block, None)

    def along_queries(self, tile: Tile, key_block: Any) -> Route:
        """The query blocks to visit for one block of keys."""
        return self._order(tile, None, key_block)

    def _order(self, tile: Tile, query_block: Any, key_block: Any) -> Route:
        inner = self.plan.keys if key_block is None else self.plan.queries
        if self.all_full:
            return Route(jnp.arange(inner.count, dtype=jnp.int32), None, inner.count)
        return route(self.codes(tile, query_block, key_block))

    def codes(self, tile: Tile, query_block: Any, key_block: Any) -> jax.Array:
        """EMPTY, PARTIAL or FULL: one block against all of the other axis."""
        call, rows, columns = self.plan.call, self.queries, self.keys
        if rows is None or columns is None:
            raise RuntimeError("Every pair is full: ask `all_full` first.")
        rows = Summary(*(_cut(tile, field, query_block) for field in rows))
        columns = Summary(*(_cut(tile, field, key_block) for field in columns))
        code = _classes(call, rows, columns)[:, None]
        if self.mask is not None:
            # EMPTY < PARTIAL < FULL, so the class of a conjunction is the lower of the two.
            code = jnp.minimum(code, _cut_mask(tile, self.mask, query_block, key_block))
        low, high = code.min(axis=(0, 1)), code.max(axis=(0, 1))
        return same_for_every_example(jnp.where(low == high, low, PARTIAL))

    def table(self) -> jax.Array:
        """The class of every pair, (B | 1, query blocks, key blocks): a kernel's grid reads it."""
        if self.queries is None or self.keys is None:
            raise RuntimeError("Every pair is full: ask `all_full` first.")
        rows = Summary(*(field[:, :, None] for field in self.queries))
        columns = Summary(*(field[:, None, :] for field in self.keys))
        code = _classes(self.plan.call, rows, columns)
        if self.mask is not None:
            low, high = self.mask.min(axis=1), self.mask.max(axis=1)
            code = jnp.minimum(code, jnp.where(low == high, low, PARTIAL))
        return code


class Route(NamedTuple):
    """Which blocks to visit along an axis, the partial ones first."""

    order: jax.Array  # block numbers
    partial: Any  # how many are partial; None where none can be
    count: Any  # how many are to be visited


def route(code: jax.Array) -> Route:
    """The route along the last axis of classes; `order` has the shape of `code`."""
    rank = jnp.where(code == EMPTY, 2, jnp.where(code == FULL, 1, 0))
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    partial = (code == PARTIAL).sum(axis=-1, dtype=jnp.int32)
    return Route(order, partial, (code != EMPTY).sum(axis=-1, dtype=jnp.int32))


def full_squares(code: jax.Array) -> tuple[Route, jax.Array]:
    """Join blocks to squares of two by two where all four are full.

    Args:
        code: Classes of two neighbouring rows (or columns) of blocks, (2, 2 * n).

    Returns:
        The route along the squares, and `code` with the blocks that they hold EMPTY.
    """
    full = code.reshape(2, -1, 2).min(axis=(0, 2)) == FULL
    squares = route(jnp.where(full, FULL, EMPTY))._replace(partial=None)
    return squares, jnp.where(jnp.repeat(full, 2), EMPTY, code)


def _classes(call: Call, rows: Summary, columns: Summary) -> jax.Array:
    """Class of pairs of blocks, for fields that broadcast; without the user's mask."""
    left, right = band(call)
    some = [rows.some, columns.some]
    every = [rows.every, columns.every]
    if left is not None:
        some.append(columns.high >= rows.low - left)
        every.append(columns.low >= rows.high - left)
    if right is not None:
        some.append(columns.low <= rows.high + right)
        every.append(columns.high <= rows.low + right)
    if call.has("q_segment_ids"):
        some += [rows.segment_low <= columns.segment_high, columns.segment_low <= rows.segment_high]
        every += [
            rows.segment_low == columns.segment_high,
            columns.segment_low == rows.segment_high,
        ]
    return _code(conjunction(some), conjunction(every))


def _code(some: Any, every: Any) -> jax.Array:
    return jnp.where(every & some, FULL, jnp.where(some, PARTIAL, EMPTY))


def _cut(tile: Tile, field: jax.Array, block: Any) -> jax.Array:
    start, size = tile.batch if field.shape[0] not in (0, 1) else (0, 1)
    field = lax.dynamic_slice_in_dim(field, start, size, 0)
    return field if block is None else lax.dynamic_slice_in_dim(field, block, 1, 1)


def _cut_mask(tile: Tile, codes: jax.Array, query_block: Any, key_block: Any) -> jax.Array:
    """Classes of the mask for the tile's batches and heads: (size | 1, size | 1, free axis)."""
    group = tile.call.group_size
    ranges = [tile.batch, (tile.kv_heads[0] * as_index(group), tile.kv_heads[1] * group)]
    ranges += [(0, codes.shape[2]) if query_block is None else (query_block, 1)]
    ranges += [(0, codes.shape[3]) if key_block is None else (key_block, 1)]
    ranges = [(0, 1) if size == 1 else cut for cut, size in zip(ranges, codes.shape, strict=True)]
    codes = lax.dynamic_slice(codes, int32_starts(ranges), [size for _, size in ranges])
    return codes.reshape(codes.shape[0], codes.shape[1], -1)


def _per_block(values: jax.Array, axis: Axis, reduce: Any, fill: Any) -> jax.Array:
    """Reduce (B, length) over the positions that each block holds to (B, count)."""
    pad = axis.count * axis.block - axis.length
    if pad:
        values = jnp.concatenate([values, jnp.full((values.shape[0], pad), fill, values.dtype)], 1)
    return reduce(values.reshape(values.shape[0], axis.count, axis.block), axis=2)


def _summary(
    axis: Axis, where: jax.Array, index: jax.Array, lengths: Any, segments: Any, owned: bool
) -> Summary:
    most = np.iinfo(np.int32).max
    where = jnp.broadcast_to(where, (where.shape[0], axis.length))
    inside = jnp.ones((1, axis.length), bool) if lengths is None else index[None] < lengths[:, None]
    ids = jnp.zeros((1, axis.length), jnp.int32) if segments is None else segments
    every = _per_block(inside, axis, jnp.all, True)
    if axis.overlaps and owned:
        every = every & (jnp.arange(axis.count) < axis.count - 1)[None]
    summary = Summary(
        _per_block(where, axis, jnp.min, most),
        _per_block(where, axis, jnp.max, -most),
        _per_block(inside, axis, jnp.any, False),
        every,
        _per_block(ids, axis, jnp.min, most),
        _per_block(ids, axis, jnp.max, -most),
    )
    if axis.overlaps and not owned:
        # The last block is read from its early start: what it repeats counts too.
        tail = slice(axis.length - axis.block, axis.length)
        last = Summary(
            where[:, tail].min(1),
            where[:, tail].max(1),
            inside[:, tail].any(1),
            inside[:, tail].all(1),
            ids[:, tail].min(1),
            ids[:, tail].max(1),
        )
        summary = Summary(*(f.at[:, -1].set(x) for f, x in zip(summary, last, strict=True)))
    return summary


def _mask_classes(plan: Plan, mask: jax.Array) -> jax.Array:
    """Class of every pair of blocks under the user's mask alone, (B | 1, N | 1, i, j).

    A broadcast axis stays of size 1 where it stands for all heads or batches, and is repeated per
    block along i and j.
    """
    batch, heads, i_size, j_size = mask.shape
    queries, keys, across = plan.queries, plan.keys, as_index(heads)

    def row(index: jax.Array) -> jax.Array:
        rest, block = index // queries.count, index % queries.count
        # A kernel's block may be longer than the mask.
        start = 0 if i_size == 1 else jnp.maximum(queries.start(block), 0)
        size = min(queries.block, i_size)
        cut = ((rest // across, 1), (rest % across, 1), (start, size), (0, j_size))
        rows = lax.dynamic_slice(mask, int32_starts(cut), [size for _, size in cut])[0, 0]
        if j_size == 1:
            rows = jnp.broadcast_to(rows, (size, 1))
            some, every = rows.any(), rows.all()
            return jnp.broadcast_to(_code(some, every), (keys.count,))
        some = _per_block(rows.any(0)[None], keys, jnp.any, False)[0]
        every = _per_block(rows.all(0)[None], keys, jnp.all, True)[0]
        return _code(some, every)

    codes = lax.map(row, jnp.arange(batch * heads * queries.count, dtype=jnp.int32))
    return codes.reshape(batch, heads, queries.count, keys.count)


@jax.custom_batching.custom_vmap
def same_for_every_example(code: jax.Array) -> jax.Array:
    """Under `vmap`, one class for all examples (partial where they differ).

    The loops over blocks then have the same trip count for every example and stay plain loops; what
    an example does not see in a block that another one visits is masked by element.
    """
    return code


@same_for_every_example.def_vmap
def _(axis_size: int, in_batched: list[bool], code: jax.Array) -> tuple[jax.Array, bool]:
    del axis_size
    if in_batched[0]:
        low, high = code.min(axis=0), code.max(axis=0)
        code = jnp.where(low == high, low, PARTIAL)
    return same_for_every_example(code), False
