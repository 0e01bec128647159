"""Zigzag order: every device gets an early and a late run of a causal sequence, so equal work.

Of 2 n runs of equal length, device r of n holds runs r and 2 n - 1 - r. In contiguous order the
last device sees n times the keys of the first, and all wait for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core import check
from flash_attention_jax._core.types import Array, ArrayLike

ORDERS = ("contiguous", "zigzag")


def runs_of(devices: int) -> np.ndarray:
    """The runs in the order in which the devices hold them: 0, 2n - 1, 1, 2n - 2, ..."""
    first = np.arange(devices)
    return np.stack([first, 2 * devices - 1 - first], axis=1).reshape(-1)


def zigzag(x: ArrayLike, axis: int, *, devices: int) -> Array:
    """Puts an array into zigzag order: to be cut along the axis over so many devices.

    Args:
        x: Any array; its axis is a multiple of 2 * devices.
        axis: The axis of the tokens.
        devices: How many devices share it.

    Returns:
        The array with runs 0, 2n - 1, 1, 2n - 2, ... along the axis.

    Raises:
        ValueError: If the length is no multiple of 2 * devices.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_attention_jax.sharding import zigzag
        >>> zigzag(jnp.arange(8), 0, devices=2).tolist()
        [0, 1, 6, 7, 2, 3, 4, 5]

    References:
        Grattafiori et al. 2024, "The Llama 3 Herd of Models", arXiv:2407.21783, section 3.3.2.
    """
    return _take_runs(x, axis, devices, runs_of(devices))


def unzigzag(x: ArrayLike, axis: int, *, devices: int) -> Array:
    """Takes an array out of zigzag order: the inverse of `zigzag`.

    Args:
        x: An array in zigzag order.
        axis: The axis of the tokens.
        devices: How many devices share it.

    Returns:
        The array with its tokens one after another.

    Raises:
        ValueError: If the length is no multiple of 2 * devices.

    Example:
        >>> import jax.numpy as jnp
        >>> from flash_attention_jax.sharding import unzigzag, zigzag
        >>> unzigzag(zigzag(jnp.arange(8), 0, devices=2), 0, devices=2).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return _take_runs(x, axis, devices, np.argsort(runs_of(devices)))


def _take_runs(x: ArrayLike, axis: int, devices: int, order: np.ndarray) -> Array:
    check.array("x", x)
    check.whole("devices", devices, least=1)
    check.whole("axis", axis, least=-len(x.shape))
    if axis >= len(x.shape):
        check.fail("axis", f"be below {len(x.shape)}", str(axis), "Name an axis of `x`.")
    length = x.shape[axis]
    zigzag_length("x", length, devices)
    axis %= len(x.shape)
    shape = (*x.shape[:axis], 2 * devices, length // (2 * devices), *x.shape[axis + 1 :])
    return jnp.take(jnp.asarray(x).reshape(shape), order, axis=axis).reshape(x.shape)


def zigzag_length(name: str, length: int, devices: int) -> None:
    """Refuse a length that does not fall into 2 * devices runs."""
    if length % (2 * devices):
        requirement = f"have a multiple of 2 * devices = {2 * devices} tokens in zigzag order"
        advice = "Pad it, and hide the rest by `kv_lengths`; or use order='contiguous'."
        check.fail(name, requirement, str(length), advice)


def shard_positions(length: int, *, axis_name: str, order: str = "contiguous") -> Array:
    """Where this device's tokens stand in the whole sequence; inside `shard_map`.

    For rotary embedding, learned positions and the like: `apply_rotary(..., positions=...)`.

    Args:
        length: How many tokens this device has.
        axis_name: The mesh axis along which the sequence is cut.
        order: "contiguous" or "zigzag".

    Returns:
        (length,) int32.

    Raises:
        ValueError: If the order is unknown, or `length` is odd in zigzag order.

    Example:
        >>> import jax
        >>> from flash_attention_jax.sharding import shard_positions
        >>> mesh = jax.make_mesh((1,), ("context",))
        >>> spec = jax.sharding.PartitionSpec("context")
        >>> positions = lambda: shard_positions(4, axis_name="context")
        >>> jax.shard_map(positions, mesh=mesh, in_specs=(), out_specs=spec)().tolist()
        [0, 1, 2, 3]
    """
    check.choice("order", order, ORDERS)
    check.whole("length", length, least=0)
    device, size = lax.axis_index(axis_name), lax.axis_size(axis_name)
    here = jnp.arange(length, dtype=jnp.int32)
    if order == "contiguous":
        return here + device * jnp.int32(length)
    zigzag_length("length", length * size, size)
    run = length // 2
    late: jax.Array = (2 * size - 1 - device) * run
    return jnp.where(here < run, here + device * run, here - run + late)
