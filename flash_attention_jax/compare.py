"""Comparisons of two attention functions, of their outputs and gradients.

`python -m flash_attention_jax check` compares every engine of this library with float64 instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flash_attention_jax._core import check

__all__ = [
    "Difference",
    "Gradients",
    "PRNGKeyGenerator",
    "value_and_grad_difference",
]


class Gradients(NamedTuple):
    """The largest elementwise differences of the gradients of two attention functions.

    Attributes:
        dq: Of those with respect to the queries.
        dk: With respect to the keys.
        dv: With respect to the values.
    """

    dq: float
    dk: float
    dv: float


class Difference(NamedTuple):
    """The largest elementwise differences of two attention functions; print it, or unpack it.

    Attributes:
        o: Of the outputs.
        gradients: Of the gradients, (dq, dk, dv).
    """

    o: float
    gradients: Gradients

    def __str__(self) -> str:
        """The four on a line."""
        four = {"o": self.o, **self.gradients._asdict()}
        return "  ".join(f"{name} {x:.1e}" for name, x in four.items())


class PRNGKeyGenerator:
    """An endless iterator of independent random keys: `next(keys)`.

    Args:
        seed: Where it starts; the same seed gives the same keys in the same order.

    Raises:
        TypeError: If `seed` is not an integer.
        ValueError: If `seed` is negative.

    Example:
        >>> import jax
        >>> from flash_attention_jax import PRNGKeyGenerator
        >>> keys = PRNGKeyGenerator(seed=42)
        >>> jax.random.normal(next(keys), (2, 3)).shape
        (2, 3)
    """

    def __init__(self, seed: int = 42) -> None:
        self._key = jax.random.key(check.whole("seed", seed, least=0))

    def __iter__(self) -> Iterator[jax.Array]:
        return self

    def __next__(self) -> jax.Array:
        self._key, key = jax.random.split(self._key)
        return key


def value_and_grad_difference(
    fn1: Callable[..., Any],
    fn2: Callable[..., Any],
    seed: int = 42,
    batch: int = 2,
    heads: int = 4,
    q_seq_len: int = 4096,
    k_seq_len: int = 8192,
    add_key_mask: bool = True,
    dim: int = 512,
) -> Difference:
    """Compare the outputs and gradients of two attention functions on random float32 inputs.

        o = max |fn1(q, k, v, mask) - fn2(q, k, v, mask)|,  dq, dk, dv likewise

    The gradients are those under a random cotangent of the output, so each entry of each is
    compared on its own: a sum of outputs could hide differences that cancel.

    The default sizes are heavy: 2e12 floating-point operations per function (about a minute on two
    CPU cores), and for a function that holds its logits several matrices of 1 GiB. Of the first
    function, out, dq, dk and dv are kept while the second runs, and nothing else.

    Args:
        fn1: A function of this library, or any that is called as fn(q, k, v) or, with
            `add_key_mask`, fn(q, k, v, mask), heads first. A function whose first parameter is
            named `query` is called as `jax.nn.dot_product_attention` is. Options are bound with
            `functools.partial`. Of a pair (out, lse) the first counts.
        fn2: As fn1.
        seed: Of the inputs, the mask and the cotangent.
        batch: Batch size.
        heads: Heads of queries, keys and values.
        q_seq_len: Queries.
        k_seq_len: Keys.
        add_key_mask: Whether to pass a padding mask (batch, k_seq_len) that keeps the first keys
            of each batch entry, 1 .. k_seq_len of them at random.
        dim: Dimension of queries, keys and values.

    Returns:
        (o, (dq, dk, dv)), the largest differences, as a named pair and a named triple; NaN where
        either function gives NaN.

    Raises:
        TypeError: If fn1 or fn2 is no function, or a size no integer.
        ValueError: If a size is not positive, or an output has not the shape of the queries.

    Example:
        >>> from flash_attention_jax import attention, flash_attention, value_and_grad_difference
        >>> sizes = {"batch": 1, "heads": 2, "q_seq_len": 30, "k_seq_len": 40, "dim": 16}
        >>> diff, (dq, dk, dv) = value_and_grad_difference(
        ...     attention, flash_attention, seed=42, **sizes
        ... )
        >>> max(diff, dq, dk, dv) < 1e-5
        True
    """
    for name, fn in (("fn1", fn1), ("fn2", fn2)):
        if not callable(fn):
            advice = "Pass one such as `flash_attention`."
            check.fail(name, "be a function", check.shown(fn), advice, TypeError)
    sizes = {"batch": batch, "heads": heads, "q_seq_len": q_seq_len, "k_seq_len": k_seq_len}
    for name, size in (sizes | {"dim": dim}).items():
        check.whole(name, size, least=1)
    keys = PRNGKeyGenerator(seed)

    def normal(length: int) -> jax.Array:
        return jax.random.normal(next(keys), (batch, heads, length, dim), jnp.float32)

    q, k, v, dout = map(normal, (q_seq_len, k_seq_len, k_seq_len, q_seq_len))
    mask = None
    if check.flag("add_key_mask", add_key_mask):
        lengths = jax.random.randint(next(keys), (batch, 1), 1, k_seq_len + 1, jnp.int32)
        mask = jnp.arange(k_seq_len, dtype=jnp.int32) < lengths
    first = list(_results("fn1", fn1, mask)(q, k, v, dout))
    second = list(_results("fn2", fn2, mask)(q, k, v, dout))
    # From the last to the first, so that both are freed as soon as they are compared.
    dv, dk, dq, o = (_largest_difference(first.pop(), second.pop()) for _ in range(4))
    return Difference(o, Gradients(dq, dk, dv))


def _results(name: str, fn: Callable[..., Any], mask: jax.Array | None) -> Callable[..., Any]:
    """(q, k, v, dout) -> out, dq, dk, dv, compiled, of a function of either convention."""
    try:
        heads_last = next(iter(inspect.signature(fn).parameters), "") == "query"
    except (TypeError, ValueError):
        heads_last = False

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if heads_last:
            q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
            out = fn(q, k, v, **({} if mask is None else {"mask": mask[:, None, None]}))
        else:
            out = fn(q, k, v, *(() if mask is None else (mask,)))
        out = out[0] if isinstance(out, tuple) else out
        if out.shape != q.shape:
            requirement = f"return an output of the queries' shape {q.shape}"
            check.fail(name, requirement, str(out.shape), "Bind its options with partial.")
        return jnp.swapaxes(out, 1, 2) if heads_last else out

    return jax.jit(functools.partial(value_and_grads, attend))


def value_and_grads(attend: Callable[..., Any], q: Any, k: Any, v: Any, dout: Any) -> Any:
    """Out, dq, dk and dv of an attention function."""
    out, backward = jax.vjp(attend, q, k, v)
    return out, *backward(dout.astype(out.dtype))


@jax.jit
def _largest_difference_jit(a: jax.Array, b: jax.Array) -> jax.Array:
    wide = np.promote_types(np.promote_types(a.dtype, b.dtype), np.float32)
    return jnp.abs(a.astype(wide) - b.astype(wide)).max()


def _largest_difference(a: jax.Array, b: jax.Array) -> float:
    return float(_largest_difference_jit(a, b))
