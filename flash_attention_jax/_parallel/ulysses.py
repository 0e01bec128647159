"""Ulysses: the heads are spread over the devices for the time of the attention, instead of tokens.

    q, k, v: (all heads, some tokens)  --all-to-all-->  (some heads, all tokens)
    out, lse = attention of these heads, by any engine
    out, lse: (some heads, all tokens)  --all-to-all-->  (all heads, some tokens)

Where there are fewer key heads than devices, each device receives the one that its queries read.
JAX differentiates it: the transpose of an all-to-all is one.

References:
    Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._core import check, dropout
from flash_attention_jax._core.call import ROLES, TERM_ROLES, Arrays, Call
from flash_attention_jax._core.results import Results
from flash_attention_jax._core.varying import unified

Attend = Callable[[Call, Arrays], Results]


def check_heads(heads: int, size: int) -> None:
    """Refuse query heads that the devices cannot share."""
    if heads % size:
        got = f"{heads} over {size} devices"
        advice = "Use ring attention, or a second mesh axis for it."
        check.fail("heads", "be a multiple of the devices that share them", got, advice)


def copies(kv_heads: int, size: int) -> int:
    """How often a key head is sent, so that every device has those that its queries read."""
    return size // math.gcd(kv_heads, size)


def spread(call: Call, size: int) -> tuple[int, int]:
    """Query heads and key heads on one device while it attends."""
    return call.heads // size, call.kv_heads * copies(call.kv_heads, size) // size


def attend_ulysses(
    call: Call, arrays: Arrays, axis: str, size: int, inner: Attend
) -> tuple[jax.Array, jax.Array]:
    """Attention with the heads spread over a mesh axis; inside `shard_map`.

    Args:
        call: The record of the whole length and of the heads that this device has tokens of.
        arrays: The device's own, cut along the length; masks and biases are whole along the keys.
        axis: The mesh axis.
        size: Its devices.
        inner: Attention of some heads to the tokens that the axis shares.

    Returns:
        The device's out and lse.
    """
    check_heads(call.heads, size)
    device = lax.axis_index(axis)
    arrays, _ = unified((arrays, device))
    heads, kv_heads = spread(call, size)

    def exchange(x: jax.Array, roles: str, heads_letter: str, length_letter: str) -> jax.Array:
        at = roles.index(heads_letter), roles.index(length_letter)
        return lax.all_to_all(x, axis, at[0], at[1], tiled=True)

    def take_heads(x: jax.Array, roles: str) -> jax.Array:
        if x.shape[roles.index("n")] == 1:
            return x
        return lax.dynamic_slice_in_dim(x, device * heads, heads, roles.index("n"))

    def shared(name: str, x: jax.Array) -> jax.Array:
        """What the device needs of an array for its heads and all tokens."""
        if name == "q":
            return exchange(x, ROLES[name][call.layout], "n", "i")
        if name in ROLES:
            roles = ROLES[name][call.layout]
            repeated = jnp.repeat(x, copies(call.kv_heads, size), roles.index("k"))
            return exchange(repeated, roles, "k", "j")
        roles, whole = TERM_ROLES[name], call.shape_of(name) or ()
        rows = "j" if name == "kv_segment_ids" else "i"
        cut = rows in roles and whole[roles.index(rows)] > 1
        if cut and "n" in roles and x.shape[roles.index("n")] > 1:
            return exchange(x, roles, "n", rows)
        if cut:
            return lax.all_gather(x, axis, axis=roles.index(rows), tiled=True)
        return take_heads(x, roles) if "n" in roles else x

    given = {name: shared(name, x) for name, x in arrays._asdict().items() if x is not None}
    if call.dropout_rate:
        own = given.get("dropout_origin")
        given["dropout_origin"] = dropout.origin(call, own, head=device * heads)
    fewer = call.holding(given, heads=heads, kv_heads=kv_heads)
    out, lse, _ = inner(fewer, Arrays(**given))
    roles = ROLES["out"][call.layout]
    out = lax.all_to_all(out, axis, roles.index("i"), roles.index("n"), tiled=True)
    roles = ROLES["lse"][call.layout]
    return out, lax.all_to_all(lse, axis, roles.index("i"), roles.index("n"), tiled=True)
