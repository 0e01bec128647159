"""A part of a larger attention: some queries and some keys of it, as a call record of its own.

The larger call is a record with the whole lengths; its arrays are spread over the devices of a mesh
axis. A part is a run of queries against a run of keys. Where it lies among the whole enters as what
the record has already: an offset of the diagonal, shorter lengths, cut masks, biases and diagonals,
and the origin of dropout's positions. So every engine computes it, and none knows of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._core import dropout, masks
from flash_attention_jax._core.call import Arrays, Call, roles
from flash_attention_jax._core.tiles import Axis, Plan
from flash_attention_jax._engines import dispatch


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive positions of one length.

    Attributes:
        local: Where they begin in the device's own array; may be traced.
        start: Where they begin in the whole; may be traced.
        size: How many they are.
    """

    local: Any
    start: Any
    size: int


@dataclasses.dataclass(frozen=True)
class Part:
    """Some queries against some keys of `call`."""

    call: Call
    queries: Run
    keys: Run

    def place(self, name: str, size: int, letter: str) -> tuple[Any, int] | None:
        """Start and size of the part along one axis of an array; None = all of it.

        Queries, keys and what belongs to each lie where the device has them. Along the keys of a
        mask or bias, and along diagonals, an array is whole.
        """
        if letter == "i" and size > 1:
            return self.queries.local, self.queries.size
        if letter == "j" and size > 1:
            whole = name in ("mask", "bias")
            return (self.keys.start if whole else self.keys.local), self.keys.size
        if letter == "g":
            # Diagonal j - i + q_len - 1 of the part's last query and first key.
            last = self.queries.start + self.queries.size - 1
            start = self.keys.start - last + self.call.q_len - 1
            return start, self.queries.size + self.keys.size - 1
        return None

    def roles(self, name: str) -> str:
        """Axis letters of an array of the call or of its results."""
        return roles(self.call.layout, name)

    def cut(self, name: str, x: Any) -> Any:
        """The part of an array."""
        for axis, letter in enumerate(self.roles(name)):
            place = self.place(name, x.shape[axis], letter)
            if place is not None and place[1] != x.shape[axis]:
                x = lax.dynamic_slice_in_dim(x, place[0], place[1], axis)
        return x

    def add(self, name: str, total: Any, share: Any) -> Any:
        """The sum over all parts with this part's share added."""
        starts = []
        for axis, letter in enumerate(self.roles(name)):
            place = self.place(name, total.shape[axis], letter)
            starts.append(jnp.int32(0) if place is None else jnp.asarray(place[0], jnp.int32))
        if share.shape == total.shape:
            return total + share.astype(total.dtype)
        old = lax.dynamic_slice(total, starts, share.shape)
        return lax.dynamic_update_slice(total, old + share.astype(total.dtype), starts)

    def put(self, name: str, total: Any, block: Any) -> Any:
        """An array over the device's queries with the part's written in."""
        if block.shape == total.shape:
            return block
        axis = self.roles(name).index("i")
        return lax.dynamic_update_slice_in_dim(total, block, self.queries.local, axis)

    def record(self, arrays: Arrays) -> tuple[Call, Arrays]:
        """The part as a call of its own; sinks, which belong to one part, are left out."""
        call, queries, keys = self.call, self.queries, self.keys
        present = {name: x for name, x in arrays._asdict().items() if x is not None}
        present.pop("sinks", None)
        given = {name: self.cut(name, x) for name, x in present.items()}
        if call.banded or call.has("alibi_slopes"):
            offset = given.get("q_offset", jnp.full((1, 1), call.offset, jnp.int32))
            given["q_offset"] = offset + jnp.asarray(queries.start - keys.start, jnp.int32)
        for name, run in (("q_lengths", queries), ("kv_lengths", keys)):
            if name in given:
                given[name] = jnp.clip(given[name] - run.start, 0, run.size).astype(jnp.int32)
        if call.dropout_rate:
            given["dropout_origin"] = dropout.origin(
                call, given.get("dropout_origin"), query=queries.start, key=keys.start
            )
        return call.holding(given, q_len=queries.size, k_len=keys.size, offset=0), Arrays(**given)


def sees_any(call: Call, arrays: Arrays) -> jax.Array | None:
    """Whether any query of the call sees any key; None where all surely do."""
    rows, columns = Axis(call.q_len, call.q_len), Axis(call.k_len, call.k_len)
    plan = Plan(call, rows, columns, call.batch, call.kv_heads, False)
    visits = masks.Visits.of(plan, arrays)
    return None if visits.all_full else (visits.table() != masks.EMPTY).any()


def choose_for_parts(call: Call, name: str | None) -> dispatch.Engine:
    """The engine for the parts of a call.

    Raises:
        NotImplementedError: If the one named declines, or takes no such parts.
    """
    terms = tuple(term for term in call.terms if term[0] != "sinks")
    if (call.banded or call.has("alibi_slopes")) and not call.has("q_offset"):
        terms += (("q_offset", (1, 1), "int32"),)
    if call.dropout_rate:
        terms += (("dropout_origin", (5,), "int32"),)
    return dispatch.choose(dataclasses.replace(call, terms=terms), name)
