"""Attention for Flax linen: an `attention_fn` for Flax's own layers, and an `Attention` layer.

    layer = flax.linen.MultiHeadDotProductAttention(num_heads=8, attention_fn=attention_fn)

is the same layer with the same parameters, in memory that grows with the length and not with its
square. `make_attention_fn` gives it what Flax's function lacks: cosine similarity, windows, and so
on. `flash_attention_jax.nnx` has the same three names for Flax nnx.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> x = jax.random.normal(jax.random.key(0), (2, 10, 32), jnp.float32)
    >>> mask = nn.make_causal_mask(x[..., 0])
    >>> layer = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=attention_fn)
    >>> y, params = layer.init_with_output(jax.random.key(1), x, mask=mask)
    >>> flax_layer = nn.MultiHeadDotProductAttention(num_heads=4)
    >>> bool(jnp.allclose(y, flax_layer.apply(params, x, mask=mask), atol=1e-5))
    True
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array

from flash_attention_jax._core import check
from flash_attention_jax._core.optional import needs
from flash_attention_jax._flax.attention_fn import Similarity, attention_fn, make_attention_fn
from flash_attention_jax._flax.layer import AttentionLayer, no_cache
from flash_attention_jax._flax.options import Attributes, Initializer
from flash_attention_jax.cache import KVCache

with needs("flash_attention_jax.linen", "flax", extra="flax"):
    from flax import linen as nn

__all__ = ["Attention", "Similarity", "attention_fn", "make_attention_fn"]


class Attention(AttentionLayer, nn.Module):
    """Multi-head attention for Flax linen.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x = jax.random.normal(jax.random.key(0), (2, 10, 32), jnp.float32)
        >>> layer = Attention(dim=32, heads=4, dim_head=8, causal=True, similarity="cosine")
        >>> y, params = layer.init_with_output(jax.random.key(1), x)
        >>> y.shape
        (2, 10, 32)

        The first seven tokens, and then one after the other, with a cache:

        >>> cache = layer.init_cache(batch=2, length=10)
        >>> for new in (slice(0, 7), slice(7, 8), slice(8, 9), slice(9, 10)):
        ...     variables = {**params, "cache": cache}
        ...     z, changed = layer.apply(variables, x[:, new], decode=True, mutable="cache")
        ...     cache = changed["cache"]
        >>> bool(jnp.allclose(z, y[:, -1:], atol=1e-6))
        True
    """

    __call__ = nn.compact(AttentionLayer.__call__)

    @nn.nowrap
    def init_cache(self, batch: int, length: int, dtype: Any = None) -> dict[str, KVCache]:
        """An empty "cache" collection of this layer.

        Args:
            batch: Sequences.
            length: Tokens that each may have in all; with a window, a ring takes any number.
            dtype: Of keys and values, narrower than the computation or not; None = the layer's
                `dtype`, or where there is none the dtype in which it computes float32 inputs.

        Returns:
            What goes into the variables as "cache".
        """
        return {"kv": self._empty_cache(batch, length, dtype)}

    def _parameter(self, name: str, init: Initializer, shape: tuple[int, ...]) -> Array:
        return self.param(name, init, shape, self.param_dtype)

    def _read_cache(self, batch: int, length: int, dtype: Any) -> KVCache | None:
        if self.is_initializing():
            # As in Flax's own layer: initialised with an input of full length, it has a cache.
            self.put_variable("cache", "kv", self._empty_cache(batch, length, dtype))
            return None
        cache = self.get_variable("cache", "kv")
        if cache is None:
            no_cache('pass {**params, "cache": layer.init_cache(batch, length)} to apply')
        if not self.is_mutable_collection("cache"):
            advice = (
                'Pass mutable="cache" to apply, and the cache that it returns to the next call.'
            )
            check.fail("mutable", 'hold "cache" where decode=True', "a cache to read", advice)
        return cache

    def _write_cache(self, cache: KVCache) -> None:
        self.put_variable("cache", "kv", cache)

    def _dropout_key(self) -> Any:
        return self.make_rng("dropout")


# So that help() shows the attributes too.
Attention.__doc__ = f"{Attention.__doc__}\n{Attributes.__doc__}"
