"""Attention over sequences of different lengths, packed one after another without padding."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from flash_attention_jax._api.run import run
from flash_attention_jax._core import check
from flash_attention_jax._core.types import ArrayLike

__all__ = ["flash_attention_varlen", "flash_attention_varlen_qkvpacked", "pad_input", "unpad_input"]


def flash_attention_varlen(
    q: Float[ArrayLike, "total_q h d"],
    k: Float[ArrayLike, "total_k hk d"],
    v: Float[ArrayLike, "total_k hk dv"],
    cu_seqlens_q: Int[ArrayLike, " bounds"],
    cu_seqlens_k: Int[ArrayLike, " bounds"] | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    similarity: Literal["dot", "cosine"] = "dot",
    causal: bool = False,
    window: int | tuple[int | None, int | None] | None = None,
    scale: float | Float[ArrayLike, "*scale"] | None = None,
    softcap: float | None = None,
    sinks: Float[ArrayLike, " h"] | None = None,
    alibi_slopes: Float[ArrayLike, " h"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    return_lse: bool = False,
    block_q: int | None = None,
    block_kv: int | None = None,
    implementation: str | None = None,
    differentiation: Literal["reverse", "any"] = "reverse",
    deterministic_backward: bool = True,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "total_q h dv"] | tuple[Float[Array, "total_q h dv"], Float[Array, "total_q h"]]:
    """Attends within each of several sequences that lie packed along one axis.

    Sequence `s` owns the queries `cu_seqlens_q[s] : cu_seqlens_q[s + 1]` and the keys and values
    `cu_seqlens_k[s] : cu_seqlens_k[s + 1]`; its queries see its keys alone:

        out[q of s] = attention(q[q of s], k[k of s], v[k of s]),        s = 0 .. b - 1

    Causal masking, the window and ALiBi are about the diagonal of each sequence, end-aligned where
    its two lengths differ: query `i` of sequence `s` stands at its key `i + len_k[s] - len_q[s]`,
    as a cache needs, and as FlashAttention has it from 2.1 on.

    Sequences may be empty. A query whose sequence has no key it may see, and every token from
    `cu_seqlens[-1]` on, which belongs to no sequence, has output 0, lse -inf (with `sinks`, the
    sink) and gradients 0. Such tokens at the end let the array keep one shape under `jax.jit`
    whatever it holds; see `unpad_input`.

    Memory grows with `total_q + total_k`: sequences are told apart by one integer per token.

    Args:
        q: packed queries (total_q, h, d), float64, float32, bfloat16 or float16.
        k: packed keys (total_k, hk, d) of the same dtype; h is a multiple of hk, and query head n
            reads key head n // (h // hk).
        v: packed values (total_k, hk, dv) of the same dtype.
        cu_seqlens_q: where each sequence of queries starts and the last one ends, integer (b + 1,),
            that is 0 followed by the cumulative sum of the lengths. Traced or not; only where it is
            not are its values checked.
        cu_seqlens_k: the same of the keys. `None` means `cu_seqlens_q` (self-attention, with
            total_k equal to total_q).
        max_seqlen_q: length of the longest sequence of queries, or a bound on it, an integer. The
            result does not depend on it: a hint, checked where `cu_seqlens_q` is not traced.
        max_seqlen_k: the same of the keys.
        similarity: "dot" or "cosine" (queries and keys normalised).
        causal: query `i` of a sequence sees its keys `j <= i + len_k - len_q` only.
        window: (left, right), both inclusive, about the diagonal; -1 or `None` is unbounded, an
            integer w is (w, w).
        scale: factor of the similarity, a number or an array with one entry per head. `None` means
            1 / sqrt(d) for "dot" and 10 for "cosine".
        softcap: logits become `softcap * tanh(logits / softcap)`.
        sinks: one logit per head, in the denominator only, (h,).
        alibi_slopes: `-slope * abs(i + len_k - len_q - j)` is added to the logits, (h,).
        dropout_rate: the share of probabilities to drop, 0 <= dropout_rate < 1.
        dropout_key: a key of `jax.random`, needed when `dropout_rate` is over 0. The bits depend on
            the position in the packed arrays, so the same sequence packed elsewhere drops others.
        return_lse: whether to return the logarithm of the denominators too.
        block_q: queries per block; `None` lets the library choose.
        block_kv: keys per block; `None` lets the library choose.
        implementation: the name of an engine, or `None` to let the library choose.
        differentiation: "reverse", or "any" for forward mode and every order.
        deterministic_backward: False lets a kernel's backward sum in whatever order its programs
            run.
        precision: of the matrix products, as in JAX.

    Returns:
        Packed outputs (total_q, h, dv) in the dtype of `q`; with `return_lse`, `(out, lse)` with
        lse (total_q, h), float32 (float64 for float64).

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: ranks or shapes don't fit, or, where they are concrete, `cu_seqlens` don't start
            with 0, decrease or pass the tokens, or `max_seqlen` is under the longest sequence.
        NotImplementedError: `implementation` names an engine that cannot do this call.

    Example:
        >>> import jax.numpy as jnp
        >>> q = k = v = jnp.ones((5, 2, 4), jnp.float32)  # tokens, heads, dimension
        >>> cu_seqlens = jnp.array([0, 2, 5], jnp.int32)  # one sequence of 2 and one of 3
        >>> out, lse = flash_attention_varlen(q, k, v, cu_seqlens, causal=True, return_lse=True)
        >>> out.shape
        (5, 2, 4)
        >>> jnp.exp(lse[:, 0] - 2.0).round().astype(jnp.int32).tolist()  # keys each query sees
        [1, 2, 1, 2, 3]

    References:
        Dao, Fu, Ermon, Rudra, Ré, "FlashAttention: Fast and Memory-Efficient Exact Attention with
        IO-Awareness", 2022, arXiv:2205.14135.
        Krell, Kosec, Perez, Fitzgibbon, "Efficient Sequence Packing without Cross-contamination",
        2021, arXiv:2107.02027.
    """
    check.choice("similarity", similarity, ("dot", "cosine"))
    _check_packed(q, k, v, alone=cu_seqlens_k is None)
    same = cu_seqlens_k is None or (cu_seqlens_k is cu_seqlens_q and q.shape[0] == k.shape[0])
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, "q", q.shape[0])
    _check_max_seqlen("max_seqlen_q", max_seqlen_q, "cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is None or same:
        _check_max_seqlen("max_seqlen_k", max_seqlen_k, "cu_seqlens_q", cu_seqlens_q)
        cu_seqlens_k = cu_seqlens_q
    else:
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, "k", k.shape[0])
        _check_max_seqlen("max_seqlen_k", max_seqlen_k, "cu_seqlens_k", cu_seqlens_k)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            got = f"shapes {cu_seqlens_q.shape} and {cu_seqlens_k.shape}"
            advice = "Give an empty sequence an entry that repeats the one before it."
            check.fail("cu_seqlens_q` and `cu_seqlens_k", "count the same sequences", got, advice)

    starts_q = jnp.asarray(cu_seqlens_q).astype(jnp.int32)
    starts_k = jnp.asarray(cu_seqlens_k).astype(jnp.int32)
    sequences = starts_q.shape[0] - 1
    q_sequence = _sequence_of_token(starts_q, q.shape[0])
    kv_sequence = _sequence_of_token(starts_k, k.shape[0])
    # Tokens past the end are in sequence b on both sides. Those of the keys move on to b + 1, so
    # that no query meets them. Both stay sorted, so each query still sees one range of keys.
    kv_segment_ids = jnp.where(kv_sequence == sequences, sequences + 1, kv_sequence)

    # In the packed arrays, query p of sequence s stands at the key
    #     cu_k[s] + (p - cu_q[s]) + (len_k[s] - len_q[s]) = p + cu_k[s + 1] - cu_q[s + 1],
    # an offset that is 0 throughout where the two are the same.
    q_offset = None
    if not same and (causal or window is not None or alibi_slopes is not None):
        ends = jnp.append(starts_k[1:] - starts_q[1:], jnp.zeros(1, jnp.int32))
        q_offset = ends[q_sequence][None]

    options = {
        "causal": causal,
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "q_offset": q_offset,
        "q_segment_ids": q_sequence,
        "kv_segment_ids": kv_segment_ids,
        "dropout_rate": dropout_rate,
        "dropout_key": dropout_key,
        "return_lse": return_lse,
        "block_q": block_q,
        "block_kv": block_kv,
        "implementation": implementation,
        "differentiation": differentiation,
        "deterministic_backward": deterministic_backward,
        "precision": precision,
    }
    # What `dot_product_attention` does with (length, heads, dimension), under these names.
    return run(
        "flash_attention_varlen",
        q,
        k,
        v,
        None,
        options,
        layout="heads_last",
        similarity=similarity,
    )


def flash_attention_varlen_qkvpacked(
    qkv: Float[ArrayLike, "total 3 h d"],
    cu_seqlens: Int[ArrayLike, " bounds"],
    max_seqlen: int | None = None,
    **options: Any,
) -> Float[Array, "total h d"] | tuple[Float[Array, "total h d"], Float[Array, "total h"]]:
    """Self-attention over packed sequences whose queries, keys and values come in one array.

        flash_attention_varlen(qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_seqlens, **options)

    Args:
        qkv: packed queries, keys and values (total, 3, h, d), in this order on axis 1.
        cu_seqlens: 0 and the cumulative sum of the lengths, integer (b + 1,).
        max_seqlen: length of the longest sequence, or a bound on it: a hint.
        **options: the keyword-only arguments of `flash_attention_varlen`.

    Returns:
        Packed outputs (total, h, d) in the dtype of `qkv`; with `return_lse=True`, `(out, lse)`
        with lse (total, h).

    Raises:
        ValueError: `qkv` does not have the shape (total, 3, h, d).
        TypeError, ValueError, NotImplementedError: as `flash_attention_varlen`.

    Example:
        >>> import jax.numpy as jnp
        >>> qkv = jnp.ones((5, 3, 2, 4), jnp.float32)
        >>> cu_seqlens = jnp.array([0, 2, 5], jnp.int32)
        >>> flash_attention_varlen_qkvpacked(qkv, cu_seqlens, causal=True).shape
        (5, 2, 4)
    """
    check.array("qkv", qkv)
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        advice = "Stack the queries, keys and values on axis 1."
        check.fail("qkv", "have shape (total, 3, heads, dimension)", str(qkv.shape), advice)
    # Checked here as well, so that an error names the arguments of this function.
    _check_cu_seqlens("cu_seqlens", cu_seqlens, "qkv", qkv.shape[0])
    _check_max_seqlen("max_seqlen", max_seqlen, "cu_seqlens", cu_seqlens)
    return flash_attention_varlen(
        qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_seqlens, None, max_seqlen, **options
    )


def unpad_input(
    hidden_states: Shaped[ArrayLike, "b n *features"],
    attention_mask: Bool[ArrayLike, "b n"] | Int[ArrayLike, "b n"],
    *,
    total: int | None = None,
) -> tuple[Shaped[Array, "total *features"], Int[Array, " total"], Int[Array, " b+1"], int]:
    """Packs the tokens that a padding mask keeps.

    With `flat` the batch and length axes of `hidden_states` merged into one:

        indices    = the places, in order, where the merged attention_mask is not 0
        packed     = flat[indices]
        cu_seqlens = 0, then the cumulative sum of attention_mask.sum(axis=1)

    `pad_input` undoes it. The gradient of `packed` goes back to the kept places; it is 0 at the
    others, whatever these hold.

    How many tokens are kept depends on the mask, so a traced mask (under `jax.jit`, `jax.vmap`)
    needs a static `total`. The packed array is then padded with zeros to `total`, with tokens that
    belong to no sequence: their indices lie past `b * n`, where `pad_input` drops them, and
    `flash_attention_varlen` gives them 0. Kept tokens beyond a traced mask's `total` are cut off
    the end, and `cu_seqlens` with them; a mask that is not traced raises instead.

    Args:
        hidden_states: (b, n, ...), any dtype.
        attention_mask: (b, n), boolean or integer, nonzero where a token is to be kept. The kept
            ones may lie anywhere in their row.
        total: length of the packed array, at least the number of kept tokens. `None` means exactly
            that number.

    Returns:
        packed: (total, ...) in the dtype of `hidden_states`.
        indices: int32 (total,), where each packed token came from in the merged axes.
        cu_seqlens: int32 (b + 1,), where each row's tokens start in `packed`, and the end.
        max_seqlen: the largest number of tokens kept in a row, a Python integer; n, its bound,
            where the mask is traced.

    Raises:
        TypeError: the mask is neither boolean nor integer, or `total` is not an integer.
        ValueError: the shapes don't agree; `total` is `None` with a traced mask, or too small.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]], jnp.float32)[..., None]
        >>> mask = jnp.array([[True, True, False], [True, False, False]])
        >>> packed, indices, cu_seqlens, max_seqlen = unpad_input(x, mask)
        >>> packed[:, 0].tolist(), indices.tolist(), cu_seqlens.tolist(), max_seqlen
        ([1.0, 2.0, 3.0], [0, 1, 3], [0, 2, 3], 2)
        >>> bool(jnp.array_equal(pad_input(packed, indices, batch=2, seqlen=3), x))
        True
    """
    check.array("hidden_states", hidden_states)
    check.array("attention_mask", attention_mask)
    if attention_mask.dtype != bool and not jnp.issubdtype(attention_mask.dtype, jnp.integer):
        requirement = "be boolean or integer (nonzero = keep)"
        got = str(attention_mask.dtype)
        check.fail("attention_mask", requirement, got, "Compare it with 0 first.", TypeError)
    if attention_mask.ndim != 2 or hidden_states.shape[:2] != attention_mask.shape:
        requirement = "have the first two axes (batch, length) of `hidden_states`"
        got = f"{attention_mask.shape} with `hidden_states` {hidden_states.shape}"
        check.fail("attention_mask", requirement, got, "Pass one entry per token.")
    batch, length = attention_mask.shape
    mask = check.concrete(attention_mask)
    if mask is None:
        if total is None:
            advice = f"Pass a static bound on the kept tokens, such as {batch * length}."
            check.fail("total", "be given where `attention_mask` is traced", "None", advice)
        total, max_seqlen = check.whole("total", total, least=0), length
    else:
        # In NumPy: inside a jitted function even the sum of a constant would be traced.
        lengths = mask.astype(bool).sum(axis=1)
        kept, max_seqlen = int(lengths.sum()), int(lengths.max(initial=0))
        total = kept if total is None else check.whole("total", total, least=0)
        if total < kept:
            requirement = f"be at least the {kept} tokens that `attention_mask` keeps"
            advice = "Pass a larger one, or None for exactly as many."
            check.fail("total", requirement, str(total), advice)

    keep = jnp.asarray(attention_mask).astype(bool)
    lengths = keep.sum(axis=1, dtype=jnp.int32)
    cu_seqlens = jnp.append(jnp.zeros(1, jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32))
    cu_seqlens = jnp.minimum(cu_seqlens, total)
    kept_places = jnp.flatnonzero(keep, size=total, fill_value=0).astype(jnp.int32)
    # The padding's places differ from each other too: gathers and scatters may then rely on every
    # index being unique, which spares the gradient its atomic additions on a GPU.
    places = jnp.arange(total, dtype=jnp.int32)
    indices = jnp.where(places < cu_seqlens[-1], kept_places, batch * length + places)
    flat = jnp.asarray(hidden_states).reshape(batch * length, *hidden_states.shape[2:])
    packed = flat.at[indices].get(mode="fill", fill_value=0, unique_indices=True)
    return packed, indices, cu_seqlens, max_seqlen


def pad_input(
    packed: Shaped[ArrayLike, "total *features"],
    indices: Int[ArrayLike, " total"],
    batch: int,
    seqlen: int,
) -> Shaped[Array, "batch seqlen *features"]:
    """Puts packed tokens back into a padded batch; every other place is 0.

        flat[indices] = packed,        flat = the batch and length axes merged into one

    Args:
        packed: (total, ...), any dtype.
        indices: integer (total,), each token's place in the merged axes, as `unpad_input` returns
            them: no two the same. Those from `batch * seqlen` on are dropped.
        batch: how many rows the result has.
        seqlen: how long each row is.

    Returns:
        An array (batch, seqlen, ...) in the dtype of `packed`.

    Raises:
        TypeError: `indices` are not integers, or `batch` or `seqlen` is not an integer.
        ValueError: `indices` don't have one entry per packed token.

    Example:
        >>> import jax.numpy as jnp
        >>> packed = jnp.array([[5.0], [6.0]], jnp.float32)
        >>> pad_input(packed, jnp.array([0, 3], jnp.int32), batch=2, seqlen=2)[..., 0].tolist()
        [[5.0, 0.0], [0.0, 6.0]]
    """
    check.array("packed", packed)
    check.integer("indices", indices)
    if packed.ndim < 1 or indices.shape != packed.shape[:1]:
        got = f"{indices.shape} with `packed` {packed.shape}"
        advice = "Pass those of `unpad_input`."
        check.fail("indices", "have one entry for each token of `packed`", got, advice)
    batch = check.whole("batch", batch, least=0)
    seqlen = check.whole("seqlen", seqlen, least=0)
    flat = jnp.zeros((batch * seqlen, *packed.shape[1:]), packed.dtype)
    flat = flat.at[jnp.asarray(indices)].set(jnp.asarray(packed), mode="drop", unique_indices=True)
    return flat.reshape(batch, seqlen, *packed.shape[1:])


def _sequence_of_token(cu_seqlens: Int[Array, " bounds"], total: int) -> Int[Array, " total"]:
    """The sequence of each token, b for those past the end; empty sequences own none."""
    tokens = jnp.arange(total, dtype=jnp.int32)
    ends = cu_seqlens[1:]
    if not isinstance(ends.shape[0], int):  # a bisection's steps are counted when traced
        return (ends <= tokens[:, None]).sum(axis=1, dtype=jnp.int32)
    return jnp.searchsorted(ends, tokens, side="right").astype(jnp.int32)


def _check_packed(q: ArrayLike, k: ArrayLike, v: ArrayLike, *, alone: bool) -> None:
    """Ranks and token counts; heads, dimensions and dtypes are checked with those of any call."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.array(name, x)
        if x.ndim != 3:
            advice = "Pack the batch into the tokens, as `unpad_input` does."
            check.fail(name, "have shape (tokens, heads, dimension)", str(x.shape), advice)
    if alone and q.shape[0] != k.shape[0]:
        got = f"q {q.shape} and k {k.shape}"
        requirement = "have as many tokens as `q` without `cu_seqlens_k`"
        check.fail("k", requirement, got, "Pass `cu_seqlens_k`.")


def _check_cu_seqlens(name: str, value: ArrayLike, packed: str, total: int) -> None:
    """Dtype and shape, and the numbers where they are concrete."""
    advice = "Pass 0 and the cumulative sum of the lengths, such as [0, 3, 7]."
    check.integer(name, value)
    if value.ndim != 1 or not value.shape[0]:
        check.fail(name, "have shape (sequences + 1,)", str(value.shape), advice)
    starts = check.concrete(value)
    if starts is None:
        return
    starts = starts.astype(np.int64)
    if starts[0] != 0:
        check.fail(name, "start with 0", str(starts[0]), advice)
    falls = np.flatnonzero(np.diff(starts) < 0)
    if falls.size:
        at = int(falls[0]) + 1
        check.fail(name, "not decrease", f"{starts[at]} after {starts[at - 1]}", advice)
    if isinstance(total, int) and starts[-1] > total:
        requirement = f"end within the {total} tokens of `{packed}`"
        check.fail(name, requirement, str(starts[-1]), advice)


def _check_max_seqlen(
    name: str, value: int | None, starts_name: str, cu_seqlens: ArrayLike
) -> None:
    """A bound on the lengths, held against them where they are concrete."""
    if value is None:
        return
    bound = check.whole(name, value, least=0)
    starts = check.concrete(cu_seqlens)
    longest = 0 if starts is None else int(np.diff(starts.astype(np.int64)).max(initial=0))
    if bound < longest:
        requirement = f"be at least the longest sequence of `{starts_name}`, {longest}"
        check.fail(name, requirement, str(bound), f"Pass {longest}, or None.")
