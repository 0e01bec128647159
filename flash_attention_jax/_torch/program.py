"""What a call from torch is on JAX's side: a program, what it turns into, and what is compiled.

A program is a function with all of its arguments but the arrays, and has a hash: `jax.jit` compiles
once for each program and each set of shapes. It turns into the program of its gradient (`Gradient`)
or of a batch of it (`Batch`), which run in the same way; so there are derivatives of any order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Batch", "Constant", "Gradient", "Program", "Tape"]
__all__ += ["gradients", "value", "value_and_tape"]


# --- programs --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Constant:
    """An argument that is no array: 1, 1.0 and True are different programs."""

    value: Any = dataclasses.field(compare=False)
    key: Any

    @classmethod
    def of(cls, value: Any) -> Constant:
        """Raises TypeError where the value has no hash."""
        key = (type(value), repr(value) if isinstance(value, float) else value)
        hash(key)
        return cls(value, key)


@dataclasses.dataclass(frozen=True)
class Program:
    """A JAX function with all of its arguments but the arrays.

    Attributes:
        function: The function.
        tree: Structure of its (args, kwargs).
        constants: For each leaf of them the constant, or None where an array goes.
    """

    function: Callable[..., Any]
    tree: Any
    constants: tuple[Constant | None, ...]

    def __call__(self, arrays: Sequence[Any]) -> Any:
        """The function's result, any structure of arrays."""
        rest = iter(arrays)
        leaves = [next(rest) if c is None else c.value for c in self.constants]
        args, kwargs = jax.tree.unflatten(self.tree, leaves)
        return self.function(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """From the arrays of a program and the cotangents to the gradients of the wanted arrays."""

    program: Program
    wanted: tuple[bool, ...]

    def __call__(self, arrays: Sequence[Any], cotangents: Sequence[Any]) -> tuple[Any, ...]:
        out, pullback = _vjp(self.program, self.wanted, arrays)
        leaves, tree = jax.tree.flatten(out)
        return _pull(pullback, tree, leaves, cotangents)


@dataclasses.dataclass(frozen=True)
class Batch:
    """A program over a batch of some of its arrays."""

    program: Program
    in_axes: tuple[int | None, ...]

    def __call__(self, arrays: Sequence[Any]) -> Any:
        return jax.vmap(lambda *xs: self.program(xs), self.in_axes)(*arrays)


def _vjp(program: Program, wanted: Sequence[bool], arrays: Sequence[Any]) -> tuple[Any, Any]:
    """`jax.vjp` with respect to the wanted arrays alone."""

    def of_wanted(*wanted_arrays: Any) -> Any:
        rest = iter(wanted_arrays)
        return program([next(rest) if w else x for w, x in zip(wanted, arrays, strict=True)])

    return jax.vjp(of_wanted, *(x for w, x in zip(wanted, arrays, strict=True) if w))


def _pull(pullback: Any, tree: Any, outs: Sequence[Any], cotangents: Sequence[Any]) -> Any:
    """The gradients in torch's convention, which for complex numbers is the conjugate of JAX's."""
    leaves = [_cotangent(x, ct) for x, ct in zip(outs, cotangents, strict=True)]
    return tuple(_conjugate(x) for x in pullback(tree.unflatten(leaves)))


def _cotangent(out: Any, cotangent: Any) -> Any:
    """What `jax.vjp` wants for an output whose gradient in torch may be None."""
    if not jnp.issubdtype(out.dtype, jnp.inexact):
        return np.zeros(out.shape, jax.dtypes.float0)
    return jnp.zeros(out.shape, out.dtype) if cotangent is None else _conjugate(cotangent)


def _conjugate(x: Any) -> Any:
    return jnp.conj(x) if jnp.issubdtype(x.dtype, jnp.complexfloating) else x


# --- compiled --------------------------------------------------------------------------------


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Tape:
    """What backward must know beside arrays; made once per compilation.

    Attributes:
        tree: Structure of the outputs.
        outs: Their shapes and dtypes.
        pullback: Structure of the pullback.
        sources: Where each leaf of the pullback comes from: ("array", i), ("out", i) or ("own", i).
    """

    tree: Any
    outs: tuple[Any, ...]
    pullback: Any
    sources: tuple[tuple[str, int], ...]


@jax.jit(static_argnums=0)
def value(program: Program, arrays: list[Any]) -> Any:
    return program(arrays)


@jax.jit(static_argnums=(0, 1))
def value_and_tape(
    program: Program, wanted: tuple[bool, ...], arrays: list[Any]
) -> tuple[list[Any], list[Any], Tape]:
    """The outputs, the residuals that are neither arrays given nor outputs, and the tape.

    Only the latter residuals leave the computation: XLA would copy the others.
    """
    out, pullback = _vjp(program, wanted, arrays)
    outs, tree = jax.tree.flatten(out)
    outs = [jnp.asarray(x) for x in outs]
    leaves, pullback_tree = jax.tree.flatten(pullback)
    places = {id(x): ("out", i) for i, x in enumerate(outs)}
    places |= {id(x): ("array", i) for i, x in enumerate(arrays)}
    own: list[Any] = []
    sources = []
    for leaf in leaves:
        if id(leaf) not in places:
            places[id(leaf)] = ("own", len(own))
            own.append(leaf)
        sources.append(places[id(leaf)])
    kinds = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outs)
    return outs, own, Tape(tree, kinds, pullback_tree, tuple(sources))


@jax.jit(static_argnums=0)
def gradients(tape: Tape, residuals: list[Any], cotangents: list[Any]) -> tuple[Any, ...]:
    """The gradients of the wanted arrays."""
    return _pull(tape.pullback.unflatten(residuals), tape.tree, tape.outs, cotangents)
