"""What the kernels read: arrays made ready by XLA, by name, and the way through the blocks.

A kernel moves tiles of (rows, dimension) with TMA, which reads zeros past the end of an array and
wants rows in eights and dimensions in 64s. Everything that hides a key by position becomes one
range of keys per query (`low`, `high`), so a kernel compares two numbers and knows nothing of
causal, window or lengths. Which blocks are visited at all, and which without a mask, is a list per
outer block (`order`, `counts`), made from the same classes as those of the blocked engine.
"""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flash_attention_jax._core import masks
from flash_attention_jax._core.call import ROLES, Arrays, Call
from flash_attention_jax._core.similarity import needs_running_maximum
from flash_attention_jax._core.tiles import Axis, Plan, Tile
from flash_attention_jax.kernels.hopper_config import COLUMNS

LOG2E = float(np.log2(np.e))
LN2 = float(np.log(2.0))

Operands = dict[str, Any]  # arrays, or a reference that a kernel adds to

ROW_STEP = 8
"""TMA with a swizzled tile wants the number of rows to be a multiple of this."""


def bounded(call: Call) -> bool:
    """Whether the forward pass runs without a maximum."""
    return not needs_running_maximum(call, call.dtype)


def masked(call: Call) -> bool:
    """Whether any pair of blocks may have to be masked, at any size of block."""
    return masks.masks_anything(call)


LARGEST_CONSTANT = 2**16
"""Entries of a table that is computed when the call is traced, where no array enters it."""


def once(call: Call, arrays: Arrays, entries: int) -> contextlib.AbstractContextManager[Any]:
    """In which ranges and routes are computed while tracing, if they depend on no array.

    A short causal call then runs the kernel and nothing else: what XLA would do each time to sort a
    few block numbers takes longer than the kernel.
    """
    given = (arrays.q_offset, arrays.q_lengths, arrays.kv_lengths, arrays.mask)
    fixed = all(x is None for x in (*given, arrays.q_segment_ids))
    return (
        jax.ensure_compile_time_eval()
        if fixed and entries <= LARGEST_CONSTANT
        else contextlib.nullcontext()
    )


# --- arrays ---


def pad_axis(x: jax.Array, axis: int, multiple: int, fill: Any = 0) -> jax.Array:
    """Pad one axis at its end to a multiple; the array itself where it is one already."""
    short = -x.shape[axis] % multiple
    if not short:
        return x
    widths = [(0, short if n == axis % x.ndim else 0) for n in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)


def rows_of(call: Call, name: str, x: jax.Array) -> jax.Array:
    """q, k, v, out or dout as TMA reads it: length in eights, dimension in 64s, else unchanged."""
    length = ROLES[name][call.layout].index("i" if name in ("q", "out") else "j")
    return pad_axis(pad_axis(x, length, ROW_STEP), -1, COLUMNS)


def clean(call: Call, name: str, x: jax.Array, seen: jax.Array | None) -> jax.Array:
    """Zero the rows of q, k, v or dout that take no part, so that 0 * NaN cannot arise."""
    if seen is None:
        return x
    roles = ROLES[name][call.layout]
    length = roles.index("i" if name in ("q", "out") else "j")
    head = roles.index("n" if name in ("q", "out") else "k")
    shape = [1] * 4
    shape[0], shape[head], shape[length] = seen.shape
    seen = seen if head < length else seen.swapaxes(1, 2)
    return jnp.where(seen.reshape(shape), x, jnp.zeros((), x.dtype))


def queries_that_see(call: Call, arrays: Arrays) -> jax.Array | None:
    """Which queries may see a key, (B | 1, N | 1, T); None where all may."""
    if not masked(call):
        return None
    if not masks_keys_alone(call):
        return _visible(call, arrays).any(axis=3)
    with once(call, arrays, call.q_len):
        low, high = masks.key_ranges(call, arrays)
        return _unless_all(low < high)


def keys_that_are_seen(call: Call, arrays: Arrays) -> jax.Array | None:
    """Which keys some query may see, (B | 1, K | 1, S); None where all are."""
    if not masked(call):
        return None
    if not masks_keys_alone(call):
        seen = _visible(call, arrays).any(axis=2)
        if seen.shape[1] == 1:
            return seen
        return seen.reshape(-1, call.kv_heads, call.group_size, call.k_len).any(axis=2)
    with once(call, arrays, max(call.q_len, call.k_len)):
        low, high = masks.key_ranges(call, arrays)
        some = low < high
        j = jnp.arange(call.k_len, dtype=jnp.int32)
        least = jnp.where(some, low, call.k_len).min(axis=1, keepdims=True)
        most = jnp.where(some, high, 0).max(axis=1, keepdims=True)
        seen = (j >= least) & (j < most)
        if arrays.mask is not None:
            seen = seen & jnp.broadcast_to(arrays.mask[:, 0, 0], (arrays.mask.shape[0], call.k_len))
        if arrays.q_segment_ids is not None:
            seen = seen & _among(arrays.kv_segment_ids, arrays.q_segment_ids)
        return _unless_all(seen)


def masks_keys_alone(call: Call) -> bool:
    """Whether the user's mask, if any, is one of keys: the same for every head and query."""
    mask = call.shape_of("mask")
    return mask is None or mask[1:3] == (1, 1)


def _visible(call: Call, arrays: Arrays) -> jax.Array:
    """What a dense mask leaves visible, (B | 1, N | 1, T, S): for a reduction to fuse with."""
    tile = Tile.whole(call)
    at = masks.positions(call, arrays, tile, "bhrij")
    seen = masks.visible(call, arrays, tile, at, "bhrij")
    if seen is None:
        raise RuntimeError("Nothing is masked: ask `masked` first.")
    seen = jnp.broadcast_to(seen, (*seen.shape[:3], call.q_len, call.k_len))
    return seen.reshape(seen.shape[0], -1, call.q_len, call.k_len)


def _unless_all(seen: jax.Array) -> jax.Array | None:
    """With an axis for heads; None where it is known while tracing that nothing is hidden."""
    return None if not isinstance(seen, Tracer) and bool(seen.all()) else seen[:, None]


def _among(ids: jax.Array, others: jax.Array) -> jax.Array:
    """Which of `ids` (B | 1, S) occur among `others` (B | 1, T), in O(n log n)."""
    batch = max(ids.shape[0], others.shape[0])
    ids, others = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in (ids, others))
    others = jnp.sort(others, axis=1)
    place = jax.vmap(jnp.searchsorted)(others, ids)
    found = jnp.take_along_axis(others, jnp.minimum(place, others.shape[1] - 1), axis=1)
    return found == ids


def terms(
    call: Call, arrays: Arrays, q_multiple: int, kv_multiple: int, *, keys_first: bool = False
) -> Operands:
    """What the element mask and the added terms read, padded so that no read passes the end.

    Args:
        call: The call.
        arrays: Its arrays.
        q_multiple: Queries of a block.
        kv_multiple: Keys of a block.
        keys_first: Whether a tile has its keys as rows; the bias and a dense mask are transposed
            for it.
    """
    found: Operands = {}
    with once(call, arrays, call.q_len):
        low, high = masks.key_ranges(call, arrays)
        # A padded query has an empty range; a key past the end lies in none.
        if masks.band(call)[0] is not None:
            found["low"] = pad_axis(low, 1, q_multiple)
        found["high"] = pad_axis(high, 1, q_multiple)
    if arrays.q_segment_ids is not None:
        found["q_segments"] = pad_axis(arrays.q_segment_ids, 1, q_multiple)
        found["kv_segments"] = pad_axis(arrays.kv_segment_ids, 1, kv_multiple)
    if arrays.mask is not None and masks_keys_alone(call):
        kept = jnp.broadcast_to(arrays.mask[:, 0, 0], (arrays.mask.shape[0], call.k_len))
        found["kept"] = pad_axis(kept.astype(jnp.int32), 1, kv_multiple)
    elif arrays.mask is not None:
        mask = arrays.mask.astype(jnp.int32 if 1 in arrays.mask.shape[2:] else jnp.int8)
        found["mask"] = _of_pairs(mask, q_multiple, kv_multiple, keys_first=keys_first)
    if arrays.bias is not None:
        found["bias"] = _of_pairs(arrays.bias, q_multiple, kv_multiple, keys_first=keys_first)
    if arrays.alibi_slopes is not None:
        i = jnp.arange(call.q_len, dtype=jnp.int32)[None]
        diagonal = i + (call.offset if arrays.q_offset is None else arrays.q_offset)
        found["diagonal"] = pad_axis(diagonal, 1, q_multiple)
        found["slopes"] = per_head(call, arrays.alibi_slopes * LOG2E)
    if arrays.scale is not None:
        found["scale"] = per_head(call, arrays.scale)
    if call.dropout_rate:
        found["words"] = arrays.dropout_key
        if arrays.dropout_origin is not None:
            found["origin"] = arrays.dropout_origin.astype(jnp.int32)
    return found


def _of_pairs(x: jax.Array, q_multiple: int, kv_multiple: int, *, keys_first: bool) -> jax.Array:
    """A term that broadcasts to (b, h, i, j) in whole blocks; an axis of size 1 stays."""
    for axis, multiple in ((2, q_multiple), (3, kv_multiple)):
        if x.shape[axis] > 1:
            x = pad_axis(x, axis, multiple)
    return x.swapaxes(2, 3) if keys_first else x


def per_head(call: Call, x: jax.Array) -> jax.Array:
    """An array per head, or one number for all of them, as (N,) float32."""
    return jnp.broadcast_to(x.astype(jnp.float32), (call.heads,))


# --- the way through the blocks ---


def routes(call: Call, arrays: Arrays, block_q: int, block_kv: int, *, over_keys: bool) -> Operands:
    """Lists of blocks to visit: `order` (B | 1, outer, inner) and `counts` (B | 1, outer, 2).

    Args:
        call: The call.
        arrays: Its arrays.
        block_q: Queries of a block.
        block_kv: Keys of a block.
        over_keys: Whether a program owns queries and walks keys, or the other way round.

    Returns:
        Nothing where every block is visited without a mask; else for each outer block the inner
        ones, the partial first, and how many are partial and how many there are in all.
    """
    steps = plan(call, block_q, block_kv)
    with once(call, arrays, steps.queries.count * steps.keys.count):
        visits = masks.Visits.of(steps, arrays)
        if visits.all_full:
            return {}
        code = visits.table()
        order, partial, last = masks.route(code if over_keys else code.swapaxes(1, 2))
        return {"order": order, "counts": jnp.stack([partial, last], axis=-1)}


def routes_of_batches(call: Call, arrays: Arrays, block_q: int, block_kv: int) -> Operands:
    """As `routes`, for programs that own one pair of blocks of the bias and walk batches.

    Returns:
        `order` (B, pairs, 1) and `counts`; (1, pairs, B) where the bias is shared by the batches.
    """
    steps = plan(call, block_q, block_kv)
    batches, _, _, _ = call.shape_of("bias") or (1, 1, 1, 1)
    with once(call, arrays, steps.queries.count * steps.keys.count):
        visits = masks.Visits.of(steps, arrays)
        if visits.all_full:
            return {}
        code = visits.table()
        code = jnp.broadcast_to(code, (call.batch, *code.shape[1:])).reshape(call.batch, -1)
        code = code[:, :, None] if batches == call.batch else code.T[None]
        order, partial, last = masks.route(code)
        return {"order": order, "counts": jnp.stack([partial, last], axis=-1)}


def plan(call: Call, block_q: int, block_kv: int) -> Plan:
    """The blocks of a kernel, for the classes of pairs of them.

    A short last block is partial on both sides: what lies past the end has to be hidden.
    """
    return Plan(call, Axis(call.q_len, block_q), Axis(call.k_len, block_kv), 1, 1, True)
