"""The engine for every mode and order of differentiation: blocks under `jax.checkpoint`.

Rabe & Staats 2021, "Self-attention Does Not Need O(n^2) Memory", algorithm of section 3: for each
block of queries, a scan over blocks of keys whose body is checkpointed, so that reverse mode keeps
the carried (m, l, acc) of each step and recomputes the rest. `jax.jvp`, `jax.linearize`,
`jax.hessian` and any nesting of them work, because JAX differentiates what is written here.
First-order memory is O(n) in forward and in reverse mode.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._core import masks
from flash_attention_jax._core.call import ROLES, Arrays, Call
from flash_attention_jax._core.logits import wide_terms
from flash_attention_jax._core.results import Results
from flash_attention_jax._core.similarity import normalised
from flash_attention_jax._core.tiles import Plan, Tile, plan
from flash_attention_jax._core.varying import full, unified
from flash_attention_jax._engines import online


def why_not(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    return call.symbolic_length


def attend(call: Call, arrays: Arrays) -> Results:
    """Attention in O(n) memory, differentiable to any order in any mode.

    Returns:
        out, in the call's dtype, lse and low, with the axes `ROLES` of the call's layout.
    """
    arrays = unified(_widened(call, normalised(call, arrays)))
    roles = Results(*(ROLES[name][call.layout] for name in Results._fields))
    if 0 in (call.batch, call.q_len):
        empty = (full(call.shape(axes), 0, call.acc_dtype, arrays) for axes in roles)
        return _in_dtype(call, Results(*empty))
    elements = 2**18 if call.platform == "cpu" else 2**25
    steps = plan(call, 512, 512, elements, sums_queries=False)
    visits = masks.Visits.of(steps, arrays)

    def query_block(_: None, step: jax.Array) -> tuple[None, Results]:
        rows = jax.checkpoint(lambda arrays: _attend_rows(arrays, steps, visits, step))(arrays)
        return None, rows

    count = jnp.arange(steps.units * steps.queries.count, dtype=jnp.int32)
    _, rows = lax.scan(query_block, None, count)

    def place(whole: Results, block: tuple[jax.Array, Results]) -> tuple[Results, None]:
        step, rows = block
        tile = _tile(steps, step, 0)
        placed = (
            tile.put(x, axes, part, "bhrie"[: part.ndim])
            for x, axes, part in zip(whole, roles, rows, strict=True)
        )
        return Results(*placed), None

    whole = Results(
        *(full(call.shape(axes), 0, x.dtype, rows) for axes, x in zip(roles, rows, strict=True))
    )
    return lax.scan(place, whole, (count, rows))[0]


def _in_dtype(call: Call, results: Results) -> Results:
    return results._replace(out=results.out.astype(call.dtype))


def _widened(call: Call, arrays: Arrays) -> Arrays:
    """The arrays made wide: JAX sums the gradients of blocks in the dtype of the array."""
    q, k, v = (x.astype(call.acc_dtype) for x in (arrays.q, arrays.k, arrays.v))
    return wide_terms(call, arrays._replace(q=q, k=k, v=v))


def _tile(steps: Plan, step: jax.Array, key_block: Any) -> Tile:
    return steps.tile(step // steps.queries.count, step % steps.queries.count, key_block)


def _attend_rows(arrays: Arrays, steps: Plan, visits: masks.Visits, number: jax.Array) -> Results:
    """One block of queries against the keys that it sees, with the axes of `online.end`."""
    call = steps.call
    tile = _tile(steps, number, 0)
    q = online.queries(call, arrays, tile)
    masked = not visits.all_full
    codes = visits.codes(tile, number % steps.queries.count, None) if masked else None

    # The branch lies inside: a checkpoint inside a branch would keep all of k and v for each step.
    @jax.checkpoint
    def visit(arrays: Arrays, q: jax.Array, index: jax.Array, carry: online.Carry) -> online.Carry:
        def step(carry: online.Carry) -> online.Carry:
            return online.step(call, arrays, _tile(steps, number, index), q, carry, masked=masked)

        if codes is None:
            return step(carry)
        return lax.cond(codes[index] == masks.EMPTY, lambda carry: carry, step, carry)

    def key_block(carry: online.Carry, index: jax.Array) -> tuple[online.Carry, None]:
        return visit(arrays, q, index, carry), None

    carry = online.start(call, tile, q)
    if call.k_len:
        carry, _ = lax.scan(key_block, carry, jnp.arange(steps.keys.count, dtype=jnp.int32))
    return _in_dtype(call, online.end(call, arrays, tile, carry))
