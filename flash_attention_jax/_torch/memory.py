"""Memory between PyTorch and JAX, through DLPack; and what has no memory to cross.

Memory crosses without a copy where it is dense and aligned to 64 bytes (what both libraries
allocate is). A result that lies where an input or another result lies is cloned.
"""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flash_attention_jax._core.optional import needs

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch

__all__ = ["COMMON", "NARROW", "check_output", "struct", "to_jax", "to_torch", "traced"]

COMMON = {
    jnp.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    )
}
"""Dtypes of JAX that torch has too; the others (random keys, 4 bits) stay in JAX."""

NARROW = {torch.int64: torch.int32, torch.uint64: torch.uint32}
"""Integers that JAX has only with x64 on, and what they cross as otherwise."""

PLAIN = torch.Tensor.__torch_dispatch__


def to_jax(x: Any) -> Any:
    """The array that shares the tensor's memory, or a copy where it is not dense or aligned."""
    if isinstance(x, torch.Tensor):
        x = x.to(_crossing(x.dtype)) if x.dtype in NARROW else x
        return jax.dlpack.from_dlpack(x.detach().resolve_conj().resolve_neg().contiguous())
    return x


def _crossing(dtype: Any) -> Any:
    """The dtype in which a tensor reaches JAX."""
    return dtype if jax.config.jax_enable_x64 else NARROW.get(dtype, dtype)


def to_torch(arrays: Sequence[Any], beside: Sequence[jax.Array]) -> list[Any]:
    """Tensors that share the arrays' memory, but none with another of them or with `beside`."""
    # JAX may still be at work, and reading what the caller is free to write once this returns. On a
    # CPU, exporting an array waits until it is there; on a GPU, torch's stream waits, by DLPack.
    taken = {x.unsafe_buffer_pointer() for x in beside if x.dtype in COMMON}
    tensors = []
    for index, array in enumerate(arrays):
        check_output(index, array)
        tensor = torch.from_dlpack(array)
        tensor = tensor.clone() if tensor.data_ptr() in taken else tensor
        taken.add(tensor.data_ptr())
        tensors.append(tensor)
    return tensors


def check_output(index: int, array: Any) -> None:
    """Refuses a result that torch cannot hold."""
    if array.dtype not in COMMON:
        raise TypeError(
            f"Output {index} must have a dtype that torch has, got {array.dtype}. "
            "Cast it in the function (a random key by jax.random.key_data)."
        )


def struct(x: torch.Tensor) -> jax.ShapeDtypeStruct:
    """Shape and dtype of the array that the tensor would be; symbolic sizes become numbers."""
    name = str(_crossing(x.dtype)).removeprefix("torch.")
    return jax.ShapeDtypeStruct(tuple(int(size) for size in x.shape), jnp.dtype(name))


def traced(tensors: Sequence[Any]) -> bool:
    """Whether torch looks into the call, or a tensor has no memory of its own to cross.

    That is under torch.compile, torch.export, FakeTensorMode and every other mode of dispatch, and
    of tensors on the meta device or of a class that dispatches itself (`__torch_dispatch__`).
    """
    if torch._C._len_torch_dispatch_stack() or torch.jit.is_tracing():  # noqa: SLF001
        return True
    for x in tensors:
        if isinstance(x, torch.Tensor) and (x.is_meta or type(x).__torch_dispatch__ is not PLAIN):
            return True
    return False
