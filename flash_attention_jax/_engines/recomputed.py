"""Gradients of a part of attention for results of the whole, by an engine's own derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._core.call import Arrays, Call
from flash_attention_jax._core.results import Results, finite_or_zero

Blocks = dict[str, Any]


def recomputing(attend: Callable[[Call, Arrays], Any]) -> Callable[..., Blocks]:
    """What `_engines.blocked.gradients` is, for an engine that only differentiates all of its call.

    With w = exp(lse_part - lse), out = sum of w * out_part over the parts, so
    dout_part = w * dout and dlse_part = w * (dlse + rowsum((out_part - out) * dout)).
    """

    def gradients(call: Call, floats: Blocks, others: Blocks, whole: Results, ct: Any) -> Blocks:
        dout, dlse = ct

        def run(floats: Blocks) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            out, lse, low = attend(call, Arrays(**floats, **others))
            return (out, lse), low

        (out, lse), pull, low = jax.vjp(run, floats, has_aux=True)
        wide = lse.dtype
        saw, zero = lse > -jnp.inf, jnp.zeros((), lse.dtype)
        apart = (jnp.where(saw, lse, zero) - finite_or_zero(whole.lse)) + (low - whole.low)
        weight = jnp.where(saw, jnp.exp(apart), zero)
        dout = jnp.where(saw[..., None], dout.astype(wide), zero)
        farther = ((out.astype(wide) - whole.out.astype(wide)) * dout).sum(axis=-1)
        dlse = jnp.where(saw, weight * (dlse + farther), zero)
        (found,) = pull(((weight[..., None] * dout).astype(out.dtype), dlse))
        return {name: x.astype(call.acc_dtype) for name, x in found.items()}

    return gradients
