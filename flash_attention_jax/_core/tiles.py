"""Tiles: which part of each array a step holds, cut from and added into either layout.

An engine names the axes that it wants a block in ("bhrid", say) and never indexes an array itself,
so one engine serves both layouts, broadcast terms and grouped heads, without a transposed copy of
anything.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from flash_attention_jax._core.call import Call, Size, as_index, known

LANES = 64
"""A matrix product on a CPU treats so many columns alike, and those that are left over apart."""

USUAL_GROUP = 8
"""Query heads per key head that a plan reckons with where their number is symbolic."""

Index = Any  # a Python int or a traced int32 scalar


@dataclasses.dataclass(frozen=True)
class Axis:
    """One length cut into equal blocks; the last starts early rather than reach past the end.

    `length` = 10 in blocks of 4: [0..3] [4..7] [6..9]; the last block owns 8 and 9 alone.
    """

    length: int
    block: int

    @property
    def count(self) -> int:
        """Number of blocks."""
        return -(-self.length // self.block) if self.length else 0

    @property
    def overlaps(self) -> bool:
        """Whether the last block repeats positions of the one before."""
        return self.length % self.block != 0 if self.length else False

    def owned(self, index: Index) -> Index:
        """First position that belongs to block `index`."""
        return index * self.block

    def start(self, index: Index) -> Index:
        """First position that block `index` holds."""
        if not self.overlaps:
            return index * self.block
        return jnp.minimum(index * self.block, self.length - self.block)


def balanced(length: int, block: int) -> Axis:
    """Cut `length` into as few blocks of at most `block` as possible, of nearly equal size.

    1025 in blocks of at most 512 gives three of 352, not two of 512 and one that repeats 511
    positions; 3000 in blocks of at most 1024 three of 1024, of which XLA's products like each.
    """
    block = max(1, min(block, length))
    count = -(-length // block) if length else 1
    even = -(-length // count) if length else 1
    if length % even:
        lanes = -(-even // LANES) * LANES
        even = min(lanes if 16 * (lanes - even) <= even else -(-even // 16) * 16, block)
    return Axis(length, max(1, even))


def int32_starts(ranges: Sequence[tuple[Index, Size]]) -> list[Any]:
    """Starts of ranges in one dtype, whatever Python ints are under `jax_enable_x64`."""
    return [jnp.asarray(start, jnp.int32) for start, _ in ranges]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A range of batch, key heads, queries and keys: starts may be traced, sizes are static.

    Attributes:
        call: The call whose arrays are cut.
        batch: (start, size) along the batch.
        kv_heads: (start, size) along the key heads; query heads follow by the group size.
        queries: (start, size) along the queries.
        keys: (start, size) along the keys.
        fresh_queries: First query that no earlier tile held, None where none is repeated (or
            repeating is harmless).
        fresh_keys: First key that no earlier tile held, None where none is repeated.
    """

    call: Call
    batch: tuple[Index, Size]
    kv_heads: tuple[Index, Size]
    queries: tuple[Index, Size]
    keys: tuple[Index, Size]
    fresh_queries: Index | None = None
    fresh_keys: Index | None = None

    @classmethod
    def whole(cls, call: Call) -> Tile:
        """The tile that holds everything."""
        return cls(call, (0, call.batch), (0, call.kv_heads), (0, call.q_len), (0, call.k_len))

    def by_head(self) -> list[Tile]:
        """One tile for each batch and key head of this one."""
        (batch, batches), (head, heads) = self.batch, self.kv_heads
        return [
            dataclasses.replace(self, batch=(batch + b, 1), kv_heads=(head + h, 1))
            for b in range(batches)
            for h in range(heads)
        ]

    def _range(self, letter: str, size: Size) -> tuple[Index, Size]:
        if letter in "bnkij" and size == 1:
            return 0, 1
        if letter == "b":
            return self.batch
        if letter == "k":
            return self.kv_heads
        if letter == "n":
            start, count = self.kv_heads
            group = self.call.group_size
            return start * as_index(group), count * group
        if letter == "i":
            return self.queries
        if letter == "j":
            return self.keys
        if letter == "g":
            # Diagonals j - i + q_len - 1 that meet the tile, the lowest first.
            return (
                self.keys[0] - self.queries[0] - self.queries[1] + self.call.q_len,
                self.queries[1] + self.keys[1] - 1,
            )
        return 0, size

    def take(self, array: Any, roles: str, to: str) -> Any:
        """Cut this tile out of `array`, whose axes are `roles`, as a block with the axes `to`.

        In `to`, h is the key head and r the query head within its group; axes that the array lacks
        have size 1.
        """
        ranges = [
            self._range(letter, size) for letter, size in zip(roles, array.shape, strict=True)
        ]
        if any(size != full for (_, size), full in zip(ranges, array.shape, strict=True)):
            array = lax.dynamic_slice(array, int32_starts(ranges), [size for _, size in ranges])
        return _arrange(array, *self._split(array.shape, roles), to)

    def _split(self, shape: tuple[Size, ...], roles: str) -> tuple[tuple[Size, ...], str]:
        """Shape and letters of a cut array after n is split into h and r."""
        sizes: list[Size] = []
        letters = ""
        for letter, size in zip(roles, shape, strict=True):
            if letter == "n":
                sizes += (
                    [1, 1] if size == 1 else [size // self.call.group_size, self.call.group_size]
                )
                letters += "hr"
            else:
                sizes.append(size)
                letters += "h" if letter == "k" else letter
        return tuple(sizes), letters

    def put(self, buffer: Any, roles: str, block: Any, axes: str, *, add: bool = False) -> Any:
        """Write (or add) a block with the axes `axes` at this tile's place in `buffer`.

        Axes that the buffer lacks, or has with size 1, are summed: the transpose of broadcasting in
            `take`.
        """
        ranges = [
            self._range(letter, size) for letter, size in zip(roles, buffer.shape, strict=True)
        ]
        starts = int32_starts(ranges)
        cut = tuple(size for _, size in ranges)
        sizes, letters = self._split(cut, roles)
        have = dict(zip(letters, sizes, strict=True))
        summed = [
            n for n, letter in enumerate(axes) if have.get(letter, 1) == 1 and block.shape[n] != 1
        ]
        if summed:
            block = block.sum(axis=summed, keepdims=True)
        missing = [n for n, letter in enumerate(axes) if letter not in have]
        kept = "".join(letter for letter in axes if letter in have)
        block = lax.squeeze(block, missing)
        block = lax.transpose(block, [kept.index(letter) for letter in letters])
        block = jnp.broadcast_to(block, sizes).reshape(cut).astype(buffer.dtype)
        if cut == buffer.shape:
            return buffer + block if add else block
        if add:
            block = lax.dynamic_slice(buffer, starts, cut) + block
        return lax.dynamic_update_slice(buffer, block, starts)


def _arrange(array: Any, sizes: tuple[Size, ...], letters: str, to: str) -> Any:
    """Reshape to `sizes`, order the axes as in `to`; size 1 for what `letters` lacks."""
    array = array.reshape(sizes)
    order = [letters.index(letter) for letter in to if letter in letters]
    array = lax.transpose(array, order)
    return lax.expand_dims(array, [n for n, letter in enumerate(to) if letter not in letters])


@dataclasses.dataclass(frozen=True)
class Plan:
    """How an engine walks one call.

    Attributes:
        call: The call.
        queries: Blocks of queries.
        keys: Blocks of keys.
        batch: Batches that one step takes at once.
        kv_heads: Key heads that one step takes at once.
        sums_queries: Whether the engine sums over queries, so that a repeated query must be hidden.
            A repeated key always is; an output row that is written twice is the same twice.
    """

    call: Call
    queries: Axis
    keys: Axis
    batch: int
    kv_heads: int
    sums_queries: bool

    @property
    def hides_queries(self) -> bool:
        """Whether the last block of queries repeats some that must not count twice."""
        return self.sums_queries and self.queries.overlaps

    @property
    def halved(self) -> Plan:
        """The same walk in blocks of half the queries and half the keys: four for each of these."""
        queries, keys = (Axis(axis.length, axis.block // 2) for axis in (self.queries, self.keys))
        return dataclasses.replace(self, queries=queries, keys=keys)

    @property
    def halves(self) -> bool:
        """Whether `halved` has exactly two blocks for each of these, along both axes."""
        return all(axis.block % 2 == 0 and not axis.overlaps for axis in (self.queries, self.keys))

    @property
    def units(self) -> Size:
        """Number of groups of (batch, key head) that are walked one after another."""
        return (self.call.batch // self.batch) * (self.call.kv_heads // self.kv_heads)

    def tile(self, unit: Index, query_block: Index, key_block: Index) -> Tile:
        """The tile of one step."""
        across = as_index(self.call.kv_heads // self.kv_heads)
        batch, head = (unit // across, unit % across) if self.units not in (0, 1) else (0, 0)
        return Tile(
            self.call,
            (batch * self.batch, self.batch),
            (head * self.kv_heads, self.kv_heads),
            (self.queries.start(query_block), self.queries.block),
            (self.keys.start(key_block), self.keys.block),
            self.queries.owned(query_block) if self.hides_queries else None,
            self.keys.owned(key_block) if self.keys.overlaps else None,
        )


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not over `at_most` (1 at least)."""
    return next(n for n in range(max(1, min(number, at_most)), 0, -1) if number % n == 0)


def plan(call: Call, block_q: int, block_kv: int, elements: int, *, sums_queries: bool) -> Plan:
    """Make the plan: blocks near the sizes wished for, and as many heads at once as fit.

    Batches or key heads whose number is symbolic are walked one at a time.

    Args:
        call: The call.
        block_q: Queries per block and group of heads; a block holds that many rows, whatever the
            group size.
        block_kv: Keys per block.
        elements: Logits that one step may hold at most.
        sums_queries: As in `Plan`.
    """
    group = known(call.group_size, USUAL_GROUP)
    rows = call.block_q or max(1, math.ceil(block_q / max(1, group)))
    queries = balanced(call.q_len, rows)
    keys = balanced(call.k_len, call.block_kv or block_kv)
    room = elements // max(1, queries.block * keys.block * group)
    kv_heads = largest_divisor(max(1, known(call.kv_heads, 1)), room)
    batch = 1
    if kv_heads == call.kv_heads:
        batch = largest_divisor(max(1, known(call.batch, 1)), room // kv_heads)
    return Plan(call, queries, keys, batch, kv_heads, sums_queries)
