"""Ring attention: queries stay, keys and values go round the devices of one mesh axis.

    for hop = 0 ... hops:   send k, v on;   merge attention to the k, v that are here

Backward the keys make the same journey; dk and dv follow them one hop behind and go home at the
end. A hop is sent while a part computes, and no product waits for it. Out and lse are kept, nothing
else, so memory is O(local length), and the parts are always merged in the same order.

What need not travel does not: the window, where it is known when the function is traced, bounds the
hops, and a link that nobody behind needs is left out. A part whose keys no query sees is skipped by
the device that holds it.

References:
    Liu, Zaharia & Abbeel 2023, "Ring Attention with Blockwise Transformers for Near-Infinite
    Context", arXiv:2310.01889, section 3.
    Brandon et al. 2023, "Striped Attention", arXiv:2311.09431, and the zigzag order of Llama 3
    (Grattafiori et al. 2024, arXiv:2407.21783, section 3.3.2) for causal balance.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_attention_jax._core import masks
from flash_attention_jax._core.call import ROLES, Arrays, Call
from flash_attention_jax._core.results import Results, merge_stacked
from flash_attention_jax._core.similarity import normalised
from flash_attention_jax._core.tiles import Tile
from flash_attention_jax._core.varying import full, unified
from flash_attention_jax._engines import blocked, blocked_backward
from flash_attention_jax._engines.dispatch import Engine
from flash_attention_jax._engines.rule import with_gradients
from flash_attention_jax._parallel.parts import Part, Run, sees_any

Blocks = dict[str, Any]
Visit = Callable[[Any, Blocks, Any], tuple[Any, Blocks]]

MOVING = ("k", "v", "kv_segment_ids")
"""What travels: the keys and all that belongs to them."""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """One journey of the keys.

    Attributes:
        direction: 1 = each device sends to the next, -1 = to the one before.
        hops: How often.
        links: Senders.
    """

    direction: int
    hops: int
    links: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Ring:
    """What is static.

    Attributes:
        call: The whole: its lengths are those of all devices together.
        engine: Who computes the parts.
        axis: The mesh axis.
        size: Its devices.
        zigzag: Device r holds the runs r and 2 * size - 1 - r of 2 * size, not run r of size.
    """

    call: Call
    engine: Engine
    axis: str
    size: int
    zigzag: bool = False

    @property
    def runs(self) -> int:
        """Runs of consecutive tokens on each device."""
        return 2 if self.zigzag else 1

    @property
    def local(self) -> Call:
        """The record of what one device holds: for its shapes alone."""
        lengths = {"q_len": self.call.q_len // self.size, "k_len": self.call.k_len // self.size}
        return dataclasses.replace(self.call, **lengths)

    def start(self, device: Any, run: Any, length: int) -> Any:
        """Where a run of a device begins in the whole; arguments may be traced."""
        if not self.zigzag:
            return device * (length // self.size)
        return (device + run * (2 * (self.size - device) - 1)) * (length // (2 * self.size))

    def part(self, device: Any, owner: Any, a: Any, b: Any) -> Part:
        """Run `a` of the device's queries against run `b` of the owner's keys."""
        q_len, k_len = self.call.q_len, self.call.k_len
        q_size, k_size = (length // (self.size * self.runs) for length in (q_len, k_len))
        queries = Run(a * q_size, self.start(device, a, q_len), q_size)
        return Part(self.call, queries, Run(b * k_size, self.start(owner, b, k_len), k_size))

    def needed(self) -> np.ndarray:
        """(device, owner): whether the diagonal lets the device's queries see the owner's keys."""
        n, call = self.size, self.call
        left, right = masks.band(call)
        if call.has("q_offset") or not call.banded:
            return np.ones((n, n), bool)
        q_size, k_size = (x // (n * self.runs) for x in (call.q_len, call.k_len))
        result = np.zeros((n, n), bool)
        device = np.arange(n)
        for a in range(self.runs):
            first = self.start(device, a, call.q_len)[:, None] + call.offset
            for b in range(self.runs):
                keys = self.start(device, b, call.k_len)[None]
                seen = np.ones((n, n), bool)
                if left is not None:
                    seen &= keys + k_size - 1 >= first - left
                if right is not None:
                    seen &= keys <= first + q_size - 1 + right
                result |= seen
        return result

    @functools.cached_property
    def sweeps(self) -> tuple[Sweep, ...]:
        """The journeys: forwards to the devices behind, backwards to those before, as few hops."""
        n, needed = self.size, self.needed()
        device = np.arange(n)
        away = sorted({int(d) for d in ((device[:, None] - device) % n)[needed] if d})
        # Split the distances where that leaves the fewest hops; all forwards where it is equal.
        splits = [
            ((away[:m] or [0])[-1], n - away[m] if m < len(away) else 0)
            for m in range(len(away), -1, -1)
        ]
        forward, backward = min(splits, key=sum)
        return tuple(
            Sweep(direction, hops, self._links(needed, direction, hops))
            for direction, hops in ((1, forward), (-1, backward))
            if hops
        )

    def _links(self, needed: np.ndarray, direction: int, hops: int) -> tuple[int, ...]:
        """The devices that have to send: there is one further on that needs the keys."""
        n, links = self.size, set()
        for owner in range(n):
            devices = [(owner + direction * hop) % n for hop in range(hops + 1)]
            reach = max(
                hop for hop, device in enumerate(devices) if hop == 0 or needed[device, owner]
            )
            links |= set(devices[:reach])
        return tuple(sorted(links))

    def owner(self, device: Any, sweep: Sweep, hop: Any) -> Any:
        """Whose keys a device has after some hops."""
        return (device - sweep.direction * hop) % self.size

    def send(self, x: Any, direction: int, links: tuple[int, ...] | None = None) -> Any:
        """Every array one or more devices on; what nobody sends arrives as zeros."""
        links = tuple(range(self.size)) if links is None else links
        pairs = [(i, (i + direction) % self.size) for i in links]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis, pairs), x)


def attend_ring(ring: Ring, arrays: Arrays) -> Results:
    """Attention over all devices of the axis; inside `shard_map`.

    Args:
        ring: What is static.
        arrays: The device's own: q, k, v and what belongs to each token cut along the length, a
            mask, bias or relative bias whole along the keys.

    Returns:
        Those of the device's queries.
    """
    device = lax.axis_index(ring.axis)
    if ring.engine.normalised:
        arrays = normalised(ring.call, arrays)
    arrays, _ = unified((arrays, device))
    attend = _forward if ring.engine.gradients is None else _attend
    results = attend(ring, *blocked.split(arrays))
    return results._replace(out=results.out.astype(ring.call.dtype))


def tour(ring: Ring, keys: Blocks, visit: Visit, carry: Any) -> tuple[Any, Blocks]:
    """Show a device the keys of every owner that it needs, and bring home what its own keys gain.

    The keys go round; each device computes with those that are there while it sends them on. What
    they gain on the way (dk and dv, in the backward) follows one hop behind and is sent home at the
    end of a sweep. With four devices, two sweeps and full attention, whose keys are where:

        device            0  1  2  3
        at first          0  1  2  3
        sweep +1, hop 1   3  0  1  2
                  hop 2   2  3  0  1
        sweep -1, hop 1   1  2  3  0

    Args:
        ring: What is static.
        keys: The device's own arrays that travel.
        visit: (owner, keys, carry) -> carry, and what those keys gain here: arrays by name, none in
            the forward.
        carry: What stays on the device.

    Returns:
        The carry after all visits, and the sum of what the device's own keys gained everywhere.
    """
    device = lax.axis_index(ring.axis)
    carry, gained = visit(device, keys, carry)
    if not ring.sweeps:
        return carry, gained
    home = jax.tree.map(jnp.zeros_like, gained)
    for number, sweep in enumerate(ring.sweeps):
        here, first = ring.send(keys, sweep.direction, sweep.links), 1
        if number and gained:
            # What the own keys gained here has left with the first sweep, so nothing arrives with
            # the first keys of another.
            then = ring.send(here, sweep.direction, sweep.links) if sweep.hops > 1 else here
            carry, gained = visit(ring.owner(device, sweep, 1), here, carry)
            here, first = then, 2

        def hop(state: Any, number: Any, sweep: Sweep = sweep) -> tuple[Any, None]:
            here, gained, carry = state
            # Sent while the part is computed; after the last hop there is nowhere to go.
            then = here if number is None else ring.send(here, sweep.direction, sweep.links)
            arrived = ring.send(gained, sweep.direction)
            owner = ring.owner(device, sweep, sweep.hops if number is None else number)
            carry, more = visit(owner, here, carry)
            return (then, jax.tree.map(jnp.add, arrived, more), carry), None

        state = (here, gained, carry)
        numbers = jnp.arange(first, sweep.hops, dtype=jnp.int32)
        if numbers.size:
            state, _ = lax.scan(hop, state, numbers)
        if first <= sweep.hops:
            state, _ = hop(state, None)
        _, gained, carry = state
        home = jax.tree.map(jnp.add, home, ring.send(gained, -sweep.direction * sweep.hops))
    return carry, home


# --- forward ---


def _forward(ring: Ring, floats: Blocks, others: Blocks) -> Results:
    """The results, with out in the accumulator's dtype."""
    call, device = ring.local, lax.axis_index(ring.axis)
    arrays = Arrays(**floats, **others)
    fixed, keys = _apart(arrays)
    no_keys = Results(
        *(
            full(call.shape(ROLES[name][call.layout]), value, call.acc_dtype, arrays)
            for name, value in (("out", 0), ("lse", -jnp.inf), ("low", 0))
        )
    )

    def visit(owner: Any, moving: Blocks, results: Results) -> tuple[Results, Blocks]:
        here = Arrays(**fixed, **moving)

        def merge(results: Results, part: Part) -> Results:
            smaller, cut = part.record(here)
            cut = unified(cut)

            def compute(results: Results) -> Results:
                before = Results(*map(part.cut, Results._fields, results))
                merged = _merged(before, ring.engine.of_part(smaller, cut))
                return Results(*map(part.put, Results._fields, results, merged))

            return _where(sees_any(smaller, cut), compute, results)

        return _over_parts(ring, device, owner, merge, results), {}

    results, _ = tour(ring, keys, visit, no_keys)
    if arrays.sinks is None:
        return results
    # A sink belongs to no key: it joins once, as a part whose out is 0.
    tile = Tile.whole(call)
    sinks = tile.take(arrays.sinks, "n", "bhri").astype(call.acc_dtype)
    sinks = tile.put(results.lse, ROLES["lse"][call.layout], sinks, "bhri")
    return _merged(results, Results(jnp.zeros_like(results.out), sinks, jnp.zeros_like(sinks)))


def _merged(*parts: Results) -> Results:
    """Parts of the keys as one, in the dtype of the first out."""
    outs = [part.out.astype(parts[0].out.dtype) for part in parts]
    return merge_stacked(*map(jnp.stack, (outs, *zip(*(part[1:] for part in parts), strict=True))))


def _apart(arrays: Arrays) -> tuple[Blocks, Blocks]:
    """What stays on the device, and what travels."""
    present = {name: x for name, x in arrays._asdict().items() if x is not None}
    return present, {name: present.pop(name) for name in MOVING if name in present}


def _over_parts(ring: Ring, device: Any, owner: Any, compute: Any, carry: Any) -> Any:
    """Every run of the device's queries against every run of the owner's keys, in one order."""
    if ring.runs == 1:
        return compute(carry, ring.part(device, owner, 0, 0))

    def step(carry: Any, pair: jax.Array) -> tuple[Any, None]:
        return compute(carry, ring.part(device, owner, pair // 2, pair % 2)), None

    return lax.scan(step, carry, jnp.arange(4, dtype=jnp.int32))[0]


def _where(some: jax.Array | None, compute: Any, carry: Any) -> Any:
    """`compute` where there is anything to see, else the carry as it is."""
    return compute(carry) if some is None else lax.cond(some, compute, lambda c: c, carry)


# --- backward ---


def _gradients(
    ring: Ring, floats: Blocks, others: Blocks, results: Results, cotangents: Any
) -> Blocks:
    """Each part's share, from the results of the whole; dk and dv follow the keys."""
    gradients = ring.engine.gradients
    if gradients is None:
        raise RuntimeError("JAX differentiates what this engine computes.")
    fixed, keys = _apart(Arrays(**floats, **others))
    device, sinks = lax.axis_index(ring.axis), fixed.pop("sinks", None)
    zeros = {
        name: full(x.shape, 0, ring.call.acc_dtype, floats)
        for name, x in floats.items()
        if name != "sinks"
    }
    staying, travelling = _apart(Arrays(**{"q": None, "k": None, "v": None} | zeros))

    def visit(owner: Any, moving: Blocks, staying: Blocks) -> tuple[Blocks, Blocks]:
        here = Arrays(**fixed, **moving)

        def add(sums: Blocks, part: Part) -> Blocks:
            smaller, cut = part.record(here)
            cut = unified(cut)

            def compute(sums: Blocks) -> Blocks:
                rows = Results(*map(part.cut, Results._fields, results))
                ct = tuple(map(part.cut, ("out", "lse"), cotangents))
                shares = gradients(smaller, *blocked.split(cut), rows, ct)
                return {name: part.add(name, x, shares[name]) for name, x in sums.items()}

            return _where(sees_any(smaller, cut), compute, sums)

        return _apart(Arrays(**_over_parts(ring, device, owner, add, staying | travelling)))

    staying, home = tour(ring, keys, visit, staying)
    sums = staying | home
    if sinks is not None:
        sums |= blocked_backward.gradients(ring.local, {"sinks": sinks}, {}, results, cotangents)
    return sums


_attend = with_gradients(_forward, _gradients)
