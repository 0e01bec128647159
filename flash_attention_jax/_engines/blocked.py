"""The reference engine: blocks under `lax.scan` and `jax.custom_vjp`, in O(n) memory.

Forward (Dao 2023, FlashAttention-2, algorithm 1): for each block of queries, walk the key blocks
that the mask leaves, with a running maximum m, a sum l and an unnormalised output acc. Where the
logits have a known bound (cosine similarity, softcap) there is no maximum to run and nothing to
rescale. The backward is `blocked_backward`, the sizes of blocks are `blocked_plan`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from flash_attention_jax._core import masks
from flash_attention_jax._core.call import DIFFERENTIABLE, Arrays, Call, roles
from flash_attention_jax._core.results import Results
from flash_attention_jax._core.similarity import normalised
from flash_attention_jax._core.tiles import Plan, Tile
from flash_attention_jax._core.varying import full, unified
from flash_attention_jax._engines import online
from flash_attention_jax._engines.blocked_backward import gradients
from flash_attention_jax._engines.blocked_plan import by_quarters, chains, forward_plan, walk
from flash_attention_jax._engines.rule import with_gradients

_QUERIES = 3
"""Axis of the queries in `online.Carry` and in a block of queries."""

Blocks = dict[str, Any]


def why_not(call: Call) -> str | None:
    """Why this engine cannot run the call."""
    if call.differentiation == "any":
        return "its custom rule has no forward mode (differentiation='any')"
    return call.symbolic_length


def attend(call: Call, arrays: Arrays) -> Results:
    """Attention in O(n) memory.

    Returns:
        out, in the call's dtype, lse and low, with the axes `ROLES` of the call's layout.
    """
    results = unrounded(call, unified(normalised(call, arrays)))
    return results._replace(out=results.out.astype(call.dtype))


def unrounded(call: Call, arrays: Arrays) -> Results:
    """`attend` for `normalised` and `unified` arrays, with out in the accumulator's dtype."""
    return _attend(call, *split(arrays))


def split(arrays: Arrays) -> tuple[Blocks, Blocks]:
    """The arrays that receive gradients, and the others, by name; without those absent."""
    present = {name: x for name, x in arrays._asdict().items() if x is not None}
    floats = {name: present.pop(name) for name in DIFFERENTIABLE if name in present}
    return floats, present


def _attend_rule(call: Call, floats: Blocks, others: Blocks) -> Results:
    arrays = Arrays(**floats, **others)
    steps = forward_plan(call)
    visits = masks.Visits.of(steps.halved if by_quarters(steps) else steps, arrays)
    # Kept unrounded for delta, which would otherwise be the largest error of 16-bit gradients.
    empty = _no_keys(call, floats)
    if 0 in (empty.out.size, call.k_len):
        return empty

    def query_block(whole: Results, step: jax.Array) -> tuple[Results, None]:
        unit, index = step // steps.queries.count, step % steps.queries.count
        for part, rows in _attend_rows(arrays, steps, visits, unit, index):
            whole = Results(
                *(
                    part.put(x, roles(call.layout, name), block, "bhrie"[: block.ndim])
                    for name, x, block in zip(Results._fields, whole, rows, strict=True)
                )
            )
        return whole, None

    count = steps.units * steps.queries.count
    return lax.scan(query_block, empty, jnp.arange(count, dtype=jnp.int32))[0]


def _no_keys(call: Call, floats: Blocks) -> Results:
    """The results of rows that see no key, all of them."""
    out, lse, low = (
        full(call.shape(roles(call.layout, name)), value, call.acc_dtype, floats)
        for name, value in (("out", 0), ("lse", -jnp.inf), ("low", 0))
    )
    if "sinks" in floats:
        tile = Tile.whole(call)
        sinks = tile.take(floats["sinks"], "n", "bhri")
        lse = tile.put(lse, roles(call.layout, "lse"), sinks, "bhri")
    return Results(out, lse, low)


def _attend_rows(
    arrays: Arrays, steps: Plan, visits: masks.Visits, unit: jax.Array, index: jax.Array
) -> list[tuple[Tile, Results]]:
    """One block of queries against the keys that it sees.

    Returns:
        Parts of the block, each with its results, whose axes are those of `online.end`.
    """
    call = steps.call
    tile = steps.tile(unit, index, 0)
    parts = chains(steps, tile)
    qs = [online.queries(call, arrays, part) for part in parts]
    sums = [online.start(call, part, q) for part, q in zip(parts, qs, strict=True)]
    if visits.plan is steps:
        route = visits.along_keys(tile, index)
        sums = _walk_keys(arrays, steps, unit, index, route, qs, sums)
    else:
        # These visits know of quarters: a block whose quarters are all visible is visited whole,
        # each of the others by the two halves of its queries.
        codes = [visits.codes(tile, 2 * index + number, None) for number in range(2)]
        squares, quarters = masks.full_squares(jnp.stack(codes))
        sums = _walk_keys(arrays, steps, unit, index, squares, qs, sums)
        size = visits.plan.queries.block

        def half(number: jax.Array, sums: list[online.Carry]) -> list[online.Carry]:
            route, block = masks.route(quarters[number]), 2 * index + number
            own_qs, own = jax.tree.map(lambda x: _rows(x, number, size), (qs, sums))
            own = _walk_keys(arrays, visits.plan, unit, block, route, own_qs, own)
            return jax.tree.map(lambda x, rows: _with_rows(x, rows, number, size), sums, own)

        sums = lax.fori_loop(0, 2, half, sums)
    return [
        (part, online.end(call, arrays, part, carry))
        for part, carry in zip(parts, sums, strict=True)
    ]


def _walk_keys(
    arrays: Arrays,
    plan: Plan,
    unit: jax.Array,
    block: jax.Array,
    route: masks.Route,
    qs: list[jax.Array],
    sums: list[online.Carry],
) -> list[online.Carry]:
    """Add the key blocks of a route to the sums of the plan's query block of that number."""

    def visit(partial: bool, key_block: jax.Array, sums: list[online.Carry]) -> list[online.Carry]:
        tile = plan.tile(unit, block, key_block)
        parts = tile.by_head() if len(qs) > 1 else [tile]
        return [
            online.step(plan.call, arrays, part, q, carry, masked=partial)
            for part, q, carry in zip(parts, qs, sums, strict=True)
        ]

    return walk(route, visit, sums)


def _rows(x: jax.Array, number: jax.Array, size: int) -> jax.Array:
    """The rows `number * size` and on of a block of queries, or of their sums."""
    return lax.dynamic_slice_in_dim(x, number * size, size, _QUERIES)


def _with_rows(x: jax.Array, rows: jax.Array, number: jax.Array, size: int) -> jax.Array:
    """The block with these rows replaced."""
    return lax.dynamic_update_slice_in_dim(x, rows, number * size, _QUERIES)


# The added terms have a sum of their own in `gradients`, so a constant bias costs no gradient.
_attend = with_gradients(_attend_rule, gradients)
