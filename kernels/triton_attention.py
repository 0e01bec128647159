"""The Triton kernels as `join` wants them: what each pass launches, and what `vmap` makes of it.

jax-triton knows neither derivatives nor `vmap`: `join` has the first, and here examples become
batches where that means the same, and are taken one after another where it does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._core.call import ROLES, TERM_ROLES, Arrays, Call
from flash_attention_jax._core.results import Results
from flash_attention_jax.kernels import join, triton_backward, triton_forward, triton_terms
from flash_attention_jax.kernels import operands as ops
from flash_attention_jax.kernels.join import Problem, Reference, Sums
from flash_attention_jax.kernels.triton_config import Direction, tiles_of
from flash_attention_jax.kernels.triton_launch import Shapes, launch, operands, spec_of

Given = dict[str, jax.Array]
Pass = Callable[[Problem, Given], dict[str, jax.Array]]


LAUNCHED: dict[Direction, tuple[Any, bool | None]] = {
    "forward": (triton_forward.triton_forward, True),
    "dq": (triton_backward.triton_dq, True),
    "dkv": (triton_backward.triton_dkv, False),
    "shares": (triton_terms.triton_shares, True),
    "dbias": (triton_terms.triton_dbias, None),
    "drelative": (triton_terms.triton_drelative, None),
}
"""The kernels, and whether they walk keys or queries; None where they take no route."""


def attend(reference: Reference, call: Call, arrays: Arrays) -> Results:
    """Attention by the Triton kernels; arguments and results as in `join.attend`."""
    return join.attend(KERNELS, reference, call, arrays)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


# --- forward ---


def _forward(problem: Problem, arrays: Arrays) -> Sums:
    return Sums(**_batched(_run_forward, problem, _present(arrays)))


def _run_forward(problem: Problem, given: Given) -> dict[str, jax.Array]:
    call, arrays = problem.call, Arrays(**given)
    read = {}
    if arrays.sinks is not None:
        read["sinks"] = ops.per_head(call, arrays.sinks) * np.float32(ops.LOG2E)
    sums = jax.ShapeDtypeStruct(call.shape(ROLES["lse"][call.layout]), jnp.float32)
    made = {
        "out": jax.ShapeDtypeStruct(call.shape(ROLES["out"][call.layout]), jnp.dtype(call.dtype)),
        "top": sums,
        "total": sums,
    }
    return _launch(problem, arrays, "forward", read, made)


def _launch(
    problem: Problem, arrays: Arrays, direction: Direction, read: Given, made: Shapes
) -> dict[str, jax.Array]:
    """Run a kernel, which reads `read` besides the operands of every kernel."""
    call, tiles = problem.call, tiles_of(problem.call, direction)
    kernel, over_keys = LAUNCHED[direction]
    every = operands(call, arrays, tiles, over_keys=over_keys) | read
    spec = spec_of(call, tiles, problem.factor, every)
    q_blocks, kv_blocks = _blocks(call.q_len, tiles.block_q), _blocks(call.k_len, tiles.block_kv)
    if direction == "dkv":
        grid = kv_blocks * call.kv_heads * call.batch
    elif direction == "dbias":
        batch, heads, i_size, j_size = made["dbias"].shape
        grid = batch * heads * (q_blocks if i_size > 1 else 1) * (kv_blocks if j_size > 1 else 1)
    elif direction == "drelative":
        heads, count = made["drelative"].shape
        grid = heads * _blocks(count, tiles.block_q)
    else:
        grid = q_blocks * call.heads * call.batch
    return launch(kernel, call, tiles, spec, every, made, grid)


# --- backward ---


def _gradients(
    problem: Problem, arrays: Arrays, dout: jax.Array, lse2: jax.Array, delta: jax.Array
) -> dict[str, jax.Array]:
    given = _present(arrays) | {"dout": dout, "lse2": lse2, "delta": delta}
    return _batched(_run_gradients, problem, given)


def _run_gradients(problem: Problem, given: Given) -> dict[str, jax.Array]:
    given = dict(given)
    call = problem.call
    read = {
        "dout": given.pop("dout").astype(call.dtype),
        "lse2": given.pop("lse2"),
        "delta": given.pop("delta"),
    }
    arrays = Arrays(**given)
    # Wide for the derivative of the norm.
    normed = call.similarity == "cosine" and call.l2norm
    dtypes = {"q": jnp.float32, "k": jnp.float32} if normed else {}
    dq, dk, dv = (
        jax.ShapeDtypeStruct(
            call.shape(ROLES[name][call.layout]), jnp.dtype(dtypes.get(name, call.dtype))
        )
        for name in "qkv"
    )
    found = _launch(problem, arrays, "dq", read, {"dq": dq})
    found |= _launch(problem, arrays, "dkv", read, {"dk": dk, "dv": dv})
    if arrays.bias is not None:
        made = {"dbias": jax.ShapeDtypeStruct(arrays.bias.shape, jnp.float32)}
        found |= _launch(problem, arrays, "dbias", read, made)
    if arrays.relative_bias is not None:
        made = {"drelative": jax.ShapeDtypeStruct(arrays.relative_bias.shape, jnp.float32)}
        found["drelative_bias"] = _launch(problem, arrays, "drelative", read, made)["drelative"]
    return found | _shares(problem, arrays, read)


def _shares(problem: Problem, arrays: Arrays, read: Given) -> dict[str, jax.Array]:
    """What each query gives the gradients of its head's numbers, (B, N, T), if there are any."""
    call = problem.call
    wanted = {
        "dp": True,
        "dslopes": arrays.alibi_slopes is not None,
        "dslopes_weight": arrays.alibi_slopes is not None,
        "dscale": arrays.scale is not None,
        "dscale_weight": arrays.scale is not None,
    }
    if arrays.sinks is None and not wanted["dslopes"] and not wanted["dscale"]:
        return {}
    made = {  # one number in all where nothing is written
        name: jax.ShapeDtypeStruct(
            (call.batch, call.heads, call.q_len) if asked else (1,), jnp.float32
        )
        for name, asked in wanted.items()
    }
    found = _launch(problem, arrays, "shares", read, made)
    return {name: found[name] for name, asked in wanted.items() if asked}


KERNELS = join.Kernels(_forward, _gradients)


# --- vmap ---


def _present(arrays: Arrays) -> Given:
    return {name: x for name, x in arrays._asdict().items() if x is not None}


def _batched(run: Pass, problem: Problem, given: Given) -> dict[str, jax.Array]:
    """Call a pass so that `vmap` of it works."""

    @jax.custom_batching.custom_vmap
    def function(given: Given) -> dict[str, jax.Array]:
        return run(problem, given)

    @function.def_vmap
    def _(axis_size: int, in_batched: list[dict[str, bool]], given: Given) -> Any:
        mapped = in_batched[0]
        if _folds(problem.call, mapped):
            found = _folded(run, problem, axis_size, mapped, given)
        else:
            varying = {name: x for name, x in given.items() if mapped[name]}
            fixed = {name: x for name, x in given.items() if not mapped[name]}
            found = jax.lax.map(lambda one: _batched(run, problem, fixed | one), varying)
        return found, jax.tree.map(lambda _: True, found)

    return function(given)


_PER_EXAMPLE = ("dout", "lse2", "delta")
"""What a pass reads besides the arrays of its call; the batch is the first axis."""


def _folds(call: Call, mapped: dict[str, bool]) -> bool:
    """Whether examples may stand as batches of one call, each with a gradient of its own."""
    if call.dropout_rate:  # its bits depend on the batch
        return False
    for name, x in mapped.items():
        leads = name in ("q", "k", "v", *_PER_EXAMPLE) or TERM_ROLES[name][0] == "b"
        if x and not leads:
            return False
        shape = call.shape_of(name)
        if x and shape is not None and shape[0] != call.batch:
            return False
    # A gradient that is summed over the batch would be summed over the examples.
    backward = "dout" in mapped
    shared = backward and "bias" in mapped and not mapped["bias"]
    return not (shared or (backward and "relative_bias" in mapped))


def _folded(
    run: Pass, problem: Problem, size: int, mapped: dict[str, bool], given: Given
) -> dict[str, jax.Array]:
    """The pass on examples as batches."""
    call = problem.call

    def fold(name: str, x: jax.Array) -> jax.Array:
        if mapped[name]:
            return x.reshape(-1, *x.shape[2:])
        term = name in TERM_ROLES
        if (term and TERM_ROLES[name][0] != "b") or (term and x.shape[0] == 1):
            return x
        return jnp.broadcast_to(x[None], (size, *x.shape)).reshape(-1, *x.shape[1:])

    given = {name: fold(name, x) for name, x in given.items()}
    terms = tuple(
        (name, given[name].shape if name in given else shape, dtype)
        for name, shape, dtype in call.terms
    )
    wide = dataclasses.replace(call, batch=call.batch * size, terms=terms)
    found = run(dataclasses.replace(problem, call=wide), given)
    return {name: x.reshape(size, -1, *x.shape[1:]) for name, x in found.items()}
