"""The two similarities: the dot product, and the dot product of l2-normalised vectors (cosine)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core.call import Arrays, Call


def l2norm(x: Any, groups: int = 1) -> Any:
    """Scale `x` to unit l2 norm over its last axis, or over each of `groups` chunks of it.

    The norm is taken in float32 at least, of x divided by a power of two near its largest
    magnitude, so no square overflows or is lost; the result has x's dtype. At a zero vector the
    gradient is zero, and at one that is not finite too: its unit vector is NaN, a constant, which
    no gradient leaves where nothing sees it.
    """
    shape = (*x.shape[:-1], groups, x.shape[-1] // groups)
    wide = x.astype(np.promote_types(x.dtype, np.float32)).reshape(shape)
    return _unit(wide).reshape(x.shape).astype(x.dtype)


@jax.custom_jvp
def _unit(x: jax.Array) -> jax.Array:
    x, _ = _near_one(x)
    return x * _inverse_norm(x, jnp.nan)


@_unit.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Tangent of the unit vector u: (dx - u (u . dx)) / |x|, the part of dx across x."""
    (x,), (dx,) = primals, tangents
    near, factor = _near_one(x)
    finite = jnp.isfinite(_square(near))
    safe = jnp.where(finite, near, jnp.zeros_like(near))
    unit = _unit(safe)
    across = dx - unit * _dot(unit, dx)
    du = (across * _inverse_norm(safe, 0.0)) * jnp.where(finite, factor, jnp.zeros_like(factor))
    return jnp.where(finite, unit, jnp.full_like(unit, jnp.nan)), du


def _near_one(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`x` times a power of two that brings its largest magnitude near 1, and that power.

    Exact: nothing is rounded by it. It is a constant to differentiation.
    """
    info = jnp.finfo(x.dtype)
    largest = jnp.abs(lax.stop_gradient(x)).max(axis=-1, keepdims=True)
    # Without mantissa a number is a power of two. Both ends have a normal inverse.
    power = lax.reduce_precision(largest, exponent_bits=info.nexp, mantissa_bits=0)
    factor = 1 / jnp.clip(power, 2.0 ** (info.minexp + 1), 2.0 ** (-info.minexp))
    return x * factor, factor


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


def largest_safe_bound(acc_dtype: Any, probs_dtype: Any) -> float:
    """Up to which bound of the logits exp needs no running maximum.

    Without one, exp(logit) and its product with a value are between exp(-bound) and exp(bound)
    times what they are with one. Of the range of the accumulator's exponents a quarter is given to
    that: 22 for float32. So the result is exact to rounding for values between 1e-28 and 1e28 / n
    in magnitude (and 0); beyond the bound the running maximum is used. What the probabilities are
    rounded to before they multiply the values must hold them as normal numbers.
    """
    sums, probs = jnp.finfo(acc_dtype), jnp.finfo(probs_dtype)
    ends = (float(np.log(float(probs.max))), -float(np.log(float(probs.tiny))))
    return min(float(np.log(float(sums.max))) / 4, *ends)


def needs_running_maximum(call: Call, probs_dtype: Any) -> bool:
    """Whether logits are unbounded, or bounded too loosely for exp without a running maximum.

    Args:
        call: The call.
        probs_dtype: What exp(logits) is rounded to before it multiplies the values.
    """
    return call.bound is None or call.bound > largest_safe_bound(call.acc_dtype, probs_dtype)
