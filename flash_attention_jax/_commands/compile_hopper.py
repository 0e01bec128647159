"""Compile every Hopper kernel for an H200 that is not there, and report what each one takes.

    python -m flash_attention_jax compile hopper
    python -m flash_attention_jax compile hopper --only causal --dims 128

XLA compiles for a device that is only described (deviceless compilation); the assembler then says
how many registers a kernel has and how many bytes it spills. The exit status is 1 if one spills or
does not compile, and 0, with a line that says so, where the CUDA plugin is not installed:

    pip install "jax-cuda13-plugin==VERSION" "jax-cuda13-pjrt==VERSION" nvidia-cuda-nvcc nvidia-nvvm

with the VERSION of jax.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from flash_attention_jax._api import read
from flash_attention_jax._core.call import DIFFERENTIABLE
from flash_attention_jax.kernels import hopper_attention
from flash_attention_jax.kernels.hopper_config import LARGEST_FUSED_DIM

# Facts about the hardware, and nothing else: what the compiler asks of a device.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""

DIMS = (64, 128, 192, 256)
LENGTH = 2048

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "cosine": {"similarity": "cosine"},
    "cosine causal": {"similarity": "cosine", "causal": True},
    "window": {"causal": True, "window": (256, 0)},
    "softcap": {"causal": True, "softcap": 30.0},
    "ragged gqa": {"causal": True, "length": LENGTH - 7, "kv_heads": 2},
    "dropout": {"causal": True, "dropout_rate": 0.1},
    "segments": {"causal": True, "segments": True},
    "fused": {"deterministic_backward": False},
    "fused causal": {"causal": True, "deterministic_backward": False},
    "decode": {"queries": 1, "kv_heads": 2},
    "alibi sinks": {"causal": True, "alibi": True},
    "scale per head": {"causal": True, "scale_per_head": True},
    "bias": {"bias": True},
    "bias causal": {"causal": True, "bias": True},
    "mask": {"mask": True},
}
"""What each case asks of `compile_case`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flash_attention_jax compile hopper")
    parser.add_argument("--only", choices=list(OPTIONS), nargs="+", default=list(OPTIONS))
    parser.add_argument("--dims", type=int, nargs="+", default=list(DIMS))
    parser.add_argument("--dump", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    reason = why_not()
    if reason is not None:
        print(f"Nothing was compiled for a GPU: {reason}.")
        return 0
    if args.dump is None:
        # JAX reads where to dump when it is imported, which it is: once more, in a new process.
        with tempfile.TemporaryDirectory(prefix="compile-") as dump:
            given = ["--only", *args.only, "--dims", *map(str, args.dims), "--dump", dump]
            command = [sys.executable, "-m", "flash_attention_jax", "compile", "hopper", *given]
            return subprocess.run(command, env=_environment(dump), check=False).returncode
    dump = args.dump
    print(f"jax {jax.__version__}, sm_90a, bfloat16, length {LENGTH}, 8 heads")
    print(f"{'case':<14} {'dim':>4}  {'kernel':<15} {'registers':>9} {'spilled':>8} {'seconds':>8}")
    wrong = 0
    for name in args.only:
        for dim in args.dims:
            for row in _rows(name, dim, dump):
                wrong += row.wrong
                print(row, flush=True)
    print("No kernel spills." if not wrong else f"{wrong} kernels spill or do not compile.")
    return int(wrong > 0)


def why_not() -> str | None:
    """Why this machine cannot compile for a GPU, or None."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return "jax-cuda13-plugin is not installed"
    return None if _ptxas() else "ptxas was not found (nvidia-cuda-nvcc brings it)"


class Row:
    """A kernel of a case, and what the assembler said of it."""

    def __init__(self, case: str, dim: int, kernel: str, seconds: float, **found: Any) -> None:
        self.case, self.dim, self.kernel, self.seconds = case, dim, kernel, seconds
        self.registers: int | None = found.get("registers")
        self.spilled: int | None = found.get("spilled")
        self.error: str | None = found.get("error")

    @property
    def wrong(self) -> bool:
        """Whether it spills or did not compile."""
        return self.error is not None or bool(self.spilled)

    def __str__(self) -> str:
        """A line of the table."""
        start = f"{self.case:<14} {self.dim:>4}  {self.kernel:<15}"
        if self.error is not None:
            return f"{start} {self.error}"
        return f"{start} {self.registers:>9} {self.spilled:>7}B {self.seconds:>8.1f}"


def _rows(name: str, dim: int, dump: str) -> list[Row]:
    before = set(Path(dump).iterdir())
    start = time.perf_counter()
    try:
        compile_case(dim, **OPTIONS[name])
    except Exception as error:  # noqa: BLE001 (whatever it is belongs into the table)
        return [Row(name, dim, "-", 0.0, error=f"{type(error).__name__}: {error}".splitlines()[0])]
    seconds = time.perf_counter() - start
    rows = []
    for path in sorted(set(Path(dump).glob("*.ptx")) - before):
        for kernel, registers, spilled in _resources(path):
            if "mosaic_gpu" in kernel:
                short = kernel.removesuffix("_mosaic_gpu_kernel").removeprefix("hopper_")
                found = {"registers": registers, "spilled": spilled}
                rows.append(Row(name, dim, short, seconds, **found))
    expected = {
        "forward",
        "fused" if name.startswith("fused") and dim <= LARGEST_FUSED_DIM else "dq",
    }
    missing = expected - {row.kernel for row in rows}
    return rows + [Row(name, dim, kernel, 0.0, error="was not built") for kernel in sorted(missing)]


def compile_case(
    dim: int,
    *,
    length: int = LENGTH,
    queries: int | None = None,
    kv_heads: int = 8,
    segments: bool = False,
    alibi: bool = False,
    scale_per_head: bool = False,
    bias: bool = False,
    mask: bool = False,
    similarity: Literal["dot", "cosine"] = "dot",
    **options: Any,
) -> Any:
    """Forward and backward of one call, compiled for an H200.

    Args:
        dim: Head dimension.
        length: Keys.
        queries: Queries; as many as keys without it.
        kv_heads: Key heads, of 8 query heads.
        segments: Whether there are segment ids.
        alibi: Whether there are ALiBi slopes, and sinks.
        scale_per_head: Whether each head has a learned scale.
        bias: Whether there is a bias per head with a gradient.
        mask: Whether there is a dense mask for all heads.
        similarity: The similarity.
        options: As in `flash_attention`.

    Returns:
        What JAX compiled.
    """

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype)

    arrays = {
        "q": shape(1, queries or length, 8, dim),
        "k": shape(1, length, kv_heads, dim),
        "v": shape(1, length, kv_heads, dim),
    }
    if segments:
        arrays |= dict.fromkeys(
            ("q_segment_ids", "kv_segment_ids"), shape(1, length, dtype=jnp.int32)
        )
    if alibi:
        arrays |= dict.fromkeys(("alibi_slopes", "sinks"), shape(8, dtype=jnp.float32))
    if scale_per_head:
        arrays["scale"] = shape(8, dtype=jnp.float32)
    if bias:
        arrays["bias"] = shape(1, 8, length, length)
    if mask:
        arrays["mask"] = shape(1, 1, length, length, dtype=jnp.bool_)
    if options.get("dropout_rate"):
        arrays["dropout_key"] = shape(2, dtype=jnp.uint32)

    def both(arrays: dict[str, Any]) -> Any:
        def forward(arrays: dict[str, Any]) -> Any:
            given = dict(arrays)
            q, k, v = (given.pop(name) for name in "qkv")
            reading = read.read(
                q,
                k,
                v,
                given.pop("mask", None),
                {**options, **given},
                layout="heads_last",
                similarity=similarity,
                default_scale=10.0 if similarity == "cosine" else None,
                platform="gpu",
                capability=(9, 0),
            )
            given = read.arrays(reading.call, reading.given)
            return hopper_attention.attend(_no_reference, reading.call, given)

        floats = {name: x for name, x in arrays.items() if name in DIFFERENTIABLE}
        rest = {name: x for name, x in arrays.items() if name not in DIFFERENTIABLE}
        out, pull = jax.vjp(lambda floats: forward(floats | rest), floats)
        return out, pull(out)

    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=H200, topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(topology.devices, ("x",))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    given = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for name, x in arrays.items()
    }
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(both).trace(given).lower().compile()


def _no_reference(call: Any, arrays: Any) -> Any:
    raise RuntimeError("No second derivative is compiled here.")


def _environment(folder: str) -> dict[str, str]:
    """An environment in which XLA and Mosaic write what they make into a folder."""
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_emitter_re=ptx"
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_TO": folder,
        "MOSAIC_GPU_DUMP_PTX": "1",
    }


def _ptxas() -> str | None:
    for name in ("nvidia.cu13", "nvidia.cuda_nvcc"):
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            continue
        for folder in (found.submodule_search_locations or ()) if found else ():
            if (Path(folder) / "bin/ptxas").exists():
                return str(Path(folder) / "bin/ptxas")
    return shutil.which("ptxas")


def _resources(ptx: Path) -> list[tuple[str, int, int]]:
    """Name, registers and spilled bytes of each kernel in a file, by assembling it once more."""
    command = [str(_ptxas()), "-v", "-arch=sm_90a", str(ptx), "-o", os.devnull]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    found = []
    for part in re.split(r"(?=Compiling entry function)", report)[1:]:
        name = re.search(r"function '([^']+)'", part)
        numbers = [
            re.search(pattern, part)
            for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
        ]
        values = [int(match[1]) if match else 0 for match in numbers]
        found.append((name[1] if name else "?", values[0], values[1]))
    return found


if __name__ == "__main__":
    sys.exit(main())
