"""PyTorch: JAX functions on tensors, with gradients, and this library's attention among them.

    from flash_attention_jax.torch import flash_attention
    flash_attention(q, k, v, causal=True).sum().backward()

`jax2torch` makes any JAX function into one of tensors; the attention functions here are made by it,
and so are the layers `Attention` and `CosineSimAttention`. `scaled_dot_product_attention` has
torch's meaning, and `replace_scaled_dot_product_attention` puts it in torch's place inside a block.
"""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false, reportInvalidTypeForm=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, TypeAlias

from jaxtyping import Bool, Float, Num

import flash_attention_jax
from flash_attention_jax._api import run
from flash_attention_jax._core import check
from flash_attention_jax._core.optional import needs
from flash_attention_jax._torch.bridge import jax2torch
from flash_attention_jax._torch.modules import Attention, CosineSimAttention
from flash_attention_jax._torch.options import autocast, floating, kept, seeded
from flash_attention_jax._torch.read import check_dense

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch

__all__ = [
    "Attention",
    "CosineSimAttention",
    "flash_attention",
    "flash_cosine_sim_attention",
    "jax2torch",
    "memory_efficient_attention",
    "replace_scaled_dot_product_attention",
    "scaled_dot_product_attention",
]

Tensor: TypeAlias = torch.Tensor
Query: TypeAlias = Float[Tensor, "i d"] | Float[Tensor, "bh i d"] | Float[Tensor, "b h i d"]
Key: TypeAlias = Float[Tensor, "j d"] | Float[Tensor, "b j d"] | Float[Tensor, "b k j d"]
Value: TypeAlias = Float[Tensor, "j e"] | Float[Tensor, "b j e"] | Float[Tensor, "b k j e"]
Mask: TypeAlias = Num[Tensor, "..."] | Bool[Tensor, "..."]


_flash_attention = jax2torch(flash_attention_jax.flash_attention)
_flash_cosine_sim_attention = jax2torch(flash_attention_jax.flash_cosine_sim_attention)
_memory_efficient_attention = jax2torch(flash_attention_jax.memory_efficient_attention)


def flash_attention(q: Query, k: Key, v: Value, mask: Mask | None = None, **options: Any) -> Any:
    """`flash_attention_jax.flash_attention` on tensors.

    Arguments, results and errors are those of it and of `jax2torch`, with tensors for arrays.
    Dropout without a `dropout_key` draws one from torch's generator of q's device, so that
    `torch.manual_seed` repeats it. Under `torch.autocast` q, k and v are cast to its dtype, as
    torch casts those of its own attention; float64 stays.

    Args:
        q: Queries (n, d), (bh, n, d) or (b, h, n, d); float64 (where JAX's x64 is on), float32,
            bfloat16 or float16.
        k: Keys of the same rank and dtype, with fewer heads or none at all where they are shared.
        v: Values, as k, with a dimension of their own.
        mask: Boolean, or integer of 0 and 1 (1 = may attend): (b, j), or broadcasting to
            (b, h, n, j).
        **options: bias, causal (end-aligned), window, scale, softcap, sinks, dropout_rate,
            return_lse, implementation and so on, as in the JAX function.

    Returns:
        out, of q's shape with v's dimension; with return_lse, (out, lse).

    Raises:
        ValueError: As in the JAX function and `jax2torch`.
        TypeError: As in the JAX function and `jax2torch`.
        NotImplementedError: As in the JAX function and `jax2torch`.

    Example:
        >>> import torch
        >>> from flash_attention_jax.torch import flash_attention
        >>> q, k, v = torch.randn(3, 1, 8, 100, 64)
        >>> out = flash_attention(q.requires_grad_(), k, v, causal=True)
        >>> out.sum().backward()
        >>> q.grad.shape
        torch.Size([1, 8, 100, 64])

    References:
        Dao 2023, "FlashAttention-2", arXiv:2307.08691.
    """
    q, k, v = floating(q, k, v)
    return _flash_attention(q, k, v, kept(mask), **seeded(options, q))


def flash_cosine_sim_attention(
    q: Query,
    k: Key,
    v: Value,
    mask: Mask | None = None,
    attn_bias: Float[Tensor, "..."] | None = None,
    scale: Any = 8,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
    **options: Any,
) -> Any:
    """`flash_attention_jax.flash_cosine_sim_attention` on tensors.

    Arguments, results and errors are those of it and of `jax2torch`, with tensors for arrays;
    dropout and autocast as in `flash_attention`.

    Args:
        q: Queries, as in `flash_attention`.
        k: Keys, as in `flash_attention`.
        v: Values, as in `flash_attention`.
        mask: As in `flash_attention`.
        attn_bias: Added to the logits: (h, n, j), or (b, n, j) with `attn_bias_batch_dim`, or
            anything that broadcasts to (b, h, n, j). Differentiable.
        scale: Number, or tensor () or (h,), differentiable.
        causal: End-aligned.
        l2norm_qk: Whether to normalise q and k here.
        attn_bias_batch_dim: Whether a bias of three axes is (b, n, j).
        **options: As in the JAX function, groups among them.

    Returns:
        As `flash_attention`.

    Raises:
        ValueError: As in `flash_attention`.
        TypeError: As in `flash_attention`.
        NotImplementedError: As in `flash_attention`.

    Example:
        >>> import torch
        >>> from flash_attention_jax.torch import flash_cosine_sim_attention
        >>> q, k, v = torch.randn(3, 2, 8, 63, 32)
        >>> out = flash_cosine_sim_attention(q, k, v, causal=True)
        >>> torch.allclose(out, flash_cosine_sim_attention(7 * q, k, v, causal=True), atol=1e-6)
        True

    References:
        Henry et al. 2020, "Query-Key Normalization for Transformers", arXiv:2010.04245.
    """
    q, k, v = floating(q, k, v)
    return _flash_cosine_sim_attention(
        q,
        k,
        v,
        kept(mask),
        attn_bias,
        scale,
        causal,
        l2norm_qk,
        attn_bias_batch_dim,
        **seeded(options, q),
    )


def memory_efficient_attention(
    q: Query,
    k: Key,
    v: Value,
    mask: Mask | None = None,
    causal: bool = False,
    attn_bias: Float[Tensor, "..."] | None = None,
    q_bucket_size: int = 512,
    k_bucket_size: int = 1024,
    eps: float = 1e-8,
    dropout: float = 0.0,
    training: bool = False,
    **options: Any,
) -> Any:
    """`flash_attention_jax.memory_efficient_attention` on tensors.

    The arguments up to `training` are those of memory-efficient-attention-pytorch, in its order.
    Two things differ: causal is end-aligned, and dropout is applied to the normalised
    probabilities. Autocast is as in `flash_attention`.

    Args:
        q: Queries, as in `flash_attention`.
        k: Keys, as in `flash_attention`.
        v: Values, as in `flash_attention`.
        mask: As in `flash_attention`.
        causal: End-aligned.
        attn_bias: Added to the logits, broadcasts to (b, h, n, j). Differentiable.
        q_bucket_size: Queries per block.
        k_bucket_size: Keys per block.
        eps: Without effect: a row that sees no key is zero.
        dropout: Share of the probabilities dropped in training, in [0, 1); the key is drawn as in
            `flash_attention`.
        training: Whether to drop.
        **options: As in the JAX function.

    Returns:
        As `flash_attention`.

    Raises:
        ValueError: As in `flash_attention`.
        TypeError: As in `flash_attention`.
        NotImplementedError: As in `flash_attention`.

    Example:
        >>> import torch
        >>> from flash_attention_jax.torch import memory_efficient_attention
        >>> q, k, v = torch.randn(3, 1, 8, 100, 64)
        >>> mask = torch.arange(100)[None] < 70
        >>> memory_efficient_attention(q, k, v, mask, q_bucket_size=32, k_bucket_size=64).shape
        torch.Size([1, 8, 100, 64])

    References:
        Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory", arXiv:2112.05682.
    """
    del eps
    rate = check.rate("dropout", dropout)
    if check.flag("training", training) and rate:
        options = {"dropout_rate": rate, **options}
    q, k, v = floating(q, k, v)
    return _memory_efficient_attention(
        q,
        k,
        v,
        kept(mask),
        causal,
        attn_bias,
        q_bucket_size,
        k_bucket_size,
        **seeded(options, q),
    )


# --- torch's own -----------------------------------------------------------------------------


def scaled_dot_product_attention(
    query: Float[Tensor, "*q_batch i d"],
    key: Float[Tensor, "*k_batch j d"],
    value: Float[Tensor, "*v_batch j e"],
    attn_mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Float[Tensor, "*batch i e"]:
    """`torch.nn.functional.scaled_dot_product_attention`, in memory linear in the length.

    The arguments, what they mean and which of them are refused are torch's: causal is start-aligned
    (query i sees the keys up to i), dropout is applied whenever `dropout_p` is positive, a row that
    sees no key is zero, and `torch.autocast` has its say. Where torch raises RuntimeError for a bad
    argument this raises ValueError or TypeError. A negative `dropout_p` is refused, as is a
    dimension of 0, and NaN in a key or value that no query sees reaches no output. The bits dropped
    differ from torch's, and are repeated by `torch.manual_seed` as torch's are.

    Args:
        query: (..., i, d), or (..., h, i, d) with `enable_gqa`.
        key: (..., j, d), of the same dtype, or (..., hk, j, d) with h a multiple of hk.
        value: (..., j, e). The axes before the last two broadcast.
        attn_mask: Boolean, True = may attend, or float (of query's dtype, or float32), added to the
            logits and differentiable; at least two axes, broadcasts to (..., i, j).
        dropout_p: Share of the probabilities dropped, in [0, 1].
        is_causal: Start-aligned; excludes `attn_mask`.
        scale: Number; None = 1 / sqrt(d).
        enable_gqa: Whether heads share keys and values: query head n reads key head n // (h // hk).

    Returns:
        (..., i, e) in query's dtype.

    Raises:
        ValueError: Shapes that do not fit, a mask beside `is_causal`, a number out of range.
        TypeError: A dtype or type that is never valid.

    Example:
        >>> import torch
        >>> from flash_attention_jax.torch import scaled_dot_product_attention
        >>> q, k, v = torch.randn(3, 2, 8, 50, 32)
        >>> theirs = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.allclose(scaled_dot_product_attention(q, k, v, is_causal=True), theirs, atol=1e-5)
        True
    """
    _check_tensors(query, key, value, attn_mask)
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    _check_dtypes(query, key, value)
    rate = check.number("dropout_p", dropout_p)
    if not 0 <= rate <= 1:
        advice = "It is the share of probabilities that are dropped."
        check.fail("dropout_p", "be in [0, 1]", repr(dropout_p), advice)
    if check.flag("is_causal", is_causal) and attn_mask is not None:
        got, advice = "both", "Put the causal part into the mask: mask & torch.tril(...)."
        check.fail("attn_mask", "be None with is_causal=True", got, advice)
    shared = check.flag("enable_gqa", enable_gqa)
    if shared:
        key, value = _same_heads(query, key, value)
    lead, key_lead = _leads(query, key, value, shared)
    shape = (*lead, query.shape[-2], key.shape[-2])
    options: dict[str, Any] = {}
    if scale is not None:
        is_tensor = isinstance(scale, torch.Tensor)
        options["scale"] = check.number("scale", scale.item() if is_tensor else scale)
    out = _scaled_dot_product_attention(
        _heads_first(query, lead),
        _heads_first(key, key_lead),
        _heads_first(value, key_lead),
        None if attn_mask is None else _mask_heads_first(attn_mask, query.dtype, shape),
        is_causal=is_causal,
        **seeded({"dropout_rate": rate % 1, **options}, query),
    )
    out = out.reshape(*lead, query.shape[-2], value.shape[-1])
    return torch.nn.functional.dropout(out, 1.0) if rate == 1 else out


@contextlib.contextmanager
def replace_scaled_dot_product_attention() -> Iterator[None]:
    """Inside the block, torch's `scaled_dot_product_attention` is this module's.

    `torch.nn.functional` has the replacement, for every thread, and so have torch's own layers; a
    name under which a model imported the function before is answered in this thread. What
    `torch.compile` compiled has the replacement inside the block and torch's own outside. Calls
    that torch makes inside C++ are not replaced (the fast path of `torch.nn.TransformerEncoder` in
    inference). Backward need not be inside the block, unless it computes a part of the forward pass
    anew (`torch.utils.checkpoint`).

    Example:
        >>> import torch
        >>> from flash_attention_jax.torch import replace_scaled_dot_product_attention
        >>> layer, x = torch.nn.MultiheadAttention(64, 8, batch_first=True), torch.randn(2, 50, 64)
        >>> theirs, _ = layer(x, x, x, need_weights=False)
        >>> with replace_scaled_dot_product_attention():
        ...     ours, _ = layer(x, x, x, need_weights=False)
        >>> torch.allclose(ours, theirs, atol=1e-5)
        True
    """
    before = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention
    try:
        with _Replacement():
            yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = before


TORCHS = torch.nn.functional.scaled_dot_product_attention


class _Replacement(torch.overrides.TorchFunctionMode):
    """Sees the calls of torch's functions by this thread, and answers one itself.

    It does not see inside of torch's functions that are written in Python, such as that of
    `torch.nn.MultiheadAttention`, which find the name in `torch.nn.functional`.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        if func is TORCHS:
            func = scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


TORCH_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "mask": "attn_mask",
    "bias": "attn_mask",
    "causal": "is_causal",
    "dropout_rate": "dropout_p",
}
"""What `scaled_dot_product_attention` calls the arguments."""


def _start_aligned(
    query: Any, key: Any, value: Any, attn_mask: Any, *, is_causal: bool, **options: Any
) -> Any:
    """On JAX's side: all of (b, h, n, d), with fewer heads in key and value or not."""
    if attn_mask is not None:
        options["mask" if attn_mask.dtype == bool else "bias"] = attn_mask
    if is_causal:
        options |= {"causal": True, "q_offset": 0}
    mask = options.pop("mask", None)
    function = "scaled_dot_product_attention"
    return run.run(function, query, key, value, mask, options, names=TORCH_NAMES)


_scaled_dot_product_attention = jax2torch(_start_aligned)

Shape: TypeAlias = tuple[int, ...]


def _check_tensors(query: Any, key: Any, value: Any, attn_mask: Any) -> None:
    """Types and numbers of axes."""
    for name, x in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if x is None and name == "attn_mask":
            continue
        if not isinstance(x, torch.Tensor):
            got = type(x).__name__
            check.fail(name, "be a tensor", got, "Wrap it in torch.as_tensor.", TypeError)
        check_dense(lambda name=name: name, x)
        if x.dim() < 2:
            got = f"shape {tuple(x.shape)}"
            last = "queries and keys" if name == "attn_mask" else "length and dimension"
            check.fail(name, "have at least 2 axes", got, f"Its last two are {last}.")
    if query.shape[-1] != key.shape[-1]:
        advice = "Project them to the same."
        check.agree(("query", "key"), "the dimension (last axis)", (query, key), advice)
    if key.shape[-2] != value.shape[-2]:
        advice = "Only the dimension may differ."
        check.agree(("key", "value"), "length (last axis but one)", (key, value), advice)


def _check_dtypes(query: Any, key: Any, value: Any) -> None:
    """One dtype, after autocast."""
    dtypes = [x.dtype for x in (query, key, value)]
    if len({*dtypes}) > 1:
        names = ("query", "key", "value")
        got = ", ".join(f"{name} {dtype}" for name, dtype in zip(names, dtypes, strict=True))
        requirement, advice = "share one dtype", "Cast them to the same."
        check.fail("query`, `key` and `value", requirement, got, advice, TypeError)


def _same_heads(query: Any, key: Any, value: Any) -> tuple[Any, Any]:
    """Keys and values with one number of heads, of which that of the queries is a multiple."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 3:
            got = f"shape {tuple(x.shape)}"
            check.fail(name, "have heads, (..., h, n, d), with enable_gqa", got, "Reshape it.")
        if x.shape[-3] == 0 or query.shape[-3] % x.shape[-3]:
            got = f"{x.shape[-3]} heads beside {query.shape[-3]}"
            advice = "Query head n reads key head n // (heads // key heads)."
            check.fail(name, "have heads that divide those of `query`", got, advice)
    if key.shape[-3] == value.shape[-3]:
        return key, value
    heads = query.shape[-3]
    return tuple(x.repeat_interleave(heads // x.shape[-3], -3) for x in (key, value))  # pyright: ignore[reportReturnType]


def _leads(query: Any, key: Any, value: Any, shared: bool) -> tuple[Shape, Shape]:
    """The axes before the last two: of query and output, and of key and value."""
    last = -3 if shared else -2
    shapes = [tuple(x.shape[:last]) for x in (query, key, value)]
    try:
        lead = tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        listed = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        advice = "" if shared else "For heads that share keys, set enable_gqa=True."
        raise ValueError(
            f"`query`, `key` and `value` must broadcast in batch{'' if shared else ' and heads'}, "
            f"got shapes {listed}. {advice}".rstrip()
        ) from None
    if shared:
        return (*lead, query.shape[-3]), (*lead, key.shape[-3])
    return lead, lead


def _heads_first(x: Any, lead: Shape) -> Any:
    """(..., n, d) as (b, h, n, d)."""
    if len(lead) == 2 and x.shape[:-2] == lead:
        return x
    *batch, heads = lead or (1,)
    rows = x.shape[-2:]
    return x.expand(*lead, *rows).reshape(math.prod(batch), heads, *rows)


def _mask_heads_first(mask: Any, dtype: Any, shape: Shape) -> Any:
    """A mask that broadcasts to (..., i, j) as one that does to (b, h, i, j)."""
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        requirement = f"be boolean, or of query's dtype {dtype} or float32"
        got, advice = str(mask.dtype), "Pass attn_mask != 0: True where a query may attend."
        check.fail("attn_mask", requirement, got, advice, TypeError)
    check.broadcasts("attn_mask", mask, shape, "(..., i, j)", "Expand or reshape it.")
    mask = mask.reshape((1,) * (len(shape) - mask.dim()) + tuple(mask.shape))
    lead = tuple(mask.shape[:-2])
    if math.prod(lead[:-1]) != 1:  # not one for the whole batch
        lead = (*shape[:-3], lead[-1])
    return _heads_first(mask, lead)
