"""Tile sizes of the Hopper kernels: one table, by what a kernel holds.

    rows of a program = 64 * warpgroups     (64 is the height of a wgmma; a warpgroup holds its own)
    shared memory     = 2 bytes * (warpgroups * 64 * dims held + stages * inner * dims streamed)

The table holds what compiles for sm_90a without a spill (`compile.py` says so); nothing in it has
been timed yet. What `tune` measured on the GPU at hand and stored comes before it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from flash_attention_jax._core.call import Call
from flash_attention_jax.kernels import stored

ROWS = 64
"""Rows that one warpgroup holds: the height of a wgmma instruction."""

COLUMNS = 64
"""Head dimensions are padded to a multiple of this: one row of 128 bytes, the swizzle of a tile."""

PROCESSORS = 132
"""Streaming multiprocessors of an H100 or H200: how many programs run at once, at least."""

SHARED_MEMORY = 226 * 1024
"""Bytes of tiles that a program may have: of 227 KiB one is left for barriers and vectors."""

LARGEST_DIM = 256
"""The most columns that a wgmma has."""

LARGEST_JOINT_DIM = 128
"""Up to this dk and dv are summed by one warpgroup at once: 64 rows of both fit into registers."""

LARGEST_FUSED_DIM = 64
"""Up to this dq's share fits beside them; at 128 it spills 80 to 340 bytes, however it is cut."""

REGISTERS = {1: (256, 40), 2: (240, 24), 3: (160, 24)}
"""Per thread of a computing and of the loading warpgroup, by how many compute: 504 at most."""

Pass = Literal["forward", "decode", "dq", "dkv", "fused", "dbias"]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How one kernel cuts its work.

    Attributes:
        warpgroups: Warpgroups that compute; one more loads.
        inner: Rows of the streamed side in one step: keys, or queries for dk and dv.
        stages: Steps that are in flight at once.
    """

    warpgroups: int
    inner: int
    stages: int

    @property
    def outer(self) -> int:
        """Rows that a program owns."""
        return self.warpgroups * ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers per thread of a computing and of the loading warpgroup."""
        return REGISTERS[self.warpgroups]


# By the larger padded dimension of (q and k, v).
TABLE: dict[Pass, dict[int, Tiles]] = {
    "forward": {
        64: Tiles(2, 128, 2),
        128: Tiles(2, 128, 2),
        192: Tiles(2, 64, 2),
        256: Tiles(2, 64, 2),
    },
    "decode": {
        64: Tiles(1, 128, 4),
        128: Tiles(1, 128, 3),
        192: Tiles(1, 64, 4),
        256: Tiles(1, 64, 2),
    },
    "dq": {64: Tiles(2, 128, 2), 128: Tiles(2, 64, 2), 192: Tiles(1, 32, 4), 256: Tiles(1, 32, 4)},
    "dkv": {64: Tiles(2, 64, 2), 128: Tiles(2, 64, 2), 192: Tiles(1, 32, 4), 256: Tiles(1, 32, 4)},
    "fused": {64: Tiles(2, 64, 2)},
    "dbias": {
        64: Tiles(2, 64, 2),
        128: Tiles(2, 64, 2),
        192: Tiles(1, 64, 2),
        256: Tiles(1, 64, 1),
    },
}


BUSY = {128: Tiles(2, 32, 4), 256: Tiles(1, 16, 8)}
"""For dk and dv of a call of which more than a mask stands between product and probabilities."""


def padded(dim: int) -> int:
    """A head dimension as a tile holds it."""
    return -(-dim // COLUMNS) * COLUMNS


def shared_memory(kernel: Pass, dim: int, tiles: Tiles) -> int:
    """Bytes that the tiles of a kernel take, for 16-bit arrays of one padded dimension."""
    streamed = 2 * tiles.inner
    if kernel == "dbias":
        return 2 * dim * tiles.stages * (2 * tiles.outer + streamed)
    held = tiles.outer * (1 if kernel in ("forward", "decode") else 2)
    size = 2 * dim * (held + tiles.stages * streamed)
    if kernel == "fused":
        size += tiles.warpgroups * tiles.inner * (2 * ROWS + 4 * dim)
    return size


def tiles(call: Call, kernel: Pass) -> Tiles:
    """The tiles of one kernel for a call: measured ones where there are any, else the table's."""
    dim = max(padded(call.dim), padded(call.v_dim))
    if kernel == "dkv" and dim in BUSY and _busy(call):
        return BUSY[dim]
    if not call.interpret:
        name = stored.key("hopper", kernel, dim, banded=call.banded, dtype=call.dtype)
        found = stored.lookup(name, ("warpgroups", "inner", "stages"))
        reason = None if found is None else _unusable(kernel, dim, found)
        if reason is not None:
            stored.warn(f"its entry {name!r} {reason}")
        elif found is not None:
            return Tiles(**found)
    return TABLE[kernel][dim]


def _unusable(kernel: Pass, dim: int, entry: stored.Entry) -> str | None:
    """What is wrong with stored tiles, or None."""
    tiles = Tiles(**entry)
    if tiles.warpgroups not in REGISTERS:
        return f"is {entry}, and has 1, 2 or 3 warpgroups"
    if tiles.inner % 32:
        return f"is {entry}, and `inner` must be a multiple of 32"
    size = shared_memory(kernel, dim, tiles)
    if size > SHARED_MEMORY:
        return f"is {entry}: {size // 1024} of {SHARED_MEMORY // 1024} KiB of shared memory"
    return None


def _busy(call: Call) -> bool:
    """Whether more than a mask stands between the product and the probabilities.

    Beside dk, dv and a tile of the usual size no register is left for it at some dimensions.
    """
    extras = ("scale", "alibi_slopes", "q_segment_ids", "mask", "bias")
    return (
        call.similarity == "cosine"
        or call.softcap is not None
        or call.dropout_rate > 0
        or call.group_size > 1
        or any(call.has(name) for name in extras)
    )
