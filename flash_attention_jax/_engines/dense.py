"""The oracle: the whole matrix of logits at once, O(T * S) memory, JAX's own differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._core import dropout, masks
from flash_attention_jax._core.call import ROLES, Arrays, Call
from flash_attention_jax._core.logits import (
    at_most_zero,
    cut_terms,
    finish,
    logits,
    product,
    scaled,
    wide_terms,
)
from flash_attention_jax._core.results import Results
from flash_attention_jax._core.similarity import normalised
from flash_attention_jax._core.tiles import Tile

AXES = "bhrij"


def why_not(call: Call) -> str | None:
    """Why this engine cannot run the call: never."""
    del call
    return None


def attend(call: Call, arrays: Arrays) -> Results:
    """Attention by the definition, line by line.

    Returns:
        out, in the call's dtype, lse and low, with the axes `ROLES` of the call's layout.
    """
    arrays = wide_terms(call, normalised(call, arrays))
    tile = Tile.whole(call)
    q = tile.take(arrays.q, ROLES["q"][call.layout], "bhrid")
    k = tile.take(arrays.k, ROLES["k"][call.layout], "bhjd")
    v = tile.take(arrays.v, ROLES["v"][call.layout], "bhje")
    at = masks.positions(call, arrays, tile, AXES)
    visible = masks.visible(call, arrays, tile, at, AXES)
    if visible is not None:
        rows, columns = masks.sees(visible, AXES, "i"), masks.sees(visible, AXES, "j")
        q = masks.cleaned(q, "bhrid", rows, AXES)
        k, v = masks.cleaned(k, "bhjd", columns, AXES), masks.cleaned(v, "bhje", columns, AXES)

    # Into the queries where nothing is rounded by it: a compiler may otherwise join the product by
    # the scale to the subtraction of the maximum, which of logits of 1e10 leaves thousands.
    terms = cut_terms(arrays, tile, AXES)
    if q.dtype == call.acc_dtype:
        x = product(call, scaled(call, q) * terms.pop("scale", 1), k, "bhrid,bhjd->bhrij")
    else:
        x = scaled(call, product(call, q, k, "bhrid,bhjd->bhrij"))
    x = logits(call, x, terms, at, visible, AXES)
    m = lax.stop_gradient(x.max(axis=-1, initial=-jnp.inf))
    m = jnp.where(m == -jnp.inf, jnp.zeros((), m.dtype), m)
    p = jnp.exp(at_most_zero(x - m[..., None]))
    l = p.sum(axis=-1)
    if call.dropout_rate:
        words = dropout.row_words(
            arrays.dropout_key, call.heads, at.b, at.n, at.i, arrays.dropout_origin
        )
        p = jnp.where(dropout.keep(words, at.j, call.dropout_rate), p, jnp.zeros((), p.dtype))
    acc = product(call, p.astype(v.dtype), v, "bhrij,bhje->bhrie")
    sinks = None if arrays.sinks is None else tile.take(arrays.sinks, "n", "bhri").astype(l.dtype)
    found = finish(call, m, l, acc, sinks)
    whole = {name: place(call, tile, block, name) for name, block in found._asdict().items()}
    return Results(**whole | {"out": whole["out"].astype(call.dtype)})


def place(call: Call, tile: Tile, block: jax.Array, name: str) -> jax.Array:
    """A whole result in the call's layout."""
    roles = ROLES[name][call.layout]
    return tile.put(jnp.zeros(call.shape(roles), block.dtype), roles, block, "bhrie"[: block.ndim])
