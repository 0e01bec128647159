"""From similarities to logits, and from sums to the output: one definition for every engine.

logits = softcap(scale * similarity + alibi + relative_bias + bias),  then -inf where not visible
out    = acc / l,  lse = m + log l,  and the sink, if any, joins the denominator last
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core.call import TERM_ROLES, Arrays, Call, Size
from flash_attention_jax._core.masks import Positions
from flash_attention_jax._core.results import Results, finite_or_zero, lse_of
from flash_attention_jax._core.tiles import Tile

LOGIT_TERMS = ("scale", "alibi_slopes", "relative_bias", "bias")
"""The differentiable arrays that enter the logits besides q and k."""


def precision_of(call: Call) -> Any:
    """Precision of the products: the call's, else the context's, else that of the inputs' dtype."""
    context = getattr(jax.config, "jax_default_matmul_precision", None)
    if call.precision is not None or context is not None:
        return call.precision
    return lax.Precision.HIGHEST if call.dtype in ("float32", "float64") else None


def product(call: Call, a: jax.Array, b: jax.Array, equation: str) -> jax.Array:
    """Einsum of two blocks, accumulated in the call's accumulator dtype."""
    return jnp.einsum(
        equation, a, b, precision=precision_of(call), preferred_element_type=call.acc_dtype
    )


def wide_terms(call: Call, arrays: Arrays) -> Arrays:
    """The differentiable terms in the accumulator's dtype.

    JAX sums the gradient of an array that is used more than once in the array's own dtype; so the
    sum is wide, and rounded once at its end.
    """
    names = [name for name in (*LOGIT_TERMS, "sinks") if getattr(arrays, name) is not None]
    return arrays._replace(**{name: getattr(arrays, name).astype(call.acc_dtype) for name in names})


def cut_terms(arrays: Arrays, tile: Tile, axes: str) -> dict[str, jax.Array]:
    """The tile's part of each term of the logits that the call has, with the axes `term_axes`."""
    present = [name for name in LOGIT_TERMS if getattr(arrays, name) is not None]
    return {
        name: tile.take(getattr(arrays, name), TERM_ROLES[name], term_axes(name, axes))
        for name in present
    }


def term_axes(name: str, axes: str) -> str:
    """Axes of a term's block: those of the logits; the relative bias is cut along diagonals."""
    return "bhrg" if name == "relative_bias" else axes


def toeplitz(diagonals: jax.Array, rows: Size, columns: Size) -> jax.Array:
    """Spread diagonals, lowest first, to a matrix with entry j - i + rows - 1 at (i, j).

    By repeating and reading with a stride one shorter, so that the transpose is a reshape and a
    sum, not a scatter.
    """
    width = rows + columns
    lead = diagonals.shape[:-1]
    padded = jnp.pad(diagonals, [(0, 0)] * len(lead) + [(0, 1)])
    flat = jnp.broadcast_to(padded[..., None, :], (*lead, rows, width)).reshape(*lead, rows * width)
    flat = flat[..., rows - 1 : rows - 1 + rows * (width - 1)]
    return flat.reshape(*lead, rows, width - 1)[..., :columns]


def logits(
    call: Call,
    similarity: jax.Array,
    terms: dict[str, jax.Array],
    at: Positions,
    visible: jax.Array | None,
    axes: str,
) -> jax.Array:
    """Logits of one block from similarities that hold a scale already, unless the terms have it.

    Elementwise in `similarity`; differentiable in it and in the terms. Nothing that is not visible
    reaches the result or, through a derivative, anything else.
    """
    x = similarity
    if "scale" in terms:
        x = x * terms["scale"].astype(x.dtype)
    added = []
    if "alibi_slopes" in terms:
        slopes = terms["alibi_slopes"].astype(x.dtype)
        added.append(-slopes * jnp.abs(at.diagonal - at.j).astype(x.dtype))
    if "relative_bias" in terms:
        rows, columns = x.shape[axes.index("i")], x.shape[axes.index("j")]
        spread = toeplitz(terms["relative_bias"].astype(x.dtype), rows, columns)
        added.append(lax.transpose(spread, ["bhrij".index(letter) for letter in axes]))
    if "bias" in terms:
        added.append(terms["bias"].astype(x.dtype))
    for term in added:
        x = x + (term if visible is None else jnp.where(visible, term, jnp.zeros((), x.dtype)))
    if call.softcap is not None:
        x = call.softcap * jnp.tanh(x / call.softcap)
    return x if visible is None else jnp.where(visible, x, jnp.full((), -jnp.inf, x.dtype))


def scaled(call: Call, x: jax.Array) -> jax.Array:
    """`x` (a wide block of q or k, or similarities) times the static scale, if there is one."""
    return x if call.scale is None or call.scale == 1 else x * np.asarray(call.scale, x.dtype)


@jax.custom_jvp
def at_most_zero(x: jax.Array) -> jax.Array:
    """The smaller of x and 0, where x is not over 0 but for rounding: its derivative is that of x.

    A compiler may join the product that made a logit to a subtraction, and a block of the backward
    may add up its products in another order than the forward did; of logits of 1e9 both differ
    by 64.
    """
    return jnp.minimum(x, jnp.zeros((), x.dtype))


@at_most_zero.defjvp
def _at_most_zero_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return at_most_zero(*primals), tangents[0]


def finish(
    call: Call, m: jax.Array | None, l: jax.Array, acc: jax.Array, sinks: jax.Array | None
) -> Results:
    """Normalise the sums of one block of rows.

    Args:
        call: The call.
        m: Maximum of the logits per row (..., i), -inf where none was seen; None where no maximum
            was subtracted.
        l: Sum of exp(logits - m), (..., i).
        acc: Sum of the kept exp(logits - m) times the values, (..., i, e).
        sinks: One logit per row's head, broadcastable to l, or None.

    Returns:
        out (..., i, e), zero for a row without a key, and lse and low (..., i), -inf and 0 for a
        row without key or sink.
    """
    none = l == 0
    m = jnp.where(none, jnp.full((), -jnp.inf, l.dtype), jnp.zeros_like(l) if m is None else m)
    if sinks is not None:
        m, l, acc = with_sink(m, l, acc, sinks)
    weight = 1 / jnp.where(l == 0, jnp.ones_like(l), l)
    if call.dropout_rate:
        weight = weight / (1 - call.dropout_rate)
    # A constant where nothing was seen, so that no cotangent, finite or not, passes.
    out = jnp.where(none[..., None], jnp.zeros((), acc.dtype), acc * weight[..., None])
    return Results(out, *lse_of(m, l))


def with_sink(
    m: jax.Array, l: jax.Array, acc: jax.Array, sinks: jax.Array, exp: Any = jnp.exp
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums of rows with their sink: one more key, whose value is 0.

    `exp` is that of the base in which m and the sinks are logarithms.
    """
    top = lax.stop_gradient(jnp.maximum(m, sinks))
    safe = finite_or_zero(top)
    shrink = exp(m - safe)
    return top, l * shrink + exp(sinks - safe), acc * shrink[..., None]
