"""Attention by dot product, heads first, and the drop-in for `jax.nn` with both similarities."""

from __future__ import annotations

from typing import Any, Unpack

from flash_attention_jax._api.options import JAX_NAMES, Options
from flash_attention_jax._api.run import force_causal, run
from flash_attention_jax._core import check
from flash_attention_jax._core.types import (
    ArrayLike,
    KeyHeadsFirst,
    QueryHeadsFirst,
    ValueHeadsFirst,
)


def flash_attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """Exact attention in memory that grows with the length, forward and backward.

        logits = scale * q k^T + alibi + relative_bias + bias,  then softcap,  then the mask
        out    = dropout(softmax(logits)) v

    A row that sees no key has out = 0, lse = -inf and gradients 0. NaN or Inf in a key or value
    that no query of its batch and head sees, or in a masked entry of the bias, reaches no other
    output or gradient. Sums, maxima and lse are float32 at least. Without dropout key, dense mask
    or bias nothing of size n * j is held.

    Letters: b batch, h heads, hk key heads, n queries, j keys, d and e dimensions.

    Args:
        q: Queries (n, d), (bh, n, d) or (b, h, n, d); float64, float32, bfloat16 or float16.
        k: Keys of the same rank and dtype, or (b, j, d) beside four axes for a single head; (b, hk,
            j, d) with h a multiple of hk (query head m reads key head m // (h // hk)).
        v: Values, as k, with a dimension e of their own.
        mask: Boolean, or integers of 1 = may attend and 0 (other values are refused where they can
            be seen). Two axes are (b, j); three or four broadcast to (b, h, n, j). Beside (bh, n,
            d): (bh, j) or (bh, n, j). Beside (n, d): (j,) or (n, j).
        **options: Keyword-only, all optional:

            * bias: float, added to the logits; broadcasts to (b, h, n, j), (bh, n, j) or (n, j).
              Its gradient has its shape, and takes no more memory.
            * causal (bool): query i sees the keys up to i + j - n (end-aligned: the last query sees
              every key).
            * window: w or (left, right), both inclusive, about that diagonal; None or -1 =
              unbounded.
            * q_offset: int or integer array (), (b,) or (b, n): the diagonal is i + q_offset
              instead. With padded key
              caches: q_offset = kv_lengths - q_lengths.
            * q_segment_ids (b, n), kv_segment_ids (b, j): integers; a query sees the keys of its
              segment only.
            * q_lengths (b,), kv_lengths (b,): integers; tokens from there on neither see nor are
              seen. The diagonal does not move with them.
            * scale: number, or array () or (h,), differentiable; None = 1 / sqrt(d).
            * softcap: logits become softcap * tanh(logits / softcap).
            * sinks (h,): a logit per head that joins the denominator only, and so the lse.
            * alibi_slopes (h,): adds -slope * |i + offset - j|.
            * relative_bias (h, n + j - 1) or (n + j - 1,): entry j - i + n - 1 is added.
            * dropout_rate in [0, 1), dropout_key: the mask is a function of (key, b, h, i, j)
              alone, the same for any engine and block size.
            * return_lse (bool): return (out, lse).
            * block_q, block_kv: block sizes; they change rounding, nothing else.
            * implementation: "hopper", "triton", "blocked", "checkpointed" or "dense"; None =
              chosen (`explain`).
            * differentiation: "reverse" (any order), or "any" for `jax.jvp`, `jax.hessian` and
              mixed modes too.
            * precision: as in `jax.lax.dot_general`; float32 is never computed in less unless it
              says so.
            * deterministic_backward: True (the same bits each time), or False to let a kernel's
              backward sum in whatever order its programs run, which takes fewer products.

    Returns:
        out in q's dtype, of q's shape with e as its last axis. With return_lse, (out, lse): lse is
        the natural log of the denominator, of q's shape without the last axis, float32 (float64 for
        float64), and differentiable.

    Raises:
        ValueError: A value or shape that is never valid.
        TypeError: A dtype or type that is never valid, or an unknown option.
        NotImplementedError: The implementation asked for by name cannot run this call.
        TypeError: By JAX itself under `jax.jvp`, `jax.jacfwd` and `jax.hessian`, "can't apply
            forward-mode autodiff (jvp) to a custom_vjp function.": pass differentiation="any".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import flash_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 1000, 64), jnp.float32)
        >>> flash_attention(q, k, v, causal=True).shape
        (1, 8, 1000, 64)
        >>> out, lse = flash_attention(q[0, 0], k[0, 0], v[0, 0], window=(128, 0), return_lse=True)
        >>> out.shape, lse.shape
        ((1000, 64), (1000,))

    References:
        Dao 2023, "FlashAttention-2", arXiv:2307.08691, algorithms 1 and 2.
        Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory", arXiv:2112.05682.
    """
    return run("flash_attention", q, k, v, mask, dict(options))


def causal_flash_attention(
    q: QueryHeadsFirst,
    k: KeyHeadsFirst,
    v: ValueHeadsFirst,
    mask: ArrayLike | None = None,
    **options: Unpack[Options],
) -> Any:
    """`flash_attention` with causal=True; arguments, results and errors are those of it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import causal_flash_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 100, 16), jnp.float32)
        >>> bool(jnp.allclose(causal_flash_attention(q, k, v)[0], v[0]))
        True
    """
    all_options = force_causal("causal_flash_attention", options)
    return run("causal_flash_attention", q, k, v, mask, all_options)


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: Any = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
    similarity: str = "dot",
    groups: int = 1,
    l2norm_qk: bool = True,
    q_offset: Any = None,
    q_segment_ids: ArrayLike | None = None,
    kv_segment_ids: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    alibi_slopes: ArrayLike | None = None,
    relative_bias: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Any = None,
    block_q: int | None = None,
    block_kv: int | None = None,
    differentiation: str = "reverse",
    deterministic_backward: bool = True,
    precision: Any = None,
) -> Any:
    """A drop-in for `jax.nn.dot_product_attention` in O(n) memory, with what that function lacks.

    The arguments up to `return_residual` have jax.nn's names, order and meaning: the axes are
    (batch, length, heads, dim), and causal and the window are start-aligned (query i is at key
    position i, or at i + q_offset). Different from jax.nn: a row that sees no key is 0 (not the
    mean of the values), the residual is float32 and differentiable, `implementation` takes this
    library's names, and an integer mask is welcome.

    Args:
        query: (B, T, N, H) or (T, N, H).
        key: (B, S, K, H) or (S, K, H); N is a multiple of K.
        value: As key, with a dimension of its own.
        bias: Float, broadcasts to (B, N, T, S).
        mask: Boolean, or integers of 1 = may attend and 0; broadcasts to (B, N, T, S).
        scale: Number, or array () or (N,); None = 1 / sqrt(H), or 10 for cosine similarity.
        is_causal: Query i sees keys up to i.
        query_seq_lengths: (B,) integers.
        key_value_seq_lengths: (B,) integers.
        local_window_size: w or (left, right), both inclusive.
        implementation: As in `flash_attention`.
        return_residual: Return (out, lse), lse of shape (B, T, N) or (T, N).
        similarity: "dot" or "cosine".
        groups: Chunks of the dimension that cosine similarity normalises apart.
        l2norm_qk: Whether cosine similarity normalises here.
        q_offset: As in `flash_attention`: where the first query stands among the keys.
        q_segment_ids: (B, T) integers.
        kv_segment_ids: (B, S) integers.
        logits_soft_cap: As `softcap` in `flash_attention`.
        sinks: (N,).
        alibi_slopes: (N,).
        relative_bias: (N, T + S - 1) or (T + S - 1,).
        dropout_rate: In [0, 1).
        dropout_key: JAX random key.
        block_q: Queries per block.
        block_kv: Keys per block.
        differentiation: "reverse" or "any".
        deterministic_backward: False lets a kernel's backward sum in whatever order its programs
            run.
        precision: As in `jax.lax.dot_general`.

    Returns:
        out in query's dtype, of query's shape with value's dimension; with return_residual, (out,
        lse).

    Raises:
        ValueError: A value or shape that is never valid.
        TypeError: A dtype or type that is never valid.
        NotImplementedError: The implementation asked for by name cannot run this call.
        TypeError: By JAX itself under `jax.jvp`, `jax.jacfwd` and `jax.hessian`, "can't apply
            forward-mode autodiff (jvp) to a custom_vjp function.": pass differentiation="any".

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import dot_product_attention
        >>> q = jax.random.normal(jax.random.key(0), (2, 100, 8, 16), jnp.float32)
        >>> k = v = q[:, :, :2]
        >>> ours = dot_product_attention(q, k, v, is_causal=True)
        >>> theirs = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        >>> bool(jnp.allclose(ours, theirs, atol=1e-5))
        True
    """
    options = {
        "bias": bias,
        "scale": scale,
        "causal": is_causal,
        "q_lengths": query_seq_lengths,
        "kv_lengths": key_value_seq_lengths,
        "window": local_window_size,
        "q_offset": q_offset,
        "q_segment_ids": q_segment_ids,
        "kv_segment_ids": kv_segment_ids,
        "softcap": logits_soft_cap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "relative_bias": relative_bias,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "block_q": block_q,
        "block_kv": block_kv,
        "differentiation": differentiation,
        "deterministic_backward": deterministic_backward,
        "precision": precision,
        "return_lse": return_residual,
        "implementation": implementation,
    }
    check.choice("similarity", similarity, ("dot", "cosine"))
    return run(
        "dot_product_attention",
        query,
        key,
        value,
        mask,
        options,
        layout="heads_last",
        similarity=similarity,
        groups=groups,
        l2norm=l2norm_qk,
        names=JAX_NAMES,
    )
