"""Attention for Flax linen: an `attention_fn` for Flax's own layers, and a small `Attention` layer.

    layer = flax.linen.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn)

is the same layer with the same parameters, in memory that grows with the length and not with its
square. `make_attention_fn` gives it what Flax's function lacks: cosine similarity, windows, and so
on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

import flash_attention_jax
from flash_attention_jax._optional import needs
from flash_attention_jax.rotary import apply_rotary

with needs("flash_attention_jax.linen", "flax", extra="flax"):
    from flax import linen as nn
    from flax.linen.dtypes import promote_dtype

__all__ = ["Attention", "attention_fn", "make_attention_fn"]

Similarity: TypeAlias = Literal["dot", "cosine"]
AttentionFn: TypeAlias = Callable[..., Array]


def attention_fn(
    query: Float[Array | np.ndarray, "*batch q_len heads dim"],
    key: Float[Array | np.ndarray, "*batch kv_len kv_heads dim"],
    value: Float[Array | np.ndarray, "*batch kv_len kv_heads v_dim"],
    bias: Float[Array | np.ndarray, "..."] | None = None,
    mask: Num[Array | np.ndarray, "..."] | Bool[Array | np.ndarray, "..."] | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
    **options: Any,
) -> Float[Array, "*batch q_len heads v_dim"]:
    """`flax.linen.dot_product_attention` by way of `flash_attention_jax.dot_product_attention`.

    Takes Flax's arguments with Flax's meaning, so that it serves as the `attention_fn` of Flax's
    layers. It differs from Flax's own in three places: a query that may attend to no key gives 0,
    where Flax gives the mean of the values; dropout is drawn for each batch, head, query and key
    from `dropout_rng`, so `broadcast_dropout` changes nothing and the bits are not Flax's; and the
    weights never exist as an array, so they cannot be sown or computed by another einsum.

    Args:
        query: (..., q_len, heads, dim), any number of batch axes.
        key: (..., kv_len, kv_heads, dim); `heads` is a multiple of `kv_heads`.
        value: (..., kv_len, kv_heads, v_dim).
        bias: added to the logits, broadcasts to (..., heads, q_len, kv_len).
        mask: nonzero = may attend, of any dtype (Flax's helpers make float32 ones), broadcasts to
            (..., heads, q_len, kv_len).
        broadcast_dropout: accepted for Flax's sake, without effect.
        dropout_rng: the key that dropout draws from; needed where `dropout_rate` is positive.
        dropout_rate: probability of dropping an attention weight, 0 <= rate < 1.
        deterministic: no dropout.
        dtype: compute in this dtype. `None` means the common dtype of the inputs.
        precision: as in JAX.
        module: must be `None`: there are no weights to sow.
        force_fp32_for_softmax: without effect: the softmax is always computed in float32 at least.
        einsum_dot_general: must be `None`.
        qk_attn_weights_einsum: must be `None`.
        attn_weights_value_einsum: must be `None`.
        is_causal: query i attends to keys j <= i, as `flax.nnx` asks for it.
        **options: further options of `flash_attention_jax.dot_product_attention`, see
            `make_attention_fn`.

    Returns:
        (..., q_len, heads, v_dim), in the dtype computed in.

    Raises:
        NotImplementedError: the weights were asked for (`sow_weights=True`), or another einsum.
        ValueError: dropout without a key, or as `flash_attention_jax.dot_product_attention` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> x = jax.random.normal(jax.random.key(0), (2, 10, 32), jnp.float32)
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn)
        >>> mask = nn.make_causal_mask(x[..., 0])
        >>> y, params = layer.init_with_output(jax.random.key(1), x, mask=mask)
        >>> flax_layer = nn.MultiHeadDotProductAttention(num_heads=4)
        >>> bool(jnp.allclose(y, flax_layer.apply(params, x, mask=mask), atol=1e-5))
        True
    """
    if module is not None:
        raise NotImplementedError(
            "`sow_weights` must be False with this attention_fn, got True. The weights never exist "
            "as an array: use flax.linen.dot_product_attention to look at them."
        )
    for name, einsum in (
        ("einsum_dot_general", einsum_dot_general),
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        if einsum is not None:
            raise NotImplementedError(
                f"`{name}` must be None with this attention_fn, got {einsum!r}. "
                "Use flax.linen.dot_product_attention for another einsum."
            )
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    if mask is not None:
        mask = jnp.asarray(mask).astype(bool)  # nonzero = True
    if not deterministic and dropout_rate > 0.0:
        options = {"dropout_rate": dropout_rate, "dropout_key": dropout_rng, **options}

    # The functions of this library have one batch axis, Flax's layers have any number.
    batch, q_len, heads = query.shape[:-3], query.shape[-3], query.shape[-2]
    pairs = (heads, q_len, key.shape[-3])
    query, key, value = (
        x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in (query, key, value)
    )
    out = flash_attention_jax.dot_product_attention(
        query,
        key,
        value,
        _merge_batch_axes("bias", bias, batch, pairs),
        _merge_batch_axes("mask", mask, batch, pairs),
        is_causal=is_causal,
        precision=precision,
        **options,
    )
    return out.reshape(*batch, q_len, heads, value.shape[-1])


def make_attention_fn(
    *,
    similarity: Similarity = "dot",
    scale: float | Float[Array | np.ndarray, " heads"] | None = None,
    window: int | tuple[int, int] | None = None,
    is_causal: bool = False,
    implementation: str | None = None,
    **options: Any,
) -> AttentionFn:
    """An `attention_fn` for Flax's layers with the options that Flax's own lacks.

    Args:
        similarity: "dot" or "cosine".
        scale: multiplies the similarities, a number or one per head. `None` means 1 / sqrt(dim) for
            the dot product, 10 for cosine similarity.
        window: keys to the left and to the right of the query's own that it may attend to, both
            inclusive; one number counts for both sides. `None` means all.
        is_causal: query i attends to keys j <= i, whatever the mask says. Leave it False in a layer
            with `decode=True`, where Flax makes the mask.
        implementation: the engine that must run it; `None` lets the library choose.
        **options: any other keyword of `flash_attention_jax.dot_product_attention`:
            logits_soft_cap, sinks, alibi_slopes, groups, q_segment_ids, ...

    Returns:
        A function with the arguments of `attention_fn`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen as nn
        >>> x = jax.random.normal(jax.random.key(0), (2, 10, 32), jnp.float32)
        >>> local = make_attention_fn(similarity="cosine", window=(3, 0), is_causal=True)
        >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=local)
        >>> layer.init_with_output(jax.random.key(1), x)[0].shape
        (2, 10, 32)
    """
    options |= {"similarity": similarity, "implementation": implementation}
    if scale is not None:
        options["scale"] = scale
    if window is not None:
        options["local_window_size"] = window

    # `wraps` and not `partial`: Flax reads the signature to know which arguments it may pass.
    @functools.wraps(attention_fn)
    def configured(*args: Any, **kwargs: Any) -> Array:
        causal = kwargs.pop("is_causal", False) or is_causal
        return attention_fn(*args, **options, **kwargs, is_causal=causal)

    return configured


class Attention(nn.Module):
    """Multi-head self-attention over a sequence, without biases in its projections.

        q, k, v = split(x @ qkv);   q, k = rotary(q), rotary(k)
        y = concatenate_heads(softmax(scale * similarity(q, k)) v) @ out

    Attributes:
        dim: features of the input and of the output.
        heads: number of heads.
        dim_head: features of each head, even where `rotary`.
        causal: a token attends to itself and to those before it.
        similarity: "dot", with scale 1 / sqrt(dim_head), or "cosine", with scale 10.
        rotary: give the queries and keys their positions by rotation.
        implementation: the engine that must run it; `None` lets the library choose.
        dtype: dtype of the computation; `None` means that of the input and the parameters.
        param_dtype: dtype of the parameters.
        out_init: initialiser of the output projection.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (2, 10, 32), jnp.float32)
        >>> layer = Attention(dim=32, heads=4, dim_head=8, causal=True, similarity="cosine")
        >>> y, params = layer.init_with_output(jax.random.key(1), x)
        >>> y.shape
        (2, 10, 32)
    """

    dim: int
    heads: int = 8
    dim_head: int = 64
    causal: bool = False
    similarity: Similarity = "dot"
    rotary: bool = True
    implementation: str | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    out_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: Float[Array, "batch length dim"]) -> Float[Array, "batch length dim"]:
        """Attends within each sequence of the batch.

        Args:
            x: (batch, length, dim).

        Returns:
            (batch, length, dim), in the dtype computed in.

        Raises:
            ValueError: the last axis of `x` is not `dim`.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(
                f"`x` must have {self.dim} features, got shape {x.shape}. "
                "Set the `dim` of this Attention to the features of its input."
            )
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype, "use_bias": False}
        qkv = nn.DenseGeneral((3, self.heads, self.dim_head), name="qkv", **kinds)(x)
        query, key, value = (qkv[:, :, i] for i in range(3))
        if self.rotary:
            query = apply_rotary(query, layout="heads_last")
            key = apply_rotary(key, layout="heads_last")
        out = flash_attention_jax.dot_product_attention(
            query,
            key,
            value,
            is_causal=self.causal,
            similarity=self.similarity,
            implementation=self.implementation,
        )
        return nn.DenseGeneral(
            self.dim, axis=(-2, -1), kernel_init=self.out_init, name="out", **kinds
        )(out)


def _merge_batch_axes(
    name: str,
    x: Array | np.ndarray | None,
    batch: tuple[int, ...],
    pairs: tuple[int, int, int],
) -> Array | None:
    """(..., heads, q_len, kv_len), broadcasting on the left, to the same with one batch axis."""
    if x is None:
        return None
    x = jnp.asarray(x)
    rank = len(batch) + 3
    if x.ndim > rank:
        raise ValueError(
            f"`{name}` must broadcast to {(*batch, *pairs)}, got shape {x.shape}. "
            "Take away the axes on the left."
        )
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    if len(batch) == 1:
        return x  # whose shape the function itself checks
    # A mask without batch axes stays small; one with some of them is repeated over the others.
    lead = (1,) * len(batch) if math.prod(x.shape[:-3]) == 1 else batch
    return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(math.prod(lead), *x.shape[-3:])
