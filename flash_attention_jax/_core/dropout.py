"""Dropout: one mask for every engine, a function of (key, b, h, i, j) alone.

No state is walked and no block is counted, so the mask is the same forward and backward, for any
block size, under `vmap`, and in kernels that visit tiles in another order. All arithmetic is on
uint32 and wraps.

    row(b, h, i)  = two words from mixing the key's two words with (b, h) and then with i
    bits(row, j)  = mix(mix(j * golden + row[0]) ^ row[1])
    keep          = bits >= rate * 2**32

`mix` is the 32-bit finaliser with the constants that C. Wellons found by search ("lowbias32",
2018): bijective, each input bit flips each output bit with probability close to 1/2. The second row
word enters between two mixes; with one word alone, two rows whose words differ by a multiple of
`golden` would share their bits, shifted.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._core.call import Call, Size, as_index

GOLDEN = np.uint32(0x9E3779B9)  # 2**32 / golden ratio: consecutive j land far apart


def mix(x: Any) -> Any:
    """Permute the 32-bit words so that every output bit depends on every input bit."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def key_words(key: jax.Array) -> jax.Array:
    """Two uint32 words of a JAX random key, new-style or raw; longer keys are folded."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    words = key.astype(jnp.uint32).reshape(-1)
    words = jnp.pad(words, (0, words.size % 2)).reshape(-1, 2)
    folded = words[0]
    for extra in words[1:]:
        folded = mix(folded + GOLDEN) ^ extra
    return folded


def origin(call: Call, given: Any = None, **moved: Any) -> jax.Array:
    """What `row_words` takes as the origin of a part of `call`.

    Args:
        call: The larger call.
        given: Its own origin, where it is a part itself.
        **moved: Where the part begins in it: `batch`, `head`, `query`, `key`, each 0 if left out.
    """
    own = jnp.asarray([call.heads, 0, 0, 0, 0]) if given is None else given
    first = [jnp.int32(0)]
    first += [jnp.asarray(moved.get(n, 0), jnp.int32) for n in ("batch", "head", "query", "key")]
    return own.astype(jnp.int32) + jnp.stack(first)


def row_words(
    words: Any, heads: Size, b: Any, h: Any, i: Any, origin: Any = None
) -> tuple[Any, Any]:
    """The two words of the rows at batch `b`, query head `h`, query `i` (integers, broadcast).

    Where these and the keys are counted within a part of a larger call, `origin` holds five
    integers: the heads of the larger one, and the batch, head, query and key in it at which the
    part begins. The bits are then those of the larger call.
    """
    heads = as_index(heads)
    if origin is not None:
        heads, b, h, i = origin[0], b + origin[1], h + origin[2], i + origin[3]
    unit = (b * heads + h).astype(jnp.uint32)
    i = i.astype(jnp.uint32)
    first = mix(mix(words[0] + unit * GOLDEN) + i * GOLDEN)
    second = mix(mix(words[1] ^ mix(unit)) ^ mix(i))
    if origin is not None:
        first = first + origin[4].astype(jnp.uint32) * GOLDEN  # `keep` counts j from there
    return first, second


def keep(words: tuple[Any, Any], j: Any, rate: float) -> Any:
    """Which entries stay: boolean, of the shape that the row words and `j` broadcast to."""
    first, second = words
    bits = mix(mix(j.astype(jnp.uint32) * GOLDEN + first) ^ second)
    return bits >= np.uint32(threshold(rate))


def threshold(rate: float) -> int:
    """The bits below it are dropped."""
    return min(round(rate * 2**32), 2**32 - 1)
