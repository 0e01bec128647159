"""The devices of a training run: its mesh, what lies where, and what the processes agree on.

Batches are cut over `data`, sequences over `context` and heads over `model`. Parameters and the
optimizer's state are cut over `data` too, each along its largest axis that this divides. Every
process computes which bytes come next, and keeps those of its devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from flash_attention_jax.data import InputError
from flash_attention_jax.sharding import Placement

AXES = ("data", "context", "model")
HEARTBEAT_SECONDS = 30  # after so long without a sign, a process counts as dead
LEAST_CUT = 2**10  # numbers; smaller parameters lie whole on every device


def parse_mesh(text: str) -> dict[str, int]:
    """Axes and sizes of "data=2,context=4".

    Raises:
        InputError: If it does not read so.
    """
    sizes: dict[str, int] = {}
    for word in text.split(","):
        name, _, size = word.partition("=")
        if name not in AXES or not size.isdecimal() or int(size) < 1 or name in sizes:
            raise InputError(
                f"`--mesh` must be axes of {', '.join(AXES)} with sizes, got {text!r}. "
                "Write data=2,context=4, say."
            )
        sizes[name] = int(size)
    return sizes


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """The mesh with these axes; those that are missing have size 1.

    Raises:
        InputError: If there are not so many devices.
    """
    shape, devices = [sizes.get(name, 1) for name in AXES], jax.devices()
    count = math.prod(shape)
    enough = count == len(devices) if jax.process_count() > 1 else count <= len(devices)
    if not enough:
        raise InputError(
            f"`--mesh` must have as many devices as there are, got {count} for {len(devices)}. "
            "On a CPU, XLA_FLAGS=--xla_force_host_platform_device_count=8 makes 8 virtual ones."
        )
    return Mesh(np.array(devices[:count]).reshape(shape), AXES)


def join_processes(address: str, processes: int, process: int) -> None:
    """Makes this process one of several that train together.

    Raises:
        InputError: If they do not find each other.
    """
    if not 0 <= process < processes:
        raise InputError(
            f"`--process` must be below --processes {processes}, got {process}. Count from 0."
        )
    try:
        jax.distributed.initialize(
            address,
            processes,
            process,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=120,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except RuntimeError as error:
        raise InputError(
            f"`--coordinator` must be an address at which process 0 listens, got {address}: "
            f"{str(error).splitlines()[0]}. Start all processes with the same address."
        ) from error


@dataclasses.dataclass(frozen=True)
class Fleet:
    """Where a run lies; without a mesh, on one device."""

    mesh: Mesh | None = None

    @property
    def placement(self) -> Placement | None:
        """That of the attention layers."""
        if self.mesh is None:
            return None
        return Placement(self.mesh, batch_axis="data", head_axis="model")

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return jax.process_index() == 0

    def check(self, *, batch: int, heads: int, seq_len: int) -> None:
        """Refuses what the mesh does not divide."""
        if self.mesh is None:
            return
        for option, number, axis in (("batch", batch, "data"), ("heads", heads, "model")):
            if number % self.mesh.shape[axis]:
                raise InputError(
                    f"`--{option}` must be a multiple of the mesh's {axis}="
                    f"{self.mesh.shape[axis]}, got {number}. Change one of them."
                )
        if seq_len % self.mesh.shape["context"]:
            raise InputError(
                "`--seq-len` must be a multiple of the mesh's context="
                f"{self.mesh.shape['context']}, got {seq_len}. Change one of them."
            )

    def sharding(self, *spec: Any) -> NamedSharding | None:
        """A place on the mesh."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(*spec))

    def of_state(self, x: Any) -> NamedSharding | None:
        """Where a parameter, or what the optimizer keeps for it, lies."""
        if self.mesh is None:
            return None
        size = self.mesh.shape["data"]
        fits = [n for n, length in enumerate(x.shape) if length % size == 0]
        if math.prod(x.shape) < LEAST_CUT or not fits:
            return self.sharding()
        axis = max(fits, key=lambda n: x.shape[n])
        return self.sharding(*[None] * axis, "data")

    def place(self, tree: PyTree) -> PyTree:
        """Parameters and the like from the host to the devices."""
        return tree if self.mesh is None else jax.tree.map(self._put, tree)

    def _put(self, x: Any) -> Any:
        return _global(np.asarray(x), self.of_state(x)) if hasattr(x, "shape") else x

    def tokens(self, x: np.ndarray) -> Any:
        """Bytes (..., batch, length) from the host to the devices."""
        spec = [None] * (x.ndim - 2) + ["data"]
        return x if self.mesh is None else _global(x, self.sharding(*spec))

    def keep(self, tree: PyTree) -> PyTree:
        """The same under `jit`: results stay where the parameters are."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.of_state(x)), tree)

    def along(self, x: Any, *spec: Any) -> Any:
        """An array under `jit`, where it has to lie."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*spec))

    def host(self, tree: PyTree) -> PyTree:
        """The whole of it in the memory of each process; all of them take part."""
        if self.mesh is None:
            return tree
        return jax.tree.map(self._fetch, tree)

    def _fetch(self, x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        whole = x if x.is_fully_addressable else _replicated(self.sharding())(x)
        return np.asarray(whole)

    def agree(self, *flags: bool) -> list[bool]:
        """Whether any process says so, for each; they go on together or not at all."""
        if jax.process_count() == 1:
            return [*flags]
        found = multihost_utils.process_allgather(np.array(flags, np.int32))
        came = np.asarray(found).reshape(-1, len(flags)).any(axis=0)
        return [bool(flag) for flag in np.atleast_1d(came)]


def _global(x: np.ndarray, sharding: Any) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


@functools.cache
def _replicated(sharding: Any) -> Any:
    return jax.jit(lambda x: x, out_shardings=sharding)
