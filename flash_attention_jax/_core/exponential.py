"""e^x for softmax: on a CPU by a polynomial, since XLA's own takes half as long again.

Cody & Waite 1980 (Software Manual for the Elementary Functions, chapter 6): x = n log 2 + f with
|f| <= log(2) / 2, so e^x = 2^n e^f. A polynomial of degree 6 gives e^f, and n goes into the
exponent's bits. FlashAttention-4 does the same on GPUs, where the unit for exp is what runs out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_LOG2_E = np.float32(np.log2(np.e))
_LN2_HIGH = np.float32(0.693359375)  # few bits, so that n times it is exact
_LN2_LOW = np.float32(np.log(2) - 0.693359375)
_ROUND = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the low bits
_SMALLEST = np.float32(-87.3)  # e to the power of less is no normal float32
_COEFFICIENTS = [
    np.float32(c)
    for c in (0.00138146128, 0.00836871006, 0.041668389, 0.166665211, 0.49999994, 1, 1)
]


def exponential(x: jax.Array, platform: str) -> jax.Array:
    """e^x for logits from which their maximum was taken, or that are bounded.

    Args:
        x: Any shape, under 88: more is not representable in float32, and not looked for.
        platform: Where it runs, as in `Call.platform`.

    Returns:
        e^x, relative error under 2e-7 in float32; 0 for -inf and NaN for NaN.
    """
    return _polynomial(x) if platform == "cpu" and x.dtype == jnp.float32 else jnp.exp(x)


@jax.custom_jvp
def _polynomial(x: Any) -> Any:
    # As an integer, because XLA simplifies (x + c) - c to x, rounding or not.
    n = lax.bitcast_convert_type(x * _LOG2_E + _ROUND, jnp.int32) - _ROUND.view(np.int32)
    whole = n.astype(jnp.float32)
    f = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    y = _COEFFICIENTS[0]
    for c in _COEFFICIENTS[1:]:
        y = y * f + c
    power = lax.bitcast_convert_type((n + np.int32(127)) << 23, jnp.float32)
    return jnp.where(x < _SMALLEST, np.float32(0), y * power)


@_polynomial.defjvp
def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    y = _polynomial(*primals)
    return y, y * tangents[0]
