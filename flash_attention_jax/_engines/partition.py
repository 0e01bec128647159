"""Batch and heads that are sharded stay where they are: the partitioning of a call under `jax.jit`.

An engine walks batches and heads in blocks, and XLA, left alone, would gather what a block is cut
from; a kernel's custom call it cannot cut at all. Here it is told: entries of the batch and key
heads are independent, so each device runs its own. Nothing is sent, but where a gradient sums over
what is cut (of one bias for the whole batch, say), which is one all-reduce.

On a mesh of explicit axes the arrays' types say how they lie, and `shard_map` does it. On a mesh of
automatic axes only the compiler knows, and asks (`custom_partitioning`). A length or dimension that
is cut is gathered, and a warning says so once. Queries whose type says it are refused instead; the
compiler's question must not be answered by an error, which would abort the process's compilation in
XLA's words. Where the mesh cannot be seen when the function is traced, one device is assumed.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flash_attention_jax._core import dropout
from flash_attention_jax._core.call import Arrays, Call, Size, roles
from flash_attention_jax._core.results import Results
from flash_attention_jax._core.similarity import normalised
from flash_attention_jax._engines.blocked import split
from flash_attention_jax._engines.dispatch import Engine
from flash_attention_jax._engines.rule import with_gradients

Blocks = dict[str, Any]
Names = tuple[str, ...]


def attend(engine: Engine, call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    """Attention, with batch and heads on the devices on which they lie.

    Args:
        engine: Who computes it; one whose gradients JAX derives is left to XLA.
        call: The call.
        arrays: Its arrays.

    Returns:
        out and lse.

    Raises:
        ValueError: If q's type says that its length or dimension is cut.
    """
    mesh = jax.typeof(arrays.q).sharding.mesh
    kinds = set() if mesh.empty or mesh.size == 1 else set(mesh.axis_types)
    if AxisType.Explicit in kinds:
        return _explicit(engine, call, arrays)
    if kinds != {AxisType.Auto} or engine.gradients is None:
        return engine.attend(call, arrays)[:2]
    prepared = normalised(call, arrays) if engine.normalised else arrays
    out, lse, _ = _attend(_Task(engine, call), *split(prepared))
    return out.astype(call.dtype), lse


# --- what each device computes ---


@dataclasses.dataclass(frozen=True)
class Cut:
    """Mesh axes along which the batch and the heads are cut, into equal parts.

    The compiler would pad unequal ones, with entries that hold anything and would join the sums.
    """

    batch: Names
    heads: Names

    @classmethod
    def of(cls, call: Call, spec: Any, sizes: Mapping[str, int]) -> Cut:
        """How q's place on the mesh cuts the call; heads as far as key heads can be cut alike."""
        entries = dict(zip(roles(call.layout, "q"), (*spec, *[None] * 4), strict=False))
        return cls(
            _dividing(call.batch, _names(entries["b"]), sizes),
            _dividing(call.kv_heads, _names(entries["n"]), sizes),
        )

    def spec(self, call: Call, name: str, shape: tuple[Size, ...]) -> PartitionSpec:
        """Where an array of the call, a result or a gradient lies."""
        places = {"b": self.batch, "n": self.heads, "k": self.heads}
        letters = roles(call.layout, name)
        return PartitionSpec(
            *(
                places.get(r) or None if n not in (0, 1) else None
                for r, n in zip(letters, shape, strict=True)
            )
        )

    def local(self, call: Call, given: Blocks) -> tuple[Call, Blocks]:
        """One device's record and arrays, from those that it holds; in its axis environment."""
        q, k = (dict(zip(roles(call.layout, n), given[n].shape, strict=True)) for n in ("q", "k"))
        sizes = {"batch": q["b"], "heads": q["n"], "kv_heads": k["k"]}
        if call.dropout_rate:
            begins = {
                name: lax.axis_index(axes) * sizes[field]
                for name, axes, field in (
                    ("batch", self.batch, "batch"),
                    ("head", self.heads, "heads"),
                )
                if axes
            }
            origin = dropout.origin(call, given.get("dropout_origin"), **begins)
            given = given | {"dropout_origin": origin}
        return call.holding(given, **sizes), given

    def summed(self, call: Call, name: str, whole: tuple[Size, ...]) -> Names:
        """The axes along which devices hold shares of one gradient, of this shape in all."""
        size = dict(zip(roles(call.layout, name), whole, strict=True))
        axes: Names = ()
        if call.batch not in (0, 1) and size.get("b", 1) == 1:
            axes += self.batch
        if "k" not in size and call.heads not in (0, 1) and size.get("n", 1) == 1:
            axes += self.heads
        return axes


def _dividing(size: int, axes: Names, sizes: Mapping[str, int]) -> Names:
    """The axes as far as all of them together divide a size."""
    count = 1
    for at, axis in enumerate(axes):
        count *= sizes[axis]
        if size % count:
            return axes[:at]
    return axes


def _names(entry: Any) -> Names:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


GATHERED = {"i": "length", "j": "length", "d": "dimension", "e": "dimension"}
"""What is never cut, by its axis letter."""


def _gathered(call: Call, specs: Mapping[str, Any]) -> tuple[str, str, Any] | None:
    """The first array that lies cut along what is gathered: its name, along what, its spec."""
    for name, spec in sorted(specs.items(), key=lambda pair: pair[0] != "q"):
        for letter, entry in zip(roles(call.layout, _array(name)), spec, strict=False):
            if letter in GATHERED and _names(entry):
                return name, GATHERED[letter], spec
    return None


_warned: list[str] = []
"""The warning that this process has shown, so that it shows one."""


def _warn_of_gathers(call: Call, specs: Mapping[str, Any]) -> None:
    """Say once per process that whole lengths are sent to every device. It raises nothing.

    The compiler asks from inside its own call: a filter that makes warnings errors would end in an
    internal error of XLA, so there the warning is printed as it would be without that filter.
    """
    gathered = _gathered(call, specs)
    if gathered is None or _warned:
        return
    name, what, spec = gathered
    shown = "The cotangent of attention's output" if name == "dout" else f"`{name}`"
    _warned.append(
        f"{shown} is sharded along its {what}, {spec}, and is gathered on every device of these "
        "axes, which then repeat each other's work. For the length, use "
        "flash_attention_jax.sharding.context_parallel_attention, or a Flax layer's `placement`: "
        "it is a ring. Otherwise cut batch or heads. This is said once."
    )
    try:
        warnings.warn(_warned[0], UserWarning, stacklevel=2)
    except UserWarning as warning:
        warnings.showwarning(warning, UserWarning, __file__, 0)


# --- explicit axes ---


def _explicit(engine: Engine, call: Call, arrays: Arrays) -> tuple[jax.Array, jax.Array]:
    sharding = jax.typeof(arrays.q).sharding
    mesh = sharding.mesh
    given = {name: x for name, x in arrays._asdict().items() if x is not None}
    lies = {name: jax.typeof(x).sharding.spec for name, x in given.items()}
    refused = _gathered(call, {"q": sharding.spec})
    if refused is not None:
        raise ValueError(
            f"`q` must not be sharded along its {refused[1]}, got {sharding.spec}. Cut batch or "
            "heads, or use flash_attention_jax.sharding.context_parallel_attention for the length."
        )
    _warn_of_gathers(call, lies)
    cut = Cut.of(call, sharding.spec, dict(mesh.shape))
    specs = {name: cut.spec(call, name, x.shape) for name, x in given.items()}
    given = {
        name: jax.sharding.reshard(x, NamedSharding(mesh, specs[name])) for name, x in given.items()
    }

    def one(given: Blocks) -> tuple[jax.Array, jax.Array]:
        smaller, own = cut.local(call, given)
        return engine.attend(smaller, Arrays(**own))[:2]

    results = tuple(
        cut.spec(call, name, call.shape(roles(call.layout, name))) for name in ("out", "lse")
    )
    axes = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    return jax.shard_map(one, mesh=mesh, in_specs=(specs,), out_specs=results, axis_names=axes)(
        given
    )


# --- automatic axes ---


@functools.cache
def _partitioned(
    function: Callable[..., Any], call: Call, inputs: Names, outputs: Names, factors: str
) -> Callable[..., Any]:
    """`function(call, arrays by name) -> results by name` on flat arrays, cut when compiled."""

    def whole(*flat: Any) -> tuple[Any, ...]:
        found = function(call, dict(zip(inputs, flat, strict=True)))
        return tuple(found[name] for name in outputs)

    def partition(mesh: Any, arguments: Any, results: Any) -> Any:
        given = dict(zip(inputs, arguments, strict=True))
        # Where a sharding is still unknown, the compiler passes None.
        lies = {name: getattr(x.sharding, "spec", PartitionSpec()) for name, x in given.items()}
        _warn_of_gathers(call, lies)
        cut = Cut.of(call, lies["q"], dict(mesh.shape))

        def place(name: str, x: Any) -> NamedSharding:
            return NamedSharding(mesh, cut.spec(call, _array(name), x.shape))

        shared = [
            (name, cut.summed(call, _array(name), x.shape))
            for name, x in zip(outputs, results, strict=True)
        ]

        def one(*flat: Any) -> tuple[Any, ...]:
            smaller, own = cut.local(call, dict(zip(inputs, flat, strict=True)))
            found = function(smaller, own)
            return tuple(
                lax.psum(found[name], axes) if axes else found[name] for name, axes in shared
            )

        out = tuple(place(name, x) for name, x in zip(outputs, results, strict=True))
        return mesh, one, out, tuple(place(name, given[name]) for name in inputs)

    inner = custom_partitioning(whole)
    inner.def_partition(
        partition=partition,
        infer_sharding_from_operands=lambda mesh, arguments, results: partition(
            mesh, arguments, results
        )[2],
        sharding_rule=factors,
    )
    outer = custom_vmap(inner)

    @outer.def_vmap
    def _(size: int, mapped: Any, *flat: Any) -> Any:
        del size
        axes = [0 if flag else None for flag in mapped]
        return jax.vmap(whole, in_axes=axes)(*flat), (True,) * len(outputs)

    return outer


def _array(name: str) -> str:
    """The array of the call whose axes a cotangent or gradient has."""
    return name.removeprefix("d") if name in ("dout", "dlse") else name


def _run(function: Any, call: Call, given: Blocks, outputs: Names, shapes: Any) -> Blocks:
    """Run a function of blocks so that the compiler can cut it."""
    inputs = tuple(given)
    factors = _factors(call, given, outputs, shapes)
    found = _partitioned(function, call, inputs, outputs, factors)(*given.values())
    return dict(zip(outputs, found, strict=True))


def _factors(call: Call, given: Blocks, outputs: Names, shapes: dict[str, Any]) -> str:
    """Shardy's rule: which axes go together. An axis of size 1 goes with none."""
    alone = 0

    def letters(name: str, shape: tuple[Size, ...]) -> str:
        nonlocal alone
        words = []
        for letter, size in zip(roles(call.layout, _array(name)), shape, strict=True):
            together = letter in "bnk" and size not in (0, 1)
            alone += not together
            words.append(letter if together else f"z{alone}")
        return " ".join(words)

    left = ", ".join(letters(name, x.shape) for name, x in given.items())
    return f"{left} -> {', '.join(letters(name, shapes[name]) for name in outputs)}"


@functools.cache
def _forward_of(engine: Engine) -> Any:
    def forward(call: Call, given: Blocks) -> Blocks:
        return engine.of_part(call, Arrays(**given))._asdict()

    return forward


@functools.cache
def _gradients_of(engine: Engine, names: Names) -> Any:
    def gradients(call: Call, given: Blocks) -> Blocks:
        rest = dict(given)
        results = Results(*(rest.pop(name) for name in Results._fields))
        cotangents = rest.pop("dout"), rest.pop("dlse")
        floats = {name: rest.pop(name) for name in names}
        return engine.gradients(call, floats, rest, results, cotangents)  # pyright: ignore[reportOptionalCall]

    return gradients


class _Task(NamedTuple):
    """What is static: who computes, and what."""

    engine: Engine
    call: Call


def _rule(task: _Task, floats: Blocks, others: Blocks) -> Results:
    names = Results._fields
    shapes = {name: task.call.shape(roles(task.call.layout, name)) for name in names}
    forward = _forward_of(task.engine)
    return Results(**_run(forward, task.call, floats | others, names, shapes))


def _gradients_rule(task: _Task, names: Names, moving: Blocks, others: Blocks) -> Blocks:
    shapes = {name: moving[name].shape for name in names}
    return _run(_gradients_of(task.engine, names), task.call, moving | others, names, shapes)


# `custom_partitioning` has no derivative, so the gradients need a rule of their own.
_gradients: Any = jax.custom_vjp(_gradients_rule, nondiff_argnums=(0, 1))


def _gradients_forward(task: _Task, names: Names, moving: Blocks, others: Blocks) -> Any:
    return _gradients(task, names, moving, others), (moving, others)


def _gradients_backward(task: _Task, names: Names, residuals: Any, second: Blocks) -> Any:
    """The second derivative is the engine's own, and XLA's to cut."""
    moving, others = residuals
    function = _gradients_of(task.engine, names)
    _, pull = jax.vjp(lambda moving: function(task.call, moving | others), moving)
    return pull(second)[0], None


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _first(task: _Task, floats: Blocks, others: Blocks, results: Results, cotangents: Any) -> Any:
    """The gradients, of inputs that include the results and their cotangents."""
    dout, dlse = cotangents
    moving = floats | results._asdict() | {"dout": dout, "dlse": dlse}
    return _gradients(task, tuple(floats), moving, others)


_attend = with_gradients(_rule, _first)
