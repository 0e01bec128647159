"""The reference engine: blocks under `lax.scan` and `jax.custom_vjp`, in O(n) memory.

Forward (Dao 2023, FlashAttention-2, algorithm 1): for each block of queries, walk the key blocks
that the mask leaves, with a running maximum m, a sum l and an unnormalised output acc. Where the
logits have a known bound (cosine similarity, softcap) there is no maximum to run and nothing to
rescale.

Backward (algorithm 2): for each block of keys, walk the query blocks, recompute the probabilities
from lse, and add the block's share to each gradient. Everything that the backward needs of the
softmax is in lse, with what it lacks (`_core.results`), and delta = rowsum(out * dout) - dlse, so
the gradients are plain sums over blocks. `_pair_sum` is that sum, for any function of a block; its
own derivative is again such a sum, of the function's transpose, so reverse mode nests without end
and stays O(n).

What was measured on CPU (XLA, 2 cores), and what follows from it:

- XLA's matrix product is 3x slower when its left operand has to be transposed. So the backward
  holds its blocks with keys first ("bhjri"): dk and dv need no transpose, and dq is collected
  transposed (d before i), with the small key block as the left operand.
- Each operation alone is split over the cores and waits for the last of them, about 0.1 ms: blocks
  are large, and in the forward two heads are walked side by side (`_chains`).
- Large blocks waste half of a causal diagonal, so the forward walks those by quarters
  (`_by_quarters`). In the backward either was no faster.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core import dropout, masks
from flash_attention_jax._core.call import (
    DIFFERENTIABLE,
    ROLES,
    TERM_ROLES,
    Arrays,
    Call,
    Size,
    known,
)
from flash_attention_jax._core.logits import LOGIT_TERMS, below, logits, product, scaled, term_axes
from flash_attention_jax._core.results import (
    Results,
    delta_of,
    finite_or_zero,
    saved,
    sink_shares,
    without_low,
)
from flash_attention_jax._core.similarity import needs_running_maximum, normalised
from flash_attention_jax._core.tiles import LANES, USUAL_GROUP, Plan, Tile, plan
from flash_attention_jax._core.varying import axes_of, full, unified, vary
from flash_attention_jax._engines import online
from flash_attention_jax._engines.online import compute_dtype, folded, folds_scale

COLUMNS = "bhjri"  # axes of a block of logits in the backward

_ROWS = 3  # axis of the queries in `_engines.online.Carry` and in a block of queries

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


_SHORT = 2048
"""Up to this length large blocks cost more than they save: memory, and what a diagonal hides."""

_BANDS = ((512, 128, 128), (1024, 512, 256), (4096, 512, 512))
"""Blocks of queries and of keys for a band of under so many keys: larger ones are mostly masked."""

_LARGE = 2**19
"""Logits of a head in a block from which on heads are walked apart; from twice that on quarters."""


def _plan(call: Call, *, sums_queries: bool) -> Plan:
    """Block sizes per platform: what kept XLA's matrix product busy when measured."""
    short = max(call.q_len, call.k_len) <= _SHORT
    if call.platform != "cpu":
        block_q, block_kv, elements = 512, 512, 2**25
    elif call.banded and short:
        block_q, block_kv, elements = 512, 512, 2**20
    elif sums_queries and (short or call.banded):
        block_q, block_kv, elements = 1024, 1024, 2**20
    elif sums_queries:
        # Longer rows: fewer passes over what is summed.
        block_q, block_kv, elements = 1024, 2048, 2**21
    else:
        block_q, block_kv, elements = 1024, 1024, 2**21
    left, right = masks.band(call)
    if left is not None and right is not None:
        for keys, rows, columns in _BANDS:
            if left + right < keys:
                block_q, block_kv = min(block_q, rows), min(block_kv, columns)
                break
    return plan(call, block_q, block_kv, elements, sums_queries=sums_queries)


def _logits_of_a_head(steps: Plan) -> int:
    """How many logits a block holds for each key head."""
    return steps.queries.block * known(steps.call.group_size, USUAL_GROUP) * steps.keys.block


def _chains(steps: Plan, tile: Tile) -> list[Tile]:
    """A tile as one chain of operations or, head by head, as several that do not wait for another.

    XLA's CPU runtime runs operations side by side that do not depend on each other. Each of them
    alone leaves a core idle at its end (measured: 10% of the time).
    """
    apart = steps.call.platform == "cpu" and _logits_of_a_head(steps) >= _LARGE
    return tile.by_head() if apart else [tile]


def _by_quarters(steps: Plan) -> bool:
    """Whether blocks that are partly masked are walked by quarters, of which some are not."""
    return (
        steps.call.platform == "cpu"
        and _logits_of_a_head(steps) >= 2 * _LARGE
        and steps.halves
        and masks.masks_anything(steps.call)
    )


# --- forward ---


def _attend_rule(call: Call, floats: Blocks, others: Blocks) -> Results:
    arrays = Arrays(**floats, **others)
    steps = _plan(call, sums_queries=False)
    visits = masks.Visits.of(steps.halved if _by_quarters(steps) else steps, arrays)
    # Kept unrounded for delta, which would otherwise be the largest error of 16-bit gradients.
    empty = _no_keys(call, floats)
    if 0 in (empty.out.size, call.k_len):
        return empty

    def query_block(whole: Results, step: jax.Array) -> tuple[Results, None]:
        unit, index = step // steps.queries.count, step % steps.queries.count
        for part, rows in _attend_rows(arrays, steps, visits, unit, index):
            whole = Results(
                *(
                    part.put(x, _roles(call, name), block, "bhrie"[: block.ndim])
                    for name, x, block in zip(Results._fields, whole, rows, strict=True)
                )
            )
        return whole, None

    count = steps.units * steps.queries.count
    return lax.scan(query_block, empty, jnp.arange(count, dtype=jnp.int32))[0]


def _no_keys(call: Call, floats: Blocks) -> Results:
    """The results of rows that see no key, all of them."""
    out, lse, low = (
        full(call.shape(_roles(call, name)), value, call.acc_dtype, floats)
        for name, value in (("out", 0), ("lse", -jnp.inf), ("low", 0))
    )
    if "sinks" in floats:
        tile = Tile.whole(call)
        sinks = tile.take(floats["sinks"], "n", "bhri")
        lse = tile.put(lse, _roles(call, "lse"), sinks, "bhri")
    return Results(out, lse, low)


def _attend_rows(
    arrays: Arrays, steps: Plan, visits: masks.Visits, unit: jax.Array, index: jax.Array
) -> list[tuple[Tile, Results]]:
    """One block of queries against the keys that it sees.

    Returns:
        Parts of the block, each with its results, whose axes are those of `_engines.online.end`.
    """
    call = steps.call
    tile = steps.tile(unit, index, 0)
    chains = _chains(steps, tile)
    qs = [online.queries(call, arrays, part) for part in chains]
    carries = [online.start(call, part, q) for part, q in zip(chains, qs, strict=True)]

    def walk(
        plan: Plan, block: jax.Array, route: masks.Route, qs: Any, carries: list[online.Carry]
    ) -> list[online.Carry]:
        def visit(partial: bool, key_block: jax.Array, carries: Any) -> list[online.Carry]:
            parts = _chains(steps, plan.tile(unit, block, key_block))
            return [
                online.step(call, arrays, part, q, carry, masked=partial)
                for part, q, carry in zip(parts, qs, carries, strict=True)
            ]

        return _walk(route, visit, carries)

    def half(number: jax.Array, carries: list[online.Carry]) -> list[online.Carry]:
        rows = visits.plan.queries.block

        def cut(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, number * rows, rows, _ROWS)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(whole, part, number * rows, _ROWS)

        route = masks.route(quarters[number])
        block = 2 * index + number
        found = walk(visits.plan, block, route, *jax.tree.map(cut, (qs, carries)))
        return jax.tree.map(put, carries, found)

    if visits.plan is steps:
        carries = walk(steps, index, visits.along_keys(tile, index), qs, carries)
    else:
        codes = [visits.codes(tile, 2 * index + number, None) for number in range(2)]
        squares, quarters = masks.full_squares(jnp.stack(codes))
        carries = lax.fori_loop(0, 2, half, walk(steps, index, squares, qs, carries))
    return [
        (part, online.end(call, arrays, part, carry))
        for part, carry in zip(chains, carries, strict=True)
    ]


def _walk(route: masks.Route, visit: Callable[[bool, jax.Array, Any], Any], carry: Any) -> Any:
    """Visit the blocks of a route: the partial ones masked, then the full ones without a mask."""
    first = 0
    if route.partial is not None:
        first = route.partial
        carry = lax.fori_loop(0, first, lambda n, c: visit(True, route.order[n], c), carry)
    return lax.fori_loop(first, route.count, lambda n, c: visit(False, route.order[n], c), carry)


# --- backward ---


def _attend_forward(call: Call, floats: Blocks, others: Blocks) -> tuple[Any, Any]:
    results = saved(_attend(call, floats, others))
    return results, (floats, others, results)


def _attend_backward(call: Call, residuals: Any, cotangents: Any) -> tuple[Blocks, None]:
    """Every gradient, wanted or not; the compiler drops a sum over blocks that nobody reads.

    So the added terms have a sum of their own: a constant bias costs no gradient. To ask
    `custom_vjp` which inputs are differentiated (`symbolic_zeros`) was tried and is wrong under
    `jax.checkpoint`, which may run a rule that was traced for other inputs.
    """
    floats, others, results = residuals
    found = gradients(call, floats, others, results, cotangents[:2])
    return {name: x.astype(floats[name].dtype) for name, x in found.items()}, None


def gradients(
    call: Call, floats: Blocks, others: Blocks, results: Results, cotangents: Any
) -> Blocks:
    """The gradients, in the accumulator's dtype, for the cotangents of out and lse.

    Where `results` are those of attention to more keys than the call's, the gradients are the
    call's share in that: all of it enters through lse, low and delta alone.
    """
    dout, dlse = cotangents
    delta = delta_of(results, dout, dlse)
    inputs = {name: x for name, x in floats.items() if name != "sinks"}
    of_lse = without_low(results, dout, delta)
    inputs |= {"dout": of_lse[0], "lse": results.lse, "delta": of_lse[1]}
    found: Blocks = {}
    for group in (("q", "k", "v", "scale"), ("bias", "alibi_slopes", "relative_bias")):
        names = tuple(name for name in group if name in floats)
        if names:
            sums = _pair_sum(_Gradients(call, names), inputs, others)
            for name in names:
                found[name] = _from_sum(call, name, sums[name])
    if "sinks" in floats:
        found["sinks"] = _sink_gradient(call, floats["sinks"], results, delta)
    return found


_attend: Any = jax.custom_vjp(_attend_rule, nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _attend_backward)


def _sink_gradient(call: Call, sinks: jax.Array, results: Results, delta: jax.Array) -> jax.Array:
    tile, roles = Tile.whole(call), _roles(call, "lse")
    lse, low, delta = (tile.take(x, roles, "bhri") for x in (results.lse, results.low, delta))
    shares = sink_shares(tile.take(sinks, "n", "bhri").astype(lse.dtype), lse, low, delta)
    found = tile.put(full(sinks.shape, 0, lse.dtype, lse), "n", shares, "bhri")
    return vary(found, axes_of(sinks))  # a sum over no rows has lost its axes


# dq is collected with its dimension before its queries: see the head of the file.
_SUM_ROLES = {"q": "bndi"}


def _from_sum(call: Call, name: str, total: jax.Array) -> jax.Array:
    """A gradient as the caller's layout has it, from the axes in which it was collected."""
    if name not in _SUM_ROLES:
        return total
    return lax.transpose(
        total, [_SUM_ROLES[name].index(letter) for letter in ROLES[name][call.layout]]
    )


def _roles(call: Call, name: str) -> str:
    """Axes of a result, or of an input of `_Gradients`."""
    name = {"dout": "out", "delta": "lse"}.get(name, name)
    return ROLES[name][call.layout] if name in ROLES else TERM_ROLES[name]


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a block lies: the axes of its array, and those in which a block function has it."""

    roles: str
    axes: str
    shape: tuple[Size, ...]


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The backward pass of one block: the share of each wanted gradient. A hashable function."""

    call: Call
    wanted: tuple[str, ...]

    def inputs(self) -> dict[str, Slot]:
        """Slots of the differentiable inputs."""
        axes = {
            "q": "bhrid",
            "k": "bhjd",
            "v": "bhje",
            "dout": "bhrie",
            "lse": "bhri",
            "delta": "bhri",
        }
        names = [*axes, *(name for name in LOGIT_TERMS if self.call.has(name))]
        return {name: self._slot(name, _roles(self.call, name), axes.get(name)) for name in names}

    def outputs(self) -> dict[str, Slot]:
        """Slots of the sums."""
        axes = {"q": "bhdri", "k": "bhjd", "v": "bhje"}
        return {
            name: self._slot(name, _SUM_ROLES.get(name, _roles(self.call, name)), axes.get(name))
            for name in self.wanted
        }

    def _slot(self, name: str, roles: str, axes: str | None) -> Slot:
        shape = self.call.shape_of(name) or self.call.shape(roles)
        return Slot(roles, axes or term_axes(name, COLUMNS), shape)

    def __call__(self, arrays: Arrays, tile: Tile, partial: bool, blocks: Blocks) -> Blocks:
        """Algorithm 2, lines 10-18, with keys first."""
        call, dtype = self.call, compute_dtype(self.call)
        at = masks.positions(call, arrays, tile, COLUMNS)
        visible = masks.visible(call, arrays, tile, at, COLUMNS) if partial else None
        q, k, v, dout = (blocks[name].astype(dtype) for name in ("q", "k", "v", "dout"))
        lse, delta = (blocks[name][:, :, None] for name in ("lse", "delta"))
        if visible is not None:
            rows, columns = (masks.sees(visible, COLUMNS, letter) for letter in "ij")
            q = masks.cleaned(q, "bhrid", rows, COLUMNS)
            dout = masks.cleaned(dout, "bhrie", rows, COLUMNS)
            k, v = (
                masks.cleaned(k, "bhjd", columns, COLUMNS),
                masks.cleaned(v, "bhje", columns, COLUMNS),
            )

        fold = folds_scale(call)
        terms = {name: blocks[name] for name in LOGIT_TERMS if name in blocks}
        scale = terms.pop("scale", None) if fold else None
        unscaled, q = q, folded(call, q, None if scale is None else _as_rows(scale))
        similarity = _pairs(call, q, k)
        similarity = similarity if fold else scaled(call, similarity)
        fixed = {name: x for name, x in terms.items() if name not in self.wanted}
        moving = {name: x for name, x in terms.items() if name in self.wanted}

        def to_logits(similarity: jax.Array, moving: Blocks) -> jax.Array:
            return logits(call, similarity, fixed | moving, at, visible, COLUMNS)

        x, pull = jax.vjp(to_logits, similarity, moving)
        lse = finite_or_zero(lse)
        p = jnp.exp(below(x, lse) if needs_running_maximum(call, dtype) else x - lse)
        dp = _pairs(call, dout, v)
        kept = p
        if call.dropout_rate:
            words = dropout.row_words(
                arrays.dropout_key, call.heads, at.b, at.n, at.i, arrays.dropout_origin
            )
            factor = jnp.where(
                dropout.keep(words, at.j, call.dropout_rate),
                np.asarray(1 / (1 - call.dropout_rate), p.dtype),
                0,
            )
            kept, dp = p * factor, dp * factor
        result: Blocks = {}
        if "v" in self.wanted:
            result["v"] = product(call, kept.astype(dtype), dout, "bhjri,bhrie->bhje")
        if self.wanted == ("v",):
            return result
        ds, dterms = pull(p * (dp - delta))
        result |= dterms
        ds = ds.astype(dtype)
        if "k" in self.wanted:
            dk = product(call, ds, q, "bhjri,bhrid->bhjd")
            result["k"] = dk if fold else scaled(call, dk)
        if "q" in self.wanted:
            dq = product(call, k, ds, "bhjd,bhjri->bhdri")
            result["q"] = scaled(call, dq) if scale is None else dq * scale
            if scale is not None:
                along = lax.transpose(unscaled, [0, 1, 4, 2, 3]) * dq
                result["scale"] = along.sum(axis=(0, 2, 4), keepdims=True)
        return result


def _as_rows(scale: jax.Array) -> jax.Array:
    """A block of the scale, of the axes `COLUMNS`, beside a block of queries "bhrid"."""
    return lax.transpose(scale, [0, 1, 3, 4, 2])


def _pairs(call: Call, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Products of rows (b, h, r, i, d) and columns (b, h, j, d), with the bits of the forward's.

    XLA's CPU product adds up the last columns, which fill no block of `LANES`, in another order. So
    the operands change places only where there are none, or where both are as many.
    """
    sizes = call.group_size * rows.shape[3], columns.shape[2]
    if call.platform == "cpu" and sizes[0] != sizes[1] and (sizes[0] % LANES or sizes[1] % LANES):
        return lax.transpose(product(call, rows, columns, "bhrid,bhjd->bhrij"), [0, 1, 4, 2, 3])
    return product(call, columns, rows, "bhjd,bhrid->bhjri")


@dataclasses.dataclass(frozen=True)
class _Transposed:
    """The vjp of a block function, itself one: inputs and cotangents in, their cotangents out."""

    function: Any

    @property
    def call(self) -> Call:
        """The call of the innermost function."""
        return self.function.call

    @property
    def order(self) -> int:
        """How often `_Gradients` was transposed."""
        return 1 + getattr(self.function, "order", 0)

    def cotangent(self, name: str) -> str:
        """Name of the cotangent of an output: each order has its own."""
        return f"ct{self.order} {name}"

    def inputs(self) -> dict[str, Slot]:
        """Those of the function, and a cotangent per output of it."""
        return self.function.inputs() | {
            self.cotangent(name): slot for name, slot in self.function.outputs().items()
        }

    def outputs(self) -> dict[str, Slot]:
        """One sum per input of the function."""
        return self.function.inputs()

    def __call__(self, arrays: Arrays, tile: Tile, partial: bool, blocks: Blocks) -> Blocks:
        """Differentiate the function in this block."""
        primal = {name: blocks[name] for name in self.function.inputs()}
        result, pull = jax.vjp(lambda primal: self.function(arrays, tile, partial, primal), primal)
        return pull(
            {
                name: blocks[self.cotangent(name)].astype(x.dtype).reshape(x.shape)
                for name, x in result.items()
            }
        )[0]


def _pair_sum_rule(function: Any, floats: Blocks, others: Blocks) -> Blocks:
    """Sum of `function` over all pairs of blocks that the mask leaves.

    Args:
        function: A hashable block function (`_Gradients`, `_Transposed`).
        floats: Its differentiable inputs, whole.
        others: Masks, ids, lengths and the like, by the names of `Arrays`.
    """
    call: Call = function.call
    steps = _plan(call, sums_queries=True)
    arrays = Arrays(q=None, k=None, v=None, **others)
    visits = masks.Visits.of(steps, arrays)
    inputs, outputs = function.inputs(), function.outputs()
    sums = {name: full(slot.shape, 0, call.acc_dtype, floats) for name, slot in outputs.items()}
    if 0 in (call.q_len, call.k_len, call.batch):
        return sums

    def key_block(sums: Blocks, step: jax.Array) -> tuple[Blocks, None]:
        unit, index = step // steps.keys.count, step % steps.keys.count

        def visit(partial: bool, query_block: jax.Array, sums: Blocks) -> Blocks:
            tile = steps.tile(unit, query_block, index)
            blocks = {
                name: tile.take(floats[name], slot.roles, slot.axes)
                for name, slot in inputs.items()
            }
            # The gradient of a term is summed within a block too, in the dtype of its block.
            wide = {
                name: blocks[name].astype(call.acc_dtype) for name in LOGIT_TERMS if name in blocks
            }
            blocks |= wide
            share = function(arrays, tile, partial, blocks)
            return {
                name: tile.put(sums[name], slot.roles, share[name], slot.axes, add=True)
                for name, slot in outputs.items()
            }

        return _walk(visits.along_queries(steps.tile(unit, 0, index), index), visit, sums), None

    count = steps.units * steps.keys.count
    sums, _ = lax.scan(key_block, sums, jnp.arange(count, dtype=jnp.int32))
    return sums


def _pair_sum_forward(function: Any, floats: Blocks, others: Blocks) -> tuple[Blocks, Any]:
    return _pair_sum(function, floats, others), (floats, others)


def _pair_sum_backward(function: Any, residuals: Any, cotangents: Blocks) -> tuple[Blocks, None]:
    floats, others = residuals
    transposed = _Transposed(function)
    named = {transposed.cotangent(name): ct for name, ct in cotangents.items()}
    sums = _pair_sum(transposed, floats | named, others)
    return {name: sums[name].astype(x.dtype) for name, x in floats.items()}, None


_pair_sum: Any = jax.custom_vjp(_pair_sum_rule, nondiff_argnums=(0,))
_pair_sum.defvjp(_pair_sum_forward, _pair_sum_backward)
