"""The pipeline of a Hopper kernel: which blocks are walked, who loads them, what is multiplied."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from flash_attention_jax._core.call import Call
from flash_attention_jax.kernels.hopper_config import Tiles
from flash_attention_jax.kernels.hopper_tile import Refs, of_batch, row_index
from flash_attention_jax.kernels.operands import Operands

GRID = ("head", "block", "batch")
"""Axes of every grid, the first varies fastest: heads that share a key head find it in L2."""


def launch(
    name: str,
    program: Callable[..., None],
    operands: Operands,
    outputs: dict[str, jax.ShapeDtypeStruct],
    scratch: tuple[Any, ...],
    grid: tuple[int, ...],
    tiles: Tiles,
    interpret: Any,
) -> dict[str, jax.Array]:
    """Run a kernel of one warpgroup that loads and `tiles.warpgroups` that compute.

    Inside it Python integers have 32 bits, whatever JAX makes of them outside.

    Args:
        name: What profiles and compilers' reports call it.
        program: program(references by name, *scratch): what each warpgroup runs.
        operands: What it reads, by name.
        outputs: What it writes, by name.
        scratch: Shared memory and barriers of a program.
        grid: Sizes of the axes `GRID`.
        tiles: Sizes of the tiles.
        interpret: Parameters of the interpreter, None = compile.

    Returns:
        What was written, by name.
    """
    names = (*operands, *outputs)

    def entry(*refs: Any) -> None:
        named = dict(zip(names, refs, strict=True))
        pl.run_scoped(functools.partial(program, named), *scratch, collective_axes="warpgroup")

    entry.__name__ = entry.__qualname__ = name
    kernel = plgpu.kernel(
        entry,
        out_type=list(outputs.values()),
        grid=grid,
        grid_names=GRID,
        num_threads=tiles.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    with jax.enable_x64(False):
        return dict(zip(outputs, kernel(*operands.values()), strict=True))


def specialise(tiles: Tiles, compute: Callable[[Any], None], load: Callable[[], None]) -> None:
    """Give each warpgroup its work and its registers: the last one loads, the others compute."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < tiles.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(tiles.registers[0], action="increase")
        compute(warpgroup)

    @pl.when(warpgroup == tiles.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(tiles.registers[1], action="decrease")
        load()


class Route(NamedTuple):
    """The inner blocks that a program visits: `partial` ones that are masked, then the others."""

    order: Any  # None = all, in turn
    partial: Any
    last: Any

    def block(self, n: Any) -> Any:
        """Number of the n-th block."""
        return n if self.order is None else self.order[n]


def route_of(refs: Refs, b: Any, outer: Any, count: int) -> Route:
    """The route of one outer block, of `count` inner blocks in all."""
    if "order" not in refs:
        return Route(None, jnp.int32(0), jnp.int32(count))
    counts = of_batch(refs["counts"], b).at[outer]
    return Route(of_batch(refs["order"], b).at[outer], counts[0], counts[1])


def walk(route: Route, step: Any, carry: Any) -> Any:
    """Run step(n, carry, masked=...) over a route: the partial blocks masked, then the others."""
    if route.order is not None:
        carry = lax.fori_loop(0, route.partial, functools.partial(step, masked=True), carry)
    return lax.fori_loop(route.partial, route.last, functools.partial(step, masked=False), carry)


def stream_keys(
    call: Call, tiles: Tiles, refs: Refs, place: tuple[Any, Any], route: Route, sides: Any
) -> None:
    """Load the tiles of k and v that the route names, for a query head.

    Args:
        call: The call.
        tiles: Sizes of the tiles.
        refs: References, by name.
        place: The batch and the query head.
        route: The blocks.
        sides: As in `stream`.
    """
    b, h = place
    group = lax.div(h, jnp.int32(call.group_size))

    def copy(name: str, buffer: Any, ready: Any, slot: Any, n: Any, key_block: Any) -> None:
        del n
        rows = pl.ds(key_block * tiles.inner, tiles.inner)
        source = refs[name].at[row_index(call, name, b, group, rows)]
        plgpu.copy_gmem_to_smem(source, buffer.at[slot], ready.at[slot])

    stream(route, route.last, tiles, sides, copy)


def stream(route: Route, total: Any, tiles: Tiles, sides: Any, copy: Any) -> None:
    """Load `total` steps, the route again and again, each tile as soon as its slot is free.

    Args:
        route: The blocks of one round.
        total: Steps in all, a multiple of the route's.
        tiles: Sizes of the tiles.
        sides: (name, buffer, ready, free) of each ring; every arrival at a barrier is waited for
            exactly once.
        copy: copy(name, buffer, ready, slot, n, block) starts the copy of step n.
    """
    stages = jnp.int32(tiles.stages)

    def number(n: Any) -> Any:
        return route.block(lax.rem(n, route.last))

    def load(n: Any, block: Any) -> Any:
        slot = lax.rem(n, stages)
        # Read the next number before waiting: device memory is slow, and nothing depends on it yet.
        following = number(n + 1)
        for name, buffer, ready, free in sides:

            @pl.when(n >= stages)
            def _(free: Any = free) -> None:
                plgpu.barrier_wait(free.at[slot])

            copy(name, buffer, ready, slot, n, block)
        return following

    def drain(n: Any, _: None) -> None:
        for _name, _buffer, _ready, free in sides:
            plgpu.barrier_wait(free.at[lax.rem(n, stages)])

    @pl.when(total > 0)
    def _() -> None:
        lax.fori_loop(0, total, load, number(jnp.int32(0)))
        lax.fori_loop(jnp.maximum(total - stages, 0), total, drain, None)


def product(left: Any, right: Any, shape: Any, then: Any = None) -> jax.Array:
    """Left @ right of two tiles in shared memory; `then` runs while the product is under way."""

    def multiply(acc: Any) -> Any:
        plgpu.wgmma(acc, left, right)
        if then is not None:
            then()
        return acc[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def add_product(acc: jax.Array, left: jax.Array, right: Any, staged: Any) -> jax.Array:
    """Acc + left @ right, `left` in registers, as it feeds a wgmma.

    Where the interpreter runs, which knows no operand in registers, `left` passes through the tile
    `staged` in shared memory: the one difference between what is interpreted and what runs.
    """
    if staged is None:
        multiply: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))
        return multiply(plgpu.WGMMAAccumulatorRef.init(acc))
    staged[...] = left
    plgpu.commit_smem()
    return acc + product(staged, right, acc.shape)
