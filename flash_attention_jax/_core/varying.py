"""Manual axes: inside `shard_map` every array's type says over which mesh axes its values vary.

A loop's carry must have one type throughout, so an engine first brings all arrays of a call to the
union of their axes, and starts its sums with it. Outside `shard_map` the union is empty and nothing
happens. Where an input was the same on all devices, differentiating `unified` sums its gradient.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

T = TypeVar("T")


def axes_of(tree: Any) -> frozenset[str]:
    """Mesh axes over which any array of the tree varies."""
    types = [jax.typeof(x).manual_axis_type for x in jax.tree.leaves(tree)]
    return frozenset().union(*(t.varying for t in types))


def vary(tree: T, axes: frozenset[str]) -> T:
    """The same values, typed as varying over `axes` too."""

    def one(x: Any) -> Any:
        missing = tuple(sorted(axes - axes_of(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(one, tree) if axes else tree


def unified(tree: T) -> T:
    """All arrays of the tree typed as varying over the union of their axes."""
    return vary(tree, axes_of(tree))


def full(shape: tuple[Any, ...], value: Any, dtype: Any, like: Any) -> jax.Array:
    """An array to start a sum with, typed as varying over the axes of the tree `like`."""
    return vary(jnp.full(shape, value, dtype), axes_of(like))
