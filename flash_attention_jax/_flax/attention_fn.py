"""The `attention_fn` of Flax's own layers, the same for linen and nnx; it needs no Flax itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from flash_attention_jax._api.attention import dot_product_attention
from flash_attention_jax._core import check

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
    promote_dtype: Any = None,
    is_causal: bool = False,
    input_positions: Any = None,
    **options: Any,
) -> Float[Array, "*batch q_len heads v_dim"]:
    """The `dot_product_attention` of `flax.linen` and of `flax.nnx`, in O(n) memory.

    Takes Flax's arguments with Flax's meaning, so that it serves as the `attention_fn` of the
    layers `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`. It differs
    from Flax's own in three places: a query that may attend to no key gives 0, where Flax gives the
    mean of the values; dropout draws other bits from `dropout_rng`; and the weights never exist as
    an array, so they cannot be sown or computed by another einsum.

    With `broadcast_dropout` (Flax's default) each batch entry and head runs as a call of its own
    under `jax.vmap`, all with the same dropout mask. False is faster, and as good a regulariser.

    Args:
        query: (..., q_len, heads, dim), any number of batch axes.
        key: (..., kv_len, kv_heads, dim); `heads` is a multiple of `kv_heads`.
        value: (..., kv_len, kv_heads, v_dim).
        bias: Added to the logits, broadcasts to (..., heads, q_len, kv_len).
        mask: Nonzero = may attend, of any dtype (Flax's helpers make float32 ones), broadcasts to
            (..., heads, q_len, kv_len).
        broadcast_dropout: One dropout mask for all batch entries and heads; False = one for each.
        dropout_rng: The key that dropout draws from; needed where `dropout_rate` is positive.
        dropout_rate: Probability of dropping an attention weight, 0 <= rate < 1.
        deterministic: No dropout.
        dtype: Compute in this dtype. `None` means the common dtype of the inputs.
        precision: As in JAX.
        module: Must be `None`: there are no weights to sow.
        force_fp32_for_softmax: Without effect: the softmax is always computed in float32 at least.
        einsum_dot_general: Must be `None`.
        qk_attn_weights_einsum: Must be `None`.
        attn_weights_value_einsum: Must be `None`.
        promote_dtype: As in `flax.nnx`: what brings (query, key, value) into one dtype.
        is_causal: Query i attends to keys j <= i, as `flax.nnx` asks for it.
        input_positions: Must be `None`: no position enters here.
        **options: Further options of `flash_attention_jax.dot_product_attention`, see
            `make_attention_fn`.

    Returns:
        (..., q_len, heads, v_dim), in the dtype computed in.

    Raises:
        NotImplementedError: The weights were asked for (`sow_weights=True`), another einsum, or
            `input_positions` were given.
        TypeError: As `flash_attention_jax.dot_product_attention` does.
        ValueError: Dropout without a key, or as `flash_attention_jax.dot_product_attention` does.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 16), jnp.float32)
        >>> mask = jnp.tril(jnp.ones((10, 10), jnp.float32))
        >>> attention_fn(q, k, v, mask=mask, dtype=jnp.bfloat16).dtype.name
        'bfloat16'
    """
    check.rate("dropout_rate", dropout_rate)
    if module is not None:
        raise NotImplementedError(
            "`sow_weights` must be False with this attention_fn, got True. The weights never exist "
            "as an array: use Flax's own dot_product_attention to look at them."
        )
    for name, einsum in (
        ("einsum_dot_general", einsum_dot_general),
        ("qk_attn_weights_einsum", qk_attn_weights_einsum),
        ("attn_weights_value_einsum", attn_weights_value_einsum),
    ):
        if einsum is not None:
            raise NotImplementedError(
                f"`{name}` must be None with this attention_fn, got {einsum!r}. "
                "Use Flax's own dot_product_attention for another einsum."
            )
    if input_positions is not None:
        raise NotImplementedError(
            f"`input_positions` must be None with this attention_fn, got "
            f"{check.shown(input_positions)}. Give the layer a function of your own that rotates "
            "query and key first (flash_attention_jax.rotary.apply_rotary takes "
            '`positions=input_positions, layout="heads_last"`) and calls this one without them.'
        )
    inputs: Any = (query, key, value)
    if promote_dtype is not None:
        query, key, value = promote_dtype(inputs, dtype=dtype)
    else:
        common = jnp.result_type(*inputs) if dtype is None else jnp.dtype(dtype)
        query, key, value = (jnp.asarray(x).astype(common) for x in inputs)

    # The functions of this library have one batch axis, Flax's layers have any number.
    batch, q_len, heads = query.shape[:-3], query.shape[-3], query.shape[-2]
    pairs = (heads, q_len, key.shape[-3])
    query, key, value = (
        jnp.asarray(x).reshape(math.prod(x.shape[:-3]), *x.shape[-3:]) for x in (query, key, value)
    )
    options |= {"is_causal": is_causal, "precision": precision}
    if bias is not None:
        options["bias"] = _merge_batch_axes("bias", jnp.asarray(bias), batch, pairs)
    if mask is not None:
        kept = jnp.asarray(mask).astype(bool)  # nonzero = True
        options["mask"] = _merge_batch_axes("mask", kept, batch, pairs)
    attend = dot_product_attention
    if not deterministic and dropout_rate > 0.0:
        options = {"dropout_rate": dropout_rate, "dropout_key": dropout_rng, **options}
        if broadcast_dropout:
            attend = _attend_with_one_dropout_mask
    out = attend(query, key, value, **options)
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
        scale: Multiplies the similarities, a number or one per head. `None` means 1 / sqrt(dim) for
            the dot product, 10 for cosine similarity.
        window: Keys to the left and to the right of the query's own that it may attend to, both
            inclusive; one number counts for both sides. `None` means all. About the diagonal j = i:
            leave it out in a layer with `decode=True`, where the one query is not at key 0.
        is_causal: Query i attends to keys j <= i, whatever the mask says. Leave it False in a layer
            with `decode=True`, where Flax makes the mask.
        implementation: The engine that must run it; `None` lets the library choose.
        **options: Any other keyword of `flash_attention_jax.dot_product_attention`:
            logits_soft_cap, sinks, alibi_slopes, groups, q_segment_ids, ...

    Returns:
        A function with the arguments of `attention_fn`.

    Raises:
        TypeError: From the function, for an option that the layer passes too, as `dropout_rate`.
        ValueError: `similarity` is unknown, `dropout_rate` no rate, or `return_residual` was asked
            for.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> local = make_attention_fn(similarity="cosine", window=(3, 0), is_causal=True)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 10, 4, 16), jnp.float32)
        >>> local(q, k, v).shape
        (2, 10, 4, 16)
    """
    check.choice("similarity", similarity, ("dot", "cosine"))
    if options.pop("return_residual", False):
        advice = "Flax's layers take the output alone; call dot_product_attention yourself."
        check.fail("return_residual", "be False in an attention_fn", "True", advice)
    check.rate("dropout_rate", options.get("dropout_rate", 0.0))
    options |= {"similarity": similarity, "implementation": implementation}
    if scale is not None:
        options["scale"] = scale
    if window is not None:
        options["local_window_size"] = window

    # `wraps` and not `partial`: Flax reads the signature to know which arguments it may pass.
    @functools.wraps(attention_fn)
    def configured(*args: Any, **kwargs: Any) -> Array:
        for name in sorted(options.keys() & kwargs.keys()):
            made, passed = check.shown(options[name]), check.shown(kwargs[name])
            advice = "Flax's layers pass it themselves: give it to the layer alone."
            got = f"{made} from make_attention_fn and {passed} from its caller"
            check.fail(name, "be given once", got, advice, TypeError)
        causal = kwargs.pop("is_causal", False) or is_causal
        return attention_fn(*args, **options, **kwargs, is_causal=causal)

    return configured


def _merge_batch_axes(
    name: str,
    x: Array,
    batch: tuple[Any, ...],
    pairs: tuple[Any, Any, Any],
) -> Array:
    """(..., heads, q_len, kv_len), broadcasting on the left, to the same with one batch axis."""
    rank = len(batch) + 3
    if x.ndim > rank:
        check.fail(
            name,
            f"broadcast to {(*batch, *pairs)}",
            f"shape {x.shape}",
            "Take away the axes on the left.",
        )
    x = x.reshape((1,) * (rank - x.ndim) + x.shape)
    if len(batch) == 1:
        return x  # whose shape the function itself checks
    # A mask without batch axes stays small; one with some of them is repeated over the others.
    lead = (1,) * len(batch) if math.prod(x.shape[:-3]) == 1 else batch
    return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(math.prod(lead), *x.shape[-3:])


PER_BATCH = (
    "q_offset",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "q_segment_ids",
    "kv_segment_ids",
)
PER_HEAD = ("scale", "sinks", "alibi_slopes", "relative_bias")
TERMS = ("bias", "mask", *PER_BATCH, *PER_HEAD)


def _attend_with_one_dropout_mask(query: Array, key: Array, value: Array, **options: Any) -> Array:
    """`dot_product_attention` whose dropout mask is the same for all batch entries and heads.

    The mask is a function of (key, b, h, i, j) where b and h count within a call. So batch and
    heads are mapped over: in each call both are 0.
    """
    shape = jax.eval_shape(  # which also checks the arguments, in the user's shapes
        lambda *qkv: dot_product_attention(*qkv, **options), query, key, value
    ).shape
    batch, heads, kv_heads = query.shape[0], query.shape[2], key.shape[2]
    terms, over_batch, over_heads = {}, {}, {}
    for name in [name for name in TERMS if getattr(options.get(name), "ndim", 0)]:
        x, of_batch, of_head = _lead_axes(name, jnp.asarray(options.pop(name)), batch)
        if of_head:
            # The axis of heads becomes two: key heads, and query heads of each.
            lead, split = int(of_batch), (kv_heads, heads // kv_heads)
            x = x.reshape(*x.shape[:lead], *split, *x.shape[lead + 1 :])
        terms[name] = x
        over_batch[name], over_heads[name] = (0 if flag else None for flag in (of_batch, of_head))

    def attend_one_head(q: Array, k: Array, v: Array, terms: dict[str, Any]) -> Array:
        return dot_product_attention(q[:, None], k[:, None], v[:, None], **terms, **options)[:, 0]

    # Inside out: over the query heads of one key head, over the key heads, over the batch.
    mapped = jax.vmap(attend_one_head, (1, None, None, over_heads), 1)
    mapped = jax.vmap(mapped, (1, 1, 1, over_heads), 1)
    mapped = jax.vmap(mapped, (0, 0, 0, over_batch))
    grouped = query.reshape(*query.shape[:2], kv_heads, heads // kv_heads, query.shape[3])
    return mapped(grouped, key, value, terms).reshape(shape)


def _lead_axes(name: str, x: Array, batch: Any) -> tuple[Array, bool, bool]:
    """The term without axes of size 1 for batch and heads, and whether it has each of them."""
    if name in ("bias", "mask"):
        of_batch, of_head = (n not in (0, 1) for n in x.shape[:2])
        return (
            x.reshape([n for i, n in enumerate(x.shape) if i > 1 or n not in (0, 1)]),
            of_batch,
            of_head,
        )
    if name in PER_HEAD:
        rows = x.reshape(-1, x.shape[-1]) if name == "relative_bias" else x.reshape(-1)
        of_head = rows.shape[0] not in (0, 1)
        return rows if of_head else rows[0], False, of_head
    # One offset per query keeps an axis for the batch, which it must have.
    rows = x[:, None] if name == "q_offset" and x.ndim == 2 else x
    return (rows, True, False) if x.shape[0] == batch and batch not in (0, 1) else (x, False, False)
