"""Run one head over a long sequence on this CPU, and show what time and memory that takes.

python benchmarks/long.py                                     (131072, 512): takes many minutes
python benchmarks/long.py --length 16384 --dim 64 --causal

The logits of the default size, all at once, would take 64 GiB.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import measure
import numpy as np

from flash_attention_jax import flash_attention

ROWS = 16  # queries whose outputs are compared with float64


def gibibytes(count: int | None) -> str:
    """A size in words."""
    return "not said" if count is None else f"{count / 2**30:.3f} GiB"


def error_of_rows(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, causal: bool
) -> float:
    """Relative error of some rows, the first and the last among them, against float64."""
    rows = np.unique(np.linspace(0, len(q) - 1, ROWS).astype(int))
    logits = q[rows].astype(np.float64) @ k.T.astype(np.float64) / np.sqrt(q.shape[1])
    if causal:
        logits = np.where(np.arange(len(k)) <= rows[:, None], logits, -np.inf)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    right = probs @ v.astype(np.float64) / probs.sum(axis=1, keepdims=True)
    return measure.relative_error(out[rows], right)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Run one head over a long sequence on this CPU.")
    parser.add_argument("--length", type=int, default=131072, help="queries and keys")
    parser.add_argument("--dim", type=int, default=512, help="of each of them")
    parser.add_argument("--causal", action="store_true", help="see earlier keys only")
    options = parser.parse_args(arguments)
    for name in ("length", "dim"):
        if getattr(options, name) < 1:
            got = getattr(options, name)
            print(f"long.py: --{name} must be at least 1, got {got}.", file=sys.stderr)
            return 2

    jax.config.update("jax_platforms", "cpu")
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((options.length, options.dim), np.float32) for _ in "qkv")
    arrays = [jax.device_put(x) for x in (q, k, v)]
    abstract = jax.ShapeDtypeStruct(q.shape, jnp.float32)
    build = measure.compile_cold(
        lambda q, k, v: flash_attention(q, k, v, causal=options.causal), *[abstract] * 3
    )
    jax.block_until_ready(arrays)
    before = measure.peak_bytes()
    mask, machine = ", causal" if options.causal else "", measure.describe_machine()
    print(
        f"({options.length}, {options.dim}) float32{mask}, forward, "
        f"on {machine['cpu']}, {machine['cores']} cores",
        flush=True,
    )
    start = time.perf_counter()
    out = jax.block_until_ready(build.run(*arrays))
    seconds = time.perf_counter() - start
    after = measure.peak_bytes()
    # The usual count: two products of length * length * dim, half of them where causal.
    operations = 4 * options.length**2 * options.dim / (2 if options.causal else 1)
    print(f"compile time       {build.seconds:.2f} s")
    print(f"time               {seconds:.2f} s ({operations / seconds / 1e9:.1f} GFLOP/s)")
    print(f"temporary memory   {gibibytes(build.temp_bytes)}, by the compiler")
    print(f"one array          {gibibytes(q.nbytes)}; three go in, one comes out")
    print(f"peak resident      {gibibytes(after)}, {gibibytes(before)} of it before the run")
    print(f"all the logits     {gibibytes(4 * options.length**2)}, never held")
    print(f"error              {error_of_rows(q, k, v, np.asarray(out), options.causal):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
