"""How the blocked engine walks a call: sizes of blocks, and which of them one step takes at once.

Sizes were measured on a CPU (XLA, 2 cores):

- Each operation alone is split over the cores and waits for the last of them, about 0.1 ms. So
  blocks are large, and the forward takes the heads of a large block side by side (`chains`).
- A large block on a causal diagonal is half invisible. So the forward splits blocks that are partly
  masked into quarters (`by_quarters`): fully visible quarters skip masking, invisible ones are
  skipped. In the backward neither was faster.

      keys ->          A block on the diagonal, in quarters: 1 is computed without a mask,
      q  2 .           2 is masked, and the one with the dot is not visited.
         1 2
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from flash_attention_jax._core import masks
from flash_attention_jax._core.call import Call, known
from flash_attention_jax._core.tiles import USUAL_GROUP, Plan, Tile, plan

_SHORT = 2048
"""Up to this length large blocks cost more than they save: memory, and what a diagonal hides."""

_BANDS = ((512, 128, 128), (1024, 512, 256), (4096, 512, 512))
"""Blocks of queries and of keys for a band of under so many keys: larger ones are mostly masked."""

LARGE = 2**19
"""Logits of a head in a block from which on heads are walked apart; from twice that on quarters."""


def forward_plan(call: Call) -> Plan:
    """The plan of the forward, which sums over keys."""
    short = max(call.q_len, call.k_len) <= _SHORT
    if call.platform != "cpu":
        return _within_band(call, 512, 512, 2**25, sums_queries=False)
    if call.banded and short:
        return _within_band(call, 512, 512, 2**20, sums_queries=False)
    return _within_band(call, 1024, 1024, 2**21, sums_queries=False)


def backward_plan(call: Call) -> Plan:
    """The plan of the backward, which sums over queries too."""
    short = max(call.q_len, call.k_len) <= _SHORT
    if call.platform != "cpu":
        return _within_band(call, 512, 512, 2**25, sums_queries=True)
    if call.banded and short:
        return _within_band(call, 512, 512, 2**20, sums_queries=True)
    if call.banded or short:
        return _within_band(call, 1024, 1024, 2**20, sums_queries=True)
    # Longer rows: fewer passes over what is summed.
    return _within_band(call, 1024, 2048, 2**21, sums_queries=True)


def _within_band(
    call: Call, block_q: int, block_kv: int, elements: int, *, sums_queries: bool
) -> Plan:
    """A plan of blocks near these sizes, or smaller ones where a narrow band masks most of them."""
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


def chains(steps: Plan, tile: Tile) -> list[Tile]:
    """A tile as one chain of operations or, head by head, as several that do not wait for another.

    XLA's CPU runtime runs operations side by side that do not depend on each other. Each of them
    alone leaves a core idle at its end (measured: 10% of the time).
    """
    apart = steps.call.platform == "cpu" and _logits_of_a_head(steps) >= LARGE
    return tile.by_head() if apart else [tile]


def by_quarters(steps: Plan) -> bool:
    """Whether the forward splits partly masked blocks into quarters."""
    return (
        steps.call.platform == "cpu"
        and _logits_of_a_head(steps) >= 2 * LARGE
        and steps.halves
        and masks.masks_anything(steps.call)
    )


def walk(route: masks.Route, visit: Callable[[bool, jax.Array, Any], Any], carry: Any) -> Any:
    """Visit the blocks of a route: the partial ones masked, then the full ones without a mask."""
    first = 0
    if route.partial is not None:
        first = route.partial
        carry = lax.fori_loop(0, first, lambda n, c: visit(True, route.order[n], c), carry)
    return lax.fori_loop(first, route.count, lambda n, c: visit(False, route.order[n], c), carry)
