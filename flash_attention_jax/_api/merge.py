"""Attention over ranges of keys, merged."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np

from flash_attention_jax._core import check
from flash_attention_jax._core.results import merge_stacked
from flash_attention_jax._core.types import (
    Array,
    ArrayLike,
)


def merge_attention(*parts: tuple[ArrayLike, ArrayLike]) -> tuple[Array, Array]:
    """Merge attention over ranges of keys, exactly: as if all keys had been one range.

        lse = logsumexp(lse_1, lse_2, ...),  out = sum of exp(lse_m - lse) * out_m

    Differentiable in every out and lse. A part that saw no key (lse = -inf) adds nothing, whatever
    its out holds. Sinks belong to one part. The weights add up to 1 whatever the lses are; where
    they are so large that their unit in the last place is over 1 (a bias of -1e9 on a whole row),
    how many keys stand behind each is lost, and parts of one lse count alike.

    Args:
        *parts: Pairs (out, lse) of one shape (..., e) and (...), as functions return them with
            return_lse=True.

    Returns:
        The merged (out, lse); out in the dtype of the first out.

    Raises:
        ValueError: If there are no parts, or their shapes differ.
        TypeError: If a part is not a pair of float arrays.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import flash_attention, merge_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 50, 16), jnp.float32)
        >>> halves = [
        ...     flash_attention(q, k[s], v[s], return_lse=True)
        ...     for s in (slice(0, 20), slice(20, 50))
        ... ]
        >>> out, lse = merge_attention(*halves)
        >>> bool(jnp.allclose(out, flash_attention(q, k, v), atol=1e-5))
        True
    """
    if not parts:
        raise ValueError(
            "`parts` must hold at least one pair (out, lse), got none. Call with return_lse=True."
        )
    for index, part in enumerate(parts):
        name = f"parts[{index}]"
        if isinstance(part, (tuple, list)) and part and isinstance(part[0], tuple):
            got, advice = f"a {type(part).__name__} of pairs", "Unpack it: merge_attention(*pairs)."
            check.fail(name, "be a pair (out, lse)", got, advice, TypeError)
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            advice, got = "Call with return_lse=True.", check.shown(part)
            check.fail(name, "be a pair (out, lse)", got, advice, TypeError)
        out_name, lse_name = f"{name}[0]", f"{name}[1]"
        check.floating(out_name, part[0])
        check.floating(lse_name, part[1])
        if not part[0].shape:
            check.fail(out_name, "have at least 1 axis", "shape ()", "Reshape it.")
        if tuple(part[0].shape) != tuple(parts[0][0].shape):
            names, outs = ("parts[0][0]", out_name), (parts[0][0], part[0])
            check.agree(names, "shape", outs, "Split the keys, not the queries.")
        if tuple(part[0].shape[:-1]) != tuple(part[1].shape):
            advice, axes = "Use the lse of the same call.", "all axes but the last of the first"
            check.agree((out_name, lse_name), axes, part, advice)
    outs = [jnp.asarray(out) for out, _ in parts]
    lses = [jnp.asarray(lse) for _, lse in parts]
    wide = functools.reduce(np.promote_types, (x.dtype for x in lses), np.dtype(np.float32))
    stacked = jnp.stack([x.astype(wide) for x in lses])
    merged = merge_stacked(
        jnp.stack([x.astype(wide) for x in outs]), stacked, jnp.zeros_like(stacked)
    )
    return merged.out.astype(outs[0].dtype), merged.lse
