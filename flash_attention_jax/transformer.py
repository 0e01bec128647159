"""A small causal transformer over tokens, in Flax linen, and text generation with it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

from flash_attention_jax._optional import needs

with needs("flash_attention_jax.transformer", "flax", extra="train"):
    from flax import linen as nn

    from flash_attention_jax.linen import Attention, Similarity

__all__ = ["CausalTransformer", "generate"]


class CausalTransformer(nn.Module):
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

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = CausalTransformer(dim=32, depth=2, heads=2, dim_head=16)
        >>> tokens = jnp.zeros((1, 8), jnp.int32)
        >>> logits, params = model.init_with_output(jax.random.key(0), tokens)
        >>> logits.shape, logits.dtype.name
        ((1, 8, 256), 'float32')
    """

    dim: int
    depth: int
    heads: int
    dim_head: int = 64
    num_tokens: int = 256
    similarity: Similarity = "dot"
    implementation: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array | np.ndarray, "batch length"]
    ) -> Float[Array, "batch length num_tokens"]:
        """Reads tokens.

        Args:
            tokens: (batch, length), integers in [0, num_tokens).

        Returns:
            Logits of the token after each, (batch, length, num_tokens), float32.
        """
        # Each layer adds two terms to the stream; drawn this much smaller, their sum starts with
        # the variance of one (the scaling of GPT-2).
        init = nn.initializers.variance_scaling(1 / (2 * self.depth), "fan_in", "truncated_normal")
        norm = functools.partial(nn.RMSNorm, dtype=jnp.float32, param_dtype=jnp.float32)
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=self.dtype, param_dtype=jnp.float32
        )
        x = nn.Embed(
            self.num_tokens,
            self.dim,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            embedding_init=nn.initializers.normal(1.0),
            name="embed",
        )(tokens)
        for layer in range(self.depth):
            attended = Attention(
                dim=self.dim,
                heads=self.heads,
                dim_head=self.dim_head,
                causal=True,
                similarity=self.similarity,
                implementation=self.implementation,
                dtype=self.dtype,
                out_init=init,
                name=f"attention_{layer}",
            )(norm(name=f"attention_norm_{layer}")(x))
            x = x + attended.astype(jnp.float32)
            hidden = dense(4 * self.dim, name=f"expand_{layer}")(norm(name=f"norm_{layer}")(x))
            fed = dense(self.dim, kernel_init=init, name=f"contract_{layer}")(nn.gelu(hidden))
            x = x + fed.astype(jnp.float32)
        readout = nn.Dense(
            self.num_tokens,
            use_bias=False,
            dtype=jnp.float32,
            param_dtype=jnp.float32,
            name="readout",
        )
        return readout(norm(name="norm")(x))


def generate(
    model: nn.Module,
    params: PyTree,
    prompt: Int[Array | np.ndarray, "batch prompt"],
    length: int,
    *,
    key: Key[Array, ""],
    window: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Int[Array, "batch length"]:
    """Draws `length` further tokens, one at a time, each from the model's distribution.

        token ~ softmax(top_k(logits) / temperature)

    Every token reads the last `window` tokens anew: time `length` passes over `window` tokens, and
    no memory beyond one such pass. It compiles once for each pair of lengths.

    Args:
        model: maps tokens (batch, n) to logits (batch, n, num_tokens), causally.
        params: what `model.apply` takes as its first argument.
        prompt: the tokens to go on from, (batch, prompt), at least one.
        length: how many tokens to draw, at least 1.
        key: draws the tokens.
        window: how many tokens the model reads, at least 1. `None` means all of them.
        temperature: below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest.
        top_k: draw among the `top_k` likeliest tokens. `None` means among all.

    Returns:
        The drawn tokens without the prompt, (batch, length), int32.

    Raises:
        ValueError: an argument is out of the range said above.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> model = CausalTransformer(dim=32, depth=1, heads=2, dim_head=16)
        >>> prompt = jnp.asarray([list(b"def ")], jnp.int32)
        >>> params = model.init(jax.random.key(0), prompt)
        >>> generate(model, params, prompt, 5, key=jax.random.key(1), top_k=10).shape
        (1, 5)
    """
    if prompt.ndim != 2 or not prompt.shape[1]:
        raise ValueError(
            f"`prompt` must have shape (batch, n) with n at least 1, got {prompt.shape}. "
            "Start from one token at least."
        )
    for name, value, least in (("length", length, 1), ("window", window, 1), ("top_k", top_k, 1)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value}. Pass more.")
    if not temperature >= 0.0:
        raise ValueError(f"`temperature` must not be negative, got {temperature}. Pass 0 or more.")
    whole = prompt.shape[1] + length
    width: int = whole if window is None else min(window, whole)
    buffer = jnp.asarray(prompt, jnp.int32)[:, -width:]
    filled = jnp.asarray(buffer.shape[1], jnp.int32)
    buffer = jnp.pad(buffer, ((0, 0), (0, width - buffer.shape[1])))
    keys = jax.random.split(key, length)
    return _generate(model, params, buffer, filled, keys, jnp.float32(temperature), top_k)


@functools.partial(jax.jit, static_argnums=(0, 6))
def _generate(
    model: nn.Module,
    params: PyTree,
    buffer: Int[Array, "batch window"],
    filled: Int[Array, ""],
    keys: Key[Array, " length"],
    temperature: Float[Array, ""],
    top_k: int | None,
) -> Int[Array, "batch length"]:
    """The loop of `generate`; the first `filled` columns of `buffer` hold tokens."""
    window = buffer.shape[1]

    def draw(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        buffer, filled = carry
        # What lies after the last token is never seen: the model is causal.
        logits: Any = model.apply(params, buffer)
        logits = logits[:, filled - 1].astype(jnp.float32)
        if top_k is not None and top_k < logits.shape[-1]:
            least = jax.lax.top_k(logits, top_k)[0][:, -1:]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
        token = jnp.where(temperature > 0, drawn, jnp.argmax(logits, -1)).astype(jnp.int32)
        # A full window lets go of its oldest token. Rotary positions are relative: moving all
        # tokens by one place changes nothing else.
        full = filled == window
        buffer = jnp.where(full, jnp.roll(buffer, -1, axis=1), buffer)
        last = jnp.where(full, window - 1, filled)
        return (buffer.at[:, last].set(token), last + 1), token

    _, tokens = jax.lax.scan(draw, (buffer, filled), keys)
    return tokens.T
