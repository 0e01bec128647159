"""A part of a larger attention: some queries and some keys of it, as a call record of its own.

The larger call is a record with the whole lengths; its arrays are spread over the devices of a mesh
axis. A part is a run of queries against a run of keys. Where it lies among the whole enters as what
the record has already: an offset of the diagonal, shorter lengths, cut masks, biases and diagonals,
and the origin of dropout's positions. So every engine computes it, and none knows of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention_jax import _blocked, _dispatch, _masks
from flash_attention_jax._call import ROLES, TERM_ROLES, Arrays, Call, Layout
from flash_attention_jax._results import Results, finite_or_zero
from flash_attention_jax._tiles import Axis, Plan

Blocks = dict[str, Any]


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
            origin = jnp.asarray(
                given.get("dropout_origin", jnp.asarray([call.heads, 0, 0, 0, 0])), jnp.int32
            )
            moved = (jnp.asarray(run.start, jnp.int32) for run in (queries, keys))
            given["dropout_origin"] = origin + jnp.stack([jnp.int32(0)] * 3 + [*moved])
        terms = tuple(
            (name, x.shape, str(x.dtype)) for name, x in given.items() if name not in ROLES
        )
        smaller = dataclasses.replace(
            call, q_len=queries.size, k_len=keys.size, offset=0, terms=terms
        )
        return smaller, Arrays(**given)


def roles(layout: Layout, name: str) -> str:
    """Axis letters of an array of a call or of its results."""
    return ROLES[name][layout] if name in ROLES else TERM_ROLES[name]


def sees_any(call: Call, arrays: Arrays) -> jax.Array | None:
    """Whether any query of the call sees any key; None where all surely do."""
    rows, columns = Axis(call.q_len, call.q_len), Axis(call.k_len, call.k_len)
    plan = Plan(call, rows, columns, call.batch, call.kv_heads, False)
    visits = _masks.Visits.of(plan, arrays)
    return None if visits.all_full else (visits.table() != _masks.EMPTY).any()


# --- who computes a part ---

KERNELS = ("hopper", "triton")


@dataclasses.dataclass(frozen=True)
class Engine:
    """How an engine computes parts.

    Attributes:
        name: That of the implementation.
        attend: (call, arrays) -> `Results`.
        gradients: (call, floats, others, results, (dout, dlse)) -> the gradients' shares of the
            part where results and cotangents are those of the whole; None = JAX differentiates
            `attend`.
        normalised: Whether both take q and k as the product wants them.
    """

    name: str
    attend: Callable[[Call, Arrays], Results]
    gradients: Callable[..., Blocks] | None = None
    normalised: bool = False

    def run(self, call: Call, arrays: Arrays) -> Results:
        """A call that is no part."""
        return _dispatch.engine(self.name)(call, arrays)


BLOCKED = Engine("blocked", _blocked.unrounded, _blocked.gradients, normalised=True)


@functools.cache
def of(name: str) -> Engine:
    """The engine of an implementation; those of kernels compute a part again in its backward."""
    if name == "blocked":
        return BLOCKED
    attend = _dispatch.engine(name)
    return Engine(name, attend, _recomputing(attend) if name in KERNELS else None)


def _recomputing(attend: Callable[[Call, Arrays], Any]) -> Callable[..., Blocks]:
    """The gradients of a part by an engine's own derivative, for results of the whole.

    With w = exp(lse_part - lse), out = sum of w * out_part over the parts, so
    dout_part = w * dout and dlse_part = w * (dlse + rowsum((out_part - out) * dout)).
    """

    def gradients(call: Call, floats: Blocks, others: Blocks, whole: Results, ct: Any) -> Blocks:
        dout, dlse = ct

        def run(floats: Blocks) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            out, lse, low = attend(call, Arrays(**floats, **others))
            return (out, lse), low

        (out, lse), pull, low = jax.vjp(run, floats, has_aux=True)
        wide = lse.dtype
        saw, zero = lse > -jnp.inf, jnp.zeros((), lse.dtype)
        apart = (jnp.where(saw, lse, zero) - finite_or_zero(whole.lse)) + (low - whole.low)
        weight = jnp.where(saw, jnp.exp(apart), zero)
        dout = jnp.where(saw[..., None], dout.astype(wide), zero)
        farther = ((out.astype(wide) - whole.out.astype(wide)) * dout).sum(axis=-1)
        dlse = jnp.where(saw, weight * (dlse + farther), zero)
        (found,) = pull(((weight[..., None] * dout).astype(out.dtype), dlse))
        return {name: x.astype(call.acc_dtype) for name, x in found.items()}

    return gradients


def choose(call: Call, name: str | None) -> Engine:
    """The engine for the parts of a call.

    Raises:
        NotImplementedError: If the one named declines, or takes no such parts.
    """
    terms = tuple(term for term in call.terms if term[0] != "sinks")
    if (call.banded or call.has("alibi_slopes")) and not call.has("q_offset"):
        terms += (("q_offset", (1, 1), "int32"),)
    if call.dropout_rate:
        terms += (("dropout_origin", (5,), "int32"),)
    return of(choose_whole(dataclasses.replace(call, terms=terms), name))


def choose_whole(call: Call, name: str | None) -> str:
    """The implementation for all tokens of some heads.

    Raises:
        NotImplementedError: If the one named declines.
    """
    return _dispatch.choose(call, name).name
