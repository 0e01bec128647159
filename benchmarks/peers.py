"""Peers: each way to compute attention that is measured, behind one small adapter.

An adapter says why it cannot run a workload, or prepares it: arrays in its own layout, compiled and
warm. A peer that is not installed gives its reason, never an error. PyTorch's are in
peers_torch.py; flash-attention-jax 0.3.1, whose import name is ours, runs apart (apart.py).
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import apart
import jax
import jax.numpy as jnp
import measure
import numpy as np
import peers_torch
import workloads
from prepared import Peer, Prepared
from workloads import Workload

import flash_attention_jax as fa

Attend = Callable[[Workload, dict[str, Any]], jax.Array]


# --- what is measured ------------------------------------------------------------------------


def differentiate(attend: Attend, workload: Workload, backward: bool) -> Callable[..., Any]:
    """What is measured: the output, or also its gradients for the cotangent `weights`."""
    names = workloads.gradients(workload)

    def forward(arrays: dict[str, Any]) -> Any:
        return attend(workload, arrays)

    def both(arrays: dict[str, Any]) -> Any:
        def of(*leaves: Any) -> jax.Array:
            return forward({**arrays, **dict(zip(names, leaves, strict=True))})

        out, pull = jax.vjp(of, *(arrays[name] for name in names))
        return out, *pull(arrays["weights"])

    return both if backward else forward


def place(workload: Workload, arrays: dict[str, np.ndarray], heads_last: bool) -> dict[str, Any]:
    """The inputs in the workload's dtype, as JAX arrays of their own."""

    def put(name: str, x: np.ndarray) -> jax.Array:
        if heads_last and name in ("q", "k", "v", "weights"):
            x = x.swapaxes(1, 2)
        dtype = workloads.DTYPES[workload.dtype] if x.dtype == np.float32 else x.dtype
        return jax.device_put(x.astype(dtype, order="C", copy=True))

    on_device: dict[str, Any] = {name: put(name, x) for name, x in arrays.items()}
    if workload.dropout:
        on_device["dropout_key"] = jax.random.key(0)
    return on_device


def prepare_jax(attend: Attend, heads_last: bool, workload: Workload, backward: bool) -> Prepared:
    """Compile and warm a function of JAX."""
    inputs = workloads.inputs(workload)
    # Inference has no cotangent, so the forward pass does not hold one either.
    inputs = {name: x for name, x in inputs.items() if backward or name != "weights"}
    arrays = place(workload, inputs, heads_last)
    build = measure.compile_cold(differentiate(attend, workload, backward), arrays)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(arrays))
    room = measure.available_bytes() if jax.default_backend() == "cpu" else None
    if room is not None and build.temp_bytes is not None and build.temp_bytes > 0.8 * room:
        raise MemoryError(f"{build.temp_bytes} bytes")  # Linux would kill the process instead
    sets = [
        arrays if index == 0 else place(workload, inputs, heads_last)
        for index in range(measure.count_sets(nbytes, jax.default_backend()))
    ]
    calls = measure.repeat(build.run, [[each] for each in sets])

    def compute_results() -> dict[str, np.ndarray]:
        outputs = build.run(arrays)
        names = ["out", *(f"d{name}" for name in workloads.gradients(workload))]
        by_name = dict(zip(names, outputs, strict=True)) if backward else {"out": outputs}

        def to_host(name: str, x: jax.Array) -> np.ndarray:
            array = np.asarray(x.astype(jnp.float32))
            return array.swapaxes(1, 2) if heads_last and name != "dbias" else array

        return {name: to_host(name, x) for name, x in by_name.items()}

    before = _device_peak()
    results = compute_results()
    after = _device_peak()
    return Prepared(
        time=measure.make_timer(calls),
        results=lambda: results,
        temp_bytes=build.temp_bytes,
        compile_seconds=build.seconds,
        # The allocator keeps one peak for the whole process, so it tells only who raised it.
        peak_bytes=after if after is not None and after != before else None,
        device_seconds=lambda: measure.device_seconds(build.run, [arrays]),
    )


def _device_peak() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


# --- ours ------------------------------------------------------------------------------------


def ours(implementation: str | None) -> Attend:
    """`flash_attention`, or its cosine where the workload is."""

    def attend(w: Workload, arrays: dict[str, Any]) -> jax.Array:
        options = {**our_options(w, arrays), "implementation": implementation}
        if w.similarity == "cosine":
            options["scale"] = workloads.COSINE_SCALE
            return fa.flash_cosine_sim_attention(arrays["q"], arrays["k"], arrays["v"], **options)
        return fa.flash_attention(arrays["q"], arrays["k"], arrays["v"], **options)

    return attend


def our_options(w: Workload, arrays: dict[str, Any]) -> dict[str, Any]:
    """The options of a workload; `arrays` may be their shapes."""
    options: dict[str, Any] = {"causal": w.causal}
    if w.window is not None:
        options["window"] = w.sides
    if w.softcap is not None:
        options["softcap"] = w.softcap
    if w.bias:
        options["attn_bias" if w.similarity == "cosine" else "bias"] = arrays["bias"]
    if w.sinks:
        options["sinks"] = arrays["sinks"]
    if w.mask_prob:
        options["mask"] = arrays["mask"]
    if w.documents > 1:
        options["q_segment_ids"] = options["kv_segment_ids"] = arrays["segment_ids"]
    if w.dropout:
        options |= {"dropout_rate": w.dropout, "dropout_key": arrays["dropout_key"]}
    return options


def shapes(w: Workload, *, heads_last: bool = False) -> dict[str, Any]:
    """The shapes of a workload's arrays: to compile and to ask without making them."""
    dtype = jnp.dtype(workloads.DTYPES[w.dtype])

    def struct(shape: tuple[int, ...], of: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, of)

    def order(shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        return (shape[0], shape[2], shape[1], shape[3]) if heads_last else shape

    q, kv = struct(order(w.shape)), struct(order(w.kv_shape))
    arrays: dict[str, Any] = {"q": q, "k": kv, "v": kv, "weights": q}
    arrays["mask"] = struct((w.batch, w.keys), jnp.bool_)
    arrays["segment_ids"] = struct((w.batch, w.length), jnp.int32)
    arrays["sinks"] = struct((w.heads,))
    if w.bias:
        arrays["bias"] = struct((1, w.heads, w.length, w.keys))
    arrays["dropout_key"] = jax.eval_shape(lambda: jax.random.key(0))
    return arrays


def our_why_not(implementation: str | None, w: Workload, backward: bool) -> str | None:
    """The library's own reason; it chooses forward and backward together."""
    del backward
    arrays = shapes(w)
    if w.dropout:
        arrays["dropout_key"] = jax.random.key(0)
    options = our_options(w, arrays)
    if "attn_bias" in options:
        options["bias"] = options.pop("attn_bias")
    try:
        fa.explain(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            similarity=w.similarity,
            implementation=implementation,
            **cast("Any", options),
        )
    except NotImplementedError as error:
        return str(error).partition("declines this call: ")[2].partition(". Use ")[0] or str(error)
    except ValueError as error:  # an implementation of another version
        return str(error)
    return None


def _drop_in(w: Workload, arrays: dict[str, Any]) -> jax.Array:
    return fa.dot_product_attention(
        arrays["q"],
        arrays["k"],
        arrays["v"],
        arrays.get("bias"),
        is_causal=w.causal,
        local_window_size=w.sides,
        similarity=w.similarity,  # pyright: ignore[reportArgumentType]
        scale=workloads.COSINE_SCALE if w.similarity == "cosine" else None,
        logits_soft_cap=w.softcap,
    )


# --- others that JAX compiles ----------------------------------------------------------------


def lacks(w: Workload, *able: str) -> str | None:
    """The first thing that a workload needs and that is not among these."""
    missing = [name for name in w.features if name not in able]
    return f"it has no {missing[0]}" if missing else None


def _jax_nn(implementation: Any) -> Attend:
    def attend(w: Workload, arrays: dict[str, Any]) -> jax.Array:
        mask = arrays["mask"][:, None, None] if w.mask_prob else None
        return jax.nn.dot_product_attention(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            arrays.get("bias"),
            mask,
            is_causal=w.causal,
            local_window_size=w.sides,
            implementation=implementation,
        )

    return attend


def _jax_nn_why_not(implementation: str, w: Workload, backward: bool) -> str | None:
    del backward
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        return "it needs an NVIDIA GPU"
    if implementation == "cudnn" and w.dtype == "float32":
        return "it has no float32"
    return lacks(w, "grouped heads", "window", "bias", "key mask")


def _import(name: str) -> tuple[ModuleType | None, str]:
    """A package, or why it cannot be used."""
    try:
        return importlib.import_module(name), ""
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, f"{name} is not installed"
        return None, f"{name} cannot be imported: {error}"
    except Exception as error:  # noqa: BLE001 (a broken installation is a reason as well)
        return None, f"{name} cannot be imported: {str(error).splitlines()[0]}"


def _tokamax(implementation: str) -> Attend:
    def attend(w: Workload, arrays: dict[str, Any]) -> jax.Array:
        module: Any = _import("tokamax")[0]
        mask = arrays["mask"][:, None, None] if w.mask_prob else None
        return module.dot_product_attention(
            arrays["q"],
            arrays["k"],
            arrays["v"],
            arrays.get("bias"),
            mask,
            is_causal=w.causal,
            local_window_size=w.sides,
            logits_soft_cap=w.softcap,
            implementation=implementation,
        )

    return attend


def _tokamax_why_not(implementation: str, w: Workload, backward: bool) -> str | None:
    del backward
    if implementation != "xla_chunked" and jax.default_backend() != "gpu":
        return "it needs an NVIDIA GPU"
    able = ("grouped heads", "window", "bias", "key mask", "softcap")
    return lacks(w, *able) or _import("tokamax")[1] or None


# --- the table -------------------------------------------------------------------------------


def _peer(
    name: str,
    why_not: Callable[[Workload, bool], str | None],
    attend: Attend,
    *,
    heads_last: bool,
) -> Peer:
    return Peer(name, why_not, functools.partial(prepare_jax, attend, heads_last))


def _our_peer(implementation: str) -> Peer:
    why_not = functools.partial(our_why_not, implementation)
    return _peer(implementation, why_not, ours(implementation), heads_last=False)


# Which of ours stands for the library in a ratio: the first that took the call.
OURS = ("hopper", "triton", "blocked")

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        # Ours, heads first; cosine where the workload is.
        *map(_our_peer, (*OURS, "checkpointed", "dense")),
        # Ours in jax.nn's layout, through the drop-in.
        _peer(
            "blocked, heads last",
            lambda w, backward: lacks(
                w, "cosine similarity", "grouped heads", "window", "softcap", "bias"
            ),
            _drop_in,
            heads_last=True,
        ),
        _peer("jax.nn", functools.partial(_jax_nn_why_not, "xla"), _jax_nn("xla"), heads_last=True),
        _peer(
            "jax.nn cuDNN",
            functools.partial(_jax_nn_why_not, "cudnn"),
            _jax_nn("cudnn"),
            heads_last=True,
        ),
        _peer(
            "tokamax",
            functools.partial(_tokamax_why_not, "mosaic"),
            _tokamax("mosaic"),
            heads_last=True,
        ),
        _peer(
            "tokamax, chunked",
            functools.partial(_tokamax_why_not, "xla_chunked"),
            _tokamax("xla_chunked"),
            heads_last=True,
        ),
        *peers_torch.PEERS,
        apart.PEER,
    )
}


def find(name: str) -> Peer:
    """The peer of a name.

    Raises:
        ValueError: If there is none; the message lists those that there are.
    """
    if name not in PEERS:
        raise ValueError(
            f"`peer` must be the name of a peer, got {name!r}. Known: {', '.join(PEERS)}."
        )
    return PEERS[name]


# What JAX compiles, by peer, and whether its arrays are heads last: of these memory is measured.
TRACED: dict[str, tuple[Attend, bool]] = {
    "blocked": (ours("blocked"), False),
    "jax.nn": (_jax_nn("xla"), True),
}


def compile_peer(peer: str, workload: Workload, backward: bool) -> measure.Build:
    """Compile a peer for the shapes of a workload alone, so that any length will do."""
    attend, heads_last = TRACED[peer]
    arrays = shapes(workload, heads_last=heads_last)
    return measure.compile_cold(differentiate(attend, workload, backward), arrays)
