"""Forward and backward kernels joined: one differentiable function, as the other engines have it.

The derivative of the kernels is the backward kernels; the derivative of those (a second derivative
of attention) is that of the reference engine, which nests to any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._call import DIFFERENTIABLE, ROLES, Arrays, Call
from flash_attention_jax._similarity import l2norm
from flash_attention_jax.kernels import hopper_backward, hopper_forward
from flash_attention_jax.kernels import operands as ops
from flash_attention_jax.kernels._config import LARGEST_FUSED_DIM, padded, tiles
from flash_attention_jax.kernels._support import interpreter

Floats = dict[str, Any]
Reference = Callable[[Call, Arrays], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static: the call, what makes its base-2 logits, and who differentiates the backward.

    Attributes:
        call: The call.
        factor: Base-2 logits are factor * q . k; 1 where q holds it already. Unused where the scale
            is an array.
        reference: An engine that computes the same and nests derivatives.
    """

    call: Call
    factor: float
    reference: Reference

    @property
    def plain(self) -> Call:
        """The call that the reference engine computes from the kernel's q and k."""
        scale = None if self.call.scale is None else self.factor * ops.LN2
        return dataclasses.replace(self.call, similarity="dot", l2norm=False, groups=1, scale=scale)


def attend(reference: Reference, call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Attention by the kernels.

    Args:
        reference: The engine for derivatives of the derivative.
        call: The call.
        arrays: Its arrays.

    Returns:
        out and lse, with the axes `ROLES` of the call's layout.
    """
    q, k, factor = arrays.q, arrays.k, None
    if call.similarity == "cosine" and call.l2norm:
        # Wide until the kernels: their gradients come back wide too, and lose nothing on the way
        # through the norm.
        q, k = (l2norm(x.astype(jnp.float32), call.groups) for x in (q, k))
        if call.scale is not None and call.softcap is None:
            # Into q before it is rounded: then the product is the logit, in base 2.
            q, factor = q * np.float32(call.scale * ops.LOG2E), 1.0
    if factor is None:
        factor = 1.0 if call.scale is None else float(call.scale * ops.LOG2E)
    fields = arrays._replace(q=q, k=k)._asdict()
    floats = {name: fields[name] for name in DIFFERENTIABLE if fields[name] is not None}
    others = {name: x for name, x in fields.items() if name not in DIFFERENTIABLE and x is not None}
    return _attend(Problem(call, factor, reference), floats, others)


def _narrow(problem: Problem, floats: Floats) -> Floats:
    """The arrays with q and k as the kernels multiply them."""
    return floats | {name: floats[name].astype(problem.call.dtype) for name in "qk"}


# --- forward ---


def _forward(problem: Problem, floats: Floats, others: Floats) -> tuple[jax.Array, jax.Array]:
    call, arrays = problem.call, Arrays(**_narrow(problem, floats), **others)
    sizes = tiles(call, "forward")
    keys = ops.keys_that_are_seen(call, arrays)
    given = {
        "q": ops.rows_of(call, "q", arrays.q),
        "k": ops.rows_of(call, "k", ops.clean(call, "k", arrays.k, keys)),
        "v": ops.rows_of(call, "v", ops.clean(call, "v", arrays.v, keys)),
    }
    given |= ops.routes(call, arrays, sizes.outer, sizes.inner, over_keys=True)
    given |= ops.vectors(call, arrays, sizes.outer, sizes.inner)
    if arrays.sinks is not None:
        given["sinks"] = ops.per_head(call, arrays.sinks) * np.float32(ops.LOG2E)
    out, lse = hopper_forward.forward(
        call, given, sizes, problem.factor, interpret=interpreter(call)
    )
    out = cut(out, call.shape(ROLES["out"][call.layout]))
    lse = cut(lse, (call.batch, call.heads, call.q_len))
    return out, lse if call.layout == "heads_first" else lse.swapaxes(1, 2)


def cut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The leading part of a padded result."""
    return x if x.shape == shape else x[tuple(slice(size) for size in shape)]


_attend: Any = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _attend_forward(problem: Problem, floats: Floats, others: Floats) -> tuple[Any, Any]:
    out, lse = _attend(problem, floats, others)
    wide = {name: jnp.zeros((), x.dtype) for name, x in floats.items()}
    return (out, lse), (_narrow(problem, floats), wide, others, out, lse)


def _attend_backward(problem: Problem, residuals: Any, cotangents: Any) -> tuple[Floats, None]:
    floats, wide, others, out, lse = residuals
    gradients = _gradients(problem, floats, others, (out, lse), cotangents)
    return {name: x.astype(wide[name].dtype) for name, x in gradients.items()}, None


_attend.defvjp(_attend_forward, _attend_backward)


# --- backward ---


def _backward(
    problem: Problem, floats: Floats, others: Floats, results: Any, cotangents: Any
) -> Floats:
    """The gradient of every array in `floats`: those of q and k wide where they were."""
    call, arrays = problem.call, Arrays(**floats, **others)
    (out, lse), (dout, dlse) = results, cotangents
    wide = jnp.float32
    delta = (out.astype(wide) * dout.astype(wide)).sum(axis=-1) - dlse
    if call.layout == "heads_last":
        lse, delta = lse.swapaxes(1, 2), delta.swapaxes(1, 2)
    found = _of_q_k_v(problem, arrays, dout, lse, delta)
    gradients = {name: found["d" + name] for name in "qkv"}
    for name, shares in (("scale", "dscale"), ("alibi_slopes", "dslopes")):
        if shares in found:
            per_head = found[shares][:, :, : call.q_len].sum(axis=(0, 2))
            gradients[name] = _to_shape(per_head, getattr(arrays, name))
    if arrays.sinks is not None:
        # A sink is a key without a value: its dP is zero.
        sinks = ops.per_head(call, arrays.sinks)[:, None]
        shares = -(jnp.exp(sinks - lse) * delta).sum(axis=(0, 2))
        gradients["sinks"] = _to_shape(shares, arrays.sinks)
    return gradients


def _to_shape(per_head: jax.Array, like: jax.Array) -> jax.Array:
    """A gradient per head, summed where one number stands for all heads."""
    return per_head.sum(keepdims=True) if like.shape == (1,) else per_head


def _of_q_k_v(
    problem: Problem, arrays: Arrays, dout: jax.Array, lse: jax.Array, delta: jax.Array
) -> dict[str, jax.Array]:
    """Run the kernels: dq, dk, dv, and the shares of each query in dslopes and dscale."""
    call, interpret = problem.call, interpreter(problem.call)
    over_keys, over_queries = tiles(call, "dq"), tiles(call, "dkv")
    rows, keys = ops.queries_that_see(call, arrays), ops.keys_that_are_seen(call, arrays)
    dtype = jnp.dtype(call.dtype)
    # Wide for the derivative of the norm.
    normed = call.similarity == "cosine" and call.l2norm
    gradient_dtype = jnp.dtype(jnp.float32) if normed else dtype
    given = {
        "q": ops.rows_of(call, "q", ops.clean(call, "q", arrays.q, rows)),
        "k": ops.rows_of(call, "k", ops.clean(call, "k", arrays.k, keys)),
        "v": ops.rows_of(call, "v", ops.clean(call, "v", arrays.v, keys)),
        "dout": ops.rows_of(call, "out", ops.clean(call, "out", dout.astype(dtype), rows)),
    }
    # A row that saw nothing has lse = -inf: as +inf it makes every probability 0.
    lse2 = jnp.where(lse == -np.inf, np.float32(np.inf), lse * np.float32(ops.LOG2E))
    delta = delta if rows is None else jnp.where(rows[:, None], delta, np.float32(0))

    def common(q_multiple: int, kv_multiple: int) -> ops.Operands:
        vectors = ops.vectors(call, arrays, q_multiple, kv_multiple)
        vectors["lse2"] = ops.pad_axis(lse2, 2, q_multiple, np.inf)
        vectors["delta"] = ops.pad_axis(delta, 2, q_multiple)
        return given | vectors

    sizes = over_keys
    found = hopper_backward.query_gradient(
        call,
        common(sizes.outer, sizes.inner)
        | ops.routes(call, arrays, sizes.outer, sizes.inner, over_keys=True),
        sizes,
        problem.factor,
        gradient_dtype,
        interpret=interpret,
    )
    sizes = over_queries
    walked = common(sizes.inner, sizes.outer) | ops.routes(
        call, arrays, sizes.inner, sizes.outer, over_keys=False
    )
    together = max(padded(call.dim), padded(call.v_dim)) <= LARGEST_FUSED_DIM
    for names in [("dk", "dv")] if together else [("dk",), ("dv",)]:
        found |= hopper_backward.key_gradients(
            call,
            walked,
            sizes,
            problem.factor,
            {name: dtype if name == "dv" else gradient_dtype for name in names},
            interpret=interpret,
        )
    shapes = {name: call.shape(ROLES[name][call.layout]) for name in "qkv"}
    return found | {f"d{name}": cut(found[f"d{name}"], shapes[name]) for name in "qkv"}


_gradients: Any = jax.custom_vjp(_backward, nondiff_argnums=(0,))


def _gradients_forward(
    problem: Problem, floats: Floats, others: Floats, results: Any, cotangents: Any
) -> tuple[Floats, Any]:
    gradients = _gradients(problem, floats, others, results, cotangents)
    return gradients, (floats, others, results, cotangents)


def _gradients_backward(problem: Problem, residuals: Any, second: Floats) -> tuple[Any, ...]:
    """Of the gradients as a function of the inputs: what came out of the forward counts as them."""
    floats, others, results, cotangents = residuals
    call = problem.plain

    def first(floats: Floats, cotangents: Any) -> Floats:
        def run(floats: Floats) -> Any:
            out, lse = problem.reference(call, Arrays(**floats, **others))
            return out, lse

        return jax.vjp(run, floats)[1](cotangents)[0]

    _, pull = jax.vjp(first, floats, cotangents)
    dfloats, dcotangents = pull(second)
    return dfloats, None, jax.tree.map(jnp.zeros_like, results), dcotangents


_gradients.defvjp(_gradients_forward, _gradients_backward)
