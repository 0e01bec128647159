"""Context parallelism: which way a length is shared by devices, why, and what it sends."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core import check, masks
from flash_attention_jax._core.call import ROLES, Arrays, Call, roles
from flash_attention_jax._core.results import Results
from flash_attention_jax._engines import dispatch
from flash_attention_jax._parallel.order import ORDERS, zigzag_length
from flash_attention_jax._parallel.parts import choose_for_parts
from flash_attention_jax._parallel.ring import Ring, attend_ring
from flash_attention_jax._parallel.ulysses import attend_ulysses, check_heads, spread

WAYS = ("auto", "ring", "ulysses", "ring+ulysses")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a length is shared.

    Attributes:
        way: "none", "ring", "ulysses" or "ring+ulysses".
        reason: Why.
        ring: Devices along the ring.
        ulysses: Devices that share the heads.
        order: "contiguous" or "zigzag".
        hops: How often keys are sent on.
        forward: Collectives that a device takes part in, by the name that XLA's HLO has for them.
        backward: The same for the gradient of q, k and v.
        bytes_forward: Bytes of q, k, v and out that a device sends.
        bytes_backward: Bytes that it sends for the gradients of them.
    """

    way: str
    reason: str
    ring: int
    ulysses: int
    order: str
    hops: int
    forward: dict[str, int]
    backward: dict[str, int]
    bytes_forward: int
    bytes_backward: int

    def __str__(self) -> str:
        """A line for each."""

        def listed(counts: dict[str, int], size: int) -> str:
            parts = [f"{count} {name}" for name, count in counts.items()] or ["nothing"]
            return f"{', '.join(parts)}: {size:,} bytes sent by each device"

        return "\n".join(
            [
                f"context parallel: {self.way}, {self.reason}",
                f"devices:  ring of {self.ring}, heads over {self.ulysses}, {self.order} order",
                f"hops:     {self.hops}",
                f"forward:  {listed(self.forward, self.bytes_forward)}",
                f"backward: {listed(self.backward, self.bytes_backward)}",
            ]
        )


def plan(call: Call, sizes: tuple[int, int], way: str, order: str) -> Plan:
    """Choose how a length is shared; a call without queries or keys has nothing to share.

    Args:
        call: The record of the whole length and of one device's batch and heads.
        sizes: Devices along the ring axis and along the axis for the heads; with one axis, (n, 0)
            leaves its use open.
        way: One of `WAYS`.
        order: One of `_parallel.order.ORDERS`.

    Raises:
        ValueError: If the heads do not divide, or the way needs another number of axes.
    """
    chosen = _chosen(call, sizes, way, order)
    if _empty(call):
        return _described(call, "none", "there are no queries or no keys", (1, 1), order)
    return chosen


def _empty(call: Call) -> bool:
    return 0 in (call.batch, call.heads, call.q_len, call.k_len)


def _chosen(call: Call, sizes: tuple[int, int], way: str, order: str) -> Plan:
    devices, open_ = sizes[0] * max(sizes[1], 1), sizes[1] == 0
    if devices == 1:
        return _described(call, "none", "there is one device", (1, 1), order)
    if way == "ring+ulysses" or (way == "auto" and not open_):
        if open_:
            advice = "Pass length_axis=(ring axis, axis for the heads)."
            check.fail("length_axis", f"name two axes for {way!r}", "one", advice)
        check_heads(call.heads, sizes[1])
        return _described(call, "ring+ulysses", "the mesh has an axis for each", sizes, order)
    if not open_:
        advice = "Use 'ring+ulysses', or name one axis."
        check.fail("length_axis", f"name one axis for {way!r}", "two", advice)
    if way == "ulysses":
        check_heads(call.heads, devices)
        return _described(call, way, "it was asked for", (1, devices), order)
    ring = _described(call, "ring", "it was asked for", (devices, 1), order)
    if way == "ring":
        return ring
    if call.heads % devices:
        reason = f"because {call.heads} heads cannot be shared by {devices} devices"
        return dataclasses.replace(ring, reason=reason)
    if order == "zigzag":
        return dataclasses.replace(ring, reason="because zigzag order is the ring's")
    other = _described(call, "ulysses", "", (1, devices), order)
    totals = [p.bytes_forward + p.bytes_backward for p in (ring, other)]
    counts = f"{totals[0]:,} bytes sent by each device in a ring, {totals[1]:,} with Ulysses"
    # A ring sends while it computes, all-to-all does not: equal bytes are for the ring.
    chosen = ring if totals[0] <= totals[1] else other
    return dataclasses.replace(chosen, reason=f"because it sends less: {counts}")


def _described(call: Call, way: str, reason: str, sizes: tuple[int, int], order: str) -> Plan:
    """The plan with what it sends: the formula that the tests hold the compiled program against."""
    size, ulysses = sizes
    token = jnp.dtype(call.dtype).itemsize
    wide = np.dtype(call.acc_dtype).itemsize
    forward: dict[str, int] = {}
    backward: dict[str, int] = {}
    sent_forward = sent_backward = 0
    inside = call
    if ulysses > 1:
        heads, kv_heads = spread(call, ulysses)
        # q, k, v there and out back; backward the same for their gradients. An lse that is asked
        # for is one more.
        forward["all-to-all"] = backward["all-to-all"] = 4
        queries = call.q_len // (size * ulysses) * heads * (ulysses - 1) * call.batch
        keys = call.k_len // (size * ulysses) * kv_heads * (ulysses - 1) * call.batch
        moved = (call.dim + call.v_dim) * (queries + keys) * token
        sent_forward += moved
        sent_backward += moved
        inside = dataclasses.replace(call, heads=heads, kv_heads=kv_heads)
    hops = 0
    if size > 1:
        ring = Ring(inside, dispatch.named("blocked"), "", size, order == "zigzag")
        hops = sum(sweep.hops for sweep in ring.sweeps)
        ids = 1 if call.has("kv_segment_ids") else 0
        if hops:
            forward["collective-permute"] = (2 + ids) * hops
            # dk and dv make every hop too, and one more: home.
            backward["collective-permute"] = (2 + ids) * hops + 2 * (hops + 1)
        keys = call.batch * inside.kv_heads * (call.k_len // size) * (call.dim + call.v_dim)
        sent_forward += hops * keys * token
        sent_backward += hops * keys * token + (hops + bool(hops)) * keys * wide
    return Plan(
        way, reason, size, ulysses, order, hops, forward, backward, sent_forward, sent_backward
    )


def attend(
    call: Call,
    arrays: Arrays,
    chosen: Plan,
    axes: tuple[str, ...],
    implementation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention of one device's queries to the whole length; inside `shard_map`.

    Args:
        call: The record of the whole length.
        arrays: The device's own.
        chosen: How the length is shared.
        axes: The mesh axes along which it is cut: of the ring, for the heads, or both.
        implementation: The engine asked for.
    """
    if _empty(call):
        call, arrays = _own(call, arrays)

    def whole(call: Call, arrays: Arrays) -> Results:
        return dispatch.choose(call, implementation).attend(call, arrays)

    def around(call: Call, arrays: Arrays) -> Results:
        engine = choose_for_parts(call, implementation)
        ring = Ring(call, engine, axes[0], chosen.ring, chosen.order == "zigzag")
        return attend_ring(ring, arrays)

    inner = around if chosen.ring > 1 else whole
    if chosen.ulysses > 1:
        return attend_ulysses(call, arrays, axes[-1], chosen.ulysses, inner)
    return inner(call, arrays)[:2]


def _own(call: Call, arrays: Arrays) -> tuple[Call, Arrays]:
    """A call in which no query sees a key, as one of the device's own: sinks alone matter."""
    axes = {name: ROLES[name][call.layout] for name in ("q", "k")}
    smaller = dataclasses.replace(
        call,
        q_len=arrays.q.shape[axes["q"].index("i")],
        k_len=arrays.k.shape[axes["k"].index("j")],
        similarity="dot",
        scale=1.0,
        softcap=None,
        causal=False,
        window=(None, None),
        dropout_rate=0.0,
        terms=tuple(term for term in call.terms if term[0] == "sinks"),
    )
    return smaller, Arrays(arrays.q, arrays.k, arrays.v, sinks=arrays.sinks)


def with_origin(
    call: Call, arrays: Arrays, batch_axis: str | None, head_axis: str | None
) -> Arrays:
    """The arrays with dropout's place among devices that share batch or heads."""
    if not call.dropout_rate or (batch_axis is None and head_axis is None):
        return arrays
    heads = call.heads * (1 if head_axis is None else lax.axis_size(head_axis))
    at: list[Any] = [heads, 0, 0, 0, 0]
    for place, axis, count in ((1, batch_axis, call.batch), (2, head_axis, call.heads)):
        at[place] = 0 if axis is None else lax.axis_index(axis) * count
    return arrays._replace(dropout_origin=jnp.stack([jnp.asarray(x, jnp.int32) for x in at]))


def padded(call: Call, arrays: Arrays, multiple: int) -> tuple[Call, Arrays]:
    """The call with both lengths made multiples of a number; what is added is hidden.

    An added query sees nothing either: it could see keys that no other one does, which may be NaN.
    """
    q_len, k_len = (-(-x // multiple) * multiple for x in (call.q_len, call.k_len))
    if (q_len, k_len) == (call.q_len, call.k_len):
        return call, arrays
    more = {"i": q_len - call.q_len, "j": k_len - call.k_len}
    given = {}
    for name, x in arrays._asdict().items():
        if x is None:
            continue
        axes = zip(roles(call.layout, name), x.shape, strict=True)
        widths = [(0, more.get(letter, 0) if size > 1 else 0) for letter, size in axes]
        if name == "relative_bias":
            widths = [(0, 0), (more["i"], more["j"])]  # entry j - i + q_len - 1
        given[name] = jnp.pad(x, widths)
    _, right = masks.band(call)
    hidden = right is not None and call.q_len - 1 + call.offset + right < call.k_len
    if more["j"] and (call.has("q_offset") or not hidden):
        given.setdefault("kv_lengths", jnp.full((call.batch,), call.k_len, jnp.int32))
    if more["i"]:
        given.setdefault("q_lengths", jnp.full((call.batch,), call.q_len, jnp.int32))
    return call.holding(given, q_len=q_len, k_len=k_len), Arrays(**given)


def check_order(order: Any, call: Call, devices: int) -> None:
    """A known order, that the lengths allow."""
    check.choice("order", order, ORDERS)
    if order == "zigzag":
        zigzag_length("q", call.q_len, devices)
        zigzag_length("k", call.k_len, devices)
