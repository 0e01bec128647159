"""Inside `shard_map`: reads a call whose length is spread over mesh axes.

Each device has its own tokens. What belongs to a token (q, k, v, ids, offsets, rows of a mask or
bias) is cut along the length; along the keys a mask, bias or relative bias is whole. The record
speaks of the whole, so defaults and checks are those of `_api.read`; the arrays are the device's
own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._api.read import read
from flash_attention_jax._core import check, dropout
from flash_attention_jax._core.call import ROLES, TERM_ROLES, Arrays, Call

PER_TOKEN = {"q_segment_ids": -1, "kv_segment_ids": -1, "q_offset": -1, "mask": -2, "bias": -2}
"""The axis along which an option is cut, for enough axes."""


@dataclasses.dataclass(frozen=True)
class Local:
    """A call that was read: the record of the whole, the device's arrays, its results' shapes."""

    call: Call
    arrays: Arrays
    out_shape: tuple[int, ...]
    lse_shape: tuple[int, ...]


def axis_size(name: str, axis: Any) -> int:
    """The devices of a mesh axis that is manual here.

    Args:
        name: What the user calls the argument.
        axis: What was passed.
    """
    if not isinstance(axis, str):
        advice = "Name one axis of the mesh."
        check.fail(name, "be the name of a mesh axis", check.shown(axis), advice, TypeError)
    try:
        return lax.axis_size(axis)
    except NameError:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        known = ", ".join(repr(known) for known in manual) or "none"
        advice = (
            f"Manual here: {known}. Call it inside jax.shard_map over a mesh that has this axis, "
            "or use `context_parallel_attention`."
        )
        check.fail(name, "be a manual mesh axis", repr(axis), advice)


def _length_axis(layout: str, rank: int) -> int:
    return rank - 2 if layout == "heads_first" else rank - 3


def _longer(x: Any, axis: int, times: int) -> jax.ShapeDtypeStruct:
    shape = list(x.shape)
    shape[axis] *= times
    return jax.ShapeDtypeStruct(tuple(shape), x.dtype)


def read_local(
    q: Any, k: Any, v: Any, mask: Any, options: dict[str, Any], size: int, **fixed: Any
) -> Local:
    """Check one device's arguments, and make the record of the whole.

    Args:
        q: The device's queries.
        k: Its keys.
        v: Its values.
        mask: Its rows of the mask, or None.
        options: The options by the names of `_api.options.Options`.
        size: On how many devices the length lies.
        **fixed: As in `_api.read.read`.
    """
    layout = fixed.get("layout", "heads_first")
    for name, x in (("q", q), ("k", k), ("v", v)):
        check.array(name, x)
        least = 2 if layout == "heads_first" else 3
        check.rank(name, x, (least, least + 1, 4), "that the whole has")
    longer: list[Any] = [_longer(x, _length_axis(layout, len(x.shape)), size) for x in (q, k, v)]
    q_len, k_len = (x.shape[_length_axis(layout, len(x.shape))] for x in (q, k))
    whole = {name: x for name, x in (*options.items(), ("mask", mask)) if x is not None}
    given, cut = dict(whole), set()
    for name, axis in PER_TOKEN.items():
        shape = getattr(whole.get(name), "shape", ())
        of_keys = name == "mask" and len(shape) == 2 and len(q.shape) > 2  # (b, j)
        per_batch = name == "q_offset" and len(shape) < 2
        if of_keys or per_batch or len(shape) < -axis:
            continue
        if shape[axis] == (k_len if name == "kv_segment_ids" else q_len):
            whole[name] = _longer(whole[name], axis, size)
            cut.add(name)
    call = read(longer[0], longer[1], longer[2], whole.pop("mask", None), whole, **fixed).call
    local = dataclasses.replace(call, q_len=q_len, k_len=k_len)
    arrays: dict[str, Any] = {
        name: jnp.asarray(x).reshape(local.shape(ROLES[name][call.layout]))
        for name, x in (("q", q), ("k", k), ("v", v))
    }
    for name, shape, dtype in call.terms:
        if name == "dropout_key":
            arrays[name] = dropout.key_words(jnp.asarray(given[name]))
            continue
        axis = TERM_ROLES[name].find("j" if name == "kv_segment_ids" else "i")
        mine = [n // size if name in cut and m == axis else n for m, n in enumerate(shape)]
        arrays[name] = jnp.asarray(given[name]).reshape(mine).astype(dtype)
    return Local(call, Arrays(**arrays), (*q.shape[:-1], v.shape[-1]), tuple(q.shape[:-1]))
