"""A preallocated cache of keys and values for decoding, and attention to it.

    cache = init_cache(batch, length, kv_heads, dim)
    out, cache = cached_attention(query, key, value, cache)  # one token or many, again and again

The sizes never change, so a jitted step compiles once; with the cache donated
(`jax.jit(step, donate_argnums=...)`) it is written in place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flash_attention_jax._api.attention import dot_product_attention
from flash_attention_jax._core import check
from flash_attention_jax._core.types import ArrayLike

__all__ = ["KVCache", "append", "cached_attention", "init_cache"]

SET_BY_THE_CACHE = {
    "is_causal": "Attention to a cache is always causal.",
    "local_window_size": "Give `window` to init_cache.",
    "q_offset": "The cache counts its tokens.",
    "query_seq_lengths": "Give `lengths`, the new tokens of each sequence.",
    "key_value_seq_lengths": "Give `lengths`, the new tokens of each sequence.",
}
"""Options of `dot_product_attention` that have no place beside a cache, and what to do instead."""

IN_ORDER_OF_KEYS = ("mask", "bias", "q_segment_ids", "kv_segment_ids")
"""Options with an axis of keys, which in a ring are not in the order of the tokens."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["key", "value", "lengths"],
    meta_fields=["window"],
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of a batch of sequences; a pytree, made by `init_cache`.

    Position p of a sequence lies in slot p, or in slot p % capacity of a ring.

    Attributes:
        key: (batch, capacity, kv_heads, dim).
        value: (batch, capacity, kv_heads, v_dim).
        lengths: (batch,) int32, the tokens that each sequence has had so far. In a ring they may be
            more than the capacity.
        window: how many tokens before its own a query sees; None = all. Static.
    """

    key: Float[Array, "batch capacity kv_heads dim"]
    value: Float[Array, "batch capacity kv_heads v_dim"]
    lengths: Int[Array, " batch"]
    window: int | None = None

    @property
    def capacity(self) -> int:
        """Slots for tokens of each sequence."""
        return self.key.shape[1]

    @property
    def is_ring(self) -> bool:
        """Whether new tokens take the slots of those that left the window, without end."""
        return self.window is not None and self.capacity == self.window + 1

    def trim(self, n: int | Int[ArrayLike, " batch"]) -> KVCache:
        """Takes the last tokens of each sequence out again, as those of a draft that was refused.

        Tokens that overran inside `jit` were never stored (see `append`), and do not count.

        Args:
            n: how many, at least 0: one number, or integers (batch,). Where they are more than a
                sequence has: an error outside `jit`; inside, all of it.

        Returns:
            The cache without them; nothing is copied.

        Raises:
            TypeError: `n` is no integer.
            ValueError: the cache is a ring, or `n` is out of the range said above.

        Example:
            >>> import jax.numpy as jnp
            >>> key = jnp.ones((2, 3, 1, 4), jnp.float32)
            >>> cache = append(init_cache(2, 8, 1, 4), key, key)
            >>> cache.trim(jnp.array([0, 2])).lengths.tolist()
            [3, 1]
        """
        if self.is_ring:
            got = f"a ring of {self.capacity} slots (window={self.window})"
            advice = (
                "The last tokens lie where older ones lay, which the query before them sees: go on "
                "from the cache that you had before them, or make one without a window."
            )
            check.fail("cache", "hold every token where it is trimmed", got, advice)
        if isinstance(n, (int, np.integer)) and not isinstance(n, bool):
            n = check.whole("n", n, least=0, advice="Add tokens with append.")
            n = np.asarray(min(n, 2**31 - 1), np.int32)
        check.integer("n", n)
        shape = self.lengths.shape
        check.shape_is("n", n, [(), shape], f"() or (batch,) = {shape}", "One per sequence.")
        taken, held = check.concrete(n), check.concrete(self.lengths)
        if taken is not None and (taken.min(initial=0) < 0 or held is not None):
            wrong = (taken < 0) | (False if held is None else taken > held)
            if wrong.any():
                row = int(np.argmax(np.broadcast_to(wrong, shape)))
                got = f"{np.broadcast_to(taken, shape)[row]} in sequence {row}"
                limit = "" if held is None else f" and the {held[row]} tokens that are there"
                check.fail("n", f"be within 0{limit}", got, "It is how many tokens to take out.")
        count = jnp.maximum(jnp.asarray(n).astype(jnp.int32), 0)
        return dataclasses.replace(self, lengths=jnp.maximum(self.lengths - count, 0))


def init_cache(
    batch: int,
    length: int,
    kv_heads: int,
    dim: int,
    *,
    v_dim: int | None = None,
    window: int | None = None,
    dtype: Any = jnp.float32,
) -> KVCache:
    """An empty cache.

    Args:
        batch: sequences.
        length: tokens that each may have in all.
        kv_heads: heads of keys and values, fewer than those of the queries in grouped attention.
        dim: features of each key.
        v_dim: features of each value; None = dim.
        window: how many tokens before its own a query sees; None = all. Where that is less than
            `length - 1`, the cache is a ring of `window + 1` slots and may be filled without end.
        dtype: in which keys and values are stored, a float; it may be narrower than that of the
            tokens.

    Returns:
        A cache of `length` slots, or of `window + 1` where these are fewer.

    Raises:
        TypeError: a size is not an integer, or `dtype` no float.
        ValueError: a size is under 1, or `window` under 0.

    Example:
        >>> init_cache(2, 1000, 4, 64).key.shape
        (2, 1000, 4, 64)
        >>> init_cache(2, 1000, 4, 64, window=255).key.shape
        (2, 256, 4, 64)
    """
    sizes = {"batch": batch, "length": length, "kv_heads": kv_heads, "dim": dim}
    sizes["v_dim"] = dim if v_dim is None else v_dim
    for name, size in sizes.items():
        check.whole(name, size, least=1)
    if window is not None:
        window = check.whole("window", window, least=0, advice="Use None for all tokens.")
        length = min(length, window + 1)
    if not jnp.issubdtype(dtype, jnp.floating):
        advice = "Keys and values are stored by rounding alone."
        check.fail("dtype", "be a float", str(jnp.dtype(dtype)), advice, TypeError)
    # Two buffers even where the shapes agree: one array cannot be donated twice.
    return KVCache(
        jnp.zeros((batch, length, kv_heads, dim), dtype),
        jnp.zeros((batch, length, kv_heads, sizes["v_dim"]), dtype),
        jnp.zeros((batch,), jnp.int32),
        window,
    )


def append(
    cache: KVCache,
    key: Float[ArrayLike, "batch new kv_heads dim"],
    value: Float[ArrayLike, "batch new kv_heads v_dim"],
    lengths: Int[ArrayLike, " batch"] | None = None,
) -> KVCache:
    """Writes new tokens after those that are there.

    A cache that is no ring can overrun. Where the lengths are known (outside `jit`) that is an
    error. Inside `jit` it cannot be one: tokens from position `capacity` on are dropped, nobody
    sees them, and the length stays at `capacity`.

    Args:
        cache: the cache.
        key: (batch, new, kv_heads, dim), in the cache's dtype or a wider one, which is rounded.
        value: (batch, new, kv_heads, v_dim), the same.
        lengths: (batch,) integers of 0 .. new: how many of the new tokens each sequence really has,
            those on the left. None = all.

    Returns:
        The cache with the new tokens.

    Raises:
        TypeError: a dtype is neither that of the cache nor wider.
        ValueError: a shape does not fit the cache, or the tokens do not (outside `jit`).

    Example:
        >>> import jax.numpy as jnp
        >>> key = jnp.ones((2, 3, 1, 4), jnp.float32)
        >>> cache = append(init_cache(2, 8, 1, 4), key, key, jnp.array([3, 1]))
        >>> cache.lengths.tolist()
        [3, 1]
    """
    new = _check_tokens(cache, key, value)
    before = cache.lengths
    counts = _check_lengths(cache, lengths, new)
    _check_room(cache, counts)
    # Worked out per token: which slot it takes, and `capacity` (nowhere) for those not kept.
    index = jnp.arange(new, dtype=jnp.int32)[None]
    slots, kept = before[:, None] + index, index < counts[:, None]
    after = before + counts
    if cache.is_ring:
        kept &= index >= counts[:, None] - cache.capacity
        slots %= cache.capacity
    else:
        after = jnp.minimum(after, cache.capacity)
    slots = jnp.where(kept, slots, cache.capacity)
    rows = jnp.arange(before.size, dtype=jnp.int32)[:, None]
    return dataclasses.replace(
        cache,
        key=cache.key.at[rows, slots].set(_stored(key, cache), mode="drop"),
        value=cache.value.at[rows, slots].set(_stored(value, cache), mode="drop"),
        lengths=after,
    )


def cached_attention(
    query: Float[ArrayLike, "batch new heads dim"],
    key: Float[ArrayLike, "batch new kv_heads dim"],
    value: Float[ArrayLike, "batch new kv_heads v_dim"],
    cache: KVCache,
    *,
    lengths: Int[ArrayLike, " batch"] | None = None,
    **options: Any,
) -> tuple[Any, KVCache]:
    """Causal attention of new tokens to those in the cache and to themselves.

    In any number of calls, with any number of tokens in each, the outputs are those of one causal
    pass over the whole sequences (with `local_window_size=(window, 0)` if the cache has a window),
    to rounding.

    A step reads the slots that are filled, in time, and copies nothing as large as the cache,
    except in a ring with more than one new token or with ALiBi, where the slots are first brought
    into the order of the tokens, with a relative bias and more than one new token, and where the
    cache has a narrower dtype than the tokens and is widened for the call. Overrun is as
    `append` says: an error outside `jit`; inside, a dropped token's query sees the tokens that
    are stored, and no other.

    Args:
        query: (batch, new, heads, dim); heads a multiple of kv_heads.
        key: (batch, new, kv_heads, dim), positions already in it (rotary embedding at
            `cache.lengths` on).
        value: (batch, new, kv_heads, v_dim).
        cache: what was before.
        lengths: (batch,) integers of 0 .. new: how many of the new tokens each sequence really has,
            those on the left; the outputs of the others are 0. None = all.
        **options: keywords of `dot_product_attention`: similarity, scale, logits_soft_cap, sinks,
            alibi_slopes, implementation, ... If the cache is no ring, also mask, bias and segment
            ids, whose axis of keys has the length `capacity`. A `relative_bias` is that of a pass
            over n tokens in all, of length 2 * n - 1, with n at least `capacity`: entry j - i + n -
            1 is added at positions i and j, as in `dot_product_attention`.

    Returns:
        What `dot_product_attention` returns, (batch, new, heads, v_dim), and the cache with the new
        tokens.

    Raises:
        TypeError: as `append` and `dot_product_attention` do.
        ValueError: as those do, or an option that the cache decides.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flash_attention_jax import dot_product_attention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 10, 2, 16), jnp.float32)
        >>> whole = dot_product_attention(q, k, v, is_causal=True)
        >>> cache, parts = init_cache(1, 10, 2, 16), []
        >>> for new in (slice(0, 8), slice(8, 9), slice(9, 10)):
        ...     out, cache = cached_attention(q[:, new], k[:, new], v[:, new], cache)
        ...     parts.append(out)
        >>> bool(jnp.allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-6))
        True

    References:
        Pope et al. 2022, "Efficiently Scaling Transformer Inference", arXiv:2211.05102, section 2.
        Jiang et al. 2023, "Mistral 7B", arXiv:2310.06825, figure 2 (the ring).
    """
    for name, advice in SET_BY_THE_CACHE.items():
        if name in options:
            got = check.shown(options[name])
            check.fail(name, "be left out beside a cache", got, advice)
    after = append(cache, key, value, lengths)
    relative = _check_relative(options.pop("relative_bias", None), query, cache, options)
    if lengths is not None:
        options["query_seq_lengths"] = jnp.asarray(lengths).astype(jnp.int32)
    if cache.is_ring:
        for name in IN_ORDER_OF_KEYS:
            if options.get(name) is not None:
                got, advice = check.shown(options[name]), "Make a cache without a window."
                check.fail(name, "be None beside a ring", got, advice)
    single = query.shape[1] == 1
    if cache.is_ring and not (single and options.get("alibi_slopes") is None):
        return _attend_in_order(query, key, value, cache, relative, options), after
    if relative is not None and single:
        # For one query the diagonals are a row of biases, in the order of the slots.
        row = jnp.moveaxis(relative[:, _diagonals_of_slots(cache, relative)], 0, 1)[:, :, None]
        bias = options.get("bias")
        if bias is not None:
            wide = np.promote_types(jnp.promote_types(check.dtype_name(bias), "float32"), row.dtype)
            row = jnp.asarray(bias).astype(wide) + row.astype(wide)
        options["bias"] = row
        relative = None
    keys, values = (_widened(x, key) for x in (after.key, after.value))
    if cache.is_ring:
        # What the ring holds after the write is what the one query sees, in whatever order.
        options["key_value_seq_lengths"] = jnp.minimum(after.lengths, cache.capacity)
    else:
        options |= {
            "is_causal": True,
            "local_window_size": None if cache.window is None else (cache.window, 0),
            "q_offset": cache.lengths,
            "key_value_seq_lengths": after.lengths,
        }
    if relative is None:
        return dot_product_attention(query, keys, values, **options), after
    return _attend_one_by_one(query, keys, values, relative, options), after


def _check_relative(
    relative: Any, query: ArrayLike, cache: KVCache, options: dict[str, Any]
) -> Array | None:
    """The relative bias, (heads or 1, 2 * n - 1) with n at least the capacity.

    Beside it mask, bias and ids are cut or added to before `dot_product_attention` sees them; so
    they are checked here, with the sizes of the user's call.
    """
    if relative is None:
        return None
    check.floating("query", query)
    check.rank("query", query, (4,), "(batch, new, heads, dim)")
    check.floating("relative_bias", relative)
    (batch, new, heads), slots = query.shape[:3], cache.capacity
    for name, axes, target in (
        ("mask", "(b, h, i, j)", (batch, heads, new, slots)),
        ("bias", "(b, h, i, j)", (batch, heads, new, slots)),
        ("q_segment_ids", "(batch, length)", (batch, new)),
        ("kv_segment_ids", "(batch, length)", (batch, slots)),
    ):
        x = options.get(name)
        if x is not None:
            (check.floating if name == "bias" else check.array)(name, x)
            advice = "An axis may be 1; that of the keys is as long as the cache."
            check.broadcasts(name, x, target, axes, advice)
    shape, least = tuple(relative.shape), 2 * slots - 1
    rows = shape[:-1] in ((), (1,), (heads,))
    if not (shape and rows) or shape[-1] < least or shape[-1] % 2 == 0:
        requirement = (
            f"have shape (heads, 2 * n - 1) with heads={heads} and n at least the cache's capacity "
            f"{cache.capacity}, or without the heads"
        )
        advice = "Entry j - i + n - 1 is that of positions i and j."
        check.fail("relative_bias", requirement, f"shape {shape}", advice)
    return jnp.asarray(relative).reshape(-1, shape[-1])


def _diagonals_of_slots(cache: KVCache, relative: Array) -> Array:
    """Which entry the next token's query adds at each slot, (batch, capacity)."""
    at, slots = cache.lengths[:, None], jnp.arange(cache.capacity, dtype=jnp.int32)
    back = (at - slots) % cache.capacity if cache.is_ring else at - slots
    middle = relative.shape[-1] // 2
    return jnp.clip(middle - back, 0, 2 * middle)


def _attend_one_by_one(
    query: ArrayLike, keys: Array, values: Array, relative: Array, options: dict[str, Any]
) -> Any:
    """Attention where each sequence's first query is on a diagonal of its own, in O(n) memory.

    A relative bias is the same for all sequences of a call: so each is a call of its own, under
    `jax.vmap`.
    """
    batch, new, slots = query.shape[0], query.shape[1], keys.shape[1]
    given = {
        name: options.pop(name)
        for name in ("mask", "bias", "q_segment_ids", "kv_segment_ids", "query_seq_lengths")
        if options.get(name) is not None
    }
    lengths = {name: options.pop(name) for name in ("q_offset", "key_value_seq_lengths")}
    keys_of_dropout = None
    if options.get("dropout_key") is not None:
        # Each call would drop what the first sequence of a batch does.
        key = options.pop("dropout_key")
        check.random_key("dropout_key", key)
        folds = jnp.arange(batch, dtype=jnp.uint32)
        keys_of_dropout = jax.vmap(lambda row: jax.random.fold_in(key, row))(folds)
    for name in ("mask", "bias"):
        if name in given and given[name].ndim < 4:
            given[name] = jnp.asarray(given[name])[(None,) * (4 - given[name].ndim)]
    # Those of the whole batch have an axis for it, which a call alone has with one entry.
    owned = {name: x.shape[0] == batch > 1 for name, x in given.items()}
    shared = {name: given.pop(name) for name, own in owned.items() if not own}
    middle = relative.shape[-1] // 2
    # Entry j - i + new - 1 of a call is at positions j and q_offset + i.
    entries = jnp.arange(new + slots - 1, dtype=jnp.int32) - (new - 1) + middle

    def one(dropout_key: Any, *arrays: Any) -> Any:
        (query, keys, values), given, lengths = jax.tree.map(lambda x: jnp.asarray(x)[None], arrays)
        index = jnp.clip(entries - lengths["q_offset"], 0, 2 * middle)
        terms = {**given, **lengths, **shared, "relative_bias": relative[:, index]}
        if dropout_key is not None:
            terms["dropout_key"] = dropout_key
        out = dot_product_attention(query, keys, values, **terms, **options)
        return jax.tree.map(lambda x: x[0], out)

    return jax.vmap(one)(keys_of_dropout, (query, keys, values), given, lengths)


def _stored(x: ArrayLike, cache: KVCache) -> Array:
    """New keys or values as the cache holds them."""
    return jnp.asarray(x).astype(cache.key.dtype)


def _widened(x: Array, like: ArrayLike) -> Array:
    """What the cache holds, in the dtype of new tokens."""
    return x.astype(jax.dtypes.canonicalize_dtype(like.dtype))


def _attend_in_order(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cache: KVCache,
    relative: Array | None,
    options: dict[str, Any],
) -> Any:
    """Attention to a ring, brought into the order of its tokens, and to the new tokens after it."""
    capacity, new = cache.capacity, query.shape[1]
    # Entry j is position lengths - capacity + j, so query i, at lengths + i, is on the diagonal
    # j = i + capacity, the same for all sequences.
    slots = (cache.lengths[:, None] + jnp.arange(capacity, dtype=jnp.int32)) % capacity
    old = (jnp.take_along_axis(x, slots[..., None, None], 1) for x in (cache.key, cache.value))
    keys, values = (
        _widened(jnp.concatenate((x, _stored(y, cache)), axis=1), y)
        for x, y in zip(old, (key, value), strict=True)
    )
    if relative is not None:
        middle = relative.shape[-1] // 2
        diagonals = jnp.arange(capacity + 2 * new - 1, dtype=jnp.int32) - (new - 1) - capacity
        options["relative_bias"] = relative[:, jnp.clip(diagonals + middle, 0, 2 * middle)]
    # The entries before position 0 are a segment of their own: no mask of size new * capacity.
    entries = jnp.arange(capacity + new, dtype=jnp.int32)
    return dot_product_attention(
        query,
        keys,
        values,
        is_causal=True,
        local_window_size=(cache.window, 0),
        q_offset=capacity,
        q_segment_ids=jnp.ones((1, new), jnp.int32),
        kv_segment_ids=(entries >= capacity - cache.lengths[:, None]).astype(jnp.int32),
        **options,
    )


def _check_tokens(cache: KVCache, key: ArrayLike, value: ArrayLike) -> int:
    """That keys and values fit the cache; returns how many tokens they are."""
    for name, x, held in (("key", key, cache.key), ("value", value, cache.value)):
        check.floating(name, x)
        axes = f"(batch, new, kv_heads, dim) = {(held.shape[0], 'new', *held.shape[2:])}"
        if len(x.shape) != 4 or (x.shape[0], *x.shape[2:]) != (held.shape[0], *held.shape[2:]):
            advice = "Make the cache for these sizes with init_cache."
            check.fail(name, f"have the axes {axes} of the cache", f"{tuple(x.shape)}", advice)
        same = check.dtype_name(x) == str(held.dtype)
        if not same and jnp.dtype(check.dtype_name(x)).itemsize <= held.dtype.itemsize:
            advice = "Give `dtype` to init_cache."
            requirement = f"have the dtype of the cache, {held.dtype}, or a wider one"
            check.fail(name, requirement, check.dtype_name(x), advice, TypeError)
    if key.shape[1] != value.shape[1]:
        check.agree(("key", "value"), "length", (key, value), "Pass both of the same tokens.")
    return key.shape[1]


def _check_lengths(cache: KVCache, lengths: ArrayLike | None, new: int) -> Array:
    """The new tokens of each sequence, int32, within 0 .. new also where they cannot be seen."""
    if lengths is None:
        return jnp.full_like(cache.lengths, new)
    check.integer("lengths", lengths)
    shape = cache.lengths.shape
    check.shape_is("lengths", lengths, [shape], f"(batch,) = {shape}", "One per sequence.")
    check.lengths_within("lengths", lengths, new)
    return jnp.clip(jnp.asarray(lengths).astype(jnp.int32), 0, new)


def _check_room(cache: KVCache, counts: Array) -> None:
    """That the cache holds the new tokens, where the lengths can be seen."""
    before, added = check.concrete(cache.lengths), check.concrete(counts)
    if cache.is_ring or before is None or added is None:
        return
    worst = int(np.argmax(before + added))
    if before[worst] + added[worst] > cache.capacity:
        check.fail(
            "cache",
            f"have room for the new tokens, {cache.capacity} in all",
            f"{added[worst]} new ones after {before[worst]} in sequence {worst}",
            "Give init_cache a larger `length`, or a `window`.",
        )
