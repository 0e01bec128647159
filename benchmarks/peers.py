"""Peers: each way to compute attention that is measured, behind one small adapter.

An adapter says why it cannot run a workload, or prepares it: arrays in its own layout, compiled and
ready to run. A peer that is not installed gives its reason, never an error.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import measure
import numpy as np
import workloads
from workloads import Workload

import flash_attention_jax as fa


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A peer about to run a workload.

    Attributes:
        run: computes once, and returns when it is done.
        results: computes once; "out", and where prepared with backward "dq", "dk" and "dv", as
            (batch, heads, length, dim) arrays.
        temp_bytes: temporary memory by the compiler's account, None where there is no compiler.
        compile_seconds: to trace and compile, None where there is no compiler.
    """

    run: Callable[[], Any]
    results: Callable[[], dict[str, np.ndarray]]
    temp_bytes: int | None = None
    compile_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to compute attention.

    Attributes:
        name: what the tables call it.
        why_not: why it cannot run a workload, or None.
        prepare: makes a workload ready, with its gradients or without.
    """

    name: str
    why_not: Callable[[Workload], str | None]
    prepare: Callable[[Workload, dict[str, np.ndarray], bool], Prepared]


def thread_count() -> int:
    """The cores that this process may use: as many threads as JAX's CPU backend has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- JAX -------------------------------------------------------------------------------------


def _heads_first(implementation: str) -> Callable[..., jax.Array]:
    def attend(w: Workload, q: Any, k: Any, v: Any, extras: dict[str, Any]) -> jax.Array:
        options: dict[str, Any] = {"implementation": implementation, "causal": w.causal}
        if w.window is not None:
            options["window"] = w.window
        if w.term == "key mask":
            options["mask"] = extras["mask"]
        if w.term == "segments":
            options["q_segment_ids"] = options["kv_segment_ids"] = extras["segment_ids"]
        if w.term == "dropout":
            options |= {
                "dropout_rate": workloads.DROPOUT_RATE,
                "dropout_key": extras["dropout_key"],
            }
        if w.similarity == "cosine":
            return fa.flash_cosine_sim_attention(q, k, v, scale=workloads.COSINE_SCALE, **options)
        return fa.flash_attention(q, k, v, **options)

    return attend


def _drop_in(w: Workload, q: Any, k: Any, v: Any, extras: dict[str, Any]) -> jax.Array:
    return fa.dot_product_attention(
        q,
        k,
        v,
        is_causal=w.causal,
        local_window_size=w.window,
        similarity=w.similarity,
        scale=workloads.COSINE_SCALE if w.similarity == "cosine" else None,
    )


def _jax_nn(w: Workload, q: Any, k: Any, v: Any, extras: dict[str, Any]) -> jax.Array:
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=w.causal, local_window_size=w.window, implementation="xla"
    )


def function(
    attend: Callable[..., jax.Array], workload: Workload, backward: bool
) -> Callable[..., Any]:
    """The output, or the value of sum(weights * out) with its gradients: what is measured."""

    def forward(arrays: dict[str, Any]) -> jax.Array:
        return attend(workload, arrays["q"], arrays["k"], arrays["v"], arrays)

    def value_and_grad(arrays: dict[str, Any]) -> Any:
        def loss(q: Any, k: Any, v: Any) -> jax.Array:
            return jnp.vdot(forward({**arrays, "q": q, "k": k, "v": v}), arrays["weights"])

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(arrays["q"], arrays["k"], arrays["v"])

    return value_and_grad if backward else forward


def _prepare_jax(attend: Callable[..., jax.Array], heads_last: bool) -> Callable[..., Prepared]:
    def turned(array: np.ndarray) -> np.ndarray:
        turn = heads_last and array.ndim == 4
        return np.ascontiguousarray(array.swapaxes(1, 2)) if turn else array

    def prepare(workload: Workload, inputs: dict[str, np.ndarray], backward: bool) -> Prepared:
        # The forward pass is not given the cotangent, as it would not be in use.
        arrays: dict[str, Any] = {
            name: jax.device_put(turned(array))
            for name, array in inputs.items()
            if backward or name != "weights"
        }
        build = measure.compiled(function(attend, workload, backward), arrays)

        def results() -> dict[str, np.ndarray]:
            found = build.run(arrays)
            named = (
                dict(zip(("dq", "dk", "dv"), found[1], strict=True)) if backward else {"out": found}
            )
            return {name: turned(np.asarray(array)) for name, array in named.items()}

        return Prepared(
            lambda: jax.block_until_ready(build.run(arrays)),
            results,
            build.temp_bytes,
            build.seconds,
        )

    return prepare


def _term_why_not(workload: Workload) -> str | None:
    return f"not measured with {workload.term}" if workload.term else None


def _jax_nn_why_not(workload: Workload) -> str | None:
    if workload.similarity == "cosine":
        return "it has no cosine similarity"
    return _term_why_not(workload)


# What JAX compiles, by peer, and whether its arrays are heads last: of these memory is measured.
TRACED: dict[str, tuple[Callable[..., jax.Array], bool]] = {
    "blocked": (_heads_first("blocked"), False),
    "jax.nn": (_jax_nn, True),
}


def compiled(peer: str, workload: Workload, backward: bool) -> measure.Build:
    """Compile a peer for the shapes of a workload alone, so that any length will do."""
    attend, heads_last = TRACED[peer]
    batch, heads, length, dim = workload.shape
    shape = (batch, length, heads, dim) if heads_last else workload.shape
    arrays = {
        **dict.fromkeys(("q", "k", "v", "weights"), jax.ShapeDtypeStruct(shape, jnp.float32)),
        "mask": jax.ShapeDtypeStruct((batch, length), jnp.bool_),
        "segment_ids": jax.ShapeDtypeStruct((batch, length), jnp.int32),
        "dropout_key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    return measure.compiled(function(attend, workload, backward), arrays)


# --- PyTorch ---------------------------------------------------------------------------------


def torch_or_reason() -> tuple[ModuleType | None, str]:
    """PyTorch, set to as many threads as JAX has; or why it cannot be used."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return None, "torch is not installed" if absent else f"torch cannot be imported: {error}"
    except (OSError, RuntimeError) as error:  # an installation that does not fit the machine
        return None, f"torch cannot be imported: {str(error).splitlines()[0]}"
    torch.set_num_threads(thread_count())
    return torch, ""


def _torch_why_not(workload: Workload) -> str | None:
    if workload.similarity == "cosine":
        return "it has no cosine similarity"
    if workload.window is not None:
        return "it has no window but as a dense mask"
    return _term_why_not(workload) or torch_or_reason()[1] or None


def _prepare_torch(workload: Workload, inputs: dict[str, np.ndarray], backward: bool) -> Prepared:
    torch: Any = torch_or_reason()[0]
    q, k, v, weights = (torch.from_numpy(inputs[name]) for name in ("q", "k", "v", "weights"))
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward() -> Any:
        with torch.no_grad():
            return attend(q, k, v, is_causal=workload.causal)

    def value_and_grad() -> Any:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        value = (attend(*leaves, is_causal=workload.causal) * weights).sum()
        return value.detach(), torch.autograd.grad(value, leaves)

    def results() -> dict[str, np.ndarray]:
        if not backward:
            return {"out": forward().numpy()}
        grads = value_and_grad()[1]
        return {n: x.numpy() for n, x in zip(("dq", "dk", "dv"), grads, strict=True)}

    return Prepared(value_and_grad if backward else forward, results)


# --- the table -------------------------------------------------------------------------------

PEERS = {
    peer.name: peer
    for peer in (
        # Ours, heads first; cosine where the workload is.
        Peer("blocked", _term_why_not, _prepare_jax(*TRACED["blocked"])),
        # Ours in jax.nn's layout, through the drop-in.
        Peer(
            "blocked, heads last",
            _term_why_not,
            _prepare_jax(_drop_in, heads_last=True),
        ),
        # Ours by the definition.
        Peer("dense", _term_why_not, _prepare_jax(_heads_first("dense"), heads_last=False)),
        Peer("jax.nn", _jax_nn_why_not, _prepare_jax(*TRACED["jax.nn"])),
        Peer("torch SDPA", _torch_why_not, _prepare_torch),
    )
}
