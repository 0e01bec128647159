"""What attention leaves for its backward pass and for merging: out, lse, and what lse lacks.

    denominator = exp(lse + low)

A float32 lse of 1e9 is a multiple of 64, so log l is lost in m + log l: where the logits of a row
share a large offset, a probability made from lse alone would be 1 for each key instead of 1 / n. So
every engine returns the rest, too. It is a constant to differentiation: lse has the derivative of
both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

SAVED_OUT, SAVED_LSE = "flash_attention_out", "flash_attention_lse"
"""Names under which `jax.checkpoint_policies.save_only_these_names` keeps them."""


class Results(NamedTuple):
    """Of one call or a part of one; axes as `ROLES` says.

    `low` is log(denominator) - lse, under half a unit in the last place of lse; 0 where lse is
    -inf.
    """

    out: Any
    lse: Any
    low: Any


def finite_or_zero(x: jax.Array) -> jax.Array:
    """-inf replaced by 0: what to subtract in exp, so that -inf - -inf never arises."""
    return jnp.where(x == -jnp.inf, jnp.zeros((), x.dtype), x)


def lse_of(m: jax.Array, l: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log of the denominator exp(m) * l as (lse, low); (-inf, 0) where l is 0.

    m is a constant to differentiation.
    """
    none = l == 0
    safe, m = jnp.where(none, jnp.ones_like(l), l), finite_or_zero(lax.stop_gradient(m))
    lse = m + jnp.log(safe)
    # log l - (lse - m), by a way on which nothing cancels: l * exp(m - lse) is about 1 where no bit
    # of log l was lost.
    low = lax.stop_gradient(jnp.log(safe * jnp.exp(m - lse)))
    zero = jnp.zeros((), l.dtype)
    return jnp.where(none, jnp.full((), -jnp.inf, l.dtype), lse), jnp.where(none, zero, low)


def merge_stacked(outs: jax.Array, lses: jax.Array, lows: jax.Array) -> Results:
    """Merge parts along the first axis: outs (parts, ..., e), the others (parts, ...), one dtype.

    The weights add up to 1 also where the lses are so large that they hold no log l. A part without
    a key adds nothing, whatever its out holds.
    """
    top = lax.stop_gradient(lses.max(axis=0))
    weights = jnp.exp((lses - finite_or_zero(top)) + lows)
    total = weights.sum(axis=0)
    weights = weights / jnp.where(total == 0, jnp.ones_like(total), total)
    outs = jnp.where((lses == -jnp.inf)[..., None], jnp.zeros((), outs.dtype), outs)
    return Results((weights[..., None] * outs).sum(axis=0), *lse_of(top, total))


def delta_of(results: Results, dout: jax.Array, dlse: jax.Array) -> jax.Array:
    """Rowsum(out * dout) - dlse, which the gradient of every logit of a row subtracts.

    A row that sees no key passes nothing on: its out of 0 is a constant, so a cotangent that is not
    finite (of its norm, say) ends here.
    """
    dtype = results.lse.dtype
    out, dout = results.out.astype(dtype), dout.astype(dtype)
    products = (out * dout).sum(axis=-1)
    stays = ~jnp.isfinite(products) & (out == 0).all(axis=-1)
    delta = jnp.where(stays, jnp.zeros((), dtype), products) - dlse
    return jnp.where(results.lse == -jnp.inf, jnp.zeros((), dtype), delta)


def of_seen_rows(results: Results, dout: jax.Array) -> jax.Array:
    """Dout, with zeros for the rows that see no key."""
    return jnp.where((results.lse != -jnp.inf)[..., None], dout, jnp.zeros((), dout.dtype))


def without_low(results: Results, dout: jax.Array, delta: jax.Array) -> tuple[Any, Any]:
    """Multiply dout and delta by exp(-low), so that probabilities made from lse alone will do.

    Of rows that see no key, a bias of -inf among the reasons, dout is 0.
    """
    if 0 in dout.shape:
        return dout, delta
    factor = jnp.exp(-results.low)
    scaled = (dout * factor[..., None]).astype(dout.dtype)
    return of_seen_rows(results, scaled), delta * factor


def sink_shares(sinks: jax.Array, lse: jax.Array, low: jax.Array, delta: jax.Array) -> jax.Array:
    """What each row gives the gradient of its head's sink: a key without a value, so dP is 0."""
    none = sinks == -jnp.inf
    weight = jnp.exp((jnp.where(none, jnp.zeros((), lse.dtype), sinks) - lse) - low)
    return jnp.where(none, jnp.zeros((), lse.dtype), -weight * delta)


def saved(results: Results) -> Results:
    """The results under their names, for a remat policy that keeps them by name."""
    out, lse, low = results
    return Results(
        checkpoint_name(out, SAVED_OUT),
        checkpoint_name(lse, SAVED_LSE),
        checkpoint_name(low, SAVED_LSE),
    )
