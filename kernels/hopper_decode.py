"""Few queries against many keys on Hopper: the keys are split among programs and merged by lse.

A step of decoding has a query or a few per sequence, and the time is that of reading k and v once.
So the query heads that share a key head become rows of one tile, which reads its keys once for all
of them; and each program takes a part of the keys, so that every processor reads (Flash-Decoding:
Dao, Haziza, Massa and Sizov 2023). The kernel is the forward one: a part is a block of queries, the
same queries each time, whose route holds only the part's keys. The parts merge exactly, in a fixed
order. The backward pass needs out and lse alone, and is that of every other call.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax import _masks
from flash_attention_jax._call import Arrays, Call
from flash_attention_jax._logits import finish, merge_stacked
from flash_attention_jax.kernels import hopper_forward
from flash_attention_jax.kernels import operands as ops
from flash_attention_jax.kernels._config import PROCESSORS, ROWS, tiles
from flash_attention_jax.kernels._support import interpreter

FEWEST_KEYS = 512
"""From how many keys on a call is split; before, merging costs more than it saves."""

LEAST_BLOCKS = 2
"""Blocks of keys that a part has at least."""


def parts(call: Call) -> int | None:
    """Into how many parts the keys of a call are split, None where it is not of this kind."""
    per_head = ("bias", "alibi_slopes", "scale")
    if (
        call.group_size * call.q_len > ROWS
        or call.k_len < FEWEST_KEYS
        or call.dropout_rate
        or any(call.has(name) for name in per_head)
        or not ops.masks_keys_alone(call)
    ):
        return None
    blocks = -(-call.k_len // tiles(call, "decode").inner)
    wanted = -(-2 * PROCESSORS // (call.batch * call.kv_heads))
    each = max(LEAST_BLOCKS, -(-blocks // wanted))
    count = -(-blocks // each)
    return None if count == 1 and call.group_size == 1 else count


def forward(call: Call, arrays: Arrays, factor: float, count: int) -> tuple[jax.Array, jax.Array]:
    """Out and lse (B, N, T) of a call whose keys are split into `count` parts.

    Args:
        call: The call.
        arrays: Its arrays, q and k as the kernels multiply them.
        factor: What makes base-2 logits of the product of q and k.
        count: Of `parts`.
    """
    sizes = tiles(call, "decode")
    seen = ops.keys_that_are_seen(call, arrays)
    given = {
        "q": ops.rows_of(call, "q", _to_rows(call, arrays.q, count)),
        "k": ops.rows_of(call, "k", ops.clean(call, "k", arrays.k, seen)),
        "v": ops.rows_of(call, "v", ops.clean(call, "v", arrays.v, seen)),
    }
    given |= _routes(call, arrays, sizes.inner, count)
    of_queries = ("low", "high", "q_segments")
    for name, x in ops.terms(call, arrays, 1, sizes.inner).items():
        given[name] = _to_vector(call, x, count) if name in of_queries else x
    whole = dataclasses.replace(
        call, heads=call.kv_heads, q_len=count * ROWS, causal=False, window=(None, None)
    )
    out, lse = hopper_forward.forward(whole, given, sizes, factor, interpret=interpreter(call))
    out, lse = merge_stacked(*_from_rows(call, out, lse, count))
    if arrays.sinks is not None:
        sinks = ops.per_head(call, arrays.sinks)[:, None]
        seen_any = (lse != -np.inf).astype(lse.dtype)
        out, lse = finish(call, lse, seen_any, out.astype(lse.dtype), sinks)
    out = out.astype(call.dtype)
    return (out if call.layout == "heads_first" else out.swapaxes(1, 2)), lse


def _to_rows(call: Call, q: jax.Array, count: int) -> jax.Array:
    """The queries of a key head as the rows of one tile, once per part, in the call's layout."""
    q = q if call.layout == "heads_first" else q.swapaxes(1, 2)
    rows = q.reshape(call.batch, call.kv_heads, 1, call.group_size * call.q_len, call.dim)
    rows = ops.pad_axis(rows, 3, ROWS)
    rows = jnp.broadcast_to(rows, (*rows.shape[:2], count, *rows.shape[3:]))
    rows = rows.reshape(call.batch, call.kv_heads, count * ROWS, call.dim)
    return rows if call.layout == "heads_first" else rows.swapaxes(1, 2)


def _to_vector(call: Call, x: jax.Array, count: int) -> jax.Array:
    """A number per query, (B | 1, T), for the rows of `_to_rows`; 0 for those that pad."""
    return jnp.tile(ops.pad_axis(jnp.tile(x, (1, call.group_size)), 1, ROWS), (1, count))


def _from_rows(
    call: Call, out: jax.Array, lse: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Parts of out (parts, B, N, T, e) and of lse (parts, B, N, T), both in float32."""
    out = out if call.layout == "heads_first" else out.swapaxes(1, 2)
    rows = call.group_size * call.q_len
    shape = (count, call.batch, call.heads, call.q_len)
    out = out.reshape(call.batch, call.kv_heads, count, ROWS, -1)[..., :rows, : call.v_dim]
    lse = lse.reshape(call.batch, call.kv_heads, count, ROWS)[..., :rows]
    out, lse = jnp.moveaxis(out, 2, 0), jnp.moveaxis(lse, 2, 0)
    return out.reshape(*shape, call.v_dim).astype(lse.dtype), lse.reshape(shape)


def _routes(call: Call, arrays: Arrays, block_kv: int, count: int) -> ops.Operands:
    """The route of each part: what the mask leaves of its own blocks."""
    steps = ops.plan(call, call.q_len, block_kv)
    blocks = steps.keys.count
    with ops.once(call, arrays, count * blocks):
        visits = _masks.Visits.of(steps, arrays)
        code = jnp.full((1, 1, blocks), _masks.FULL) if visits.all_full else visits.table()
        owner = jnp.arange(blocks) // -(-blocks // count)
        own = owner == jnp.arange(count)[:, None]
        order, partial, last = _masks.route(jnp.where(own, code, _masks.EMPTY))
        return {"order": order, "counts": jnp.stack([partial, last], axis=-1)}
