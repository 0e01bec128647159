"""The attention layer that `linen.Attention` and `nnx.Attention` share: all but where state lives.

`AttentionLayer` has the attributes, the table of parameters and the computation as a function of
parameters and cache. A shell makes the parameters, keeps the cache and draws the dropout key.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import initializers
from jaxtyping import Array, Float

from flash_attention_jax._api.attention import dot_product_attention
from flash_attention_jax._core import check
from flash_attention_jax._core.call import COSINE_SCALE
from flash_attention_jax._core.types import ArrayLike
from flash_attention_jax._flax.attention_fn import Similarity
from flash_attention_jax.cache import KVCache, cached_attention, init_cache
from flash_attention_jax.rotary import apply_rotary
from flash_attention_jax.sharding import Placement

Initializer: TypeAlias = Callable[..., Any]
"""(key, shape, dtype) -> array, as in `jax.nn.initializers`."""

NORM_EPSILON = 1e-6  # as in RMSNorm of Flax


def lecun_normal(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """`jax.nn.initializers.lecun_normal()`, which is a closure, under a name that pickle finds."""
    return initializers.lecun_normal()(key, shape, dtype)


class CallOptions(TypedDict, total=False):
    """Keyword arguments of a call of `Attention`, as its docstring says."""

    segment_ids: ArrayLike | None
    context_segment_ids: ArrayLike | None
    positions: ArrayLike | None
    lengths: ArrayLike | None
    memory_efficient: bool | None
    q_bucket_size: int | None
    k_bucket_size: int | None
    implementation: str | None


@dataclasses.dataclass(eq=False)
class AttentionLayer:
    """Multi-head attention with its projections.

        q, k, v = x @ query, c @ key, c @ value        c = context, or x where there is none
        q, k    = rotary(norm(q)), rotary(norm(k))     where asked for
        y       = concatenate_heads(attention(q, k, v)) @ out

    What attention means is as in `flash_attention_jax.flash_attention`, in the order of its terms;
    causal and windows are end-aligned: the last query sees the last key. Memory grows with the
    length and not with its square, whatever the arguments, but for `memory_efficient=False`.

    Attributes:
        dim: features of the input and of the output.
        heads: number of query heads.
        dim_head: features of each head, even where `rotary`; `None` = dim // heads.
        dropout: probability of dropping an attention weight, 0 <= rate < 1.
        causal: a token attends to itself and to those before it.
        memory_efficient: False = the dense engine, in memory that grows with the square of the
            length; True or `None` = an engine in O(n) memory.
        q_bucket_size: queries per block; `None` = the engine's own. It changes rounding, no more.
        k_bucket_size: keys per block, the same.
        kv_heads: heads of keys and values, a divisor of `heads`; `None` = heads, 1 = multi-query.
        window: how far left and right of its own place a token attends, w or (left, right), both
            inclusive; `None` or -1 = all.
        similarity: "dot" or "cosine".
        scale: factor of the similarities; `None` = 1 / sqrt(dim_head), or 10 for cosine.
        learned_scale: make the scale a parameter, one per head, that starts at `scale`.
        groups: chunks of a head that cosine similarity normalises apart, a divisor of `dim_head`.
        qk_norm: RMS normalisation of queries and keys over each head, with a learned gain per
            feature, before the rotation.
        rotary: give queries and keys their positions by rotation.
        rotary_base: base of its angles.
        rotary_scaling: what divides the positions.
        alibi: subtract slope * distance from the logits, with the paper's slope for each head.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: a learned logit per head in the denominator, at first 0.
        use_bias: biases in the projections, at first 0.
        implementation: the engine that must run it; `None` lets the library choose.
        precision: of the matrix products, as in JAX.
        dtype: dtype of the computation; `None` = the common one of the input and the parameters.
        param_dtype: dtype of the parameters.
        deterministic: no dropout. Where `dropout` is positive, say it here or in the call.
        kernel_init: initialiser of the projections, for a shape (features in, features out), as a
            function or with Flax's partitioning metadata: names of these two axes, of which that of
            (heads, dim_head) cuts the heads, or of the parameter's three.
        value_init: initialiser of the projection to values; `None` = kernel_init.
        out_init: initialiser of the output projection; `None` = kernel_init.
        placement: a mesh and its axes, over which sequences, batch and heads are cut; a cache is
            read on one device. `None` = as the arrays lie.

    References:
        Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.
        Ainslie et al. 2023, "GQA", arXiv:2305.13245 (kv_heads).
        Henry et al. 2020, "Query-Key Normalization for Transformers", arXiv:2010.04245 (cosine with
        a learned scale); Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion
        Parameters", arXiv:2302.05442 (qk_norm).
        Press et al. 2022, "Train Short, Test Long", arXiv:2108.12409, section 3 (alibi).
    """

    dim: int
    heads: int = 8
    dim_head: int | None = 64
    dropout: float = 0.0
    causal: bool = False
    memory_efficient: bool | None = None
    q_bucket_size: int | None = None
    k_bucket_size: int | None = None
    kv_heads: int | None = None
    window: int | tuple[int | None, int | None] | None = None
    similarity: Similarity = "dot"
    scale: float | None = None
    learned_scale: bool = False
    groups: int = 1
    qk_norm: bool = False
    rotary: bool = False
    rotary_base: float = 10000.0
    rotary_scaling: float = 1.0
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    use_bias: bool = False
    implementation: str | None = None
    precision: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    deterministic: bool | None = None
    kernel_init: Initializer = lecun_normal
    value_init: Initializer | None = None
    out_init: Initializer | None = None
    placement: Placement | None = None

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
            mask: nonzero = may attend, of any dtype. (batch, keys), or three or four axes that
                broadcast to (batch, heads, length, keys).
            attn_bias: float, added to the logits; broadcasts to (batch, heads, length, keys).
            decode: read `x` as the next tokens, one or many, after those in the layer's cache, and
                put them there. The sequence may be cut into calls in any way. Mask and bias have
                as many keys as the cache has slots, and are not for rings.
            deterministic: no dropout; None = as the attribute says.
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
            TypeError: a dtype or type that is never valid, or an unknown option.
            ValueError: an attribute, shape or value is not as said; `decode` without a cache, or
                beyond its end (outside `jit`; inside, as `flash_attention_jax.cache.append` says).
        """
        weights = {name: self._parameter(name, *rest) for name, rest in self._parameters().items()}
        self._check_arrays(x, context)
        dtype = self.dtype or jnp.result_type(
            x, x if context is None else context, *weights.values()
        )
        cache = self._read_cache(x.shape[0], x.shape[1], dtype) if decode else None
        self._check_inputs(context, cache, options)
        terms = self._terms(weights, options, np.promote_types(dtype, np.float32))
        if self._drops(deterministic):
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
        y, cache = self._attend(weights, x, context, cache, options, terms)
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

    def _parameters(self) -> dict[str, tuple[Initializer, tuple[int, ...]]]:
        """Name -> initialiser and shape of each parameter; checks the attributes."""
        heads, kv_heads, dim_head = self._sizes()
        check.choice("similarity", self.similarity, ("dot", "cosine"))
        check.rate("dropout", self.dropout)
        inits = {"query": self.kernel_init, "key": self.kernel_init}
        inits |= {"value": self.value_init or self.kernel_init}
        table: dict[str, tuple[Initializer, tuple[int, ...]]] = {
            f"{name}_kernel": (
                _as_matrix(init, 1),
                (self.dim, heads if name == "query" else kv_heads, dim_head),
            )
            for name, init in inits.items()
        }
        out_init = _as_matrix(self.out_init or self.kernel_init, 2)
        table["out_kernel"] = (out_init, (heads, dim_head, self.dim))
        if self.use_bias:
            table |= {
                f"{name}_bias": (initializers.zeros, table[f"{name}_kernel"][1][1:])
                for name in inits
            }
            table["out_bias"] = (initializers.zeros, (self.dim,))
        if self.qk_norm:
            table |= {f"{name}_gain": (initializers.ones, (dim_head,)) for name in ("query", "key")}
        if self.learned_scale:
            table["head_scale"] = (initializers.constant(self._first_scale()), (heads,))
        if self.sinks:
            table["sink_logits"] = (initializers.zeros, (heads,))
        return table

    def _sizes(self) -> tuple[int, int, int]:
        """Heads, key heads and features of a head."""
        dim = check.whole("dim", self.dim, least=1)
        heads = check.whole("heads", self.heads, least=1)
        kv_heads = heads if self.kv_heads is None else self.kv_heads
        check.whole("kv_heads", kv_heads, least=1, advice="Use None for as many as `heads`.")
        if heads % kv_heads:
            got = f"{heads} with kv_heads={kv_heads}"
            check.fail("heads", "be a multiple of `kv_heads`", got, "Change one of them.")
        if self.dim_head is None and dim % heads:
            got, advice = f"{dim} with heads={heads}", "Change one of them, or give `dim_head`."
            check.fail("dim", "be a multiple of `heads` where dim_head=None", got, advice)
        dim_head = dim // heads if self.dim_head is None else self.dim_head
        check.whole("dim_head", dim_head, least=1, advice="Use None for dim // heads.")
        if self.rotary and dim_head % 2:
            advice = "Rotation turns pairs of features: use an even number, or rotary=False."
            check.fail("dim_head", "be even where `rotary`", str(dim_head), advice)
        groups = check.whole("groups", self.groups, least=1)
        if dim_head % groups:
            got, advice = f"{groups} with dim_head={dim_head}", "Use a divisor of it."
            check.fail("groups", "divide `dim_head`", got, advice)
        return heads, kv_heads, dim_head

    def _first_scale(self) -> float:
        """The scale before any training."""
        if self.scale is not None:
            return check.number("scale", self.scale)
        return COSINE_SCALE if self.similarity == "cosine" else self._sizes()[2] ** -0.5

    def _left(self) -> int | None:
        """How far back a token sees, None = all the way."""
        return check.window("window", self.window)[0]

    def _empty_cache(self, batch: int, length: int, dtype: Any = None) -> KVCache:
        """A cache for this layer."""
        _, kv_heads, dim_head = self._sizes()
        # Without a `dtype`, inputs are taken to be float32: what they are is not known yet.
        dtype = dtype or self.dtype or np.promote_types(self.param_dtype, np.float32)
        return init_cache(batch, length, kv_heads, dim_head, window=self._left(), dtype=dtype)

    def _drops(self, deterministic: bool | None) -> bool:
        """Whether this call draws dropout."""
        if not self.dropout:
            return False
        decided = self.deterministic if deterministic is None else deterministic
        if decided is None:
            got = f"None with dropout={self.dropout}"
            advice = "Pass False to train and True to evaluate, to the layer or to the call."
            check.fail("deterministic", "be True or False where there is dropout", got, advice)
        return not decided

    def _attend(
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
            positions: Any = options.get("positions")
            if positions is None and self.placement is not None and cache is None:
                positions = self.placement.positions(x.shape[1])
            rotate = functools.partial(
                apply_rotary,
                offset=0 if cache is None or positions is not None else cache.lengths,
                positions=positions,
                base=self.rotary_base,
                scaling=self.rotary_scaling,
                layout="heads_last",
            )
            query, key = rotate(query), rotate(key)
        if cache is None:
            alone, lengths = context is None, options.get("lengths")
            segment_ids = options.get("segment_ids")
            attend = dot_product_attention if self.placement is None else self.placement.attend
            out = attend(
                query,
                key,
                value,
                is_causal=self.causal,
                local_window_size=self.window,
                q_offset=source.shape[1] - x.shape[1],
                q_segment_ids=segment_ids,
                kv_segment_ids=segment_ids if alone else options.get("context_segment_ids"),
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths if alone else None,
                **terms,
            )
        else:
            lengths: Any = options.get("lengths")
            # A cache that is wider than the computation is read as it is, and nothing is copied.
            stored, computed = cache.key.dtype, query.dtype
            if stored.itemsize >= computed.itemsize:
                query, key, value = (x.astype(stored) for x in (query, key, value))
            out, cache = cached_attention(query, key, value, cache, lengths=lengths, **terms)
            out = out.astype(computed)
        y = jnp.einsum("btnh,nhd->btd", out, weights["out_kernel"], precision=self.precision)
        return (y + weights["out_bias"] if self.use_bias else y), cache

    def _project(self, weights: Mapping[str, Array], name: str, x: Array) -> Array:
        """(batch, length, dim) to (batch, length, heads, dim_head)."""
        y = jnp.einsum("btd,dnh->btnh", x, weights[f"{name}_kernel"], precision=self.precision)
        return y + weights[f"{name}_bias"] if self.use_bias else y

    def _terms(
        self, weights: Mapping[str, Array], options: CallOptions, wide: Any
    ) -> dict[str, Any]:
        """The options of the attention function; what joins the logits has their dtype, `wide`."""
        chosen: dict[str, Any] = {}
        for name in ("memory_efficient", "q_bucket_size", "k_bucket_size", "implementation"):
            chosen[name] = options.get(name)
            if chosen[name] is None:
                chosen[name] = getattr(self, name)
        if chosen["memory_efficient"] is False:
            if chosen["implementation"] not in (None, "dense"):
                got = f"{chosen['implementation']!r} with memory_efficient=False"
                check.fail("implementation", "be None or 'dense'", got, "Leave one of them out.")
            chosen["implementation"] = "dense"
        terms: dict[str, Any] = {
            "similarity": self.similarity,
            "scale": weights["head_scale"].astype(wide)
            if self.learned_scale
            else self._first_scale(),
            "groups": self.groups,
            "logits_soft_cap": self.softcap,
            "block_q": chosen["q_bucket_size"],
            "block_kv": chosen["k_bucket_size"],
            "implementation": chosen["implementation"],
            "precision": self.precision,
        }
        if self.alibi:
            terms["alibi_slopes"] = jnp.asarray(_alibi_slopes(self.heads), wide)
        if self.sinks:
            terms["sinks"] = weights["sink_logits"].astype(wide)
        return terms

    def _check_arrays(self, x: ArrayLike, context: ArrayLike | None) -> None:
        """Dtypes and shapes of the inputs."""
        for name, array in (("x", x), ("context", context)):
            if array is not None:
                check.floating(name, array)
                if len(array.shape) != 3 or array.shape[-1] != self.dim:
                    requirement = f"have shape (batch, length, dim) with dim={self.dim}"
                    advice = f"Set the `dim` of this Attention to the features of `{name}`."
                    check.fail(name, requirement, f"shape {tuple(array.shape)}", advice)

    def _check_inputs(
        self, context: ArrayLike | None, cache: KVCache | None, options: CallOptions
    ) -> None:
        """Names, and arguments that exclude each other."""
        unknown = set(options) - CallOptions.__annotations__.keys()
        if unknown:
            known = ", ".join(CallOptions.__annotations__)
            raise TypeError(
                f"`Attention` got an unexpected keyword argument {min(unknown)!r}. Known: {known}."
            )
        if context is not None and self.rotary:
            advice = "Positions in two sequences are not comparable: use rotary=False here."
            check.fail("context", "be None where `rotary`", check.shown(context), advice)
        if context is None and options.get("context_segment_ids") is not None:
            got = check.shown(options.get("context_segment_ids"))
            advice = "Pass `segment_ids` alone for self-attention."
            check.fail("context_segment_ids", "be None without `context`", got, advice)
        if cache is None:
            return
        if cache.window != self._left():
            got = f"{cache.window} with window={self.window}"
            advice = "Make the cache with this layer's init_cache."
            check.fail("cache", "have the window of the layer", got, advice)
        if not self.causal:
            advice = "A cache grows by tokens that those before them do not see."
            check.fail("causal", "be True where decode=True", str(self.causal), advice)
        if context is not None:
            advice = "Keys of a context do not grow: leave decode out."
            check.fail("context", "be None where decode=True", check.shown(context), advice)
        if options.get("segment_ids") is not None:
            got = check.shown(options.get("segment_ids"))
            advice = "Give each sequence a row of the batch, with `lengths`."
            check.fail("segment_ids", "be None where decode=True", got, advice)


def no_cache(how: str) -> NoReturn:
    """Refuses to decode without a cache."""
    check.fail("decode", "find a cache where it is True", "none", f"Make one: {how}.")


def _as_matrix(init: Initializer, inputs: int) -> Initializer:
    """`init` for a matrix, whose rows are the first `inputs` axes of the shape."""

    def initialise(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        flat = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
        return _reshaped(init(key, flat, dtype), shape, inputs)

    return initialise


def _reshaped(made: Any, shape: tuple[int, ...], inputs: int) -> Any:
    """A matrix in its parameter's shape, also in a box of linen or of nnx with its partitioning."""

    def named(names: Any) -> Any:
        if names is None or isinstance(names, str) or len(names) != 2:
            return names
        # Of the axes that one axis of the matrix became, the name cuts the first.
        first, last = names
        three = (first, last, None) if inputs == 1 else (first, None, last)
        return type(names)(three) if isinstance(names, (tuple, list)) else type(names)(*three)

    if hasattr(made, "raw_value"):  # flax.nnx.VariableMetadata
        metadata = {
            name: named(x) if name in ("out_sharding", "sharding", "sharding_names") else x
            for name, x in made.metadata.items()
        }
        return dataclasses.replace(made, raw_value=made.raw_value.reshape(shape), metadata=metadata)
    # A box of linen is a pytree of one array.
    made = jax.tree.map(lambda x: x.reshape(shape), made)
    if hasattr(made, "names"):  # flax.linen.Partitioned, LogicallyPartitioned
        return dataclasses.replace(made, names=named(made.names))
    return made


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
