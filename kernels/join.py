"""Forward and backward kernels joined: one differentiable function, whatever the backend.

The derivative of the kernels is the backward kernels; the derivative of those (a second derivative
of attention) is that of the reference engine, which nests to any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from flash_attention_jax._core.call import DIFFERENTIABLE, Arrays, Call
from flash_attention_jax._core.results import (
    SAVED_LSE,
    Results,
    delta_of,
    finite_or_zero,
    lse_of,
    saved,
    sink_shares,
)
from flash_attention_jax._core.similarity import l2norm
from flash_attention_jax.kernels import operands as ops

Floats = dict[str, Any]
Reference = Callable[[Call, Arrays], Results]


class Sums(NamedTuple):
    """What a forward kernel leaves, with the axes `ROLES` of the call's layout (sums as lse)."""

    out: Any
    top: Any  # maximum of the base-2 logits that was subtracted, or 0; -inf where no key was seen
    total: Any  # sum of exp2(logits - top), 0 where no key was seen


class Kernels(NamedTuple):
    """The two passes of a backend.

    Attributes:
        forward: Called with the problem and its arrays; gives `Sums`.
        gradients: Called with the problem, its arrays, dout, and lse2 and delta as (B, N, T): a
            probability is exp2(logit - lse2), so lse2 is +inf where a row sees no key. Gives
            `dq`, `dk` and `dv`, and where the call has them `dbias` and `drelative_bias` in the
            arrays' own shapes, and `dscale` and `dslopes`, (B, N, T or longer): the share of each
            query in the gradient of its head's number. With them, where the backend has them, `dp`
            (sum over the keys of probability times its gradient) and `dscale_weight`,
            `dslopes_weight` (what a unit of delta takes from the share), by which the rounding of
            delta is taken back.
    """

    forward: Callable[..., Sums]
    gradients: Callable[..., dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is static: the call, what makes its base-2 logits, and who differentiates the backward.

    Attributes:
        call: The call.
        factor: Base-2 logits are factor * q . k; 1 where q holds it already. Unused where the scale
            is an array.
        kernels: The backend.
        reference: An engine that computes the same and nests derivatives.
    """

    call: Call
    factor: float
    kernels: Kernels
    reference: Reference

    @property
    def plain(self) -> Call:
        """The call that the reference engine computes from the kernel's q and k."""
        scale = None if self.call.scale is None else self.factor * ops.LN2
        return dataclasses.replace(self.call, similarity="dot", l2norm=False, groups=1, scale=scale)


def attend(kernels: Kernels, reference: Reference, call: Call, arrays: Arrays) -> Results:
    """Attention by the kernels.

    Args:
        kernels: The backend.
        reference: The engine for derivatives of the derivative.
        call: The call.
        arrays: Its arrays.

    Returns:
        The results, with the axes `ROLES` of the call's layout.
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
    out, lse, low, _, _ = _attend(Problem(call, factor, kernels, reference), floats, others)
    return Results(out, lse, low)


def _narrow(problem: Problem, floats: Floats) -> Floats:
    """The arrays with q and k as the kernels multiply them."""
    return floats | {name: floats[name].astype(problem.call.dtype) for name in "qk"}


# --- forward ---


class _Left(NamedTuple):
    """The results, and the kernel's sums, from which alone the backward's lse2 can be exact."""

    out: Any
    lse: Any
    low: Any
    top: Any
    total: Any


def _forward(problem: Problem, floats: Floats, others: Floats) -> _Left:
    out, top, total = problem.kernels.forward(problem, Arrays(**_narrow(problem, floats), **others))
    return _Left(out, *lse_of(top * np.float32(ops.LN2), total), top, total)


_attend: Any = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _attend_forward(problem: Problem, floats: Floats, others: Floats) -> tuple[Any, Any]:
    *results, top, total = _attend(problem, floats, others)
    wide = {name: jnp.zeros((), x.dtype) for name, x in floats.items()}
    top, total = (checkpoint_name(x, SAVED_LSE) for x in (top, total))
    left = _Left(*saved(Results(*results)), top, total)
    return left, (_narrow(problem, floats), wide, others, left)


def _attend_backward(problem: Problem, residuals: Any, cotangents: Any) -> tuple[Floats, None]:
    floats, wide, others, left = residuals
    gradients = _gradients(problem, floats, others, left, cotangents[:2])
    return {name: x.astype(wide[name].dtype) for name, x in gradients.items()}, None


_attend.defvjp(_attend_forward, _attend_backward)


# --- backward ---


def _backward(
    problem: Problem, floats: Floats, others: Floats, left: _Left, cotangents: Any
) -> Floats:
    """The gradient of every array in `floats`: those of q and k wide where they were."""
    call, arrays = problem.call, Arrays(**floats, **others)
    dout, dlse = cotangents
    delta = delta_of(Results(*left[:3]), dout, dlse)
    rows = {"lse": left.lse, "low": left.low, "top": left.top, "total": left.total}
    rows |= {"delta": delta, "dlse": dlse}
    if call.layout == "heads_last":
        rows = {name: x.swapaxes(1, 2) for name, x in rows.items()}
    lse2, share = _lse2(rows["top"], rows["total"])
    # Every gradient is linear in the dout and delta of a row, so what lse2 lacks goes into them and
    # no kernel has to know of it.
    turned = share if call.layout == "heads_first" else share.swapaxes(1, 2)
    scaled = (turned[..., None] * dout.astype(share.dtype)).astype(dout.dtype)
    dout = jnp.where(turned[..., None] == 0, jnp.zeros((), dout.dtype), scaled)
    delta, dlse = rows["delta"], rows["dlse"]
    found = problem.kernels.gradients(problem, arrays, dout, lse2, share * delta)
    direct = ("q", "k", "v", "bias", "relative_bias")
    gradients = {name: found["d" + name] for name in direct if "d" + name in found}
    for name, shares in (("scale", "dscale"), ("alibi_slopes", "dslopes")):
        if shares in found:
            total = found[shares] + _of_exact_delta(found, shares + "_weight", share, delta, dlse)
            per_head = total[:, :, : call.q_len].sum(axis=(0, 2))
            gradients[name] = _to_shape(per_head, getattr(arrays, name))
    if arrays.sinks is not None:
        sinks = ops.per_head(call, arrays.sinks)[:, None]
        exact = found["dp"][:, :, : call.q_len] - dlse if "dp" in found else delta
        shares = sink_shares(sinks, rows["lse"], rows["low"], exact).sum(axis=(0, 2))
        gradients["sinks"] = _to_shape(shares, arrays.sinks)
    return gradients


def _lse2(top: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What to subtract from base-2 logits, and by what the probabilities are then too large.

    lse2 = top + log2 total, rounded; the second is 1 to a few units in the last place, unless lse2
    is so large that it holds no log2 total. A row that saw nothing has (+inf, 0).
    """
    none = total == 0
    safe, top = jnp.where(none, 1.0, total), finite_or_zero(top)
    lse2 = top + jnp.log2(safe)
    share = jnp.exp2(lse2 - top) / safe
    return jnp.where(none, jnp.inf, lse2), jnp.where(none, 0.0, share)


def _of_exact_delta(
    found: Floats, weight: str, share: jax.Array, delta: jax.Array, dlse: jax.Array
) -> jax.Array | float:
    """What a share lacks because delta was made from an output rounded to 16 bits.

    The error of one query is small, but a gradient that sums over all of them adds it up.
    """
    if weight not in found:
        return 0.0
    weights, dp = found[weight], found["dp"]
    short = [(0, 0), (0, 0), (0, weights.shape[2] - delta.shape[2])]
    error = jnp.pad(share, short) * (jnp.pad(delta + dlse, short) - dp)
    return jnp.where(weights == 0, 0.0, weights * error)


def _to_shape(per_head: jax.Array, like: jax.Array) -> jax.Array:
    """A gradient per head, summed where one number stands for all heads."""
    return per_head.sum(keepdims=True) if like.shape == (1,) else per_head


_gradients: Any = jax.custom_vjp(_backward, nondiff_argnums=(0,))


def _gradients_forward(
    problem: Problem, floats: Floats, others: Floats, left: _Left, cotangents: Any
) -> tuple[Floats, Any]:
    gradients = _gradients(problem, floats, others, left, cotangents)
    return gradients, (floats, others, left, cotangents)


def _gradients_backward(problem: Problem, residuals: Any, second: Floats) -> tuple[Any, ...]:
    """Of the gradients as a function of the inputs: what came out of the forward counts as them."""
    floats, others, left, cotangents = residuals
    call = problem.plain

    def first(floats: Floats, cotangents: Any) -> Floats:
        def run(floats: Floats) -> Any:
            return problem.reference(call, Arrays(**floats, **others))[:2]

        return jax.vjp(run, floats)[1](cotangents)[0]

    _, pull = jax.vjp(first, floats, cotangents)
    dfloats, dcotangents = pull(second)
    return dfloats, None, jax.tree.map(jnp.zeros_like, left), dcotangents


_gradients.defvjp(_gradients_forward, _gradients_backward)
