"""What an adapter of a peer is: a reason not to run, or a call that is ready to be timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from workloads import Workload


def _tell_nothing() -> float | None:
    return None


def _close_nothing() -> None:
    return None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A peer about to run a workload.

    Attributes:
        time: runs it, and tells the seconds of one call.
        results: "out", or where prepared with backward "dq", "dk", "dv" and where there is a bias
            "dbias", as (batch, heads, length, dim) arrays of float32.
        temp_bytes: temporary memory by the compiler's account, None where there is no compiler.
        compile_seconds: to trace and compile, None where there is no compiler.
        peak_bytes: the most that the allocator held, where it tells.
        device_seconds: what the GPU's kernels take in one call, or None where that is not told.
        close: gives back what it holds.
    """

    time: Callable[[], float]
    results: Callable[[], dict[str, np.ndarray]]
    temp_bytes: int | None = None
    compile_seconds: float | None = None
    peak_bytes: int | None = None
    device_seconds: Callable[[], float | None] = _tell_nothing
    close: Callable[[], None] = _close_nothing


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to compute attention.

    Attributes:
        name: what the tables call it.
        why_not: why it cannot run a workload, with its gradients or without; or None.
        prepare: makes a workload ready, with its gradients or without.
    """

    name: str
    why_not: Callable[[Workload, bool], str | None]
    prepare: Callable[[Workload, bool], Prepared]
