"""The backward of the blocked engine: gradients as sums over pairs of blocks, of any order.

Algorithm 2 of Dao 2023, FlashAttention-2: for each block of keys, walk the query blocks, recompute
the probabilities from lse, and add the block's share to each gradient. Everything that the backward
needs of the softmax is in lse, with what it lacks (`_core.results`), and delta = rowsum(out * dout)
- dlse, so the gradients are plain sums over blocks. `_pair_sum` is that sum, for any function of a
block; its own derivative is again such a sum, of the function's transpose, so reverse mode nests
without end and stays O(n).

A block function is a hashable object with a `call`, `inputs()` and `outputs()`, which name its
arrays and say where their blocks lie (`Slot`), and `(arrays, tile, partial, blocks) -> blocks`,
which computes the shares of one pair of blocks. `_Gradients` is the first of them, `_Transposed`
makes the next one of any.

XLA's matrix product on a CPU is 3x slower when its left operand has to be transposed (measured). So
blocks of logits have keys first here ("bhjri"): dk and dv need no transpose, and dq is collected
transposed (d before i), with the small key block as the left operand.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core import dropout, masks
from flash_attention_jax._core.call import ROLES, Arrays, Call, Size, known, roles
from flash_attention_jax._core.logits import (
    LOGIT_TERMS,
    at_most_zero,
    logits,
    product,
    scaled,
    term_axes,
)
from flash_attention_jax._core.results import (
    Results,
    delta_of,
    finite_or_zero,
    of_seen_rows,
    sink_shares,
    without_low,
)
from flash_attention_jax._core.similarity import needs_running_maximum
from flash_attention_jax._core.tiles import LANES, Tile
from flash_attention_jax._core.varying import axes_of, full, vary
from flash_attention_jax._engines.blocked_plan import backward_plan, walk
from flash_attention_jax._engines.online import compute_dtype, folded, folds_scale

_SMALL = 2**22
"""Entries of dout up to which a multiplied copy costs less than one more operation per logit."""

COLUMNS = "bhjri"
"""Axes of a block of logits."""

Blocks = dict[str, Any]


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
    inputs |= {"dout": dout, "lse": results.lse, "delta": delta}
    low = known(math.prod(dout.shape), _SMALL) > _SMALL
    if low:
        inputs["low"] = results.low
        if call.has("bias"):  # one of -inf hides a row, and no mask says so
            inputs["dout"] = of_seen_rows(results, dout)
    else:
        inputs["dout"], inputs["delta"] = without_low(results, dout, delta)
    found: Blocks = {}
    for group in (("q", "k", "v", "scale"), ("bias", "alibi_slopes", "relative_bias")):
        names = tuple(name for name in group if name in floats)
        if names:
            sums = _pair_sum(_Gradients(call, names, low), inputs, others)
            for name in names:
                found[name] = _from_sum(call, name, sums[name])
    if "sinks" in floats:
        found["sinks"] = _sink_gradient(call, floats["sinks"], results, delta)
    return found


def _sink_gradient(call: Call, sinks: jax.Array, results: Results, delta: jax.Array) -> jax.Array:
    tile, axes = Tile.whole(call), _roles(call, "lse")
    lse, low, delta = (tile.take(x, axes, "bhri") for x in (results.lse, results.low, delta))
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
    return roles(call.layout, {"dout": "out", "delta": "lse"}.get(name, name))


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a block lies: the axes of its array, and those in which a block function has it."""

    roles: str
    axes: str
    shape: tuple[Size, ...]


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """The backward pass of one block: the share of each wanted gradient. A hashable function.

    Attributes:
        call: The call.
        wanted: Names of the arrays whose gradients it gives.
        low: Whether lse comes with `low`; else dout and delta hold its factor already.
    """

    call: Call
    wanted: tuple[str, ...]
    low: bool

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
        if self.low:
            axes["low"] = "bhri"
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
        shifted = x - lse
        if self.low:
            shifted = shifted - blocks["low"][:, :, None]
        if needs_running_maximum(call, dtype):
            shifted = at_most_zero(shifted)
        p = jnp.exp(shifted)
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
    steps = backward_plan(call)
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

        return walk(visits.along_queries(steps.tile(unit, 0, index), index), visit, sums), None

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
