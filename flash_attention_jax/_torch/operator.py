"""Calls of JAX as an operator that torch knows: `torch.ops.flash_attention_jax.call`.

Whatever looks into torch sees operators alone: torch.compile and torch.export, which run a model on
tensors without memory, FakeTensorMode, and tensors on the meta device. They get what the operator
says of itself: the shapes of its results, by `jax.eval_shape`, and its gradient, which is the same
operator again.

    call(key, tensors) -> tensors      the key names a step: a compiled function of `_torch.program`
                                       and all of its arguments but the tensors
    call("value ...", arrays)                               -> outputs
    call("value_and_tape ...", arrays)                      -> outputs, residuals of their own
    call("gradients ...", residuals, cotangents)            -> gradients

Where nobody looks, `_torch.bridge` does the same without the operator, in less time.
"""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false, reportInvalidTypeForm=false
# pyright: reportFunctionMemberAccess=false

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence
from typing import Any

import jax

from flash_attention_jax._core.optional import needs
from flash_attention_jax._torch.memory import COMMON, check_output, struct, to_jax, to_torch
from flash_attention_jax._torch.program import (
    Gradient,
    Program,
    gradients,
    value,
    value_and_tape,
)
from flash_attention_jax._torch.read import argument, check_values, read

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch

__all__ = ["call"]


# --- steps -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled function of `_torch.program`, with all of its arguments but the tensors.

    Attributes:
        function: `value`, `value_and_tape` or `gradients`.
        static: The first arguments: a program, or a tape.
        tree: Structure of the others, into which the tensors go.
    """

    function: Any
    static: tuple[Any, ...]
    tree: Any

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        return jax.tree.leaves(self.function(*self.static, *self.tree.unflatten(arrays)))

    def results(self, structs: Sequence[Any]) -> Any:
        """The shapes of what the function returns, in its structure."""
        return self.function.eval_shape(*self.static, *self.tree.unflatten(structs))


STEPS: dict[str, Step] = {}
KEYS: dict[Step, str] = {}


def _key(step: Step) -> str:
    """The name of a step in graphs, unlike any other: torch caches graphs across processes."""
    if step not in KEYS:
        KEYS[step] = f"{step.function.__name__} {uuid.uuid4().hex}"
        STEPS[KEYS[step]] = step
    return KEYS[step]


def _step(key: str) -> Step:
    try:
        return STEPS[key]
    except KeyError:
        raise RuntimeError(
            f"A graph with a JAX function must run in the process that traced it, got {key!r} from "
            "another one. Export or compile it again here."
        ) from None


# --- the operator ----------------------------------------------------------------------------

# A CUDA graph would replay none of JAX's kernels.
TAGS = tuple(getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name))


@torch.library.custom_op(
    "flash_attention_jax::call",
    mutates_args=(),
    schema="(str key, Tensor[] tensors) -> Tensor[]",
    tags=TAGS,
)
def _call(key: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    step = _step(key)
    if isinstance(step.static[0], Program):
        check_values(step.static[0], tensors)
    arrays = [to_jax(x) for x in tensors]
    return to_torch(step.run(arrays), arrays)


@_call.register_fake
def _shapes(key: str, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    device = tensors[0].device if tensors else None
    results = jax.tree.leaves(_step(key).results([struct(x) for x in tensors]))
    return [
        torch.empty(x.shape, dtype=getattr(torch, str(x.dtype)), device=device) for x in results
    ]


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    """What backward needs; a compiled graph keeps of it what its backward uses."""
    key, tensors = inputs
    ctx.step, ctx.count = _step(key), len(tensors)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, cotangents: Sequence[Any]) -> Any:
    """None for the key, and the gradients of the tensors."""
    saved = ctx.saved_tensors
    leaves, results = saved[: ctx.count], saved[ctx.count :]
    if ctx.step.function is gradients:
        raise NotImplementedError(
            "A gradient in a compiled graph must be taken once, got a gradient of it. "
            "Take both outside of torch.compile."
        )
    if ctx.step.function is value:
        wanted = tuple(x.requires_grad for x in leaves)
        return None, _differentiable(ctx.step.static[0], wanted, leaves, cotangents)
    program, wanted = ctx.step.static
    outs, _, tape = ctx.step.results([struct(x) for x in leaves])
    cotangents = cotangents[: len(outs)]
    if torch.is_grad_enabled():
        # The residuals are constants to torch; the gradient of a gradient starts anew.
        return None, _differentiable(program, wanted, leaves, cotangents)
    places = {"array": leaves, "out": results, "own": results[len(outs) :]}
    residuals = [places[kind][i] for kind, i in tape.sources]
    tensors, tree = jax.tree.flatten((residuals, list(cotangents)))
    rest = iter(_call(_key(Step(gradients, (tape,), tree)), tensors))
    return None, [next(rest) if w else None for w in wanted]


_call.register_autograd(_backward, setup_context=_keep)


def _differentiable(
    program: Any, wanted: tuple[bool, ...], leaves: Sequence[Any], cotangents: Sequence[Any]
) -> list[Any]:
    """A gradient or None for each leaf, by the forward pass anew."""
    gradient, tensors = read(Gradient(program, wanted), (list(leaves), list(cotangents)), {})
    rest = iter(call(gradient, tensors))
    return [next(rest) if w else None for w in wanted]


# --- calls -----------------------------------------------------------------------------------


def call(program: Program, arrays: Sequence[Any]) -> Any:
    """Runs a program by the operator; the result has its structure, with tensors for arrays.

    Raises:
        TypeError: An array that is no tensor, or a result of a dtype that torch lacks.
    """
    for index, x in enumerate(arrays):
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"`{argument(program, index)}` must be a tensor where torch traces the call "
                f"(torch.compile, torch.export, FakeTensorMode, meta), got {type(x).__name__} "
                f"{x.dtype}{list(x.shape)}. Pass it as a tensor: torch.from_dlpack(...), of a "
                "random key that of jax.random.key_data."
            )
    structs = [struct(x) for x in arrays]
    tree = jax.tree.structure(([*arrays],))
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in arrays)
    step = Step(value, (program,), tree)
    if any(wanted):
        taped = Step(value_and_tape, (program, wanted), tree)
        _, own, tape = taped.results(structs)
        outs, structure = tape.outs, tape.tree
        step = taped if all(x.dtype in COMMON for x in own) else step
    else:
        outs, structure = jax.tree.flatten(step.results(structs))
    for index, x in enumerate(outs):
        check_output(index, x)
    return structure.unflatten(_call(_key(step), list(arrays))[: len(outs)])
