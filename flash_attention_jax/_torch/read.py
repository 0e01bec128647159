"""Reading a call from torch: its arrays, the program that is the rest, and what cannot cross."""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false, reportInvalidTypeForm=false

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._core.optional import needs
from flash_attention_jax._torch.memory import COMMON, NARROW, traced
from flash_attention_jax._torch.program import Batch, Constant, Gradient, Program

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch

__all__ = ["argument", "check_dense", "check_values", "read", "values"]

PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "meta": "cpu"}
"""Device types of torch whose memory JAX can read, and what JAX calls the platform; meta has none,
and asks for shapes alone."""

WIDE = {torch.float64: torch.float32, torch.complex128: torch.complex64}
"""Dtypes that JAX has only with x64 on, and what to cast them to otherwise. Integers are cast where
their values fit (`check_values`)."""

DTYPES = {getattr(torch, dtype.name) for dtype in COMMON}

SYMBOLIC = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
"""Numbers that torch.compile would keep open, and JAX compiles for one by one."""

X64 = 'turn 64 bits on when the program starts: jax.config.update("jax_enable_x64", True).'

Named: TypeAlias = Callable[[int], str]
"""From the index of a leaf of (args, kwargs) to what an error calls it."""


def read(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Program, list[Any]]:
    """Splits a call into its program and its arrays: tensors, and arrays of JAX and NumPy.

    Raises:
        TypeError: An argument that cannot cross.
        ValueError: Tensors on different devices.
        RuntimeError: A device that this JAX cannot use.
    """
    leaves, tree = jax.tree.flatten((args, kwargs))
    named = functools.partial(name, function, args, kwargs)
    arrays: list[Any] = []
    constants: list[Constant | None] = []
    first = None
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            first = index if first is None else first
            _check(leaf, index, leaves[first], first, named)
            arrays.append(leaf)
        elif isinstance(leaf, jax.Array):
            arrays.append(leaf)
        elif isinstance(leaf, (np.ndarray, np.generic)):
            _check_fits(functools.partial(named, index), leaf)
            arrays.append(jnp.array(leaf))  # a copy, because the caller may write into it later
        else:
            constants.append(_constant(leaf, index, named))
            continue
        constants.append(None)
    return Program(function, tree, tuple(constants)), arrays


def _constant(leaf: Any, index: int, named: Named) -> Constant:
    for symbolic, kind in SYMBOLIC.items():
        leaf = kind(leaf) if isinstance(leaf, symbolic) else leaf
    try:
        return Constant.of(leaf)
    except TypeError:
        raise TypeError(
            f"`{named(index)}` must be a tensor, an array, a list, tuple or dict of them, or a "
            f"value with a hash, got {type(leaf).__name__}. "
            "What is no array is a constant of the compiled function."
        ) from None


def _check(x: Any, index: int, first: Any, first_index: int, named: Named) -> None:
    """Refuses a tensor that cannot cross, by the name of its argument."""

    def fail(requirement: str, got: str, advice: str) -> NoReturn:
        raise TypeError(f"`{named(index)}` must {requirement}, got {got}. {advice}")

    check_dense(lambda: named(index), x)
    if x.dtype not in DTYPES:
        fail("have a dtype that JAX shares with torch", f"{x.dtype}", "Cast it with .to(...).")
    if x.dtype in WIDE and not jax.config.jax_enable_x64:
        advice = f"Cast it with .to({WIDE[x.dtype]}), or {X64}"
        fail("have at most 32 bits while JAX's x64 is off", f"{x.dtype}", advice)
    if x.device != first.device:
        one, other = named(first_index), named(index)
        raise ValueError(
            f"`{one}` and `{other}` must be on one device, got {one} on {first.device} and {other} "
            f"on {x.device}. Move one with .to(device): nothing is moved silently."
        )
    if index == first_index:
        check_device(named, index, x.device)


def check_dense(named: Callable[[], str], x: torch.Tensor) -> None:
    """Refuses a tensor that is more than its numbers, row after row."""
    if x.is_nested:
        got, advice = "a nested one", "Pad it (torch.nested.to_padded_tensor), and pass lengths."
    elif x.layout is not torch.strided:
        got, advice = f"layout {x.layout}", "Use its to_dense()."
    elif x.is_quantized:
        got, advice = f"dtype {x.dtype}", "Use its dequantize()."
    else:
        return
    raise TypeError(f"`{named()}` must be a dense tensor, got {got}. {advice}")


def check_values(program: Program, tensors: Sequence[Any]) -> None:
    """Refuses integers of 64 bits that JAX, with x64 off, would wrap around.

    Raises:
        ValueError: A value that does not fit 32 bits.
    """
    if jax.config.jax_enable_x64:
        return
    for index, x in enumerate(tensors):
        if isinstance(x, torch.Tensor) and x.dtype in NARROW:
            # On the CPU, by NumPy: torch has no comparison of unsigned integers.
            _check_fits(functools.partial(argument, program, index), x.detach().cpu().numpy())


def _check_fits(named: Callable[[], str], x: Any) -> None:
    """Refuses integers that do not fit 32 bits where JAX has no more."""
    if jax.config.jax_enable_x64 or x.dtype.kind not in "iu" or x.dtype.itemsize <= 4 or not x.size:
        return
    limits = np.iinfo(np.int32 if x.dtype.kind == "i" else np.uint32)
    for value in (x.min(), x.max()):
        if not limits.min <= value <= limits.max:
            raise ValueError(
                f"`{named()}` must hold integers of {limits.dtype} while JAX's x64 is off, got "
                f"{value}. Count from a number nearby, or {X64}"
            )


def values(x: Any) -> Any:
    """The tensor that holds the values, beneath the wrappers of torch.func; None where none are."""
    if torch.compiler.is_compiling() or not isinstance(x, torch.Tensor):
        return None
    functorch: Any = torch._C._functorch  # noqa: SLF001
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return None if traced([x]) else x.detach()


def check_device(named: Named, index: int, device: Any) -> None:
    """Refuses a device whose memory JAX, as it is installed, cannot read.

    Raises:
        TypeError: Neither a CPU nor a CUDA device.
        RuntimeError: A CUDA device, and a JAX without CUDA.
    """
    if device.type not in PLATFORMS:
        raise TypeError(
            f"`{named(index)}` must be on a CPU, CUDA or meta device, got {device}. "
            "Move it with .to('cpu') or .to('cuda')."
        )
    try:
        jax.devices(PLATFORMS[device.type])
    except RuntimeError as error:
        raise RuntimeError(
            f"`{named(index)}` must be on a device that JAX can use, got {device}, and JAX has "
            f"{jax.default_backend()} only. Install JAX with CUDA "
            "(pip install 'flash-attention-jax[cuda13]'), or move the tensors with .to('cpu')."
        ) from error


def argument(program: Program, index: int) -> str:
    """What the caller wrote for the array of this index."""
    while isinstance(program.function, (Batch, Gradient)):
        program = program.function.program
    places = [i for i, constant in enumerate(program.constants) if constant is None]
    if index >= len(places):  # a cotangent
        return f"gradient {index - len(places)}"
    args, kwargs = jax.tree.unflatten(program.tree, range(len(program.constants)))
    return name(program.function, args, kwargs, places[index])


def name(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> str:
    """What the caller wrote for the leaf of this index: `q`, or `params['layers'][0]`."""
    path = jax.tree_util.tree_flatten_with_path((args, kwargs))[0][index][0]
    inside = jax.tree_util.keystr(path[2:])
    if path[0].idx:
        return f"{path[1].key}{inside}"
    try:
        parameters = [*inspect.signature(function).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    place = path[1].idx
    for parameter in parameters[: place + 1]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            start = parameters.index(parameter)
            return f"{parameter.name}[{place - start}]{inside}"
    return f"{parameters[place].name}{inside}" if place < len(parameters) else f"args[{place}]"
