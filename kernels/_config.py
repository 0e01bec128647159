"""Tile sizes of the Hopper kernels: one table, by what a kernel holds.

    rows of a program = 64 * warpgroups     (64 is the height of a wgmma; a warpgroup holds its own)
    shared memory     = 2 bytes * (warpgroups * 64 * dims held + stages * inner * dims streamed)

The table holds what compiles for sm_90a without a spill, but for a few bytes in dk at 256
dimensions (`compile.py` says where); nothing in it has been timed yet.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from flash_attention_jax._call import Call

ROWS = 64
"""Rows that one warpgroup holds: the height of a wgmma instruction."""

COLUMNS = 64
"""Head dimensions are padded to a multiple of this: one row of 128 bytes, the swizzle of a tile."""

LARGEST_DIM = 256
"""The most columns that a wgmma has."""

LARGEST_FUSED_DIM = 128
"""Up to this dk and dv are summed by one warpgroup at once: 64 rows of both fit into registers."""

Pass = Literal["forward", "dq", "dkv", "dbias"]


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
        """Registers per thread of a computing and of the loading warpgroup; 504 in all at most."""
        return {1: (256, 40), 2: (240, 24), 3: (160, 24)}[self.warpgroups]


# By the larger padded dimension of (q and k, v).
TABLE: dict[Pass, dict[int, Tiles]] = {
    "forward": {
        64: Tiles(2, 128, 2),
        128: Tiles(2, 128, 2),
        192: Tiles(2, 64, 2),
        256: Tiles(2, 64, 2),
    },
    "dq": {64: Tiles(2, 128, 2), 128: Tiles(2, 64, 2), 192: Tiles(1, 32, 4), 256: Tiles(1, 32, 4)},
    "dkv": {64: Tiles(2, 64, 2), 128: Tiles(2, 64, 2), 192: Tiles(1, 32, 4), 256: Tiles(1, 32, 4)},
    "dbias": {
        64: Tiles(2, 64, 2),
        128: Tiles(2, 64, 2),
        192: Tiles(1, 64, 2),
        256: Tiles(1, 64, 1),
    },
}


def padded(dim: int) -> int:
    """A head dimension as a tile holds it."""
    return -(-dim // COLUMNS) * COLUMNS


def tiles(call: Call, kernel: Pass) -> Tiles:
    """The tiles of one kernel for a call."""
    dim = max(padded(call.dim), padded(call.v_dim))
    if kernel == "dkv" and dim == 128 and _busy(call):
        return Tiles(2, 32, 4)
    return TABLE[kernel][dim]


def _busy(call: Call) -> bool:
    """Whether more than a mask stands between the product and the probabilities.

    At 128 dimensions dk, dv and a tile of 64 queries leave no register for it: 32 then.
    """
    extras = ("scale", "alibi_slopes", "q_segment_ids", "mask", "bias")
    return (
        call.similarity == "cosine"
        or call.softcap is not None
        or call.dropout_rate > 0
        or call.group_size > 1
        or any(call.has(name) for name in extras)
    )
