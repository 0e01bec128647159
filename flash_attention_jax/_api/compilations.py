"""Says when a Python number makes each call a program of its own.

A number is a part of the call's record, and each record is compiled: a scale that is annealed as a
Python float costs a second a step, in silence. Only calls outside `jax.jit` are counted: inside,
the layers of a model may well differ in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from flash_attention_jax._core.call import Call

MOST = 2
"""Values of one number that are compiled without a word."""

_NUMBERS = {
    "scale": "Pass it as an array, jnp.asarray(scale), which is compiled once.",
    "softcap": "Keep it fixed.",
    "dropout_rate": "Keep it fixed: each rate is a program of its own.",
}

_state = threading.local()
_values: dict[tuple[str, Call], set[Any]] = {}
_warned: set[str] = set()


@contextlib.contextmanager
def counted(q: Any) -> Iterator[None]:
    """In which programs count that are compiled for these queries, unless a jit traces them."""
    _state.counts = _has_values(q)
    try:
        yield
    finally:
        _state.counts = False


def _has_values(x: Any) -> bool:
    """Whether an array is there, perhaps inside the tracers of `jax.grad` or `jax.vmap`."""
    while isinstance(x, Tracer):
        x = getattr(x, "primal", getattr(x, "val", None))
    return isinstance(x, (jax.Array, np.ndarray))


def compiled(call: Call) -> None:
    """Called whenever a record is traced: warns, once for each number, at its third value."""
    if not getattr(_state, "counts", False):
        return
    for name, advice in _NUMBERS.items():
        value = getattr(call, name)
        others = dataclasses.replace(call, **{name: 0.0})
        values = _values.setdefault((name, others), set())
        values.add(value)
        if len(values) > MOST and name not in _warned:
            _warned.add(name)
            taken = f"`{name}` took {len(values)} values in calls that are otherwise the same"
            warnings.warn(f"{taken}, and each was compiled. {advice}", stacklevel=2)
