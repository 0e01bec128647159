"""Where a call will run, as far as can be seen while it is traced.

The platform and, of CUDA devices, the compute capability: the facts from which an engine is chosen.
An interpreter of the kernels stands in for a GPU while `interpreted` is in force.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

HOPPER = (9, 0)

_interpreting: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreting", default=False)


class Machine(NamedTuple):
    """What a call is traced for.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        capability: CUDA compute capability; None elsewhere, and where it is unknown.
        interpret: Whether the kernels' interpreter stands in for the GPU.
    """

    platform: str
    capability: tuple[int, int] | None
    interpret: bool


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Trace calls as for a Hopper GPU, and run its kernels on the CPU, slowly, looking for races.

    Needs jax 0.11 or newer. For tests: every call traced inside is one of its own, so nothing that
    was traced outside is reused.
    """
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


def machine_for(q: Any, platform: str | None, capability: tuple[int, int] | None) -> Machine:
    """The machine for a call on `q`.

    Args:
        q: The queries: arrays that are committed to a device run there.
        platform: What the caller asks for, in JAX's words; None = as seen.
        capability: The compute capability to assume; None = that of the first device.
    """
    interpret = platform is None and _interpreting.get()
    if interpret:
        platform, capability = "gpu", HOPPER
    platform = platform or _platform_of(q)
    if capability is None:
        capability = _capability(platform)
    return Machine("gpu" if platform in ("cuda", "rocm") else platform, capability, interpret)


def _platform_of(q: Any) -> str:
    if isinstance(q, jax.Array) and not isinstance(q, Tracer) and q.committed:
        return next(iter(q.devices())).platform
    device: Any = getattr(jax.config, "jax_default_device", None)
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def _capability(platform: str) -> tuple[int, int] | None:
    """CUDA compute capability of the first device, None elsewhere."""
    if platform not in ("gpu", "cuda") or jax.default_backend() != "gpu":
        return None
    text = getattr(jax.devices()[0], "compute_capability", None)
    if not text or "." not in str(text):
        return None
    major, minor = str(text).split(".")[:2]
    return int(major), int(minor)
