"""The two similarities: the dot product, and the dot product of l2-normalised vectors (cosine)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._call import Arrays, Call

# exp(60) * 2**31 keys * values of 1e3 is still under float32's largest number, and exp(-60) far
# over its smallest, so logits within +-60 need no running maximum and no offset. (With an offset of
# -bound, exp underflows beyond 43.)
LARGEST_SAFE_BOUND = 60.0


def l2norm(x: Any, groups: int = 1) -> Any:
    """Scale `x` to unit l2 norm over its last axis, or over each of `groups` chunks of it.

    The norm is taken in float32 at least; the result has x's dtype. At a zero vector the gradient
    is zero, and at one that is not finite too: its unit vector is NaN, a constant, which no
    gradient leaves where nothing sees it.
    """
    wide = x.astype(np.promote_types(x.dtype, np.float32)).reshape(*x.shape[:-1], groups, -1)
    return _unit(wide).reshape(x.shape).astype(x.dtype)


@jax.custom_jvp
def _unit(x: jax.Array) -> jax.Array:
    return x * _inverse_norm(x, jnp.nan)


@_unit.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Tangent of the unit vector u: (dx - u (u . dx)) / |x|, the part of dx across x."""
    (x,), (dx,) = primals, tangents
    finite = jnp.isfinite(_square(x))
    safe = jnp.where(finite, x, jnp.zeros_like(x))
    unit = _unit(safe)
    across = dx - unit * _dot(unit, dx)
    du = across * _inverse_norm(safe, 0.0)
    return jnp.where(finite, unit, jnp.full_like(unit, jnp.nan)), du


def _inverse_norm(x: jax.Array, otherwise: float) -> jax.Array:
    """1 / |x|, 0 for a zero vector, and `otherwise` for one that is not finite."""
    square = _square(x)
    zero = square == 0
    inverse = lax.rsqrt(jnp.where(zero, jnp.ones_like(square), square))
    inverse = jnp.where(zero, jnp.zeros_like(square), inverse)
    return jnp.where(jnp.isfinite(square), inverse, jnp.full_like(square, otherwise))


def _square(x: jax.Array) -> jax.Array:
    return _dot(x, x)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    # As a product and not a sum: XLA's CPU code for it takes half the time.
    return jnp.einsum("...d,...d->...", x, y, precision=lax.Precision.HIGHEST)[..., None]


def normalised(call: Call, arrays: Arrays) -> Arrays:
    """The arrays with q and k as the engine's dot product wants them."""
    if call.similarity == "cosine" and call.l2norm:
        return arrays._replace(q=l2norm(arrays.q, call.groups), k=l2norm(arrays.k, call.groups))
    return arrays


def needs_running_maximum(call: Call, probs_dtype: Any) -> bool:
    """Whether logits are unbounded, or bounded too loosely for exp without a running maximum.

    Args:
        call: The call.
        probs_dtype: What exp(logits) is rounded to before it multiplies the values; float16 ends at
            exp(11).
    """
    limit = 8.0 if jnp.dtype(probs_dtype) == jnp.float16 else LARGEST_SAFE_BOUND
    return call.bound is None or call.bound > limit
