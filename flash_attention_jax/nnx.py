"""Attention for Flax nnx: an `attention_fn` for Flax's own layers, and an `Attention` layer.

    layer = flax.nnx.MultiHeadAttention(num_heads=8, in_features=64, attention_fn=attention_fn, ...)

is the same layer with the same parameters, in memory that grows with the length and not with its
square. `make_attention_fn` gives it what Flax's function lacks: cosine similarity, windows, and so
on. `flash_attention_jax.linen` has the same three names for Flax linen.

Example:
    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> x = jax.random.normal(jax.random.key(0), (2, 10, 32), jnp.float32)
    >>> sizes = {"num_heads": 4, "in_features": 32, "decode": False}
    >>> layer = nnx.MultiHeadAttention(**sizes, attention_fn=attention_fn, rngs=nnx.Rngs(0))
    >>> flax_layer = nnx.MultiHeadAttention(**sizes, rngs=nnx.Rngs(0))
    >>> bool(jnp.allclose(layer(x, is_causal=True), flax_layer(x, is_causal=True), atol=1e-5))
    True
"""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

from jaxtyping import Array

from flash_attention_jax._core.optional import needs
from flash_attention_jax._flax.attention_fn import Similarity, attention_fn, make_attention_fn
from flash_attention_jax._flax.layer import AttentionLayer, no_cache
from flash_attention_jax._flax.options import Attributes, Initializer
from flash_attention_jax._flax.weights import weights_of
from flash_attention_jax.cache import KVCache

with needs("flash_attention_jax.nnx", "flax", extra="flax"):
    from flax import nnx

__all__ = ["Attention", "Similarity", "attention_fn", "make_attention_fn"]


@dataclasses.dataclass(eq=False)
class Attention(AttentionLayer, nnx.Module):
    """Multi-head attention for Flax nnx; `rngs` draws the parameters, and the dropout.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> x = jax.random.normal(jax.random.key(0), (2, 10, 32), jnp.float32)
        >>> layer = Attention(dim=32, heads=4, dim_head=8, causal=True, rngs=nnx.Rngs(0))
        >>> y = layer(x)

        The first seven tokens, and then one after the other, with a cache:

        >>> layer.init_cache(batch=2, length=10)
        >>> for new in (slice(0, 7), slice(7, 8), slice(8, 9), slice(9, 10)):
        ...     z = layer(x[:, new], decode=True)
        >>> bool(jnp.allclose(z, y[:, -1:], atol=1e-6))
        True
    """

    rngs: dataclasses.InitVar[nnx.Rngs] = dataclasses.field(kw_only=True)

    def __post_init__(self, rngs: nnx.Rngs) -> None:
        for name, weight in weights_of(self).items():
            array = weight.init(rngs.params(), weight.shape, self.param_dtype)
            setattr(self, name, nnx.Param(array))
        self.dropout_keys = rngs.dropout.fork() if self.dropout else None
        self.kv: nnx.Cache[KVCache] | None = nnx.data(None)

    def init_cache(self, batch: int, length: int, dtype: Any = None) -> None:
        """Gives the layer an empty cache, in place of one that it may have.

        Args:
            batch: Sequences.
            length: Tokens that each may have in all; with a window, a ring takes any number.
            dtype: Of keys and values, narrower than the computation or not; None = the layer's
                `dtype`, or where there is none the dtype in which it computes float32 inputs.
        """
        self.kv = nnx.Cache(self._empty_cache(batch, length, dtype))

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets what `flax.nnx.view(model, deterministic=...)` asks for, in the copy that it makes.

        Args:
            deterministic: No dropout; None = as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def __getstate__(self) -> dict[str, Any]:
        """All but initialisers that pickle cannot take, as JAX's closures; they have served."""
        state = super().__getstate__()
        return {n: x for n, x in state.items() if not n.endswith("_init") or _can_pickle(x)}

    def _parameter(self, name: str, init: Initializer, shape: tuple[int, ...]) -> Array:
        del init, shape  # they served when it was made
        return getattr(self, name)[...]

    def _read_cache(self, batch: int, length: int, dtype: Any) -> KVCache:
        del batch, length, dtype
        if self.kv is None:
            no_cache("layer.init_cache(batch, length)")
        return self.kv.get_value()

    def _write_cache(self, cache: KVCache) -> None:
        if self.kv is not None:
            self.kv.set_value(cache)

    def _dropout_key(self) -> Any:
        return self.dropout_keys() if self.dropout_keys is not None else None


def _can_pickle(x: Any) -> bool:
    """Whether pickle takes it."""
    try:
        pickle.dumps(x)
    except (pickle.PicklingError, AttributeError, TypeError):
        return False
    return True


# So that help() shows the attributes too.
Attention.__doc__ = f"{Attention.__doc__}\n{Attributes.__doc__}"
