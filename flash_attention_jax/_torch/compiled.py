"""What torch.compile reads of a JAX function: one node of its graph."""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flash_attention_jax._core.optional import needs

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch

__all__ = ["InGraph"]

NOTHING = "None, which torch.compile lets into no graph"


class InGraph:
    """A function as torch.compile reads it: one node of the graph, while tracing which it runs.

    What cannot enter a graph breaks it, and goes `outside`.

    `traced` is made when it is first compiled, because it loads torch's compiler, a second's work.
    """

    def __init__(self, run: Callable[..., Any], outside: Callable[..., Any]) -> None:
        def load() -> None:
            if not hasattr(self, "traced"):
                dynamo: Any = torch._dynamo  # noqa: SLF001
                self.outside = dynamo.disable(outside)
                self.traced = dynamo.nonstrict_trace(dynamo.disable(self._traced))

        # What torch.compiler.assume_constant_result sets, which loads the compiler.
        load._dynamo_marked_constant = True  # noqa: SLF001  # pyright: ignore[reportFunctionMemberAccess]
        self.load = load
        self.run = run

    def _traced(self, arguments: Any) -> Any:
        """The result by the name of the error, "" for none: torch would not show the error."""
        args, kwargs = _replaced(arguments, NOTHING, None)
        try:
            return {"": self.run(*args, **kwargs)}
        except Exception as error:  # noqa: BLE001
            return {f"{type(error).__name__}: {error}": []}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.load()
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))  # noqa: SLF001
        reason = next((found for found in map(_obstacle, leaves) if found), "")
        if not reason:
            ((reason, result),) = self.traced(_replaced((args, kwargs), None, NOTHING)).items()
            if not reason:
                return result
        torch._dynamo.graph_break(msg=reason)  # noqa: SLF001
        return self.outside(*args, **kwargs)


def _obstacle(leaf: Any) -> str:
    """Why an argument cannot enter a graph, "" where it can."""
    if torch.compiler.is_exporting():
        return "A JAX function must be exported with strict=False."
    if leaf is None or isinstance(leaf, (int, float, str)):
        return ""
    if not isinstance(leaf, torch.Tensor):
        return "A JAX function in a graph must be given tensors, numbers and strings."
    # Compiled code (of torch 2.13) runs no operator but torch's own on a subclass, unless that says
    # what it consists of.
    if type(leaf) in (torch.Tensor, torch.nn.Parameter) or hasattr(
        type(leaf), "__tensor_flatten__"
    ):
        return ""
    return "A JAX function in a graph must be given plain tensors: x.as_subclass(torch.Tensor)."


def _replaced(tree: Any, old: Any, new: Any) -> Any:
    """A structure with other leaves in the place of some."""
    leaves, spec = torch.utils._pytree.tree_flatten(tree)  # noqa: SLF001
    leaves = [new if type(x) is type(old) and x == old else x for x in leaves]
    return torch.utils._pytree.tree_unflatten(leaves, spec)  # noqa: SLF001
