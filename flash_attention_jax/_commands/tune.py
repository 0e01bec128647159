"""Measure which tiles are fastest on the GPU at hand, and store them: `flash-attention-jax tune`.

For each kernel, every candidate that fits is compiled; then all are run in turn, round after round,
so that a GPU that warms up or is shared slows them alike; the one with the least median is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from flash_attention_jax import explain, flash_attention
from flash_attention_jax.kernels import (
    hopper_config,
    hopper_support,
    stored,
    triton_config,
    triton_support,
)

PROG = "flash-attention-jax tune"
DIRECTIONS = {"hopper": ("forward", "decode", "dq", "dkv"), "triton": ("forward", "dq", "dkv")}
ASKED = jax.ShapeDtypeStruct((1, 1, 128, 64), jnp.bfloat16)


class Kernel(NamedTuple):
    """One thing to tune."""

    backend: str
    direction: str
    dim: int
    causal: bool
    dtype: str

    @property
    def name(self) -> str:
        """Name of its entry."""
        return stored.key(
            self.backend, self.direction, self.dim, banded=self.causal, dtype=self.dtype
        )


def hopper_candidates(direction: hopper_config.Pass, dim: int) -> Iterator[stored.Entry]:
    """Tiles that fit into the shared memory of a Hopper GPU."""
    warpgroups = (2, 3, 1) if direction == "forward" else (2, 1)
    for groups, inner, stages in itertools.product(warpgroups, (32, 64, 128, 192), (2, 3, 4)):
        tiles = hopper_config.Tiles(groups, inner, stages)
        if hopper_config.shared_memory(direction, dim, tiles) <= hopper_config.SHARED_MEMORY:
            yield dataclasses.asdict(tiles)


def candidates(kernel: Kernel, capability: tuple[int, int]) -> list[stored.Entry]:
    """What is tried: the table's own tiles first."""
    if kernel.backend == "triton":
        direction = cast(triton_config.Direction, kernel.direction)
        own = triton_config.tiles(capability, kernel.dim, kernel.causal, kernel.dtype, direction)
        others = map(dataclasses.asdict, triton_config.candidates(direction, kernel.dtype))
    else:
        own = hopper_config.TABLE[cast(hopper_config.Pass, kernel.direction)][kernel.dim]
        others = hopper_candidates(cast(hopper_config.Pass, kernel.direction), kernel.dim)
    first = dataclasses.asdict(own)
    return [first, *(entry for entry in others if entry != first)]


def build(kernel: Kernel, entry: stored.Entry, *, length: int, heads: int) -> Callable[[], Any]:
    """Compile a call with these tiles; what is returned runs it once.

    Raises:
        Exception: Whatever the compiler says of tiles that it cannot use.
    """
    decode = kernel.direction == "decode"
    shapes = [(1, heads, 1 if decode else length, kernel.dim)] + [
        (1, heads, length, kernel.dim)
    ] * 2
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, s, kernel.dtype) for x, s in zip(keys, shapes, strict=True))

    def forward(q: Any, k: Any, v: Any) -> Any:
        return flash_attention(q, k, v, causal=kernel.causal, implementation=kernel.backend)

    def both(q: Any, k: Any, v: Any) -> Any:
        out, pull = jax.vjp(forward, q, k, v)
        return pull(out)

    function = forward if kernel.direction in ("forward", "decode") else both
    with stored.trial({kernel.name: entry}):
        compiled = jax.jit(function).lower(q, k, v).compile()
    return lambda: jax.block_until_ready(compiled(q, k, v))


def fastest(
    runs: dict[int, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Median seconds of each run, measured in turn; the first of each is not counted."""
    seconds: dict[int, list[float]] = {n: [] for n in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for n, run in runs.items():
            start = clock()
            run()
            seconds[n].append(clock() - start)
    return {n: statistics.median(found) for n, found in seconds.items()}


def tune(
    kernel: Kernel,
    tried: Sequence[stored.Entry],
    builder: Callable[[Kernel, stored.Entry], Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[stored.Entry, dict[int, float]] | None:
    """The fastest candidate and the median of each that compiles; None where none does."""
    runs: dict[int, Callable[[], Any]] = {}
    for n, entry in enumerate(tried):
        try:
            runs[n] = builder(kernel, entry)
        except Exception as error:  # noqa: BLE001 (a candidate that does not compile is no failure)
            print(f"  {entry}: {type(error).__name__}", file=sys.stderr)
    if not runs:
        return None
    medians = fastest(runs, rounds, clock)
    return dict(tried[min(medians, key=medians.__getitem__)]), medians


def why_not(backend: str) -> str | None:
    """Why nothing of a backend can be measured here."""
    if stored.device_kind() is None:
        return "JAX sees no NVIDIA GPU, and tiles are measured on the one that will use them"
    declines = {"hopper": hopper_support.why_not, "triton": triton_support.why_not}
    return declines[backend](explain(ASKED, ASKED, ASKED).call)


def tune_main(argv: Sequence[str] | None = None) -> int:
    """The command: measure, print, store.

    Args:
        argv: Arguments after `tune`; ["--help"] lists them.

    Returns:
        The exit code: 0, or 2 where nothing can be measured.
    """
    parser = argparse.ArgumentParser(prog=PROG, description=__doc__)
    add = parser.add_argument
    add("--backend", choices=tuple(DIRECTIONS), default="hopper", help="whose kernels")
    add("--dims", type=int, nargs="+", default=[64, 128, 256], help="head dimensions")
    add("--directions", nargs="+", choices=DIRECTIONS["hopper"], help="which kernels; else all")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--length", type=int, default=4096, help="queries and keys")
    add("--heads", type=int, default=16, help="heads")
    add("--rounds", type=int, default=7, help="rounds of which the median is taken")
    add("--out", type=Path, help=f"the file; else in ${stored.FOLDER_VARIABLE} or the user's cache")
    args = parser.parse_args(argv)
    unknown = set(args.directions or ()) - set(DIRECTIONS[args.backend])
    if unknown:
        known = ", ".join(DIRECTIONS[args.backend])
        parser.error(f"{args.backend} has no {', '.join(sorted(unknown))}; it has {known}")
    if args.backend == "hopper" and args.dtype == "float32":
        parser.error("hopper takes no float32: choose --backend triton, or another --dtype")
    reason = why_not(args.backend)
    if reason is not None:
        print(f"{PROG}: error: {reason}", file=sys.stderr)
        return 2
    device = stored.device_kind() or ""
    capability = explain(ASKED, ASKED, ASKED).call.capability
    padded = hopper_config.padded if args.backend == "hopper" else triton_config.padded

    def builder(kernel: Kernel, entry: stored.Entry) -> Callable[[], Any]:
        return build(kernel, entry, length=args.length, heads=args.heads)

    directions = args.directions or DIRECTIONS[args.backend]
    for dim, direction, causal in itertools.product(args.dims, directions, (False, True)):
        kernel = Kernel(args.backend, direction, padded(dim), causal, args.dtype)
        found = tune(kernel, candidates(kernel, capability), builder, args.rounds)
        if found is None:
            print(f"{kernel.name}: nothing compiles")
            continue
        entry, medians = found
        least = min(medians.values())
        before = f", {medians[0] / least:.2f}x the table's" if 0 in medians else ""
        print(f"{kernel.name}: {entry}, {least * 1e3:.3f} ms{before}")
        # After each, so that an interruption loses one kernel.
        path = stored.write(device, {kernel.name: entry}, args.out)
        print(f"  stored in {path}", flush=True)
    return 0
