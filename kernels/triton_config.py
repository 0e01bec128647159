"""Tiles of the Triton kernels: one table, by compute capability, direction and head dimension.

The tables hold what compiles for a causal call without a spill (float32 of 256 dimensions aside)
and fits into the shared memory of each architecture (`flash-attention-jax compile triton` says so);
nothing in them has been timed yet. What `tune` measured on the GPU at hand and stored comes before
them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from flash_attention_jax._core.call import Call
from flash_attention_jax.kernels import stored

LARGEST_DIM = 256
SMALLEST_CAPABILITY = (8, 0)

Direction = Literal["forward", "dq", "dkv", "shares", "dbias", "drelative"]

SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99}
"""KiB that a program may have, by compute capability (CUDA programming guide, table of limits)."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one kernel cuts its work.

    Attributes:
        block_q: Queries of a tile.
        block_kv: Keys of a tile.
        num_warps: Warps of a program.
        num_stages: Steps of its loop that are in flight at once.
    """

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int


def padded(dim: int) -> int:
    """A head dimension as a tile holds it: a power of two, 16 at least, as products want it."""
    return max(16, 1 << (dim - 1).bit_length())


TABLE: dict[str, dict[str, dict[int, Tiles]]] = {
    "ampere": {  # 163 KiB, mma
        "forward": {
            64: Tiles(128, 64, 4, 3),
            128: Tiles(128, 64, 8, 3),
            256: Tiles(64, 32, 8, 2),
        },
        "dq": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 32, 8, 2), 256: Tiles(64, 32, 8, 2)},
        "dkv": {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 64, 4, 2), 256: Tiles(32, 64, 8, 1)},
    },
    "small": {  # 99 KiB, mma: sm_86, sm_89, sm_120
        "forward": {
            64: Tiles(128, 64, 4, 2),
            128: Tiles(128, 32, 8, 2),
            256: Tiles(64, 32, 8, 1),
        },
        "dq": {64: Tiles(128, 32, 8, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 1)},
        "dkv": {64: Tiles(32, 128, 8, 2), 128: Tiles(32, 64, 4, 2), 256: Tiles(16, 32, 4, 1)},
    },
    "hopper": {  # 227 KiB, wgmma
        "forward": {
            64: Tiles(128, 128, 8, 3),
            128: Tiles(128, 64, 8, 3),
            256: Tiles(128, 32, 8, 2),
        },
        "dq": {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
        "dkv": {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(32, 32, 8, 2)},
    },
}
"""By architecture, direction and padded dimension (the larger of q's and v's), of 16-bit arrays."""

FLOAT32: dict[str, dict[int, Tiles]] = {
    "forward": {64: Tiles(32, 64, 8, 1), 128: Tiles(32, 16, 8, 1), 256: Tiles(16, 32, 8, 1)},
    "dq": {64: Tiles(32, 32, 4, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
    "dkv": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 16, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
"""Of every architecture: a thread holds whole rows of what it multiplies, so the tiles are small.

Those of 256 dimensions spill in the backward, the smallest that there are.
"""

_SIZES: dict[str, tuple[tuple[int, int], ...]] = {
    "forward": ((64, 32), (64, 64), (128, 32), (128, 64), (128, 128)),
    "dq": ((32, 32), (64, 32), (64, 64), (128, 32), (128, 64)),
    "dkv": ((16, 32), (32, 32), (32, 64), (32, 128), (64, 64), (64, 128)),
}
_FLOAT32_SIZES = ((16, 16), (16, 32), (32, 16), (32, 32), (32, 64), (64, 32), (64, 64))


def candidates(direction: Direction, dtype: str) -> list[Tiles]:
    """What a measurement may choose from. Those that overflow shared memory do not compile."""
    wide = jnp.dtype(dtype).itemsize == 4
    return [
        Tiles(block_q, block_kv, num_warps, num_stages)
        for block_q, block_kv in (_FLOAT32_SIZES if wide else _SIZES[direction])
        for num_warps in (4, 8)
        for num_stages in ((1, 2) if wide else (1, 2, 3, 4))
    ]


INTERPRETED = Tiles(16, 16, 1, 1)
"""The smallest that products take, so that short sequences have several blocks."""


def family(capability: tuple[int, int]) -> str:
    """Which part of the table is that of a GPU: by its tensor cores and its shared memory."""
    if capability[0] == 9:
        return "hopper"
    kib = SHARED_MEMORY.get(10 * capability[0] + capability[1], 99)
    return "ampere" if kib >= 163 else "small"


def tiles(
    capability: tuple[int, int], head_dim: int, causal: bool, dtype: str, direction: Direction
) -> Tiles:
    """The tiles of one kernel.

    Args:
        capability: CUDA compute capability.
        head_dim: The larger of the dimensions of q and v.
        causal: Whether half of the pairs are hidden; nothing depends on it yet.
        dtype: Name of the dtype of q, k and v.
        direction: Which kernel.
    """
    del causal
    dim = max(64, padded(head_dim))
    wide = jnp.dtype(dtype).itemsize == 4
    if direction == "drelative" or (direction == "dbias" and (wide or dim > 128)):
        return Tiles(32, 32, 4, 1)
    if direction == "dbias":
        return Tiles(64, 64, 8, 1)
    return (FLOAT32 if wide else TABLE[family(capability)])[direction][dim]


def tiles_of(call: Call, direction: Direction) -> Tiles:
    """The tiles of one kernel for a call; `shares` walks as dq does, without its sum."""
    if direction == "shares":
        direction = "dq"
    if call.interpret:
        return INTERPRETED
    capability = call.capability or SMALLEST_CAPABILITY
    dim = max(call.dim, call.v_dim)
    name = stored.key("triton", direction, padded(dim), banded=call.banded, dtype=call.dtype)
    measured = stored.lookup(name, ("block_q", "block_kv", "num_warps", "num_stages"))
    if measured is not None:
        found = Tiles(**measured)
    else:
        found = tiles(capability, dim, call.causal, call.dtype, direction)
    if any(call.has(term) for term in OF_PAIRS):
        return _roomier(found, direction, dim)
    return found


OF_PAIRS = ("bias", "mask", "relative_bias")
"""Terms of which a kernel reads a tile as large as that of the scores."""


def _roomier(tiles: Tiles, direction: Direction, dim: int) -> Tiles:
    """Half of what is streamed, and one step in flight: else the shared memory does not suffice.

    And eight warps, so that a thread holds less of what every pair has; where rows are long, half
    of the queries too.
    """
    block_q, block_kv = tiles.block_q, tiles.block_kv
    if direction == "dkv" or (direction == "dq" and dim > 128):
        block_q = max(16, block_q // 2)
    if direction != "dkv":
        block_kv = max(16, block_kv // 2)
    return Tiles(block_q, block_kv, 8, 1)


# --- precision ---

_ALGORITHMS = {
    "F32_F32_F32": "ieee",
    "TF32_TF32_F32": "tf32",
    "TF32_TF32_F32_X3": "tf32x3",
    "BF16_BF16_F32_X3": "bf16x3",
    "BF16_BF16_F32_X6": "bf16x6",
}
_PRECISIONS = {
    jax.lax.Precision.HIGHEST: "ieee",
    jax.lax.Precision.HIGH: "bf16x3",
    jax.lax.Precision.DEFAULT: "tf32",
}


def input_precision(call: Call) -> str | None:
    """How Triton multiplies float32; None where it knows no such way.

    What `precision` says, else the context, else IEEE: never tf32 unasked. 16-bit products are
    exact in any case.
    """
    if call.dtype != "float32":
        return "ieee"
    asked: Any = call.precision
    if asked is None:
        asked = getattr(jax.config, "jax_default_matmul_precision", None)
    if asked is None:
        return "ieee"
    sides = asked if isinstance(asked, tuple) else (asked, asked)
    found = {_side(side) for side in sides}
    return found.pop() if len(found) == 1 else None


def _side(asked: Any) -> str | None:
    if asked == "tensorfloat32":  # one of several names of HIGH, which here is bf16x3
        return "tf32"
    if isinstance(asked, jax.lax.DotAlgorithmPreset):
        return _ALGORITHMS.get(asked.name)
    if isinstance(asked, str) and asked in _ALGORITHMS:
        return _ALGORITHMS[asked]
    try:
        return _PRECISIONS.get(jax.lax.Precision(asked))
    except (ValueError, KeyError):
        return None
