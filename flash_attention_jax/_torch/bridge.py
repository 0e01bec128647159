"""The crossing between PyTorch and JAX: tensors in, tensors out, gradients through `jax.vjp`.

A program (a function and its constants) runs on arrays. It turns into the program of its gradient
(`Gradient`) or of a batch of it (`Batch`), which are called in the same way, and this gives
derivatives of any order and `torch.func`.

Two rules keep each side from writing into the other's memory:

* What backward needs is kept by `save_for_backward`, and where it is the caller's own tensor or
  the output, as that tensor: torch then counts writes into it, and backward refuses stale values.
* A result that lies where an input or another result lies is cloned (`_torch.memory`).

Where torch looks into the call, or tensors have no memory, the call is one operator of torch's
(`_torch.operator`).
"""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false, reportInvalidTypeForm=false
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from flash_attention_jax._core import check
from flash_attention_jax._core.optional import needs
from flash_attention_jax._torch import operator
from flash_attention_jax._torch.compiled import InGraph
from flash_attention_jax._torch.memory import COMMON, to_jax, to_torch, traced
from flash_attention_jax._torch.program import (
    Batch,
    Gradient,
    Program,
    gradients,
    value,
    value_and_tape,
)
from flash_attention_jax._torch.read import check_values, read

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch

__all__ = ["jax2torch"]

# --- autograd --------------------------------------------------------------------------------


class _Saved(torch.autograd.Function):
    """Forward keeps what the pullback needs; used outside of `torch.func`."""

    @staticmethod
    def forward(ctx: Any, program: Program, *leaves: Any) -> Any:
        """The output leaves, and after them their structure."""
        wanted = tuple(ctx.needs_input_grad[1:])
        check_values(program, leaves)
        arrays = [to_jax(x) for x in leaves]
        outs, own, tape = value_and_tape(program, wanted, arrays)
        tensors = to_torch(outs, arrays)
        exported = [x.dtype in COMMON for x in own]
        ctx.program, ctx.wanted, ctx.tape = program, wanted, tape
        ctx.foreign = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        ctx.own = [None if known else x for x, known in zip(own, exported, strict=True)]
        saved_outs = {i for kind, i in tape.sources if kind == "out"}
        ctx.saved_outs = sorted(saved_outs)
        ctx.save_for_backward(
            *(x for x in leaves if isinstance(x, torch.Tensor)),
            *(tensors[i] for i in ctx.saved_outs),
            *(torch.from_dlpack(x) for x, known in zip(own, exported, strict=True) if known),
        )
        ctx.mark_non_differentiable(*(x for x in tensors if not _differentiable(x)))
        ctx.set_materialize_grads(False)
        return *tensors, tape.tree

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """None, and a gradient for each leaf."""
        cotangents = cotangents[:-1]  # after those of the outputs, that of their structure
        if any(_older_batch(ct) for ct in cotangents if ct is not None):
            raise NotImplementedError(OLDER_BATCH)
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved) if x is None else x for x in ctx.foreign]
        if torch.is_grad_enabled() or _transforming():
            # The residuals are constants to torch; the gradient of a gradient starts anew.
            return None, *_differentiable_gradients(ctx.program, ctx.wanted, leaves, cotangents)
        outs = {i: next(saved) for i in ctx.saved_outs}
        own = [next(saved) if x is None else x for x in ctx.own]
        places = {"array": leaves, "out": outs, "own": own}
        residuals = [to_jax(places[kind][i]) for kind, i in ctx.tape.sources]
        given = [None if ct is None else to_jax(ct) for ct in cotangents]
        grads = gradients(ctx.tape, residuals, given)
        beside = [*residuals, *(ct for ct in given if ct is not None)]
        rest = iter(to_torch(grads, beside))
        return None, *(next(rest) if w else None for w in ctx.wanted)

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(FORWARD_MODE)


class _Transformed(torch.autograd.Function):
    """Forward keeps the arguments alone; used inside of `torch.func`."""

    @staticmethod
    def forward(program: Program, *leaves: Any) -> Any:
        """The output leaves, and after them their structure."""
        outs, tree = _run(program, leaves)
        return *outs, tree

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep the arguments."""
        ctx.program, *leaves = inputs
        ctx.foreign = [None if isinstance(x, torch.Tensor) else x for x in leaves]
        ctx.save_for_backward(*(x for x in leaves if isinstance(x, torch.Tensor)))
        ctx.mark_non_differentiable(*(x for x in output[:-1] if not _differentiable(x)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        """None, and a gradient for each leaf."""
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved) if x is None else x for x in ctx.foreign]
        wanted = tuple(ctx.needs_input_grad[1:])
        return None, *_differentiable_gradients(ctx.program, wanted, leaves, cotangents[:-1])

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(FORWARD_MODE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        """`torch.vmap` by `jax.vmap`."""
        del info
        program, *leaves = args
        batch = read(Batch(program, tuple(in_dims[1:])), (list(leaves),), {})[0]
        *outs, tree = _Transformed.apply(batch, *leaves)
        return (*outs, tree), (*(0 for _ in outs), None)


def _differentiable(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _transforming() -> bool:
    """Whether a transform of `torch.func` is under way; torch has no public word for it."""
    return torch._C._are_functorch_transforms_active()  # noqa: SLF001


def _older_batch(x: torch.Tensor) -> bool:
    """Whether it is a batch of the kind that came before `torch.func`, whose memory has no name."""
    functorch: Any = torch._C._functorch  # noqa: SLF001
    return functorch.is_legacy_batchedtensor(x)


def _differentiable_gradients(
    program: Program, wanted: tuple[bool, ...], leaves: list[Any], cotangents: Sequence[Any]
) -> list[Any]:
    """A gradient or None for each leaf, with a graph of their own."""
    gradient, tensors = read(Gradient(program, wanted), (leaves, list(cotangents)), {})
    rest = iter(call(gradient, tensors))
    return [next(rest) if w else None for w in wanted]


# --- calls -----------------------------------------------------------------------------------


def call(program: Program, arrays: Sequence[Any]) -> Any:
    """Runs a program; the result has its structure, with tensors for arrays.

    Raises:
        NotImplementedError: A derivative in forward mode.
    """
    if any(
        isinstance(x, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None
        for x in arrays
    ):
        raise NotImplementedError(FORWARD_MODE)
    if not _transforming() and traced(arrays):
        return operator.call(program, arrays)
    if _transforming():
        *outs, tree = _Transformed.apply(program, *arrays)
    elif torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in arrays
    ):
        *outs, tree = _Saved.apply(program, *arrays)
    else:
        outs, tree = _run(program, arrays)
    return tree.unflatten(outs)


def _run(program: Program, arrays: Sequence[Any]) -> tuple[list[Any], Any]:
    """The output leaves and their structure, without gradients."""
    if traced(arrays):
        outs, tree = jax.tree.flatten(operator.call(program, arrays))
        return outs, tree
    check_values(program, arrays)
    given = [to_jax(x) for x in arrays]
    outs, tree = jax.tree.flatten(value(program, given))
    return to_torch(outs, given), tree


FORWARD_MODE = (
    "A JAX function called from torch must be differentiated in reverse mode, got a forward "
    "derivative (torch.func.jvp, jacfwd or hessian, or torch.autograd.forward_ad). Use "
    "torch.func.grad, vjp or jacrev, or jax.jvp on the JAX function."
)

OLDER_BATCH = (
    "Gradients of a JAX function must be batched by torch.func, got a batch of the older kind "
    "(is_grads_batched=True, or vectorize=True). Use torch.func.jacrev or torch.func.vmap."
)


# --- the public function ----------------------------------------------------------------------


def jax2torch(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A JAX function as a function of torch tensors, with gradients.

    Arguments may be nested in any structure that JAX knows (lists, tuples, dicts, dataclasses that
    are registered), by position or keyword:

    * tensors, dense, on one CPU or CUDA device, strided in any way, are JAX arrays inside, without
      a copy where they are contiguous; those of int64 and uint64, while JAX's x64 is off, are int32
      and uint32 (to see that they fit, a GPU is waited for);
    * arrays of NumPy and JAX (random keys, say) are what they are, without gradients;
    * None is None; everything else (numbers, strings, functions) is a constant.

    `fn` runs under `jax.jit`: traced once for each set of shapes, dtypes and constants, so a number
    that changes with each call is better passed as a tensor. Its results, any structure of arrays,
    become tensors; those of integers and booleans have no gradient.

    Gradients are those of `jax.vjp`, with respect to the tensors that require one and no others,
    and to any order; under `torch.no_grad` none is prepared. Every tensor argument counts as needed
    for backward, so writing into one in between raises torch's error, and so does writing into a
    result that backward needs. No result shares memory with an argument or with another result.
    Backward over the graph of a gradient (`create_graph=True`) and `torch.func` (grad, vjp, jacrev,
    vmap) compute the forward pass anew. Forward mode is refused.

    Tensors without memory (FakeTensorMode, the meta device) have results of the right shape without
    memory. `torch.compile` (`fullgraph=True` too), `torch.export` (with strict=False) and `make_fx`
    have the call in their graph, gradients included, for one shape each, as one operator of torch's
    that runs in this process alone; arguments that are no tensor, number, string or None break a
    compiled graph, and so do subclasses of tensors. Outside of compiled code, a subclass and a
    `TorchFunctionMode` see the call as one of torch's, and a subclass comes back as itself.

    Args:
        fn: Function of JAX arrays, with a hash (as functions and their partials have), free of side
            effects as `jax.jit` wants it.

    Returns:
        The function of tensors, under the name of `fn`.

    Raises:
        TypeError: `fn` is no function or has no hash. When called: a tensor that is sparse, nested
            or quantised, of floats of 64 bits while JAX's x64 is off, or on a device of another
            kind; an argument without a hash; a result of a dtype that torch lacks; an array of JAX
            or NumPy among tensors without memory.
        ValueError: When called: tensors on different devices; an integer that does not fit 32 bits
            while JAX's x64 is off.
        RuntimeError: When called: CUDA tensors, and a JAX without CUDA; a graph of another process.
        NotImplementedError: When called: a derivative in forward mode, or batched with
            `is_grads_batched`.

    Example:
        >>> import jax, jax.numpy as jnp, torch
        >>> from flash_attention_jax.torch import jax2torch
        >>> layer = jax2torch(lambda params, x: jnp.tanh(x @ params["w"] + params["b"]))
        >>> params = {"w": torch.ones(3, 2, requires_grad=True), "b": torch.zeros(2)}
        >>> layer(params, torch.ones(5, 3)).sum().backward()
        >>> params["w"].grad.shape
        torch.Size([3, 2])

    References:
        DLPack, https://dmlc.github.io/dlpack/latest/python_spec.html
    """
    if not callable(fn):
        got = type(fn).__name__
        check.fail("fn", "be a function", got, "Pass the function, not its result.", TypeError)
    try:
        hash(fn)
    except TypeError:
        got, advice = f"a {type(fn).__name__} without one", "Wrap it in a function."
        check.fail("fn", "have a hash, by which it is compiled once", got, advice, TypeError)

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*read(fn, args, kwargs))

    def outside(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in jax.tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if torch.overrides.has_torch_function(tensors):
            return _overridden(fn, run, tensors, args, kwargs)
        return run(*args, **kwargs)

    in_graph = InGraph(run, outside)

    @functools.wraps(fn)
    def on_tensors(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return in_graph(*args, **kwargs)
        return outside(*args, **kwargs)

    return on_tensors


def _overridden(
    fn: Any, run: Callable[..., Any], tensors: Sequence[Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """A call by the `__torch_function__` of a subclass or mode, to which `fn` is one of torch's.

    It sees the results as a list: torch's own turns those of lists and tuples into the subclass.
    """
    trees = []

    @functools.wraps(fn)
    def listed(*args: Any, **kwargs: Any) -> list[Any]:
        leaves, tree = jax.tree.flatten(run(*args, **kwargs))
        trees.append(tree)
        return leaves

    out = torch.overrides.handle_torch_function(listed, tensors, *args, **kwargs)
    return trees[-1].unflatten(out) if trees and isinstance(out, list) else out
