"""Array aliases for annotations.

Axes: b batch, h query heads, k key heads, i queries, j keys, d and e dimensions.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

ArrayLike: TypeAlias = jax.Array | np.ndarray
"""A JAX array or a NumPy array; both are welcome everywhere."""

QueryHeadsFirst: TypeAlias = (
    Float[ArrayLike, "i d"] | Float[ArrayLike, "bh i d"] | Float[ArrayLike, "b h i d"]
)
KeyHeadsFirst: TypeAlias = (
    Float[ArrayLike, "j d"] | Float[ArrayLike, "b j d"] | Float[ArrayLike, "b k j d"]
)
ValueHeadsFirst: TypeAlias = (
    Float[ArrayLike, "j e"] | Float[ArrayLike, "b j e"] | Float[ArrayLike, "b k j e"]
)

__all__ = [
    "Array",
    "ArrayLike",
    "Bool",
    "Float",
    "Int",
    "KeyHeadsFirst",
    "Num",
    "QueryHeadsFirst",
    "ValueHeadsFirst",
]
