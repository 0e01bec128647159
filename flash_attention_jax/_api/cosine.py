"""Attention by cosine similarity."""

from __future__ import annotations

from typing import Any, Unpack

import jax.numpy as jnp

from flash_attention_jax._api.options import CommonOptions, Options
from flash_attention_jax._api.run import check_names, force_causal, run
from flash_attention_jax._core import check
from flash_attention_jax._core.similarity import l2norm
from flash_attention_jax._core.types import (
    ArrayLike,
    KeyHeadsFirst,
    QueryHeadsFirst,
    ValueHeadsFirst,
)


def flash_cosine_sim_attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    attn_bias: ArrayLike | None = None,
    scale: Any = 8,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
    *,
    groups: int = 1,
    **options: Unpack[CommonOptions],
) -> Any:
    """Exact attention by cosine similarity: unit queries and keys, a fixed scale, bounded logits.

        logits = scale * l2norm(q) l2norm(k)^T + ...,  the rest as in `flash_attention`

    The logits are within +-scale * groups. Up to 22 (177 in float64), with nothing added to them,
    no running maximum is needed and nothing is rescaled: exact to rounding for values between 1e-28
    and 1e28 / j in magnitude. Otherwise the running maximum is used, with the same result.

    Args:
        q: Queries, as in `flash_attention`.
        k: Keys, as in `flash_attention`.
        v: Values, as in `flash_attention`.
        mask: As in `flash_attention`.
        attn_bias: Float, added to the logits: (h, n, j), or (b, n, j) with `attn_bias_batch_dim`,
            or anything that broadcasts to (b, h, n, j). Differentiable, in its own shape.
        scale: Number, or array () or (h,), differentiable.
        causal: End-aligned, as in `flash_attention`.
        l2norm_qk: Whether to normalise here; False = q and k are normalised already (or the bound
            is not wanted).
        attn_bias_batch_dim: Whether a bias of three axes is (b, n, j).
        groups: Chunks of the dimension that are normalised apart.
        **options: As in `flash_attention`.

    Returns:
        As `flash_attention`.

    Raises:
        ValueError: As in `flash_attention`; also where `groups` does not divide d.
        TypeError: As in `flash_attention`.
        NotImplementedError: As in `flash_attention`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import flash_cosine_sim_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 63, 32), jnp.float32)
        >>> out = flash_cosine_sim_attention(q, k, v, causal=True)
        >>> bool(jnp.allclose(out, flash_cosine_sim_attention(7 * q, k, v, causal=True), atol=1e-6))
        True

    References:
        Henry et al. 2020, "Query-Key Normalization for Transformers", arXiv:2010.04245.
    """
    function, names = "flash_cosine_sim_attention", {"bias": "attn_bias"}
    check_names(function, dict(options), names)
    return run(
        function,
        q,
        k,
        v,
        mask,
        {"bias": attn_bias, "scale": scale, "causal": causal, **options},
        similarity="cosine",
        default_scale=8.0,
        l2norm=l2norm_qk,
        groups=groups,
        bias_batch_dim=check.flag("attn_bias_batch_dim", attn_bias_batch_dim),
        names=names,
    )


def cosine_sim_flash_attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """`flash_attention` by cosine similarity with the default scale 10.

    Arguments, results and errors are those of `flash_attention`; bounds are those of
    `flash_cosine_sim_attention`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import cosine_sim_flash_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 63, 32), jnp.float32)
        >>> cosine_sim_flash_attention(q, k, v, jnp.ones((2, 63), bool)).shape
        (2, 8, 63, 32)
    """
    return run(
        "cosine_sim_flash_attention",
        q,
        k,
        v,
        mask,
        dict(options),
        similarity="cosine",
    )


def causal_cosine_sim_flash_attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """`cosine_sim_flash_attention` with causal=True.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import causal_cosine_sim_flash_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 63, 32), jnp.float32)
        >>> causal_cosine_sim_flash_attention(q, k, v).shape
        (2, 8, 63, 32)
    """
    return run(
        "causal_cosine_sim_flash_attention",
        q,
        k,
        v,
        mask,
        force_causal("causal_cosine_sim_flash_attention", options),
        similarity="cosine",
    )


def l2norm_tensors(*tensors: ArrayLike, groups: int = 1) -> Any:
    """Scale each array to unit l2 norm over its last axis, or over each of `groups` chunks of it.

    The norm is taken in float32 at least; the result has the array's dtype; a zero vector stays
    zero.

    Args:
        *tensors: Float arrays (..., d).
        groups: Chunks of the last axis that are normalised apart.

    Returns:
        The array, or a tuple where several were given.

    Raises:
        ValueError: If `groups` does not divide the last axis.
        TypeError: If an array is not of a float dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_attention_jax import l2norm_tensors
        >>> print(l2norm_tensors(jnp.array([3.0, 4.0, 0.0, 5.0], jnp.float32), groups=2))
        [0.6 0.8 0.  1. ]
    """
    groups = check.whole("groups", groups, least=1)
    for index, x in enumerate(tensors):
        name = f"tensors[{index}]"
        check.floating(name, x)
        if not x.shape:
            check.fail(name, "have at least 1 axis", "shape ()", "Reshape it.")
        if x.shape[-1] % groups:
            got = f"{groups} for {name} {tuple(x.shape)}"
            check.fail("groups", "divide the last axis", got, "Use a divisor of it.")
    results = tuple(l2norm(jnp.asarray(x), groups) for x in tensors)
    return results[0] if len(results) == 1 else results
