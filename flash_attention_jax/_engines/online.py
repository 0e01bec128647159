"""The online softmax: one block of keys joins the sums of a block of queries.

    m' = max(m, max_j x)    l' = l * exp(m - m') + sum_j exp(x - m')    acc' = acc * exp(m - m') +
    exp(x - m') v

Milakov & Gimelshein 2018 (algorithm 3), with the accumulator of Rabe & Staats 2021. Where the
logits have a known bound there is no m and nothing is rescaled: l' = l + sum_j exp(x), acc' = acc +
exp(x) v.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core import dropout, masks
from flash_attention_jax._core.call import ROLES, Arrays, Call
from flash_attention_jax._core.exponential import exponential
from flash_attention_jax._core.logits import (
    at_most_zero,
    cut_terms,
    finish,
    logits,
    product,
    scaled,
)
from flash_attention_jax._core.results import Results, finite_or_zero
from flash_attention_jax._core.similarity import needs_running_maximum
from flash_attention_jax._core.tiles import Tile
from flash_attention_jax._core.varying import full

AXES = "bhrij"

Carry = tuple[Any, Any, Any]
"""m (b, h, r, i), or None where no maximum runs; l (b, h, r, i); acc (b, h, r, i, e)."""


def compute_dtype(call: Call) -> Any:
    """Dtype of the operands of products; a CPU, without 16-bit units, is faster in float32."""
    return call.acc_dtype if call.platform == "cpu" else np.dtype(call.dtype)


def folds_scale(call: Call) -> bool:
    """Whether the scale multiplies the queries (fewer numbers) rather than the product.

    Only where they are in the accumulator's dtype, so that nothing is rounded by it. Forward and
    backward fold it into the same operand: a logit of 1e6 that differed in its last bit would move
    its probability by a tenth.
    """
    return compute_dtype(call) == call.acc_dtype


def queries(call: Call, arrays: Arrays, tile: Tile) -> jax.Array:
    """The tile's queries as `step` wants them (b, h, r, i, d)."""
    scale = None if arrays.scale is None else tile.take(arrays.scale, "n", "bhrid")
    return folded(call, tile.take(arrays.q, ROLES["q"][call.layout], "bhrid"), scale)


def folded(call: Call, q: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Queries as the product wants them: in its dtype, times the scale where it folds."""
    q = q.astype(compute_dtype(call))
    if not folds_scale(call):
        return q
    return scaled(call, q) if scale is None else q * scale.astype(q.dtype)


def start(call: Call, tile: Tile, q: jax.Array) -> Carry:
    """The sums before any key was seen, varying over the manual axes that `q` varies over."""
    lead = (tile.batch[1], tile.kv_heads[1], call.group_size, tile.queries[1])
    running = needs_running_maximum(call, compute_dtype(call))
    m = full(lead, -jnp.inf, call.acc_dtype, q) if running else None
    acc = full((*lead, call.v_dim), 0, call.acc_dtype, q)
    return m, full(lead, 0, call.acc_dtype, q), acc


def step(
    call: Call, arrays: Arrays, tile: Tile, q: jax.Array, carry: Carry, *, masked: bool
) -> Carry:
    """Add the tile's keys.

    Args:
        call: The call.
        arrays: Its arrays, q and k as the product wants them (`normalised`).
        tile: Queries and keys of this step.
        q: What `queries` gave for the tile.
        carry: The sums so far.
        masked: Whether some of the tile may be invisible; False promises that all of it is visible.
    """
    dtype = compute_dtype(call)
    k = tile.take(arrays.k, ROLES["k"][call.layout], "bhjd").astype(dtype)
    v = tile.take(arrays.v, ROLES["v"][call.layout], "bhje").astype(dtype)
    at = masks.positions(call, arrays, tile, AXES)
    visible = masks.visible(call, arrays, tile, at, AXES) if masked else None
    if visible is not None:
        seen = masks.sees(visible, AXES, "j")
        q = masks.cleaned(q, "bhrid", masks.sees(visible, AXES, "i"), AXES)
        k, v = masks.cleaned(k, "bhjd", seen, AXES), masks.cleaned(v, "bhje", seen, AXES)
    x = product(call, q, k, "bhrid,bhjd->bhrij")
    folds = folds_scale(call)
    x = x if folds else scaled(call, x)
    terms = cut_terms(arrays._replace(scale=None) if folds else arrays, tile, AXES)
    x = logits(call, x, terms, at, visible, AXES)

    m, l, acc = carry
    if m is None:
        p = exponential(x, call.platform)
    else:
        # out and lse do not depend on m: as a constant it drops out of derivatives of every order.
        top = lax.stop_gradient(jnp.maximum(m, x.max(axis=-1)))
        safe = finite_or_zero(top)
        shrink = jnp.exp(m - safe)
        # Only a scale that multiplies here can be joined to the subtraction.
        shifted = x - safe[..., None] if folds else at_most_zero(x - safe[..., None])
        p = exponential(shifted, call.platform)
        m, l, acc = top, l * shrink, acc * shrink[..., None]
    l = l + p.sum(axis=-1)
    if call.dropout_rate:
        words = dropout.row_words(
            arrays.dropout_key, call.heads, at.b, at.n, at.i, arrays.dropout_origin
        )
        p = jnp.where(dropout.keep(words, at.j, call.dropout_rate), p, jnp.zeros((), p.dtype))
    return m, l, acc + product(call, p.astype(dtype), v, "bhrij,bhje->bhrie")


def end(call: Call, arrays: Arrays, tile: Tile, carry: Carry) -> Results:
    """Output (b, h, r, i, e), lse and low (b, h, r, i) of the tile's queries."""
    m, l, acc = carry
    sinks = None if arrays.sinks is None else tile.take(arrays.sinks, "n", "bhri").astype(l.dtype)
    return finish(call, m, l, acc, sinks)
