"""How attention scales with devices: time, bytes sent and memory of each, strong and weak.

    python benchmarks/scaling.py                virtual CPU devices of this process
    python benchmarks/scaling.py --devices gpu  the GPUs of this machine
    python benchmarks/scaling.py --compile      8 H200s that are not there: the program alone

Virtual devices share the cores of one machine: their times say what the ring costs beside the
computation, and nothing of a network. Bytes and memory are the compiled program's, and hold
anywhere. Writes results/scaling.json and results/scaling.png.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
HEADS, DIM = 8, 64


def measure_way(count: int, length: int, way: str, repeats: int, dtype: str) -> dict[str, Any]:
    """Measure forward and backward of one causal sequence over the first `count` devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from flash_attention_jax.sharding import context_parallel_attention, explain_context_parallel

    mesh = Mesh(np.array(jax.devices()[:count]), ("context",))
    place = NamedSharding(mesh, PartitionSpec(None, None, "context"))
    keys = jax.random.split(jax.random.key(0), 4)
    shape = (1, HEADS, length, DIM)
    q, k, v, dout = (jax.device_put(jax.random.normal(x, shape, dtype), place) for x in keys)
    order = "zigzag" if way == "zigzag" else "contiguous"
    options: dict[str, Any] = {
        "mesh": mesh,
        "causal": True,
        "context_parallel": "ring" if way == "zigzag" else way,
        "order": order,
    }
    attend = functools.partial(context_parallel_attention, **options)

    @jax.jit
    def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    compiled = both.lower(q, k, v, dout).compile()
    jax.block_until_ready(compiled(q, k, v, dout))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(q, k, v, dout))
        times.append(time.perf_counter() - start)
    explained = explain_context_parallel(q, k, v, **options)
    memory: Any = compiled.memory_analysis()
    # At least: each device sees every key and value that a causal query of it reads, once, and
    # sends back its share of their gradients.
    item = jnp.dtype(dtype).itemsize
    ideal = 2 * 2 * HEADS * DIM * item * (length - length // count)
    return {
        "devices": count,
        "length": length,
        "way": way,
        "seconds": statistics.median(times),
        "spread": [min(times), max(times)],
        "bytes_sent_by_each": explained.bytes_forward + explained.bytes_backward,
        "bytes_ideal": ideal,
        "temporary_bytes_of_each": memory.temp_size_in_bytes,
        "argument_bytes_of_each": memory.argument_size_in_bytes,
        "collectives": {"forward": explained.forward, "backward": explained.backward},
    }


def compile_for_gpus(count: int, length: int) -> str:
    """Compile a ring for Hopper GPUs that are only described, and say what XLA made of it."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from flash_attention_jax._commands import compile_hopper as deviceless
    from flash_attention_jax.sharding import context_parallel_attention

    reason = deviceless.why_not()
    if reason is not None:
        return f"Nothing was compiled for GPUs: {reason}."
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name="",
        target_config=deviceless.H200,
        topology=f"1x1x{count}",
    )
    mesh = Mesh(np.array(described.devices), ("context",))
    place = NamedSharding(mesh, PartitionSpec(None, None, "context"))
    x = jax.ShapeDtypeStruct((1, HEADS, length, DIM), jnp.bfloat16, sharding=place)
    attend = functools.partial(
        context_parallel_attention,
        mesh=mesh,
        causal=True,
        context_parallel="ring",
        implementation="blocked",
    )

    def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(dout)

    start = time.perf_counter()
    compiled = jax.jit(both).trace(x, x, x, x).lower().compile()
    seconds = time.perf_counter() - start
    names = "collective-permute|all-gather|all-reduce|all-to-all|reduce-scatter"
    counts = collections.Counter(re.findall(rf"\b({names})(?:-start)?\(", str(compiled.as_text())))
    sent = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    memory: Any = compiled.memory_analysis()
    return (
        f"{count} H200s, {length} tokens, causal, bfloat16, forward and backward: {sent} in the "
        f"program (most of them in loops), {memory.temp_size_in_bytes / 2**20:.0f} MiB temporary "
        f"on each, compiled in {seconds:.0f} s"
    )


def draw(rows: list[dict[str, Any]], path: Path, what: str, virtual: bool) -> None:
    """Time against devices, strong and weak, with the ideal."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4))
    for place, kind in zip(axes, ("strong", "weak"), strict=False):
        for way in ("ring", "zigzag", "ulysses"):
            mine = [row for row in rows if row["kind"] == kind and row["way"] == way]
            counts, times = [r["devices"] for r in mine], [r["seconds"] for r in mine]
            place.plot(counts, times, "o-", label=way)
        first = next(row for row in rows if row["kind"] == kind)
        steps = [row for row in rows if row["kind"] == kind and row["way"] == "ring"]
        # Virtual devices share the cores that one device has already.
        ideal = [
            first["seconds"]
            * (r["length"] / first["length"]) ** 2
            / (1 if virtual else r["devices"])
            for r in steps
        ]
        place.plot([r["devices"] for r in steps], ideal, "k--", label="the same work, no more")
        place.set(xlabel="devices", ylabel="seconds, forward and backward", title=kind)
        place.set(xscale="log", yscale="log")
    for way in ("ring", "zigzag", "ulysses"):
        mine = [row for row in rows if row["kind"] == "weak" and row["way"] == way]
        memory = [r["temporary_bytes_of_each"] / 2**20 for r in mine]
        axes[2].plot([r["devices"] for r in mine], memory, "o-", label=way)
    axes[2].set(xlabel="devices", ylabel="MiB of each device", title="weak: temporary memory")
    axes[2].set(xscale="log", ylim=(0, None))
    counts = sorted({row["devices"] for row in rows})
    for place in axes:
        place.minorticks_off()
        place.set_xticks(counts, [str(n) for n in counts])
    axes[1].legend()
    figure.suptitle(what)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--devices", choices=("cpu", "gpu"), default="cpu", help="which")
    parser.add_argument("--most", type=int, default=8, help="largest number of devices")
    parser.add_argument("--strong", type=int, default=4096, help="tokens in all")
    parser.add_argument("--weak", type=int, default=1024, help="tokens of each device")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--compile", action="store_true", help="compile for GPUs, run nothing")
    args = parser.parse_args()
    if args.compile:
        os.environ["JAX_PLATFORMS"] = "cpu"
        print(compile_for_gpus(args.most, args.strong))
        return
    if args.devices == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        flags = f"{flags} --xla_force_host_platform_device_count={args.most}"
        os.environ |= {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    import jax

    rows = []
    counts = [n for n in (1, 2, 4, 8, 16) if n <= min(args.most, jax.device_count())]
    for kind in ("strong", "weak"):
        for way in ("ring", "zigzag", "ulysses"):
            for count in counts:
                length = args.strong if kind == "strong" else args.weak * count
                row = measure_way(count, length, way, args.repeats, args.dtype)
                rows.append({"kind": kind} | row)
                print(
                    f"{kind:6} {way:8} {count:2} devices {length:7} tokens "
                    f"{row['seconds'] * 1e3:9.1f} ms  {row['bytes_sent_by_each']:12,} bytes sent  "
                    f"{row['temporary_bytes_of_each']:12,} temporary",
                    flush=True,
                )
    virtual = args.devices == "cpu"
    kind = jax.devices()[0].device_kind
    what = f"{counts[-1]} {'virtual devices on one ' if virtual else ''}{kind}"
    record = {
        "what": what,
        "virtual": virtual,
        "cores": os.cpu_count(),
        "heads": HEADS,
        "dim": DIM,
        "dtype": args.dtype,
        "causal": True,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "rows": rows,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "scaling.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(rows, args.out / "scaling.png", what, virtual)


if __name__ == "__main__":
    main()
