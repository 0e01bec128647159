"""Few queries against many keys on Hopper: the keys are split among programs and merged by lse.

A step of decoding has a query or a few per sequence, and the time is that of reading k and v once.
So the query heads that share a key head become rows of one tile, which reads its keys once for all
of them; and each program takes a part of the keys, so that every processor reads (Flash-Decoding:
Dao, Haziza, Massa and Sizov 2023). The kernel is the forward one: a part is a block of queries, the
same queries each time, whose route holds only the part's keys. The parts merge exactly, in a fixed
order. The backward pass needs out and the sums alone, and is that of every other call.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._core import masks
from flash_attention_jax._core.call import Arrays, Call
from flash_attention_jax._core.logits import with_sink
from flash_attention_jax._core.results import finite_or_zero
from flash_attention_jax.kernels import hopper_forward
from flash_attention_jax.kernels import operands as ops
from flash_attention_jax.kernels.hopper_config import PROCESSORS, ROWS, tiles
from flash_attention_jax.kernels.hopper_support import interpreter
from flash_attention_jax.kernels.join import Sums

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


def forward(call: Call, arrays: Arrays, factor: float, count: int) -> Sums:
    """Out, and sums (B, N, T), of a call whose keys are split into `count` parts.

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
    parts = hopper_forward.forward(whole, given, sizes, factor, interpret=interpreter(call))
    merged = _merged(
        Sums(*(_from_rows(call, name, x, count) for name, x in parts._asdict().items()))
    )
    if arrays.sinks is not None:
        sinks = ops.per_head(call, arrays.sinks)[:, None] * np.float32(ops.LOG2E)
        top, total, acc = with_sink(
            merged.top, merged.total, merged.out * merged.total[..., None], sinks, jnp.exp2
        )
        merged = Sums(acc / jnp.where(total == 0, 1.0, total)[..., None], top, total)
    out = merged.out.astype(call.dtype)
    return merged._replace(out=out if call.layout == "heads_first" else out.swapaxes(1, 2))


def _merged(parts: Sums) -> Sums:
    """Parts along the first axis as one: as `merge_stacked`, of sums that were not yet rounded."""
    top = parts.top.max(axis=0)
    weights = parts.total * jnp.exp2(parts.top - finite_or_zero(top))
    total = weights.sum(axis=0)
    weights = weights / jnp.where(total == 0, 1.0, total)
    return Sums((weights[..., None] * parts.out).sum(axis=0), top, total)


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


def _from_rows(call: Call, name: str, x: jax.Array, count: int) -> jax.Array:
    """The parts of a result of the kernel, (parts, B, N, T) or with the dimension e, in float32."""
    x = x.swapaxes(1, 2) if name == "out" and call.layout == "heads_last" else x
    rows = call.group_size * call.q_len
    x = x.reshape(call.batch, call.kv_heads, count, ROWS, *x.shape[3:])[:, :, :, :rows]
    x = jnp.moveaxis(x[..., : call.v_dim] if name == "out" else x, 2, 0)
    shape = (count, call.batch, call.heads, call.q_len, *x.shape[4:])
    return x.reshape(shape).astype(jnp.float32)


def _routes(call: Call, arrays: Arrays, block_kv: int, count: int) -> ops.Operands:
    """The route of each part: what the mask leaves of its own blocks."""
    steps = ops.plan(call, call.q_len, block_kv)
    blocks = steps.keys.count
    with ops.once(call, arrays, count * blocks):
        visits = masks.Visits.of(steps, arrays)
        code = jnp.full((1, 1, blocks), masks.FULL) if visits.all_full else visits.table()
        owner = jnp.arange(blocks) // -(-blocks // count)
        own = owner == jnp.arange(count)[:, None]
        order, partial, last = masks.route(jnp.where(own, code, masks.EMPTY))
        return {"order": order, "counts": jnp.stack([partial, last], axis=-1)}
