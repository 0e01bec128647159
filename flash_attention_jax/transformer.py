"""Two small causal transformers over tokens, in Flax linen, and text generation with a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from flash_attention_jax._core import check
from flash_attention_jax._core.optional import needs
from flash_attention_jax._flax.layer import no_cache

with needs("flash_attention_jax.transformer", "flax", extra="train"):
    from flax import linen as nn

    from flash_attention_jax.linen import Attention, Similarity
    from flash_attention_jax.sharding import Placement

__all__ = ["CausalTransformer", "CosineSimCausalTransformer", "generate"]


class _Generates:
    """What both models can do apart from reading tokens; they name their layers' attention."""

    depth: int

    def _attention(self) -> dict[str, Any]:
        """The attributes of the attention of each layer."""
        raise NotImplementedError

    def _room(self) -> int | None:
        """The most tokens of one sequence, None = any number."""
        return None

    def init_cache(self, batch: int, length: int) -> dict[str, Any]:
        """An empty "cache" collection, for calls with `decode=True`.

        Args:
            batch: sequences.
            length: tokens that each may have in all.

        Returns:
            What goes into the variables as "cache".
        """
        room = self._room()
        if room is not None and length > room:
            advice = "That is how many positions there are: build a model with more."
            check.fail("length", f"be at most max_seq_len={room}", str(length), advice)
        # Without a parent, because a model may be asked inside another.
        attention = Attention(**self._attention(), parent=None)
        layers: dict[str, Any] = {
            f"attention_{layer}": attention.init_cache(batch, length) for layer in range(self.depth)
        }
        if room is not None:
            layers["lengths"] = jnp.zeros((batch,), jnp.int32)
        return layers

    def generate(
        self,
        params: PyTree,
        prompt: Int[Array | np.ndarray, "batch prompt"],
        length: int,
        *,
        key: Key[Array, ""],
        **options: Any,
    ) -> Int[Array, "batch length"]:
        """`flash_attention_jax.transformer.generate` with this model.

        Args:
            params: the variables that `init` returned.
            prompt: (batch, prompt) integers.
            length: how many tokens to draw.
            key: draws the tokens.
            **options: lengths, window, temperature, top_k, top_p, stop_token.

        Returns:
            The drawn tokens without the prompt, (batch, length), int32.

        Raises:
            TypeError: as `generate` does.
            ValueError: as `generate` does.
        """
        return generate(self, params, prompt, length, key=key, **options)


class CausalTransformer(_Generates, nn.Module):
    """A pre-norm decoder: what follows each token, from the tokens up to it.

        x = embed(tokens)
        x = x + attention(norm(x));   x = x + feed_forward(norm(x))        `depth` times
        logits = norm(x) @ readout

    Positions enter by rotary embedding alone, so any length can be read, and no projection has a
    bias. The residual stream `x` and the logits stay in float32 whatever `dtype` says: sums of many
    small terms are where low precision hurts.

    Attributes:
        dim: features of the residual stream.
        depth: number of layers.
        heads: attention heads in each layer.
        dim_head: features of each head, even.
        num_tokens: size of the vocabulary; 256 reads bytes.
        similarity: "dot" or "cosine" attention.
        implementation: the attention engine; `None` lets the library choose.
        dtype: dtype of attention and feed-forward layers. Parameters are float32.
        kv_heads: heads of keys and values, a divisor of `heads`; `None` = heads.
        window: how many tokens before its own one layer sees; `None` = all.
        swiglu: gate the feed-forward layers, (silu(x @ gate) * (x @ expand)) @ contract, with two
            thirds of the hidden features, instead of gelu(x @ expand) @ contract.
        placement: the mesh on which attention runs, as in `Attention`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = CausalTransformer(dim=32, depth=2, heads=2, dim_head=16)
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> logits, params = model.init_with_output(jax.random.key(0), tokens)
        >>> logits.shape, logits.dtype.name
        ((1, 8, 256), 'float32')

    References:
        Shazeer 2020, "GLU Variants Improve Transformer", arXiv:2002.05202, equation 6 (swiglu).
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3 (the
        smaller initial weights at the end of each branch).
    """

    dim: int
    depth: int
    heads: int
    dim_head: int = 64
    num_tokens: int = 256
    similarity: Similarity = "dot"
    implementation: str | None = None
    dtype: Any = jnp.float32
    kv_heads: int | None = None
    window: int | None = None
    swiglu: bool = False
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch length"],
        *,
        decode: bool = False,
        lengths: Int[Array | np.ndarray, " batch"] | None = None,
    ) -> Float[Array, "batch length num_tokens"]:
        """Reads tokens.

        Args:
            tokens: (batch, length), integers in [0, num_tokens). Where their values cannot be seen
                (inside `jit`) one that is out of range gives NaN logits.
            decode: read them after those in the collection "cache", and put them there
                (`mutable="cache"`).
            lengths: (batch,) integers, how many tokens of each sequence are real, those on the
                left; None = all. The logits after the others mean nothing.

        Returns:
            Logits of the token after each, (batch, length, num_tokens), float32.

        Raises:
            TypeError: `tokens` are not an array of integers.
            ValueError: a token is out of range (outside `jit`), or `decode` without a cache.
        """
        tokens = _read_tokens(tokens, lengths, self.num_tokens)
        norm = functools.partial(nn.RMSNorm, dtype=jnp.float32, param_dtype=jnp.float32)

        def attend(x: Array, layer: int) -> Array:
            attention = Attention(**self._attention(), name=f"attention_{layer}")
            return attention(x, decode=decode, lengths=lengths)

        def feed(x: Array, layer: int) -> Array:
            init = self._last_init()
            return _feed_forward(x, layer, LECUN_NORMAL, init, self.dtype, gated=self.swiglu)

        x = _embed(self.num_tokens, self.dim, "embed")(tokens)
        x = _layers(x, self.depth, norm, attend, feed, pre_norm=True)
        return _readout(self.num_tokens)(norm(name="norm")(x))

    @nn.nowrap
    def _attention(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "heads": self.heads,
            "dim_head": self.dim_head,
            "kv_heads": self.kv_heads,
            "causal": True,
            "window": self.window,
            "similarity": self.similarity,
            "rotary": True,
            "implementation": self.implementation,
            "dtype": self.dtype,
            "out_init": self._last_init(),
            "placement": self.placement,
        }

    @nn.nowrap
    def _last_init(self) -> Any:
        # Each layer adds two terms to the stream; drawn this much smaller, their sum starts with
        # the variance of one.
        return nn.initializers.variance_scaling(1 / (2 * self.depth), "fan_in", "truncated_normal")


class CosineSimCausalTransformer(_Generates, nn.Module):
    """The decoder of flash-cosine-sim-attention: cosine similarity, post-norm, learned positions.

        x = embed(tokens) + positions
        x = norm(r * x + attention(x));   x = norm(r * x + feed_forward(x))        `depth` times
        logits = x @ readout

    Deep post-norm trains with r = (2 * depth) ** 0.25 and with values, output projections and
    feed-forward weights drawn smaller by (8 * depth) ** -0.25. With `pre_norm` both are 1,
    and the norms are where `CausalTransformer` has them. No projection has a bias; the residual
    stream and the logits are float32.

    Attributes:
        num_tokens: size of the vocabulary.
        dim: features of the residual stream.
        max_seq_len: how many positions there are: the longest sequence.
        depth: number of layers.
        attn_scale: factor of the cosine similarities.
        attn_l2norm_groups: chunks of a head that are normalised apart, a divisor of `dim_head`.
        heads: attention heads in each layer.
        dim_head: features of each head.
        pre_norm: normalise what a layer reads, instead of its result.
        non_cosine_sim_attn: attention by dot product, with scale 1 / sqrt(dim_head).
        implementation: the attention engine; `None` lets the library choose.
        dtype: dtype of attention and feed-forward layers. Parameters are float32.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = CosineSimCausalTransformer(
        ...     num_tokens=256, dim=32, max_seq_len=64, depth=2, heads=2, dim_head=16
        ... )
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> params = model.init(jax.random.key(0), tokens)
        >>> model.generate(params, tokens, 5, key=jax.random.key(1)).shape
        (1, 5)

    References:
        Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers", arXiv:2203.00555, figure
        2 (decoder only).
    """

    num_tokens: int
    dim: int
    max_seq_len: int
    depth: int
    attn_scale: float = 8.0
    attn_l2norm_groups: int = 1
    heads: int = 8
    dim_head: int = 64
    pre_norm: bool = False
    non_cosine_sim_attn: bool = False
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch length"],
        *,
        decode: bool = False,
        lengths: Int[Array | np.ndarray, " batch"] | None = None,
    ) -> Float[Array, "batch length num_tokens"]:
        """Reads tokens.

        Args:
            tokens: as in `CausalTransformer`; length at most `max_seq_len`.
            decode: as in `CausalTransformer`.
            lengths: as in `CausalTransformer`.

        Returns:
            Logits of the token after each, (batch, length, num_tokens), float32.

        Raises:
            TypeError: as `CausalTransformer` does.
            ValueError: as `CausalTransformer` does, or more tokens than positions.
        """
        tokens = _read_tokens(tokens, lengths, self.num_tokens)
        if tokens.shape[1] > self.max_seq_len:
            requirement = f"have at most max_seq_len={self.max_seq_len} tokens in a sequence"
            advice = "Cut them, or build a model with more positions."
            check.fail("tokens", requirement, f"shape {tuple(tokens.shape)}", advice)
        norm = functools.partial(nn.LayerNorm, dtype=jnp.float32, param_dtype=jnp.float32)

        def attend(x: Array, layer: int) -> Array:
            attention = Attention(**self._attention(), name=f"attention_{layer}")
            return attention(x, decode=decode, lengths=lengths)

        def feed(x: Array, layer: int) -> Array:
            init = self._init(self._gain())
            return _feed_forward(x, layer, init, init, self.dtype)

        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        if decode:
            positions = self._take_positions(tokens, lengths)[:, None] + positions
        x = _embed(self.num_tokens, self.dim, "embed")(tokens)
        x = x + _embed(self.max_seq_len, self.dim, "positions")(positions)
        residual = 1.0 if self.pre_norm else (2 * self.depth) ** 0.25
        x = _layers(x, self.depth, norm, attend, feed, pre_norm=self.pre_norm, residual=residual)
        return _readout(self.num_tokens)(norm(name="norm")(x) if self.pre_norm else x)

    def _take_positions(self, tokens: Array | np.ndarray, lengths: Any) -> Array:
        """Where the first of the new tokens stands in each sequence; they are counted now."""
        batch, new = tokens.shape
        if not (self.is_initializing() or self.has_variable("cache", "lengths")):
            no_cache('pass {**params, "cache": model.init_cache(batch, length)} to apply')
        taken = self.variable("cache", "lengths", jnp.zeros, (batch,), jnp.int32)
        first = taken.value
        if not self.is_initializing() and self.is_mutable_collection("cache"):
            added = new if lengths is None else jnp.asarray(lengths).astype(jnp.int32)
            taken.value = jnp.minimum(first + added, self.max_seq_len)
        return first

    @nn.nowrap
    def _room(self) -> int:
        return self.max_seq_len

    @nn.nowrap
    def generate(
        self,
        params: PyTree,
        prompt: Int[Array | np.ndarray, "batch prompt"],
        length: int,
        *,
        key: Key[Array, ""],
        filter_thres: float = 0.9,
        **options: Any,
    ) -> Int[Array, "batch length"]:
        """`flash_attention_jax.transformer.generate` with this model.

        Args:
            params: the variables that `init` returned.
            prompt: (batch, prompt) integers.
            length: how many tokens to draw.
            key: draws the tokens.
            filter_thres: share of the vocabulary, the least likely tokens, that is not drawn; in
                [0, 1). Without effect where `top_k` is given.
            **options: lengths, window, temperature, top_k, top_p, stop_token.

        Returns:
            The drawn tokens without the prompt, (batch, length), int32. Beyond `max_seq_len` each
            is drawn from the last `max_seq_len` tokens.

        Raises:
            TypeError: as `generate` does.
            ValueError: as `generate` does.
        """
        check.rate("filter_thres", filter_thres)
        options.setdefault("top_k", max(1, int((1 - filter_thres) * self.num_tokens)))
        return generate(self, params, prompt, length, key=key, **options)

    @nn.nowrap
    def _attention(self) -> dict[str, Any]:
        return {
            "dim": self.dim,
            "heads": self.heads,
            "dim_head": self.dim_head,
            "causal": True,
            "similarity": "dot" if self.non_cosine_sim_attn else "cosine",
            "scale": None if self.non_cosine_sim_attn else self.attn_scale,
            "groups": 1 if self.non_cosine_sim_attn else self.attn_l2norm_groups,
            "implementation": self.implementation,
            "dtype": self.dtype,
            "kernel_init": self._init(1.0),
            "value_init": self._init(self._gain()),
            "out_init": self._init(self._gain()),
        }

    @nn.nowrap
    def _gain(self) -> float:
        return 1.0 if self.pre_norm else (8 * self.depth) ** -0.25

    @nn.nowrap
    def _init(self, gain: float) -> Any:
        return nn.initializers.variance_scaling(gain**2, "fan_avg", "normal")


LECUN_NORMAL = nn.initializers.lecun_normal()


def _layers(
    x: Array,
    depth: int,
    norm: Callable[..., Callable[[Array], Array]],
    attend: Callable[[Array, int], Array],
    feed: Callable[[Array, int], Array],
    *,
    pre_norm: bool,
    residual: float = 1.0,
) -> Array:
    """The residual stream through `depth` pairs of attention and feed-forward."""
    for layer in range(depth):
        for part, name in ((attend, f"attention_norm_{layer}"), (feed, f"norm_{layer}")):
            normalise = norm(name=name)
            if pre_norm:
                x = residual * x + part(normalise(x), layer).astype(jnp.float32)
            else:
                x = normalise(residual * x + part(x, layer).astype(jnp.float32))
    return x


def _feed_forward(
    x: Array, layer: int, first: Any, last: Any, dtype: Any, *, gated: bool = False
) -> Array:
    """Two projections about a nonlinearity; three if gated, with as many weights in all."""
    dim = x.shape[-1]
    hidden = 8 * dim // 3 if gated else 4 * dim
    dense = functools.partial(nn.Dense, use_bias=False, dtype=dtype, param_dtype=jnp.float32)
    expanded = dense(hidden, kernel_init=first, name=f"expand_{layer}")(x)
    if gated:
        expanded = nn.silu(dense(hidden, kernel_init=first, name=f"gate_{layer}")(x)) * expanded
    else:
        expanded = nn.gelu(expanded)
    return dense(dim, kernel_init=last, name=f"contract_{layer}")(expanded)


def _check_tokens(name: str, tokens: Any, lengths: Any, num_tokens: int | None) -> None:
    """That the real tokens are integers in [0, num_tokens), where their values can be seen."""
    check.integer(name, tokens)
    check.rank(name, tokens, (2,), "(batch, length)")
    if lengths is not None:
        check.integer("lengths", lengths)
        shape, advice = (tokens.shape[0],), "Pass one length per sequence."
        check.shape_is("lengths", lengths, {shape}, f"(batch,) = {shape}", advice)
    values = check.concrete(tokens)
    known = None if lengths is None else check.concrete(lengths)
    if values is None or (lengths is not None and known is None):
        return
    if known is not None:
        values = values[np.arange(values.shape[1]) < known[:, None]]
    if not values.size:
        return
    low, high = int(values.min()), int(values.max())
    if num_tokens is None:
        check.fits_int32(name, values, "Look at the tokenizer.")
    if low < 0 or (num_tokens is not None and high >= num_tokens):
        least = "hold tokens of at least 0" if num_tokens is None else ""
        requirement = least or f"hold tokens in [0, num_tokens={num_tokens})"
        advice = "Look at the tokenizer, or mark what pads a sequence by `lengths`."
        check.fail(name, requirement, str(low if low < 0 else high), advice)


def _read_tokens(tokens: Array | np.ndarray, lengths: Any, num_tokens: int) -> Array:
    """The tokens, checked; under a trace, those out of range become one whose embedding is NaN.

    A table would read -1 as its last row, and the numbers would look right. Tokens beyond `lengths`
    become 0: their NaN would reach the gradients of the weights.
    """
    _check_tokens("tokens", tokens, lengths, num_tokens)
    ids = jnp.asarray(tokens).astype(jnp.int32)  # a byte could not say `num_tokens`
    ids = jnp.where(ids < 0, jnp.int32(num_tokens), ids)
    if lengths is None:
        return ids
    real = jnp.arange(ids.shape[1], dtype=jnp.int32) < jnp.asarray(lengths)[:, None]
    return jnp.where(real, ids, jnp.zeros((), ids.dtype))


def _embed(number: int, dim: int, name: str) -> nn.Embed:
    """A table of vectors of unit variance."""
    init, kind = nn.initializers.normal(1.0), jnp.float32
    return nn.Embed(number, dim, dtype=kind, param_dtype=kind, embedding_init=init, name=name)


def _readout(num_tokens: int) -> nn.Dense:
    """From the residual stream to logits."""
    kind = jnp.float32
    return nn.Dense(num_tokens, use_bias=False, dtype=kind, param_dtype=kind, name="readout")


def generate(
    model: Any,
    params: PyTree,
    prompt: Int[Array | np.ndarray, "batch prompt"],
    length: int,
    *,
    key: Key[Array, ""],
    lengths: Int[Array | np.ndarray, " batch"] | None = None,
    window: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_token: int | None = None,
) -> Int[Array, "batch length"]:
    """Draws `length` further tokens, one at a time, each from the model's distribution.

        token ~ top_p(softmax(top_k(logits) / temperature))

    One `jax.lax.while_loop` under one `jax.jit`, which compiles once for each pair of lengths; it
    ends early when every sequence has drawn `stop_token`. A model with `init_cache` reads every
    token once, with the cache inside the loop. Another model, or one with fewer positions than
    tokens (`max_seq_len`), or any with `window`, reads the last `window` tokens anew for each token
    drawn: time `length` passes over `window` tokens, and no memory beyond one such pass.

    Args:
        model: maps tokens (batch, n) to logits (batch, n, num_tokens), causally; hashable.
        params: what `model.apply` takes as its first argument.
        prompt: the tokens to go on from, (batch, prompt), at least one; integers in [0,
            num_tokens), where the model has that attribute.
        length: how many tokens to draw, at least 1.
        key: draws the tokens.
        lengths: (batch,) integers of 1 .. prompt: how many tokens of each prompt are real, those on
            the left; each sequence goes on from its own last one. None = all. A model with
            `init_cache` must take `lengths`, as those here do.
        window: how many tokens the model reads, at least 1. `None` means all of them, or as many as
            it has positions for.
        temperature: below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest.
        top_k: draw among the `top_k` likeliest tokens, of equally likely ones the first. `None`
            means among all.
        top_p: draw among the fewest likeliest tokens whose probabilities reach `top_p` together,
            in (0, 1], of equally likely ones the first. `None` means among all.
        stop_token: the token that ends a sequence; what follows it in the result is `stop_token`
            again. `None` means that none does.

    Returns:
        The drawn tokens without the prompt, (batch, length), int32. Inside another `jit` a sequence
        for which the model gives NaN, or no token at all, goes on with -1; outside that is an
        error.

    Raises:
        TypeError: a number, `prompt` or `key` is of the wrong type.
        ValueError: an argument is out of the range said above, or the model gave NaN.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = CausalTransformer(dim=32, depth=1, heads=2, dim_head=16)
        >>> prompt = jnp.asarray([list(b"def ")], jnp.int32)
        >>> params = model.init(jax.random.key(0), prompt)
        >>> generate(model, params, prompt, 5, key=jax.random.key(1), top_k=10).shape
        (1, 5)

    References:
        Fan et al. 2018, "Hierarchical Neural Story Generation", arXiv:1805.04833, section 5
        (top_k).
        Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", arXiv:1904.09751,
        section 3.1 (top_p).
    """
    num_tokens = getattr(model, "num_tokens", None)
    check.integer("prompt", prompt)
    if len(prompt.shape) != 2 or not prompt.shape[1]:
        raise ValueError(
            f"`prompt` must have shape (batch, n) with n at least 1, got {tuple(prompt.shape)}. "
            "Start from one token at least."
        )
    if lengths is not None:
        lengths = _check_lengths(lengths, *prompt.shape)
    _check_tokens("prompt", prompt, lengths, num_tokens)
    _check_key(key)
    for name, value, least in (("length", length, 1), ("window", window, 1), ("top_k", top_k, 1)):
        if value is not None:
            check.whole(name, value, least=least, advice="Pass more.")
    temperature, top_p = _scalar(temperature), _scalar(top_p)
    if not check.number("temperature", temperature) >= 0.0:
        raise ValueError(f"`temperature` must not be negative, got {temperature}. Pass 0 or more.")
    if top_p is not None and not 0.0 < check.number("top_p", top_p) <= 1.0:
        check.fail("top_p", "be in (0, 1]", str(top_p), "None draws among all tokens.")
    if stop_token is not None:
        check.whole("stop_token", stop_token, least=0, advice="Use None for none.")
        if num_tokens is not None and stop_token >= num_tokens:
            advice = "It would never be drawn: use None for none."
            check.fail("stop_token", f"be under num_tokens={num_tokens}", str(stop_token), advice)
    whole = prompt.shape[1] + length
    room = getattr(model, "max_seq_len", None)
    bounds = [size for size in (window, room) if size is not None and size < whole]
    tokens, failed = _generate(
        model,
        top_k,
        min(bounds, default=None if hasattr(model, "init_cache") else whole),
        params,
        jnp.asarray(prompt).astype(jnp.int32),
        lengths,
        jax.random.split(key, length),
        jnp.float32(temperature),
        None if top_p is None else jnp.float32(top_p),
        None if stop_token is None else jnp.int32(stop_token),
    )
    steps = check.concrete(failed)
    if steps is not None and (steps < length).any():
        row = int(np.argmin(steps))
        advice = "Look for NaN in `params`, and for logits that are -inf for every token."
        got = f"NaN, or no token to draw, at drawn token {steps[row]} of sequence {row}"
        check.fail("model", "give logits that can be drawn from", got, advice)
    return tokens


def _check_lengths(lengths: Any, batch: int, longest: int) -> Array:
    """How many tokens of each prompt are real, int32, within 1 .. longest also under a trace."""
    check.integer("lengths", lengths)
    check.shape_is("lengths", lengths, [(batch,)], f"(batch,) = {(batch,)}", "One per prompt.")
    values = check.concrete(lengths)
    if values is not None and values.size and (values.min() < 1 or values.max() > longest):
        worst = int(values.min() if values.min() < 1 else values.max())
        requirement = f"be within 1 and the prompt's length {longest}"
        check.fail("lengths", requirement, str(worst), "Every prompt needs a token to go on from.")
    return jnp.clip(jnp.asarray(lengths), 1, longest).astype(jnp.int32)


def _check_key(key: Any) -> None:
    """That it is one JAX random key."""
    advice = "Pass jax.random.key(seed)."
    check.array("key", key, advice)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()
    if not typed and not (key.dtype == jnp.uint32 and tuple(key.shape) in ((2,), (4,))):
        check.fail("key", "be one JAX random key", check.shown(key), advice, TypeError)


def _scalar(x: Any) -> Any:
    """The number in an array without axes, where it can be seen; anything else as it is."""
    values = check.concrete(x)
    return x if values is None or values.shape else values[()]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _generate(
    model: Any,
    top_k: int | None,
    width: int | None,
    params: PyTree,
    prompt: Int[Array, "batch prompt"],
    lengths: Int[Array, " batch"] | None,
    keys: Key[Array, " length"],
    temperature: Float[Array, ""],
    top_p: Float[Array, ""] | None,
    stop: Int[Array, ""] | None,
) -> tuple[Int[Array, "batch length"], Int[Array, " batch"]]:
    """The loop of `generate`; a `width` is how many tokens to reread, None = use a cache.

    Returns the tokens, and for each sequence at which of them the model failed, or `length`.
    """
    batch, length = prompt.shape[0], keys.size
    if width is None:
        state, read = _cached_reader(model, params, prompt, lengths, length)
    else:
        state, read = _rereader(model, params, prompt, lengths, width)
    if lengths is None:
        last = prompt[:, -1]
    else:
        last = jnp.take_along_axis(prompt, lengths[:, None] - 1, axis=1)[:, 0]
    filler = jnp.zeros((), jnp.int32) if stop is None else stop

    def unfinished(carry: tuple[Any, ...]) -> Array:
        step, _, _, _, done, _ = carry
        return (step < length) & ~done.all()

    def draw(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        step, state, last, tokens, done, failed = carry
        logits, state = read(state, last)
        token, fails = _draw(logits, keys[step], temperature, top_k, top_p)
        fails &= ~done
        failed = jnp.where(fails, step, failed)
        done |= fails
        token = jnp.where(done, filler, token)
        done = done if stop is None else done | (token == stop)
        return step + 1, state, token, tokens.at[:, step].set(token), done, failed

    tokens = jnp.full((batch, length), filler)
    done, failed = jnp.zeros((batch,), bool), jnp.full((batch,), length, jnp.int32)
    carry = (jnp.zeros((), jnp.int32), state, last, tokens, done, failed)
    _, _, _, tokens, _, failed = jax.lax.while_loop(unfinished, draw, carry)
    drawn = jnp.arange(length, dtype=jnp.int32) < failed[:, None]
    return jnp.where(drawn, tokens, jnp.full((), -1, jnp.int32)), failed


Read = Callable[[Any, Array], tuple[Array, Any]]
"""(state, token (batch,)) -> logits after it (batch, num_tokens), the state with it."""


def _cached_reader(
    model: Any, params: PyTree, prompt: Array, lengths: Array | None, length: int
) -> tuple[Any, Read]:
    """Reads each token once; the state is the cache."""

    def apply(cache: Any, tokens: Array, **options: Any) -> tuple[Array, Any]:
        variables = {**params, "cache": cache}
        logits, changed = model.apply(variables, tokens, decode=True, mutable="cache", **options)
        return logits[:, -1], changed["cache"]

    # The last token drawn is not read.
    cache = model.init_cache(prompt.shape[0], prompt.shape[1] + length - 1)
    if prompt.shape[1] > 1:
        options = {} if lengths is None else {"lengths": lengths - 1}
        cache = apply(cache, prompt[:, :-1], **options)[1]
    return cache, lambda cache, token: apply(cache, token[:, None])


def _rereader(
    model: Any, params: PyTree, prompt: Array, lengths: Array | None, width: int
) -> tuple[Any, Read]:
    """Reads the last `width` tokens each time; the state is those, and how many there are."""
    batch, longest = prompt.shape
    before = jnp.full((batch,), longest - 1, jnp.int32) if lengths is None else lengths - 1
    filled = jnp.minimum(before, width)
    rows, places = jnp.arange(batch, dtype=jnp.int32), jnp.arange(width, dtype=jnp.int32)
    taken = jnp.minimum((before - filled)[:, None] + places, longest - 1)
    buffer = jnp.take_along_axis(prompt, taken, axis=1)
    # What pads a row is never seen, but must be a token.
    buffer = jnp.where(places < filled[:, None], buffer, jnp.zeros((), jnp.int32))

    def read(state: tuple[Array, Array], token: Array) -> tuple[Array, tuple[Array, Array]]:
        buffer, filled = state
        # A full window lets go of its oldest token.
        full = filled == width
        buffer = jnp.where(full[:, None], jnp.roll(buffer, -1, axis=1), buffer)
        last = jnp.where(full, width - 1, filled)
        buffer = buffer.at[rows, last].set(token)
        # What lies after the last token is never seen: the model is causal.
        return model.apply(params, buffer)[rows, last], (buffer, last + 1)

    return (buffer, filled), read


def _draw(
    logits: Array, key: Array, temperature: Array, top_k: int | None, top_p: Array | None
) -> tuple[Int[Array, " batch"], Array]:
    """One token for each row of logits, and whether there was none to draw.

    Tokens are cut by their rank and not by their logit, so that equal ones widen nothing.
    """
    logits = logits.astype(jnp.float32)
    largest = logits.max(axis=-1, keepdims=True)
    fails = jnp.isnan(logits).any(axis=-1) | (largest[:, 0] == -jnp.inf)
    likeliest = jnp.argmax(logits, -1)
    # Of 0 at most, so that a small temperature cannot overflow.
    logits = jnp.where(logits == largest, jnp.zeros((), jnp.float32), logits - largest)
    logits = logits / jnp.maximum(temperature, 1e-6)
    count = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    if top_p is not None or count < logits.shape[-1]:
        falling, order = jax.lax.top_k(logits, count)  # of equal ones the first comes first
        kept = jnp.ones_like(falling, bool)
        if top_p is not None:
            probs = jax.nn.softmax(falling, axis=-1)
            before = jnp.cumsum(probs, axis=-1) - probs  # the mass of the likelier ones
            # .5 and .3 reach .8, though their sum may round to less; 1 cuts nothing off.
            slack = 4 * jnp.finfo(jnp.float32).eps
            kept = ((before < top_p - slack) | (top_p >= 1)).at[:, 0].set(True)
        rows = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
        mask = jnp.zeros_like(logits, bool).at[rows, order].set(kept)
        logits = jnp.where(mask, logits, -jnp.inf)
    drawn = jax.random.categorical(key, logits)
    return jnp.where(temperature > 0, drawn, likeliest).astype(jnp.int32), fails
