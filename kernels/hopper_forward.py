"""Forward on Hopper: warp-specialised wgmma and TMA, in Pallas for Mosaic GPU.

FlashAttention-2 (Dao 2023), algorithm 1, with the roles of FlashAttention-3 (Shah et al. 2024): one
warpgroup loads tiles of k and v into a ring in shared memory, two or three compute. A program owns
64 queries per computing warpgroup of one head; q stays in shared memory, the accumulator, maximum
and sum in registers. With two computing warpgroups they take turns at the tensor cores, so that the
exponentials of one hide under the products of the other.

Where the logits have a known bound there is no maximum: l and acc are plain sums, and nothing in
the loop rescales the accumulator. That is the one difference between softmax and cosine similarity
here, a flag when the kernel is built.

The grid is (heads, blocks of queries, batch): heads vary fastest, so those that share a key head
find k and v in L2; under a causal mask the longest rows start first.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flash_attention_jax._core.call import ROLES, Call
from flash_attention_jax.kernels import hopper_tile as tile
from flash_attention_jax.kernels.hopper_config import ROWS, Tiles, padded
from flash_attention_jax.kernels.hopper_pipeline import (
    Route,
    add_product,
    launch,
    product,
    route_of,
    specialise,
    stream_keys,
    walk,
)
from flash_attention_jax.kernels.hopper_tile import WGMMA, Grid, tiled
from flash_attention_jax.kernels.join import Sums
from flash_attention_jax.kernels.operands import Operands, bounded, plan

LOWEST = float(np.finfo(np.float32).min)
"""Where the running maximum starts; a row that sees no key is known by its sum of 0."""


class Buffers(NamedTuple):
    """Shared memory and barriers of one program; the ring has a slot per stage."""

    q: Any  # (warpgroups, 64, d)
    k: Any  # (stages, keys, d)
    v: Any  # (stages, keys, e)
    out: Any  # (warpgroups, 64, e), None where q's place serves
    top: Any  # (warpgroups, 64)
    total: Any  # (warpgroups, 64)
    probs: Any  # (warpgroups, 64, keys) where probabilities pass through shared memory, else None
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any  # None where the warpgroups take no turns


def forward(
    call: Call, operands: Operands, tiles: Tiles, factor: float, *, interpret: Any = None
) -> Sums:
    """Out and sums of a call, padded along the queries to whole blocks.

    Args:
        call: The call.
        operands: q, k, v (`operands.rows_of`), the terms, and routes if any.
        tiles: Sizes of the tiles.
        factor: What makes base-2 logits of the product of q and k where the scale is no array.
        interpret: Parameters of the interpreter, None = compile.

    Returns:
        out (call's layout, dimension padded to 64s) and the sums (B, N, T padded), float32.
    """
    blocks = plan(call, tiles.outer, tiles.inner)
    length = blocks.queries.count * tiles.outer
    sizes = call.sizes() | {"i": length, "e": padded(call.v_dim)}
    shape = tuple(sizes[letter] for letter in ROLES["out"][call.layout])
    sums = jax.ShapeDtypeStruct((call.batch, call.heads, length), jnp.float32)
    found = launch(
        "hopper_forward",
        lambda refs, *scoped: _program(call, tiles, factor, refs, Buffers(*scoped)),
        operands,
        {
            "out": jax.ShapeDtypeStruct(shape, jnp.dtype(call.dtype)),
            "top": sums,
            "total": sums,
        },
        _buffers(call, tiles, staged=interpret is not None),
        (call.heads, blocks.queries.count, call.batch),
        tiles,
        interpret,
    )
    return Sums(**found)


def _buffers(call: Call, tiles: Tiles, *, staged: bool) -> tuple[Any, ...]:
    d, e, groups = padded(call.dim), padded(call.v_dim), tiles.warpgroups
    dtype = jnp.dtype(call.dtype)

    def smem(*shape: int) -> Any:
        return plgpu.SMEM(shape, dtype, transforms=tiled(tiles.inner))

    loaded = plgpu.Barrier(num_barriers=tiles.stages)
    consumed = plgpu.Barrier(num_arrivals=groups, num_barriers=tiles.stages)
    return (
        smem(groups, ROWS, d),
        smem(tiles.stages, tiles.inner, d),
        smem(tiles.stages, tiles.inner, e),
        None if d == e else smem(groups, ROWS, e),
        plgpu.SMEM((groups, ROWS), jnp.float32),
        plgpu.SMEM((groups, ROWS), jnp.float32),
        smem(groups, ROWS, tiles.inner) if staged else None,
        plgpu.Barrier(num_barriers=groups),
        loaded,
        loaded,
        consumed,
        consumed,
        plgpu.Barrier(num_arrivals=groups) if groups == 2 else None,
    )


def _program(call: Call, tiles: Tiles, factor: float, refs: tile.Refs, buffers: Buffers) -> None:
    b, h, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    blocks = plan(call, tiles.outer, tiles.inner)
    if call.causal:
        block = blocks.queries.count - 1 - block
    route = route_of(refs, b, block, blocks.keys.count)
    sides = (
        ("k", buffers.k, buffers.k_ready, buffers.k_free),
        ("v", buffers.v, buffers.v_ready, buffers.v_free),
    )
    specialise(
        tiles,
        lambda w: _attend(call, tiles, factor, refs, buffers, route, (b, h, block, w)),
        lambda: stream_keys(call, tiles, refs, (b, h), route, sides),
    )


def _attend(
    call: Call,
    tiles: Tiles,
    factor: float,
    refs: tile.Refs,
    buffers: Buffers,
    route: Route,
    place: tuple[Any, Any, Any, Any],
) -> None:
    """One warpgroup: 64 queries against every key block of the route."""
    b, h, block, warpgroup = place
    grid = Grid(ROWS, tiles.inner, queries=0)
    start = block * tiles.outer + warpgroup * ROWS
    q = buffers.q.at[warpgroup]
    source = refs["q"].at[tile.row_index(call, "q", b, h, pl.ds(start, ROWS))]
    plgpu.copy_gmem_to_smem(source, q, buffers.q_ready.at[warpgroup])
    queries = tile.query_vectors(call, grid, refs, (b, h, start))
    terms = tile.head_terms(refs, factor, h)
    plgpu.barrier_wait(buffers.q_ready.at[warpgroup])
    running = not bounded(call)
    take_turn = _turns(buffers.turn)

    def step(n: Any, carry: Any, *, masked: bool) -> Any:
        slot = lax.rem(n, jnp.int32(tiles.stages))
        plgpu.barrier_wait(buffers.k_ready.at[slot])

        s = product(q, buffers.k.at[slot].transpose((1, 0)), grid.shape, take_turn)
        plgpu.barrier_arrive(buffers.k_free.at[slot])
        first = route.block(n) * tiles.inner
        at = b, h, start, first
        x, _, j = tile.logits2(call, grid, refs, at, terms, queries, s, masked=masked)
        p, carry = _accumulate(grid, x, carry, running=running)
        if call.dropout_rate:
            p = jnp.where(tile.kept(call, grid, queries, j), p, np.float32(0))
        m, l, acc = carry
        plgpu.barrier_wait(buffers.v_ready.at[slot])
        take_turn()
        staged = None if buffers.probs is None else buffers.probs.at[warpgroup]
        acc = add_product(acc, p.astype(buffers.v.dtype), buffers.v.at[slot], staged)
        plgpu.barrier_arrive(buffers.v_free.at[slot])
        return m, l, acc

    by_row = functools.partial(plgpu.layout_cast, new_layout=WGMMA.reduce(1))
    m = by_row(jnp.full((ROWS,), LOWEST if running else 0.0, jnp.float32))
    l = by_row(jnp.zeros((ROWS,), jnp.float32))
    acc = plgpu.layout_cast(jnp.zeros((ROWS, padded(call.v_dim)), jnp.float32), WGMMA)
    pl.when(warpgroup == 1)(take_turn)
    carry = walk(route, step, (m, l, acc))
    pl.when(warpgroup == 0)(take_turn)
    _store(call, refs, buffers, (b, h, start, warpgroup), carry)


def _turns(barrier: Any) -> Any:
    """What a warpgroup does to hand the tensor cores to the other one and get them back."""

    def take() -> None:
        if barrier is not None:
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

    return take


def _accumulate(grid: Grid, x: Any, carry: Any, *, running: bool) -> Any:
    """Probabilities of a tile before they are normalised, and the sums with them."""
    m, l, acc = carry
    if not running:
        p = jnp.exp2(x)
        return p, (m, l + p.sum(axis=1), acc)
    # Never -inf, because the maximum starts at `LOWEST`: exp2(-inf - -inf) cannot arise, whether a
    # mask or a bias of -inf hides what a row has met so far.
    top = jnp.maximum(m, x.max(axis=1))
    shrink = jnp.exp2(m - top)
    p = jnp.exp2(x - grid.spread(top, 0))
    acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
    return p, (top, l * shrink + p.sum(axis=1), acc)


def _store(
    call: Call, refs: tile.Refs, buffers: Buffers, place: tuple[Any, Any, Any, Any], carry: Any
) -> None:
    """Normalise the sums of 64 queries, let the sink join, and write out, top and total."""
    b, h, start, warpgroup = place
    m, l, acc = carry
    m = jnp.where(l == 0, np.float32(-np.inf), m)
    if "sinks" in refs:
        sink = refs["sinks"][h]
        most = jnp.maximum(m, sink)
        safe = jnp.where(most == -np.inf, np.float32(0), most)
        shrink = jnp.exp2(m - safe)
        l = l * shrink + jnp.exp2(sink - safe)
        acc = acc * lax.broadcast_in_dim(shrink, acc.shape, [0])
        m = most
    weight = 1.0 / jnp.where(l == 0, np.float32(1), l)
    if call.dropout_rate:
        weight = weight * np.float32(1 / (1 - call.dropout_rate))
    out = (buffers.q if buffers.out is None else buffers.out).at[warpgroup]
    top, total = buffers.top.at[warpgroup], buffers.total.at[warpgroup]
    top[...] = m
    total[...] = l
    out[...] = (acc * lax.broadcast_in_dim(weight, acc.shape, [0])).astype(out.dtype)
    plgpu.commit_smem()
    rows = pl.ds(start, ROWS)
    plgpu.copy_smem_to_gmem(out, refs["out"].at[tile.row_index(call, "out", b, h, rows)])
    plgpu.copy_smem_to_gmem(top, refs["top"].at[b, h, rows])
    plgpu.copy_smem_to_gmem(total, refs["total"].at[b, h, rows])
    plgpu.wait_smem_to_gmem(0)
