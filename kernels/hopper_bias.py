"""The gradient of a bias on Hopper: a program owns a tile of it, and sums what shares that tile.

The bias is added to the logits, so its gradient is ds of FlashAttention-2's algorithm 2 (Dao 2023),
summed over the batches and heads for which one entry stands. A program makes the scores of its
queries and keys anew for each of them and adds up in registers, in a fixed order: the result is in
the shape and dtype of the bias, nothing larger is ever held, and it is the same each time. It costs
two products more; where nobody reads the gradient the compiler drops the kernel.

A bias that is the same for all queries, or for all keys, needs no kernel of its own: those sums
come out of the kernels that own the keys, or the queries (`hopper_backward`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flash_attention_jax._core.call import Call
from flash_attention_jax.kernels import hopper_tile as tile
from flash_attention_jax.kernels.hopper_backward import dropped, logit_gradient
from flash_attention_jax.kernels.hopper_config import ROWS, Tiles, padded
from flash_attention_jax.kernels.hopper_pipeline import (
    Route,
    launch,
    product,
    route_of,
    specialise,
    stream,
    walk,
)
from flash_attention_jax.kernels.hopper_tile import WGMMA, Grid, tiled
from flash_attention_jax.kernels.operands import Operands, plan


class Buffers(NamedTuple):
    """Shared memory and barriers of one program: a ring of all that one score needs."""

    q: Any  # (stages, warpgroups, 64, d)
    dout: Any  # (stages, warpgroups, 64, e)
    k: Any  # (stages, keys, d)
    v: Any  # (stages, keys, e)
    ready: Any
    free: Any


def bias_gradient(
    call: Call, operands: Operands, tiles: Tiles, factor: float, dtype: Any, *, interpret: Any
) -> jax.Array:
    """Gradient of a bias (B | 1, N | 1, T, S).

    Args:
        call: The call.
        operands: As in `hopper_backward.query_gradient`, with `operands.routes_of_batches`.
        tiles: Sizes of the tiles.
        factor: What makes base-2 logits of the product of q and k where the scale is no array.
        dtype: Of the gradient.
        interpret: Parameters of the interpreter, None = compile.

    Returns:
        The gradient, its last two axes padded to whole blocks.
    """
    blocks = plan(call, tiles.outer, tiles.inner)
    batch, heads, _, _ = call.shape_of("bias") or (1, 1, 1, 1)
    count = blocks.queries.count, blocks.keys.count
    shape = (batch, heads, count[0] * tiles.outer, count[1] * tiles.inner)
    found = launch(
        "hopper_dbias",
        lambda refs, *scoped: _program(call, tiles, factor, refs, Buffers(*scoped)),
        operands,
        {"dbias": jax.ShapeDtypeStruct(shape, dtype)},
        _buffers(call, tiles),
        (heads, count[0] * count[1], batch),
        tiles,
        interpret,
    )
    return found["dbias"]


def _buffers(call: Call, tiles: Tiles) -> tuple[Any, ...]:
    d, e, groups = padded(call.dim), padded(call.v_dim), tiles.warpgroups

    def smem(*shape: int) -> Any:
        ring = (tiles.stages, *shape)
        return plgpu.SMEM(ring, jnp.dtype(call.dtype), transforms=tiled(tiles.inner))

    return (
        smem(groups, ROWS, d),
        smem(groups, ROWS, e),
        smem(tiles.inner, d),
        smem(tiles.inner, e),
        plgpu.Barrier(num_arrivals=2 * groups + 2, num_barriers=tiles.stages),
        plgpu.Barrier(num_arrivals=groups, num_barriers=tiles.stages),
    )


class Place(NamedTuple):
    """What a program owns: its tile, and the first batch and head that share it."""

    b: Any
    h: Any
    i: Any
    j: Any
    shares_batch: bool

    def batch(self, batch: Any) -> Any:
        """The batch of a step of the route."""
        return batch if self.shares_batch else self.b


def _program(call: Call, tiles: Tiles, factor: float, refs: tile.Refs, buffers: Buffers) -> None:
    b, h, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    columns = jnp.int32(plan(call, tiles.outer, tiles.inner).keys.count)
    batches, heads, _, _ = call.shape_of("bias") or (1, 1, 1, 1)
    place = Place(
        b,
        h,
        lax.div(block, columns) * tiles.outer,
        lax.rem(block, columns) * tiles.inner,
        batches < call.batch,
    )
    route = route_of(refs, b, block, call.batch if place.shares_batch else 1)
    sharing = call.heads // heads

    def copy(name: str, buffer: Any, ready: Any, slot: Any, n: Any, batch: Any) -> None:
        del name, buffer
        b, h = place.batch(batch), place.h + lax.div(n, route.last)
        group = lax.div(h, jnp.int32(call.group_size))
        keys = pl.ds(place.j, tiles.inner)
        copies = [("k", "k", group, keys, buffers.k), ("v", "v", group, keys, buffers.v)]
        for w in range(tiles.warpgroups):
            rows = pl.ds(place.i + w * ROWS, ROWS)
            copies.append(("q", "q", h, rows, buffers.q.at[:, w]))
            copies.append(("dout", "out", h, rows, buffers.dout.at[:, w]))
        for operand, role, head, rows, target in copies:
            source = refs[operand].at[tile.row_index(call, role, b, head, rows)]
            plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

    specialise(
        tiles,
        lambda w: _sum(call, tiles, factor, refs, buffers, route, (place, sharing, w)),
        lambda: stream(
            route, route.last * sharing, tiles, [("", None, buffers.ready, buffers.free)], copy
        ),
    )


def _sum(
    call: Call,
    tiles: Tiles,
    factor: float,
    refs: tile.Refs,
    buffers: Buffers,
    route: Route,
    what: tuple[Place, int, Any],
) -> None:
    """One warpgroup: 64 rows of the tile, over every head and batch that shares it."""
    place, sharing, warpgroup = what
    grid = Grid(ROWS, tiles.inner, queries=0)
    start = place.i + warpgroup * ROWS

    def head(r: Any, total: Any) -> Any:
        h = place.h + r
        terms = tile.head_terms(refs, factor, h)

        def step(n: Any, total: Any, *, masked: bool) -> Any:
            slot = lax.rem(r * route.last + n, jnp.int32(tiles.stages))
            b = place.batch(route.block(n))
            queries = tile.query_vectors(call, grid, refs, (b, h, start), masked=masked)
            plgpu.barrier_wait(buffers.ready.at[slot])
            k, v = buffers.k.at[slot], buffers.v.at[slot]
            s = product(buffers.q.at[slot, warpgroup], k.transpose((1, 0)), grid.shape)
            dp = product(buffers.dout.at[slot, warpgroup], v.transpose((1, 0)), grid.shape)
            plgpu.barrier_arrive(buffers.free.at[slot])
            at = b, h, start, place.j
            x, derivative, j = tile.logits2(call, grid, refs, at, terms, queries, s, masked=masked)
            p = jnp.exp2(x - grid.spread(grid.load(refs["lse2"].at[b, h], start, 0), 0))
            dp = dropped(call, grid, queries, j, dp)
            delta = grid.load(refs["delta"].at[b, h], start, 0)
            return total + logit_gradient(grid, p, dp, delta, derivative)

        return walk(route, step, total)

    total = plgpu.layout_cast(jnp.zeros(grid.shape, jnp.float32), WGMMA)
    total = lax.fori_loop(0, sharing, head, total)
    index = place.b, place.h, pl.ds(start, ROWS), pl.ds(place.j, tiles.inner)
    refs["dbias"][index] = total.astype(refs["dbias"].dtype)
