"""Compile every Triton kernel for GPUs that are not there, and report what each one takes.

    python -m flash_attention_jax compile triton
    python -m flash_attention_jax compile triton --only causal --dims 128 --targets 80

Triton compiles for a target that is only named; its assembler says how many registers a kernel has
and how many bytes it spills. The exit status is 1 if one spills (float32 of 256 dimensions aside),
overflows the shared memory of its target, does not use the tensor cores or does not compile, and 0,
with a line that says so, where Triton is not installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._api.read import arrays as arrays_of
from flash_attention_jax._api.read import read
from flash_attention_jax._core.call import Arrays
from flash_attention_jax.kernels import triton_config
from flash_attention_jax.kernels.triton_config import Direction, Tiles

TARGETS = (80, 86, 89, 90)
DIMS = (64, 128, 256)
LENGTH, HEADS = 2048, 8

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "cosine": {"similarity": "cosine", "causal": True},
    "everything": {
        "causal": True,
        "softcap": 30.0,
        "dropout_rate": 0.1,
        "alibi_slopes": (HEADS,),
        "bias": (1, HEADS, LENGTH, LENGTH),
        "relative_bias": (HEADS, 2 * LENGTH - 1),
    },
    "float32": {"causal": True, "dtype": "float32"},
    "bf16x3": {"causal": True, "dtype": "float32", "precision": "high"},
    "tf32": {"causal": True, "dtype": "float32", "precision": "default"},
}
"""What each case asks; shapes stand for float32 arrays."""

PASSES: tuple[Direction, ...] = ("forward", "dq", "dkv")
GRADIENTS: dict[str, Direction] = {
    "alibi_slopes": "shares",
    "bias": "dbias",
    "relative_bias": "drelative",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print the table, return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flash_attention_jax compile triton")
    parser.add_argument("--only", choices=list(OPTIONS), nargs="+", default=list(OPTIONS))
    parser.add_argument("--dims", type=int, nargs="+", default=list(DIMS))
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS))
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("Nothing was compiled for a GPU: triton is not installed.")
        return 0
    import triton  # pyright: ignore[reportMissingImports]

    print(f"triton {triton.__version__}, length {LENGTH}, {HEADS} heads, bfloat16 unless said")
    print(
        f"{'case':<10} {'target':<6} {'dim':>4}  {'kernel':<9} {'tiles':<14} "
        f"{'registers':>9} {'spilled':>8} {'shared':>7} {'mma':>5}"
    )
    wrong = spilling = 0
    for name in args.only:
        directions = PASSES
        for term, direction in GRADIENTS.items():
            directions += (direction,) if term in OPTIONS[name] else ()
        for target in args.targets:
            for dim in args.dims:
                for direction in directions:
                    text, bad, spills = _row(name, target, dim, direction)
                    wrong, spilling = wrong + bad, spilling + (spills and not bad)
                    print(text, flush=True)
    print("Every kernel fits." if not wrong else f"{wrong} kernels do not fit.")
    if spilling:
        print(f"{spilling} of float32 and more than 128 dimensions spill.")
    return int(wrong > 0)


def _row(name: str, target: int, dim: int, direction: Direction) -> tuple[str, bool, bool]:
    """A line of the table, whether it tells of a fault, and whether of registers spilled."""
    start = f"{name:<10} sm_{target:<3} {dim:>4}  {direction:<9}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kernel, tiles = compile_kernel(target, dim, direction, **OPTIONS[name])
    except Exception as error:  # noqa: BLE001 (whatever it is belongs into the table)
        return f"{start} {type(error).__name__}: {error}".splitlines()[0], True, False
    registers, spilled = _resources(target, kernel.asm["ptx"])
    shared = kernel.metadata.shared / 1024
    products = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", kernel.asm["ptx"]))
    exact = name == "float32"  # IEEE products have no tensor cores
    large = shared > triton_config.SHARED_MEMORY[target]
    sizes = f"{tiles.block_q}x{tiles.block_kv} w{tiles.num_warps} s{tiles.num_stages}"
    text = f"{start} {sizes:<14} {registers:>9} {spilled:>7}B {shared:>6.0f}K {products:>5}"
    # Float32 of 256 dimensions has the smallest tiles that there are, and spills even so.
    unavoidable = OPTIONS[name].get("dtype") == "float32" and dim > 128
    bad = bool(spilled and not unavoidable) or large or not (products or exact)
    return text, bad, bool(spilled)


def compile_kernel(
    target: int,
    dim: int,
    direction: Direction,
    *,
    tiles: Tiles | None = None,
    dtype: str = "bfloat16",
    similarity: str = "dot",
    **options: Any,
) -> tuple[Any, Tiles]:
    """One kernel of one call, compiled for a GPU that is only named.

    Args:
        target: 10 times the compute capability.
        dim: Head dimension.
        direction: Which kernel.
        tiles: Its tiles, None = those of the table.
        dtype: Name of the dtype of q, k and v.
        similarity: "dot" or "cosine".
        options: As in `flash_attention`; a tuple of integers is the shape of a float32 array.

    Returns:
        What Triton compiled, and the tiles.
    """
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from flash_attention_jax.kernels import triton_attention, triton_launch

    shaped = {
        key: jax.ShapeDtypeStruct(x, jnp.float32) if isinstance(x, tuple) else x
        for key, x in options.items()
    }
    if "dropout_rate" in options:
        shaped["dropout_key"] = jax.ShapeDtypeStruct((2,), jnp.uint32)
    capability = divmod(target, 10)
    q = jax.ShapeDtypeStruct((1, LENGTH, HEADS, dim), jnp.dtype(dtype))
    reading = read(
        q,
        q,
        q,
        None,
        shaped,
        layout="heads_last",
        similarity=similarity,  # pyright: ignore[reportArgumentType]
        platform="gpu",
        capability=capability,
    )
    call = reading.call
    tiles = tiles or triton_config.tiles_of(call, direction)
    kernel, over_keys = triton_attention.LAUNCHED[direction]

    def operands(given: dict[str, Any]) -> dict[str, Any]:
        arrays: Arrays = arrays_of(call, given)
        return triton_launch.operands(call, arrays, tiles, over_keys=over_keys)

    loaded = jax.eval_shape(operands, reading.given)
    factor = 1.0 if similarity == "cosine" else 0.125
    spec = triton_launch.spec_of(call, tiles, factor, loaded)
    narrow = ("q", "k", "v", "dout", "out", "dq", "dk", "dv")
    results = kernel.arg_names[kernel.arg_names.index("counts") + 1 :]
    types = {name: x.dtype for name, x in loaded.items()} | dict.fromkeys(results, jnp.float32)
    signature = {
        name: _pointer(dtype if name in narrow else types.get(name, jnp.dtype(dtype)))
        for name in kernel.arg_names
    } | {"spec": "constexpr"}
    aligned = {(n,): [["tt.divisibility", 16]] for n in range(len(signature) - 1)}
    source = ASTSource(fn=kernel, signature=signature, constexprs={"spec": spec}, attrs=aligned)
    chosen = {
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=chosen), tiles


def _pointer(dtype: Any) -> str:
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "int32": "i32", "bool": "i1"}
    return "*" + names[jnp.dtype(dtype).name]


def _resources(target: int, ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes of a kernel, by assembling it once more."""
    from triton.backends.nvidia import compiler  # pyright: ignore[reportMissingImports]

    named = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    with tempfile.TemporaryDirectory(prefix="compile-") as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        report = subprocess.run(
            [
                compiler.get_ptxas(target).path,
                "-v",
                f"-arch={named[1] if named else f'sm_{target}'}",
                str(path),
                "-o",
                str(path.with_suffix(".cubin")),
            ],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    numbers = [
        re.search(pattern, report)
        for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    ]
    registers, spilled = (int(match[1]) if match else 0 for match in numbers)
    return registers, spilled


if __name__ == "__main__":
    sys.exit(main())
