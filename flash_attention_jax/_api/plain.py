"""The public oracles, with all logits in memory, and Rabe & Staats' attention."""

from __future__ import annotations

from typing import Any, Unpack

from flash_attention_jax._api.options import CommonOptions, Options, ScaleOptions
from flash_attention_jax._api.run import check_names, force_causal, run
from flash_attention_jax._core import check
from flash_attention_jax._core.types import (
    ArrayLike,
    KeyHeadsFirst,
    QueryHeadsFirst,
    ValueHeadsFirst,
)


def attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """`flash_attention` by the definition, with the whole matrix of logits in memory: the oracle.

    Also named `plain_attention`. Arguments, results and errors are those of `flash_attention`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import attention, flash_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 63, 32), jnp.float32)
        >>> bool(jnp.allclose(attention(q, k, v), flash_attention(q, k, v), atol=1e-5))
        True
    """
    return run("attention", q, k, v, mask, dict(options), default="dense")


def causal_attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """`attention` with causal=True.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import causal_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 63, 32), jnp.float32)
        >>> causal_attention(q, k, v).shape
        (2, 8, 63, 32)
    """
    all_options = force_causal("causal_attention", options)
    return run("causal_attention", q, k, v, mask, all_options, default="dense")


def cosine_sim_attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """`cosine_sim_flash_attention` (scale 10) by the definition: all logits are in memory.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import cosine_sim_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 63, 32), jnp.float32)
        >>> cosine_sim_attention(q, k, v).shape
        (2, 8, 63, 32)
    """
    return run(
        "cosine_sim_attention",
        q,
        k,
        v,
        mask,
        dict(options),
        default="dense",
        similarity="cosine",
    )


def plain_cosine_sim_attention(
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
    """`flash_cosine_sim_attention` (scale 8) by the definition: all logits are in memory.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import plain_cosine_sim_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 8, 63, 32), jnp.float32)
        >>> plain_cosine_sim_attention(q, k, v, causal=True).shape
        (2, 8, 63, 32)
    """
    function, names = "plain_cosine_sim_attention", {"bias": "attn_bias"}
    check_names(function, dict(options), names)
    return run(
        function,
        q,
        k,
        v,
        mask,
        {"bias": attn_bias, "scale": scale, "causal": causal, **options},
        default="dense",
        similarity="cosine",
        default_scale=8.0,
        l2norm=l2norm_qk,
        groups=groups,
        bias_batch_dim=check.flag("attn_bias_batch_dim", attn_bias_batch_dim),
        names=names,
    )


def memory_efficient_attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    causal: bool = False,
    attn_bias: ArrayLike | None = None,
    q_bucket_size: int = 512,
    k_bucket_size: int = 1024,
    **options: Unpack[ScaleOptions],
) -> Any:
    """Rabe & Staats' attention: checkpointed, differentiable in every mode and to any order.

    Also named `rabe_attention`. The first arguments are those of
    memory-efficient-attention-pytorch; dropout is this library's (`dropout_rate`, `dropout_key`:
    applied to the normalised probabilities).

    Args:
        q: Queries, as in `flash_attention`.
        k: Keys, as in `flash_attention`.
        v: Values, as in `flash_attention`.
        mask: As in `flash_attention`.
        causal: End-aligned, as in `flash_attention`.
        attn_bias: As `bias` in `flash_attention`.
        q_bucket_size: Queries per block.
        k_bucket_size: Keys per block.
        **options: As in `flash_attention`.

    Returns:
        As `flash_attention`.

    Raises:
        ValueError: As in `flash_attention`.
        TypeError: As in `flash_attention`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import memory_efficient_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 100, 16), jnp.float32)
        >>> _, tangent = jax.jvp(
        ...     lambda q: memory_efficient_attention(q, k, v, causal=True), (q,), (q,)
        ... )
        >>> tangent.shape
        (100, 16)

    References:
        Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory", arXiv:2112.05682.
    """
    names = {"bias": "attn_bias", "block_q": "q_bucket_size", "block_kv": "k_bucket_size"}
    check_names("memory_efficient_attention", dict(options), names)
    all_options = {
        "bias": attn_bias,
        "causal": causal,
        "block_q": q_bucket_size,
        "block_kv": k_bucket_size,
        **options,
    }
    return run(
        "memory_efficient_attention",
        q,
        k,
        v,
        mask,
        all_options,
        default="checkpointed",
        names=names,
    )
