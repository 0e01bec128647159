"""Launching a Triton kernel from JAX: compiled, through jax-triton, or interpreted, through torch.

A kernel is called with arrays by the names of its parameters, in whatever order; one that the call
does not have is stood in for by q, and never read. Shapes and strides are a part of what a kernel
is compiled for, so that every load is known to be aligned.
"""

from __future__ import annotations

import importlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._core import dropout, masks
from flash_attention_jax._core.call import ROLES, Arrays, Call
from flash_attention_jax.kernels import operands as ops
from flash_attention_jax.kernels.triton_config import Tiles, input_precision, padded
from flash_attention_jax.kernels.triton_tile import PairStrides, Spec, Strides

Shapes = dict[str, jax.ShapeDtypeStruct]


def spec_of(call: Call, tiles: Tiles, factor: float, given: ops.Operands) -> Spec:
    """What is static in a launch: the call, its tiles, and how the operands lie.

    Args:
        call: The call.
        tiles: Tiles of the kernel.
        factor: As in `join.Problem`.
        given: The operands by name.
    """
    rate = call.dropout_rate
    offset = call.shape_of("q_offset")
    relative = given.get("relative")
    return Spec(
        batch=call.batch,
        heads=call.heads,
        kv_heads=call.kv_heads,
        group=call.group_size,
        q_len=call.q_len,
        k_len=call.k_len,
        dim=call.dim,
        v_dim=call.v_dim,
        block_q=tiles.block_q,
        block_kv=tiles.block_kv,
        block_d=padded(call.dim),
        block_e=padded(call.v_dim),
        q=_strides(call, "q"),
        k=_strides(call, "k"),
        v=_strides(call, "v"),
        out=_strides(call, "out"),
        lse=_strides(call, "lse"),
        factor=factor,
        softcap=None if call.softcap is None else float(call.softcap * ops.LOG2E),
        running=not ops.bounded(call),
        causal=call.causal,
        precision=input_precision(call) or "ieee",
        threshold=dropout.threshold(rate) if rate else None,
        growth=1.0 / (1.0 - rate),
        origin="origin" in given,
        ranges=_batch_strides(given, "low", "high"),
        segments=_batch_strides(given, "q_segments", "kv_segments"),
        diagonal=_batch_stride(given.get("diagonal")),
        scale="scale" in given,
        sinks="sinks" in given,
        relative=None if relative is None else 0 if relative.shape[0] == 1 else relative.shape[1],
        mask=_pair_strides(given.get("mask")),
        bias=_pair_strides(given.get("bias")),
        order=_batch_stride(given.get("order")),
        contiguous=not (call.has("mask") or call.has("q_segment_ids"))
        and (offset is None or offset[1] == 1),
        interpreted=call.interpret,
    )


def _strides(call: Call, name: str) -> Strides:
    roles = ROLES[name][call.layout]
    found, step = {}, 1
    for letter, size in reversed(list(zip(roles, call.shape(roles), strict=True))):
        found[letter] = step
        step *= size
    head = "n" if "n" in roles else "k"
    return Strides(found["b"], found[head], found["i" if "i" in roles else "j"])


def _batch_stride(x: jax.Array | None) -> int | None:
    """Elements between batches, 0 where one serves all, None where there is nothing."""
    if x is None:
        return None
    return 0 if x.shape[0] == 1 else int(np.prod(x.shape[1:]))


def _batch_strides(given: ops.Operands, first: str, second: str) -> tuple[int, int] | None:
    """Of two operands that are there together."""
    strides = _batch_stride(given.get(first)), _batch_stride(given.get(second))
    return None if strides[0] is None or strides[1] is None else (strides[0], strides[1])


def _pair_strides(x: jax.Array | None) -> PairStrides | None:
    if x is None:
        return None
    steps = [int(np.prod(x.shape[axis + 1 :])) for axis in range(4)]
    return PairStrides(
        *(0 if size == 1 else step for size, step in zip(x.shape, steps, strict=True))
    )


def operands(call: Call, arrays: Arrays, tiles: Tiles, *, over_keys: bool | None) -> ops.Operands:
    """The operands that every kernel reads, by the names of its parameters.

    Args:
        call: The call.
        arrays: Its arrays, q and k as they are multiplied.
        tiles: Tiles of the kernel.
        over_keys: Whether a program owns queries and walks keys, or the other way round; None where
            it takes no route.

    Returns:
        q, k, v (untouched); `low` and `high` (B | 1, T) int32, the range of keys of each query,
        unless nothing is hidden; `q_segments` and `kv_segments` (B | 1, T), (B | 1, S) int32;
        `mask` and `bias` (B | 1, N | 1, T | 1, S | 1); `diagonal` (B | 1, T) int32 and `slopes`
        (N,); `relative` (N | 1, T + S - 1); `scale` (N,); `words` (2,) and `origin` (5,) int32;
        `order` and `counts` as `operands.routes` gives them.
    """
    found: ops.Operands = {"q": arrays.q, "k": arrays.k, "v": arrays.v}
    short = call.q_len % tiles.block_q or call.k_len % tiles.block_kv
    if short or ops.masked(call):
        with ops.once(call, arrays, call.q_len):
            found["low"], found["high"] = masks.key_ranges(call, arrays)
    if arrays.q_segment_ids is not None:
        found |= {"q_segments": arrays.q_segment_ids, "kv_segments": arrays.kv_segment_ids}
    if arrays.mask is not None:
        found["mask"] = arrays.mask
    if arrays.bias is not None:
        found["bias"] = arrays.bias
    if arrays.alibi_slopes is not None:
        i = jnp.arange(call.q_len, dtype=jnp.int32)[None]
        found["diagonal"] = i + (call.offset if arrays.q_offset is None else arrays.q_offset)
        found["slopes"] = ops.per_head(call, arrays.alibi_slopes)
    if arrays.relative_bias is not None:
        found["relative"] = arrays.relative_bias
    if arrays.scale is not None:
        found["scale"] = ops.per_head(call, arrays.scale)
    if call.dropout_rate:
        found["words"] = jax.lax.bitcast_convert_type(arrays.dropout_key, jnp.int32)
        if arrays.dropout_origin is not None:
            found["origin"] = arrays.dropout_origin.astype(jnp.int32)
    if over_keys is not None:
        found |= ops.routes(call, arrays, tiles.block_q, tiles.block_kv, over_keys=over_keys)
    return found


def launch(
    kernel: Any, call: Call, tiles: Tiles, spec: Spec, given: ops.Operands, made: Shapes, grid: int
) -> dict[str, jax.Array]:
    """Run a kernel.

    Args:
        kernel: A function under `triton.jit`, whose parameters are operands, results and `spec`.
        call: The call.
        tiles: Its warps and stages.
        spec: Its constant.
        given: Operands by name; one that is missing is never read.
        made: Shapes of the results by name, in the order of the parameters.
        grid: How many programs.

    Returns:
        The results by name.
    """
    names = [name for name in kernel.arg_names if name not in made and name != "spec"]
    arrays = [given.get(name, given["q"]) for name in names]
    if call.interpret:
        results = jax.pure_callback(
            lambda *arrays: _interpret(kernel, spec, arrays, list(made.values()), grid),
            list(made.values()),
            *arrays,
        )
    else:
        import jax_triton  # pyright: ignore[reportMissingImports]

        major, minor = call.capability or (0, 0)
        results = jax_triton.triton_call(
            *arrays,
            kernel=kernel,
            out_shape=list(made.values()),
            grid=(grid,),
            name=kernel.__name__,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            compute_capability=10 * major + minor,
            spec=spec,
        )
    return dict(zip(made, results, strict=True))


# --- interpreted ---

_one_at_a_time = threading.Lock()  # Triton's interpreter patches its own language while it runs


def _interpret(
    kernel: Any, spec: Spec, arrays: Any, made: list[jax.ShapeDtypeStruct], grid: int
) -> list[np.ndarray]:
    """Run a kernel under Triton's interpreter, on torch tensors in the memory of the CPU."""
    results = [np.zeros(x.shape, x.dtype) for x in made]
    with _one_at_a_time:
        tensors = [_to_torch(np.asarray(x)) for x in (*arrays, *results)]
        kernel[(grid,)](*tensors, spec=spec)
        # The interpreter writes back into the tensors that it was given.
        return [
            tensor.view(_storage(x.dtype)).numpy().view(x.dtype)
            for tensor, x in zip(tensors[len(arrays) :], made, strict=True)
        ]


def _torch() -> Any:
    """Imported by name, so that types can be checked where there is no torch."""
    return importlib.import_module("torch")


def _storage(dtype: Any) -> Any:
    torch = _torch()
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return sizes[np.dtype(dtype).itemsize]


def _to_torch(x: np.ndarray) -> Any:
    """A tensor with the same bytes: NumPy has no bfloat16 that torch takes."""
    torch = _torch()
    kind = {"bfloat16": torch.bfloat16, "bool": torch.bool}.get(str(x.dtype))
    x = np.ascontiguousarray(x)
    if kind is None:
        return torch.from_numpy(x.copy())
    raw = x.view(np.int16 if kind is torch.bfloat16 else np.uint8)
    return torch.from_numpy(raw.copy()).view(kind)
