"""The Hopper kernels as `join` wants them: what each pass reads, and in which tiles it runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._core.call import ROLES, Arrays, Call
from flash_attention_jax._core.results import Results
from flash_attention_jax.kernels import (
    hopper_backward,
    hopper_bias,
    hopper_decode,
    hopper_forward,
    join,
)
from flash_attention_jax.kernels import operands as ops
from flash_attention_jax.kernels.hopper_config import (
    LARGEST_FUSED_DIM,
    LARGEST_JOINT_DIM,
    padded,
    tiles,
)
from flash_attention_jax.kernels.hopper_support import interpreter
from flash_attention_jax.kernels.join import Problem, Reference, Sums


def attend(reference: Reference, call: Call, arrays: Arrays) -> Results:
    """Attention by the Hopper kernels; arguments and results as in `join.attend`."""
    return join.attend(KERNELS, reference, call, arrays)


def _forward(problem: Problem, arrays: Arrays) -> Sums:
    call = problem.call
    count = hopper_decode.parts(call)
    if count is not None:
        return _in_layout(call, hopper_decode.forward(call, arrays, problem.factor, count))
    sizes = tiles(call, "forward")
    keys = ops.keys_that_are_seen(call, arrays)
    given = {
        "q": ops.rows_of(call, "q", arrays.q),
        "k": ops.rows_of(call, "k", ops.clean(call, "k", arrays.k, keys)),
        "v": ops.rows_of(call, "v", ops.clean(call, "v", arrays.v, keys)),
    }
    given |= ops.routes(call, arrays, sizes.outer, sizes.inner, over_keys=True)
    given |= ops.terms(call, arrays, sizes.outer, sizes.inner)
    if arrays.sinks is not None:
        given["sinks"] = ops.per_head(call, arrays.sinks) * np.float32(ops.LOG2E)
    out, *sums = hopper_forward.forward(
        call, given, sizes, problem.factor, interpret=interpreter(call)
    )
    out = cut(out, call.shape(ROLES["out"][call.layout]))
    return _in_layout(call, Sums(out, *(cut(x, call.shape("bni")) for x in sums)))


def _in_layout(call: Call, sums: Sums) -> Sums:
    """Sums that are (B, N, T), as the kernel writes them, in the call's layout."""
    if call.layout == "heads_first":
        return sums
    return Sums(sums.out, sums.top.swapaxes(1, 2), sums.total.swapaxes(1, 2))


def cut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The leading part of a padded result."""
    return x if x.shape == shape else x[tuple(slice(size) for size in shape)]


def _of_q_k_v(
    problem: Problem, arrays: Arrays, dout: jax.Array, lse2: jax.Array, delta: jax.Array
) -> dict[str, jax.Array]:
    """Run the kernels: dq, dk, dv, dbias, and the shares of each query in dslopes and dscale."""
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
    delta = delta if rows is None else jnp.where(rows, delta, np.float32(0))

    def common(q_multiple: int, kv_multiple: int, *, keys_first: bool = False) -> ops.Operands:
        terms = ops.terms(call, arrays, q_multiple, kv_multiple, keys_first=keys_first)
        terms["lse2"] = ops.pad_axis(lse2, 2, q_multiple, np.inf)
        terms["delta"] = ops.pad_axis(delta, 2, q_multiple)
        return given | terms

    sizes = over_keys
    walked = common(sizes.outer, sizes.inner)
    walked |= ops.routes(call, arrays, sizes.outer, sizes.inner, over_keys=True)
    found = hopper_backward.query_shares(call, walked, sizes, problem.factor, interpret=interpret)
    dim = max(padded(call.dim), padded(call.v_dim))
    together = dim <= LARGEST_JOINT_DIM
    fused = dim <= LARGEST_FUSED_DIM and not call.deterministic_backward
    if not fused:
        found |= hopper_backward.query_gradient(
            call, walked, sizes, problem.factor, gradient_dtype, interpret=interpret
        )
    sizes = tiles(call, "fused") if fused else over_queries
    walked = common(sizes.inner, sizes.outer, keys_first=True)
    walked |= ops.routes(call, arrays, sizes.inner, sizes.outer, over_keys=False)
    dtypes = {"dq": gradient_dtype, "dk": gradient_dtype, "dv": dtype}
    if fused:
        found |= hopper_backward.fused_gradients(
            call, walked, sizes, problem.factor, dtypes, interpret=interpret
        )
    else:
        for names in [("dk", "dv")] if together else [("dk",), ("dv",)]:
            wanted = {name: dtypes[name] for name in names}
            found |= hopper_backward.key_gradients(
                call, walked, sizes, problem.factor, wanted, interpret=interpret
            )
    bias = call.shape_of("bias")
    if bias is not None and 1 not in bias[2:]:
        sizes = tiles(call, "dbias")
        walked = common(sizes.outer, sizes.inner)
        walked |= ops.routes_of_batches(call, arrays, sizes.outer, sizes.inner)
        dbias = hopper_bias.bias_gradient(
            call, walked, sizes, problem.factor, arrays.bias.dtype, interpret=interpret
        )
        found["dbias"] = cut(dbias, bias)
    elif bias is not None:
        found["dbias"] = _shared_bias_gradient(call, found, bias)
    shapes = {name: call.shape(ROLES[name][call.layout]) for name in "qkv"}
    return found | {f"d{name}": cut(found[f"d{name}"], shapes[name]) for name in "qkv"}


def _shared_bias_gradient(
    call: Call, found: dict[str, jax.Array], shape: tuple[int, ...]
) -> jax.Array:
    """Of a bias that is the same for all keys, or for all queries, from what the kernels summed."""
    if shape[3] == 1:
        total = found["dbias_of_queries"][:, :, : call.q_len, None]
    else:
        total = found["dbias_of_keys"][:, :, None, : call.k_len]
    over = [n for n, (have, want) in enumerate(zip(total.shape, shape, strict=True)) if have > want]
    return total.sum(axis=over, keepdims=True)


KERNELS = join.Kernels(_forward, _of_q_k_v)
