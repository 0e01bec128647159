"""The rule of reverse mode that blocks, rings and partitioned calls share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from flash_attention_jax._core.results import Results, saved

Blocks = dict[str, Any]


def with_gradients(
    forward: Callable[[Any, Blocks, Blocks], Results], gradients: Callable[..., Blocks]
) -> Callable[[Any, Blocks, Blocks], Results]:
    """`forward` with a reverse mode of its own, which keeps the inputs and the results.

    Args:
        forward: (static, floats, others) -> `Results`; static is hashable, and floats are the
            arrays by name that receive gradients.
        gradients: (static, floats, others, results, (dout, dlse)) -> the gradient of each of the
            floats, by name. Where it is differentiable, so is the reverse mode.

    Returns:
        A function with the arguments of `forward`.
    """
    function: Any = jax.custom_vjp(forward, nondiff_argnums=(0,))

    def keep(static: Any, floats: Blocks, others: Blocks) -> tuple[Results, Any]:
        results = saved(function(static, floats, others))
        return results, (floats, others, results)

    def pull(static: Any, residuals: Any, cotangents: Results) -> tuple[Blocks, None]:
        # Every gradient, wanted or not: the compiler drops what nobody reads. To ask `custom_vjp`
        # which inputs are differentiated (`symbolic_zeros`) was tried and is wrong under
        # `jax.checkpoint`, which may run a rule that was traced for other inputs.
        floats, others, results = residuals
        grads = gradients(static, floats, others, results, (cotangents.out, cotangents.lse))
        return {name: grads[name].astype(x.dtype) for name, x in floats.items()}, None

    function.defvjp(keep, pull)
    return function
