"""The attention layer that `linen.Attention` and `nnx.Attention` share: all but where state lives.

`AttentionLayer` computes as a function of weights and cache. A shell (linen or nnx) makes the
weights, keeps the cache and draws the dropout key, by the four methods that raise
`NotImplementedError` here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NoReturn, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flash_attention_jax._api.attention import dot_product_attention
from flash_attention_jax._core import check
from flash_attention_jax._core.types import ArrayLike
from flash_attention_jax._flax import checks
from flash_attention_jax._flax.options import Attributes, CallOptions, Initializer
from flash_attention_jax._flax.weights import weights_of
from flash_attention_jax.cache import KVCache, cached_attention, init_cache
from flash_attention_jax.rotary import apply_rotary

NORM_EPSILON = 1e-6  # as in RMSNorm of Flax


class AttentionLayer(Attributes):
    """Multi-head attention with its projections, without a place for its weights and its cache."""

    def __call__(
        self,
        x: Float[ArrayLike, "batch length dim"],
        context: Float[ArrayLike, "batch keys dim"] | None = None,
        mask: ArrayLike | None = None,
        attn_bias: ArrayLike | None = None,
        *,
        decode: bool = False,
        deterministic: bool | None = None,
        **options: Unpack[CallOptions],
    ) -> Float[Array, "batch length dim"]:
        """Attends within each sequence of the batch, or from it to its context.

        Args:
            x: (batch, length, dim), what the queries are made of.
            context: (batch, keys, dim), what keys and values are made of; None = x.
            mask: Nonzero = may attend, of any dtype. (batch, keys), or three or four axes that
                broadcast to (batch, heads, length, keys).
            attn_bias: Float, added to the logits; broadcasts to (batch, heads, length, keys).
            decode: Read `x` as the next tokens, one or many, after those in the layer's cache, and
                put them there. The sequence may be cut into calls in any way. Mask and bias have
                as many keys as the cache has slots, and are not for rings.
            deterministic: No dropout; None = as the attribute says.
            **options: keyword-only, all optional:

                * segment_ids (batch, length), context_segment_ids (batch, keys): integers; a token
                  sees the tokens of its segment only.
                * positions (length,) or (batch, length): what `rotary` turns by, instead of 0, 1...
                * lengths (batch,): tokens of each sequence, those on the left; the rest neither
                  sees nor is seen. With `decode`, those that are put into the cache.
                * memory_efficient, q_bucket_size, k_bucket_size, implementation: instead of the
                  attributes, for this call.

        Returns:
            (batch, length, dim), in the dtype computed in.

        Raises:
            TypeError: A dtype or type that is never valid, or an unknown option.
            ValueError: An attribute, shape or value is not as said; `decode` without a cache, or
                beyond its end (outside `jit`; inside, as `flash_attention_jax.cache.append` says).
        """
        # Listing the weights checks the attributes, so a bad one is named before a bad array.
        table = weights_of(self)
        weights = {name: self._parameter(name, *weight) for name, weight in table.items()}
        checks.check_arrays(self, x, context)
        dtype = self.dtype or jnp.result_type(
            x, x if context is None else context, *weights.values()
        )
        cache = self._read_cache(x.shape[0], x.shape[1], dtype) if decode else None
        checks.check_options(self, context, options)
        if cache is not None:
            checks.check_decoding(self, context, cache, options)
        # What joins the logits is as wide as they are: rounded to bfloat16, a sink would move.
        terms = self._terms(weights, options, np.promote_types(dtype, np.float32))
        if checks.draws_dropout(self, deterministic):
            terms |= {"dropout_rate": self.dropout, "dropout_key": self._dropout_key()}
        if mask is not None:
            # Flax's helpers make float masks: nonzero = may attend, as in `attention_fn`.
            seen = jnp.asarray(mask).astype(bool)
            terms["mask"] = seen[:, None, None] if seen.ndim == 2 else seen
        if attn_bias is not None:
            terms["bias"] = attn_bias
        weights = {name: weight.astype(dtype) for name, weight in weights.items()}
        x = jnp.asarray(x).astype(dtype)
        context = None if context is None else jnp.asarray(context).astype(dtype)
        y, cache = self._forward(weights, x, context, cache, options, terms)
        if cache is not None:
            self._write_cache(cache)
        return y

    # --- what a shell has to say ---

    def _parameter(self, name: str, init: Initializer, shape: tuple[int, ...]) -> Array:
        """The parameter, where there is none yet a new one."""
        raise NotImplementedError

    def _read_cache(self, batch: int, length: int, dtype: Any) -> KVCache | None:
        """The cache to decode with; None while the layer is initialised."""
        raise NotImplementedError

    def _write_cache(self, cache: KVCache) -> None:
        """Keeps the cache for the next call."""
        raise NotImplementedError

    def _dropout_key(self) -> Any:
        """A key that was not used before."""
        raise NotImplementedError

    # --- the layer ---

    def _empty_cache(self, batch: int, length: int, dtype: Any = None) -> KVCache:
        """A cache for this layer."""
        sizes = checks.sizes_of(self)
        # Without a `dtype`, inputs are taken to be float32: what they are is not known yet.
        dtype = dtype or self.dtype or np.promote_types(self.param_dtype, np.float32)
        window = checks.window_left(self)
        return init_cache(batch, length, sizes.kv_heads, sizes.dim_head, window=window, dtype=dtype)

    def _terms(
        self, weights: Mapping[str, Array], options: CallOptions, wide: Any
    ) -> dict[str, Any]:
        """The options of the attention function; what joins the logits has their dtype, `wide`."""
        tuning = checks.tuning(self, options)
        terms: dict[str, Any] = {
            "similarity": self.similarity,
            "scale": weights["head_scale"].astype(wide)
            if self.learned_scale
            else checks.first_scale(self),
            "groups": self.groups,
            "logits_soft_cap": self.softcap,
            "precision": self.precision,
            **tuning._asdict(),
        }
        if self.alibi:
            terms["alibi_slopes"] = jnp.asarray(_alibi_slopes(self.heads), wide)
        if self.sinks:
            terms["sinks"] = weights["sink_logits"].astype(wide)
        return terms

    def _forward(
        self,
        weights: Mapping[str, Array],
        x: Array,
        context: Array | None,
        cache: KVCache | None,
        options: CallOptions,
        terms: dict[str, Any],
    ) -> tuple[Float[Array, "batch length dim"], KVCache | None]:
        """The layer as a function of its parameters: the output, and the cache with `x` in it."""
        source = x if context is None else context
        query = self._project(weights, "query", x)
        key, value = (self._project(weights, name, source) for name in ("key", "value"))
        if self.qk_norm:
            query = _rms_norm(query, weights["query_gain"])
            key = _rms_norm(key, weights["key_gain"])
        if self.rotary:
            query, key = self._rotate(query, key, cache, options.get("positions"))
        if cache is None:
            out = self._attend_to_tokens(query, key, value, context is None, options, terms)
        else:
            lengths = options.get("lengths")
            out, cache = _attend_to_cache(query, key, value, cache, lengths, terms)
        y = jnp.einsum("btnh,nhd->btd", out, weights["out_kernel"], precision=self.precision)
        return (y + weights["out_bias"] if self.use_bias else y), cache

    def _project(self, weights: Mapping[str, Array], name: str, x: Array) -> Array:
        """(batch, length, dim) to (batch, length, heads, dim_head)."""
        y = jnp.einsum("btd,dnh->btnh", x, weights[f"{name}_kernel"], precision=self.precision)
        return y + weights[f"{name}_bias"] if self.use_bias else y

    def _rotate(
        self, query: Array, key: Array, cache: KVCache | None, positions: Any
    ) -> tuple[Array, Array]:
        """Queries and keys turned by their positions; `positions` replaces 0, 1, 2, ..."""
        # In zigzag order on a mesh, the place of a token in the array is not its position.
        if positions is None and self.placement is not None and cache is None:
            positions = self.placement.positions(query.shape[1])
        rotate = functools.partial(
            apply_rotary,
            # New tokens follow those in the cache, of which each sequence may have another number.
            offset=0 if cache is None or positions is not None else cache.lengths,
            positions=positions,
            base=self.rotary_base,
            scaling=self.rotary_scaling,
            layout="heads_last",
        )
        return rotate(query), rotate(key)

    def _attend_to_tokens(
        self,
        query: Array,
        key: Array,
        value: Array,
        to_itself: bool,
        options: CallOptions,
        terms: dict[str, Any],
    ) -> Array:
        """Attention to all keys of this call: those of `x` itself, or those of a context."""
        lengths, segment_ids = options.get("lengths"), options.get("segment_ids")
        attend = dot_product_attention if self.placement is None else self.placement.attend
        return attend(
            query,
            key,
            value,
            is_causal=self.causal,
            local_window_size=self.window,
            # `dot_product_attention` is start-aligned as JAX's is, and the layer end-aligned.
            q_offset=key.shape[1] - query.shape[1],
            q_segment_ids=segment_ids,
            kv_segment_ids=segment_ids if to_itself else options.get("context_segment_ids"),
            query_seq_lengths=lengths,
            # `lengths` count the tokens of `x`; a context is hidden by a mask or its segments.
            key_value_seq_lengths=lengths if to_itself else None,
            **terms,
        )


def no_cache(how: str) -> NoReturn:
    """Refuses to decode without a cache."""
    check.fail("decode", "find a cache where it is True", "none", f"Make one: {how}.")


def _attend_to_cache(
    query: Array, key: Array, value: Array, cache: KVCache, lengths: Any, terms: dict[str, Any]
) -> tuple[Array, KVCache]:
    """Attention to the cache with the new keys and values in it; the output, and that cache."""
    # A cache that is wider than the computation is read as it is, and nothing is copied.
    stored, computed = cache.key.dtype, query.dtype
    if stored.itemsize >= computed.itemsize:
        query, key, value = (x.astype(stored) for x in (query, key, value))
    out, cache = cached_attention(query, key, value, cache, lengths=lengths, **terms)
    return out.astype(computed), cache


def _rms_norm(x: Array, gain: Array) -> Array:
    """The last axis over its root mean square, times gain; in float32 at least."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + NORM_EPSILON)).astype(x.dtype) * gain


def _alibi_slopes(heads: int) -> np.ndarray:
    """Powers of 2**(-8 / heads); for other numbers of heads than powers of two, the authors' mix.

    That is the slopes for the next lower power of two, and then every second one of those for the
    next higher.
    """
    lower = 2 ** int(math.log2(heads))
    exponents = [-8 * (n + 1) / lower for n in range(lower)]
    exponents += [-4 * (2 * n + 1) / lower for n in range(heads - lower)]
    return 2.0 ** np.asarray(exponents)
