"""Backward on Hopper, bit for bit the same each time: two kernels, seven products.

FlashAttention-2 (Dao 2023), algorithm 2, split so that each gradient is summed by the program that
owns it, in a fixed order and in registers: one kernel owns blocks of queries and sums dq over keys,
one owns blocks of keys and sums dk and dv over queries and over the query heads that share the key
head. The scores are made twice; in return nothing is added in memory, so nothing depends on which
program ran first. The second kernel holds its tiles transposed, keys first, so that probabilities
and their gradients feed dv and dk from registers.

Where dk and dv together do not fit into the registers of a warpgroup (over 128 dimensions), the
second kernel runs once for each.

With `deterministic_backward=False`, and up to 64 dimensions, one kernel makes all three in five
products: the programs that own keys add their share of dq in memory, by TMA, in whatever order they
run (algorithm 2 as FlashAttention-2 and 3 have it).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flash_attention_jax._core.call import ROLES, Call
from flash_attention_jax.kernels import hopper_tile as tile
from flash_attention_jax.kernels.hopper_config import COLUMNS, ROWS, Tiles, padded
from flash_attention_jax.kernels.hopper_pipeline import (
    Route,
    add_product,
    launch,
    product,
    route_of,
    specialise,
    stream,
    stream_keys,
    walk,
)
from flash_attention_jax.kernels.hopper_tile import WGMMA, Grid, Vectors, tiled
from flash_attention_jax.kernels.operands import LOG2E, Operands, plan


class Buffers(NamedTuple):
    """Shared memory and barriers of one program: what it owns, and two rings of what it walks."""

    first: Any  # (warpgroups, 64, d): q, or k
    second: Any  # (warpgroups, 64, e): dout, or v
    ring_d: Any  # (stages, inner, d): k, or q
    ring_e: Any  # (stages, inner, e): v, or dout
    staged: Any  # (warpgroups, 64, inner) where left operands pass through shared memory, else None
    owned: Any  # ready: first and second of each warpgroup
    d_ready: Any
    e_ready: Any
    d_free: Any
    e_free: Any
    ds: Any  # (warpgroups, 64, inner) and (warpgroups, inner, d): a step's share of dq, else None
    share: Any


def _buffers(call: Call, tiles: Tiles, *, staged: bool, fused: bool = False) -> tuple[Any, ...]:
    d, e, groups = padded(call.dim), padded(call.v_dim), tiles.warpgroups

    def smem(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.dtype(call.dtype), transforms=tiled(tiles.inner))

    loaded = plgpu.Barrier(num_barriers=tiles.stages)
    consumed = plgpu.Barrier(num_arrivals=groups, num_barriers=tiles.stages)
    return (
        smem(groups, ROWS, d),
        smem(groups, ROWS, e),
        smem(tiles.stages, tiles.inner, d),
        smem(tiles.stages, tiles.inner, e),
        smem(groups, ROWS, tiles.inner) if staged else None,
        plgpu.Barrier(num_arrivals=2, num_barriers=groups),
        loaded,
        loaded,
        consumed,
        consumed,
        smem(groups, ROWS, tiles.inner) if fused else None,
        plgpu.SMEM(
            (groups, tiles.inner, d),
            jnp.float32,
            transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128)),
        )
        if fused
        else None,
    )


def dropped(call: Call, grid: Grid, queries: Vectors, j: Any, x: Any) -> Any:
    """Probabilities, or gradients of them, after dropout."""
    if not call.dropout_rate:
        return x
    growth = np.float32(1 / (1 - call.dropout_rate))
    return jnp.where(tile.kept(call, grid, queries, j), x * growth, np.float32(0))


def logit_gradient(grid: Grid, p: Any, dp: Any, delta: Any, derivative: Any) -> Any:
    """Gradient of the logits before a softcap, by `derivative` of it (None = 1)."""
    ds = p * (dp - grid.spread(delta, grid.queries))
    return ds if derivative is None else ds * derivative


def _store(ref: Any, index: tuple[Any, ...], value: Any, buffer: Any) -> None:
    """Write 64 rows: by TMA through the buffer where it has the dtype, else from registers."""
    if buffer.dtype == ref.dtype:
        buffer[...] = value.astype(ref.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, ref.at[index])
        plgpu.wait_smem_to_gmem(0)
    else:
        ref[index] = value


# --- dq ---


def query_gradient(
    call: Call,
    operands: Operands,
    tiles: Tiles,
    factor: float,
    dtype: Any,
    *,
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """Gradient of the product's left side: the sum of ds k over keys.

    Args:
        call: The call.
        operands: q, k, v, dout (`operands.rows_of`), the terms, `lse2`, `delta`, routes if any.
        tiles: Sizes of the tiles.
        factor: What makes base-2 logits of the product of q and k where the scale is no array.
        dtype: Of `dq`.
        interpret: Parameters of the interpreter, None = compile.

    Returns:
        `dq` in the call's layout, padded to whole blocks.
    """
    length = plan(call, tiles.outer, tiles.inner).queries.count * tiles.outer
    sizes = call.sizes() | {"i": length, "d": padded(call.dim)}
    shape = tuple(sizes[letter] for letter in ROLES["q"][call.layout])
    outputs = {"dq": jax.ShapeDtypeStruct(shape, dtype)}
    return _over_keys("hopper_dq", call, operands, tiles, factor, outputs, interpret)


def query_shares(
    call: Call, operands: Operands, tiles: Tiles, factor: float, *, interpret: Any = None
) -> dict[str, jax.Array]:
    """Shares of each query in the gradients of numbers that stand for all keys.

    A kernel of its own, so that the compiler drops it where the slopes or the scale are constants;
    beside dq it would not fit into the registers.

    Args:
        call: The call.
        operands: As in `query_gradient`.
        tiles: Sizes of the tiles.
        factor: As in `query_gradient`.
        interpret: Parameters of the interpreter, None = compile.

    Returns:
        (B, N, T padded) each, and nothing where the call has no such number: the shares `dslopes`
        of ALiBi, `dscale`, and `dbias_of_queries` of a bias that is the same for all keys. `dp`,
        the mean of the gradient of the probabilities, and the weights of the first two are for
        `join`, which corrects them, and the gradient of sinks.
    """
    names = [
        name
        for term in ("slopes", "scale")
        if term in operands
        for name in (f"d{term}", f"d{term}_weight")
    ]
    names = ["dp", *names] if names or call.has("sinks") else []
    bias = call.shape_of("bias")
    if bias is not None and bias[3] == 1:
        names.append("dbias_of_queries")
    length = plan(call, tiles.outer, tiles.inner).queries.count * tiles.outer
    rows = jax.ShapeDtypeStruct((call.batch, call.heads, length), jnp.float32)
    outputs = dict.fromkeys(names, rows)
    if not outputs:
        return {}
    return _over_keys("hopper_shares", call, operands, tiles, factor, outputs, interpret)


def _over_keys(
    name: str,
    call: Call,
    operands: Operands,
    tiles: Tiles,
    factor: float,
    outputs: dict[str, jax.ShapeDtypeStruct],
    interpret: Any,
) -> dict[str, jax.Array]:
    """Launch programs that own queries."""
    blocks = plan(call, tiles.outer, tiles.inner)
    return launch(
        name,
        lambda refs, *scoped: _query_program(call, tiles, factor, refs, Buffers(*scoped)),
        operands,
        outputs,
        _buffers(call, tiles, staged=interpret is not None),
        (call.heads, blocks.queries.count, call.batch),
        tiles,
        interpret,
    )


def _query_program(
    call: Call, tiles: Tiles, factor: float, refs: tile.Refs, buffers: Buffers
) -> None:
    b, h, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    blocks = plan(call, tiles.outer, tiles.inner)
    if call.causal:
        block = blocks.queries.count - 1 - block
    route = route_of(refs, b, block, blocks.keys.count)
    sides = (
        ("k", buffers.ring_d, buffers.d_ready, buffers.d_free),
        ("v", buffers.ring_e, buffers.e_ready, buffers.e_free),
    )
    specialise(
        tiles,
        lambda w: _sum_over_keys(call, tiles, factor, refs, buffers, route, (b, h, block, w)),
        lambda: stream_keys(call, tiles, refs, (b, h), route, sides),
    )


def _sum_over_keys(
    call: Call,
    tiles: Tiles,
    factor: float,
    refs: tile.Refs,
    buffers: Buffers,
    route: Route,
    place: tuple[Any, Any, Any, Any],
) -> None:
    b, h, block, warpgroup = place
    grid = Grid(ROWS, tiles.inner, queries=0)
    start = block * tiles.outer + warpgroup * ROWS
    rows = pl.ds(start, ROWS)
    q, dout = buffers.first.at[warpgroup], buffers.second.at[warpgroup]
    ready = buffers.owned.at[warpgroup]
    plgpu.copy_gmem_to_smem(refs["q"].at[tile.row_index(call, "q", b, h, rows)], q, ready)
    plgpu.copy_gmem_to_smem(refs["dout"].at[tile.row_index(call, "out", b, h, rows)], dout, ready)
    queries = tile.query_vectors(call, grid, refs, (b, h, start))
    lse2 = grid.load(refs["lse2"].at[b, h], start, 0)
    delta = grid.load(refs["delta"].at[b, h], start, 0)
    terms = tile.head_terms(refs, factor, h)
    staged = None if buffers.staged is None else buffers.staged.at[warpgroup]
    plgpu.barrier_wait(ready)

    def step(n: Any, carry: Any, *, masked: bool) -> Any:
        slot = lax.rem(n, jnp.int32(tiles.stages))
        k, v = buffers.ring_d.at[slot], buffers.ring_e.at[slot]
        plgpu.barrier_wait(buffers.d_ready.at[slot])
        s = product(q, k.transpose((1, 0)), grid.shape)
        first = route.block(n) * tiles.inner
        at = b, h, start, first
        x, derivative, j = tile.logits2(call, grid, refs, at, terms, queries, s, masked=masked)
        p = jnp.exp2(x - grid.spread(lse2, 0))
        plgpu.barrier_wait(buffers.e_ready.at[slot])
        dp = product(dout, v.transpose((1, 0)), grid.shape)
        plgpu.barrier_arrive(buffers.e_free.at[slot])
        dp = dropped(call, grid, queries, j, dp)
        ds = logit_gradient(grid, p, dp, delta, derivative)
        dq, sums = carry
        sums = _add_shares(grid, sums, queries, j, s, (p, dp, ds, derivative))
        dq = None if dq is None else add_product(dq, ds.astype(k.dtype), k, staged)
        plgpu.barrier_arrive(buffers.d_free.at[slot])
        return dq, sums

    zero = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA.reduce(1))
    dq = None
    if "dq" in refs:
        dq = plgpu.layout_cast(jnp.zeros((ROWS, padded(call.dim)), jnp.float32), WGMMA)
    dq, sums = walk(route, step, (dq, {name: zero for name in SHARES if name in refs}))
    if dq is not None:
        gradient = refs["scale"][h] if "scale" in refs else np.float32(factor / LOG2E)
        _store(refs["dq"], tile.row_index(call, "q", b, h, rows), dq * gradient, q)
    for name, total in sums.items():
        refs[name][b, h, rows] = total


SHARES = ("dp", "dslopes", "dslopes_weight", "dscale", "dscale_weight", "dbias_of_queries")
"""Sums over the keys of each query: see `query_shares`."""


def _add_shares(
    grid: Grid, sums: dict[str, Any], queries: Vectors, j: Any, s: Any, found: tuple[Any, ...]
) -> dict[str, Any]:
    """Add what one tile brings to each share."""
    p, dp, ds, derivative = found
    by = {"dp": lambda: p * dp, "dbias_of_queries": lambda: ds}
    slope = p if derivative is None else p * derivative
    if "dslopes" in sums:
        distance = -jnp.abs(grid.spread(queries["diagonal"], 0) - j).astype(jnp.float32)
        by |= {"dslopes": lambda: ds * distance, "dslopes_weight": lambda: slope * distance}
    by |= {"dscale": lambda: ds * s, "dscale_weight": lambda: slope * s}
    return {name: total + by[name]().sum(axis=1) for name, total in sums.items()}


# --- dk and dv ---


def key_gradients(
    call: Call,
    operands: Operands,
    tiles: Tiles,
    factor: float,
    dtypes: dict[str, Any],
    *,
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """Sums over queries, and over the query heads of each key head: ds q and p dout.

    Args:
        call: The call.
        operands: As in `query_gradient`, the routes over queries.
        tiles: Sizes of the tiles.
        factor: As in `query_gradient`.
        dtypes: Of the results, by name: `dk`, `dv`, or one of them.
        interpret: Parameters of the interpreter, None = compile.

    Returns:
        The gradients named, in the call's layout, padded to whole blocks; with dk, where the bias
        is the same for all queries, the share of each key in its gradient, `dbias_of_keys`
        (B, N, S padded).
    """
    blocks = plan(call, tiles.inner, tiles.outer)
    length = blocks.keys.count * tiles.outer
    sizes = call.sizes() | {"j": length, "d": padded(call.dim), "e": padded(call.v_dim)}
    outputs = {
        name: jax.ShapeDtypeStruct(
            tuple(sizes[letter] for letter in ROLES[name[1:]][call.layout]), dtype
        )
        for name, dtype in dtypes.items()
    }
    bias = call.shape_of("bias")
    if "dk" in dtypes and bias is not None and bias[2] == 1 < bias[3]:
        shape = (call.batch, call.heads, length)
        outputs["dbias_of_keys"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    grid = (call.kv_heads, blocks.keys.count, call.batch)
    return launch(
        "hopper_fused" if "dq" in operands else "hopper_" + "_".join(dtypes),
        lambda refs, *scoped: _key_program(call, tiles, factor, refs, Buffers(*scoped)),
        operands,
        outputs,
        _buffers(call, tiles, staged=interpret is not None, fused="dq" in operands),
        grid,
        tiles,
        interpret,
    )


def fused_gradients(
    call: Call,
    operands: Operands,
    tiles: Tiles,
    factor: float,
    dtypes: dict[str, Any],
    *,
    interpret: Any = None,
) -> dict[str, jax.Array]:
    """dq, dk and dv in one kernel; dq is summed in memory, in the order in which programs run.

    Args:
        call: The call.
        operands: As in `key_gradients`.
        tiles: Sizes of the tiles.
        factor: As in `query_gradient`.
        dtypes: Of `dq`, `dk` and `dv`.
        interpret: Parameters of the interpreter, None = compile.

    Returns:
        As `key_gradients`, and `dq` in the call's layout, padded to whole blocks.
    """
    blocks = plan(call, tiles.inner, tiles.outer)
    length = blocks.queries.count * tiles.inner
    sizes = call.sizes() | {"i": length, "d": padded(call.dim)}
    shape = tuple(sizes[letter] for letter in ROLES["q"][call.layout])
    # The interpreter adds nothing in memory: there each warpgroup has a place of its own.
    places = (blocks.keys.count * tiles.warpgroups,) if interpret is not None else ()
    total = jax.new_ref(jnp.zeros((*places, *shape), jnp.float32))
    wanted = {name: dtypes[name] for name in ("dk", "dv")}
    found = key_gradients(
        call, operands | {"dq": total}, tiles, factor, wanted, interpret=interpret
    )
    dq = jax.freeze(total)
    dq = dq.sum(axis=0) if places else dq
    gradient = 1.0 if "scale" in operands else factor / LOG2E
    return found | {"dq": (dq * np.float32(gradient)).astype(dtypes["dq"])}


def _add_to_dq(
    dq: Any, index: tuple[Any, ...], place: Any, share: Any, left: Any, right: Any
) -> None:
    """Add left @ right, a step's share of dq, in memory.

    Args:
        dq: The sum.
        index: Where the share lies in it.
        place: Where the interpreter puts the share instead.
        share: Shared memory that it passes through.
        left: ds transposed, in shared memory.
        right: k, in shared memory.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    rows, columns = share.shape
    for start in range(0, columns, COLUMNS):  # at once it would not fit into the registers
        part = pl.ds(start, COLUMNS)
        share.at[:, part][...] = product(left, right.at[:, part], (rows, COLUMNS))
    plgpu.commit_smem()
    if len(dq.shape) > len(index) + 1:
        plgpu.copy_smem_to_gmem(share, dq.at[(place, *index)])
    else:
        plgpu.copy_smem_to_gmem(share, dq.at[index], reduction_op="add")


def _key_program(
    call: Call, tiles: Tiles, factor: float, refs: tile.Refs, buffers: Buffers
) -> None:
    b, group, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    blocks = plan(call, tiles.inner, tiles.outer)
    route = route_of(refs, b, block, blocks.queries.count)
    sides = (
        ("q", buffers.ring_d, buffers.d_ready, buffers.d_free),
        ("dout", buffers.ring_e, buffers.e_ready, buffers.e_free),
    )

    def copy(name: str, buffer: Any, ready: Any, slot: Any, n: Any, query_block: Any) -> None:
        h = group * call.group_size + lax.div(n, route.last)
        rows = pl.ds(query_block * tiles.inner, tiles.inner)
        role = "out" if name == "dout" else name
        source = refs[name].at[tile.row_index(call, role, b, h, rows)]
        plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])

    specialise(
        tiles,
        lambda w: _sum_over_queries(
            call, tiles, factor, refs, buffers, route, (b, group, block, w)
        ),
        lambda: stream(route, route.last * call.group_size, tiles, sides, copy),
    )


def _sum_over_queries(
    call: Call,
    tiles: Tiles,
    factor: float,
    refs: tile.Refs,
    buffers: Buffers,
    route: Route,
    place: tuple[Any, Any, Any, Any],
) -> None:
    b, group, block, warpgroup = place
    grid = Grid(ROWS, tiles.inner, queries=1)
    start = block * tiles.outer + warpgroup * ROWS
    rows = pl.ds(start, ROWS)
    k, v = buffers.first.at[warpgroup], buffers.second.at[warpgroup]
    ready = buffers.owned.at[warpgroup]
    plgpu.copy_gmem_to_smem(refs["k"].at[tile.row_index(call, "k", b, group, rows)], k, ready)
    plgpu.copy_gmem_to_smem(refs["v"].at[tile.row_index(call, "v", b, group, rows)], v, ready)
    keys = tile.key_vectors(grid, refs, b, start)
    staged = None if buffers.staged is None else buffers.staged.at[warpgroup]
    plgpu.barrier_wait(ready)

    def head(r: Any, carry: Any) -> Any:
        h = group * call.group_size + r
        terms = tile.head_terms(refs, factor, h)
        scaled = refs["scale"][h] if "scale" in refs else None

        def step(n: Any, carry: Any, *, masked: bool) -> Any:
            slot = lax.rem(r * route.last + n, jnp.int32(tiles.stages))
            first = route.block(n) * tiles.inner
            queries = tile.query_vectors(call, grid, refs, (b, h, first), masked=masked)
            q, dout = buffers.ring_d.at[slot], buffers.ring_e.at[slot]
            plgpu.barrier_wait(buffers.d_ready.at[slot])
            s = product(k, q.transpose((1, 0)), grid.shape)
            at = b, h, start, first
            x, derivative, j = tile.logits2(
                call,
                grid,
                refs,
                at,
                terms,
                queries,
                s,
                masked=masked,
                keys=keys if masked else None,
            )
            # Read late, when what the mask needed is done with: a vector along the columns takes
            # as many registers as a quarter of the tile.
            lse2 = grid.load(refs["lse2"].at[b, h], first, 1)
            p = jnp.exp2(x - grid.spread(lse2, 1))
            plgpu.barrier_wait(buffers.e_ready.at[slot])
            dk, dv, dbias = carry
            dp = delta = None
            if dv is not None:
                kept = dropped(call, grid, queries, j, p)
                dv = add_product(dv, kept.astype(dout.dtype), dout, staged)
            if dk is not None:
                # Read late: its registers are those that lse had.
                delta = grid.load(refs["delta"].at[b, h], first, 1)
                dp = product(v, dout.transpose((1, 0)), grid.shape)
                dp = dropped(call, grid, queries, j, dp)
            plgpu.barrier_arrive(buffers.e_free.at[slot])
            if dk is not None:
                ds = logit_gradient(grid, p, dp, delta, derivative)
                dbias = None if dbias is None else dbias + ds.sum(axis=1)
                ds = ds if scaled is None else ds * scaled
                dk = add_product(dk, ds.astype(q.dtype), q, staged)
                if "dq" in refs:
                    left = buffers.ds.at[warpgroup]
                    left[...] = ds.astype(q.dtype)
                    plgpu.commit_smem()
                    at = tile.row_index(call, "q", b, h, pl.ds(first, tiles.inner))
                    place = block * tiles.warpgroups + warpgroup
                    share = buffers.share.at[warpgroup]
                    _add_to_dq(refs["dq"], at, place, share, left.transpose((1, 0)), k)
            plgpu.barrier_arrive(buffers.d_free.at[slot])
            return dk, dv, dbias

        dk, dv, dbias = walk(route, step, (*carry, no_bias))
        if dbias is not None:
            refs["dbias_of_keys"][b, h, rows] = dbias
        return dk, dv

    def zero(name: str, dim: int) -> Any:
        if name not in refs:
            return None
        return plgpu.layout_cast(jnp.zeros((ROWS, padded(dim)), jnp.float32), WGMMA)

    no_bias = None
    if "dbias_of_keys" in refs:
        no_bias = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), WGMMA.reduce(1))
    carry = zero("dk", call.dim), zero("dv", call.v_dim)
    dk, dv = lax.fori_loop(0, call.group_size, head, carry)
    if "dq" in refs:
        plgpu.wait_smem_to_gmem(0)
    if dk is not None:
        gradient = 1.0 if "scale" in refs else factor / LOG2E
        dk = dk * np.float32(gradient)
        _store(refs["dk"], tile.row_index(call, "k", b, group, rows), dk, k)
    if dv is not None:
        _store(refs["dv"], tile.row_index(call, "v", b, group, rows), dv, v)
