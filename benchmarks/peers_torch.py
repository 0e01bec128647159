"""PyTorch's peers: SDPA per backend, FlexAttention, and a package on top of it."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import measure
import numpy as np
import workloads
from prepared import Peer, Prepared
from workloads import Workload

BACKENDS = {
    "torch SDPA": None,
    "torch SDPA flash": "FLASH_ATTENTION",
    "torch SDPA efficient": "EFFICIENT_ATTENTION",
    "torch SDPA cuDNN": "CUDNN_ATTENTION",
    "torch SDPA math": "MATH",
}
# Where `make` puts the packages that are only ever measured.
INSTALLED = Path(sys.prefix) / "peers"
MEMORY_EFFICIENT = "memory-efficient-attention-pytorch"

Attend = Callable[[Any, Workload, dict[str, Any]], Callable[..., Any]]


def torch_or_reason() -> tuple[ModuleType | None, str]:
    """PyTorch, set to as many threads as JAX has; or why it cannot be used."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "torch"
        return None, "torch is not installed" if absent else f"torch cannot be imported: {error}"
    except (OSError, RuntimeError) as error:  # an installation that does not fit the machine
        return None, f"torch cannot be imported: {str(error).splitlines()[0]}"
    torch.set_num_threads(measure.thread_count())
    return torch, ""


def device() -> str:
    """Where JAX computes, in torch's word."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def _why_unusable() -> str | None:
    torch, reason = torch_or_reason()
    if torch is not None and device() == "cuda" and not torch.cuda.is_available():
        return "this torch sees no GPU"
    return reason or None


def _lacks(w: Workload, *able: str) -> str | None:
    missing = [name for name in w.features if name not in able]
    return f"it has no {missing[0]}" if missing else None


def prepare(attend_for: Attend, workload: Workload, backward: bool) -> Prepared:
    """Arrays on torch's device, warm; the whole call is differentiated as JAX's peers are."""
    torch: Any = torch_or_reason()[0]
    inputs = workloads.inputs(workload)
    dtype = getattr(torch, workload.dtype)
    names = workloads.gradients(workload)
    cuda = device() == "cuda"

    def place() -> dict[str, Any]:
        arrays = {}
        for name, x in inputs.items():
            tensor = torch.tensor(x).to(device())
            arrays[name] = tensor.to(dtype) if x.dtype == np.float32 else tensor
        if backward:
            for name in names:
                arrays[name].requires_grad_(True)
        return arrays

    first = place()
    attend = attend_for(torch, workload, first)
    nbytes = sum(x.numel() * x.element_size() for x in first.values())
    count = measure.count_sets(nbytes, "gpu" if cuda else "cpu")
    sets = [first if index == 0 else place() for index in range(count)]

    def call(arrays: dict[str, Any]) -> Any:
        if not backward:
            with torch.no_grad():
                return attend(arrays)
        out = attend(arrays)
        # Not autograd.grad: torch's reentrant checkpoint, which one peer uses, does not go with it.
        out.backward(arrays["weights"])
        grads = [arrays[name].grad for name in names]
        for name in names:
            arrays[name].grad = None
        return out, *grads

    def repeat(number: int) -> None:
        for index in range(number):
            call(sets[index % count])
        if cuda:
            torch.cuda.synchronize()

    def to_host(x: Any) -> np.ndarray:
        return x.detach().float().cpu().numpy()

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else 0
    outputs = call(first)
    peak = torch.cuda.max_memory_allocated() - held if cuda else None
    labels = ["out", *(f"d{name}" for name in names)]
    results = {
        name: to_host(x)
        for name, x in zip(labels, outputs if backward else [outputs], strict=False)
    }

    def device_seconds() -> float | None:
        if not cuda:
            return None
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for index in range(5):
            call(sets[index % count])
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / 5

    return Prepared(
        time=measure.make_timer(repeat),
        results=lambda: results,
        peak_bytes=peak,
        device_seconds=device_seconds,
    )


# --- scaled_dot_product_attention ------------------------------------------------------------


def _sdpa(backend: str | None, torch: Any, w: Workload, arrays: dict[str, Any]) -> Any:
    del arrays
    kernels = importlib.import_module("torch.nn.attention") if backend else None

    def attend(x: dict[str, Any]) -> Any:
        mask = x["mask"][:, None, None] if w.mask_prob else x.get("bias")
        backends = (
            contextlib.nullcontext()
            if kernels is None
            else kernels.sdpa_kernel(getattr(kernels.SDPBackend, backend or ""))
        )
        with backends:
            return torch.nn.functional.scaled_dot_product_attention(
                x["q"],
                x["k"],
                x["v"],
                attn_mask=mask,
                dropout_p=w.dropout,
                is_causal=w.causal,
                enable_gqa=w.key_heads != w.heads,
            )

    return attend


def _sdpa_why_not(backend: str | None, w: Workload, backward: bool) -> str | None:
    del backward
    if w.window is not None:
        return "it has no window but as a dense mask"
    if w.documents > 1:
        return "it has no segments but as a dense mask"
    if w.causal and w.mask_prob:
        return "it takes no mask beside causal"
    reason = _lacks(w, "grouped heads", "bias", "key mask", "dropout") or _why_unusable()
    if reason is not None:
        return reason
    if device() == "cpu" and backend in ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        return "it needs an NVIDIA GPU"
    if device() == "cpu" and backend == "MATH":
        room, logits = measure.available_bytes(), 4.0 * w.batch * w.heads * w.length * w.keys
        if room is not None and 4 * logits > 0.8 * room:
            return "oom"
    return None


# --- FlexAttention ---------------------------------------------------------------------------


def _flex(torch: Any, w: Workload, arrays: dict[str, Any]) -> Any:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    ids, keep, sides = arrays.get("segment_ids"), arrays.get("mask"), w.sides

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        del h
        seen = j >= 0
        if w.causal:
            seen = seen & (i >= j)
        if sides is not None:
            seen = seen & (i - j <= sides[0]) & (j - i <= sides[1])
        if ids is not None:
            seen = seen & (ids[b, i] == ids[b, j])
        if keep is not None:
            seen = seen & keep[b, j]
        return seen

    block_mask = None
    if w.causal or sides is not None or ids is not None or keep is not None:
        batch = w.batch if ids is not None or keep is not None else None
        sizes = batch, None, w.length, w.keys
        block_mask = flex.create_block_mask(mask_mod, *sizes, device=device())
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def attend(x: dict[str, Any]) -> Any:
        bias = x.get("bias")

        def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            del b
            if bias is not None:
                score = score + bias[0, h, i, j]
            return score if w.softcap is None else w.softcap * torch.tanh(score / w.softcap)

        changed = bias is not None or w.softcap is not None
        return compiled(
            x["q"],
            x["k"],
            x["v"],
            score_mod=score_mod if changed else None,
            block_mask=block_mask,
            enable_gqa=w.key_heads != w.heads,
        )

    return attend


def _flex_why_not(w: Workload, backward: bool) -> str | None:
    del backward
    able = ("grouped heads", "window", "softcap", "bias", "key mask", "segments")
    reason = _lacks(w, *able) or _why_unusable()
    return reason or ("it is measured on a GPU only" if device() == "cpu" else None)


# --- memory-efficient-attention-pytorch ------------------------------------------------------


def _memory_efficient_or_reason() -> tuple[Any, str | None]:
    where = str(INSTALLED / MEMORY_EFFICIENT)
    if where not in sys.path:
        sys.path.append(where)
    try:
        name = "memory_efficient_attention_pytorch.memory_efficient_attention"
        return importlib.import_module(name).memory_efficient_attention, None
    except ImportError:
        return None, f"{MEMORY_EFFICIENT} is not installed"


def _memory_efficient(torch: Any, w: Workload, arrays: dict[str, Any]) -> Any:
    del torch, arrays
    function = _memory_efficient_or_reason()[0]
    warnings.filterwarnings("ignore", message="torch.utils.checkpoint", category=UserWarning)

    def attend(x: dict[str, Any]) -> Any:
        bias = x["bias"][0] if w.bias else None
        return function(x["q"], x["k"], x["v"], mask=x.get("mask"), causal=w.causal, attn_bias=bias)

    return attend


def _memory_efficient_why_not(w: Workload, backward: bool) -> str | None:
    del backward
    return _lacks(w, "bias", "key mask") or _why_unusable() or _memory_efficient_or_reason()[1]


# --- the table -------------------------------------------------------------------------------


def _peer(name: str, why_not: Callable[[Workload, bool], str | None], attend: Attend) -> Peer:
    return Peer(name, why_not, functools.partial(prepare, attend))


PEERS = (
    *(
        _peer(name, functools.partial(_sdpa_why_not, backend), functools.partial(_sdpa, backend))
        for name, backend in BACKENDS.items()
    ),
    _peer("torch FlexAttention", _flex_why_not, _flex),
    _peer(MEMORY_EFFICIENT, _memory_efficient_why_not, _memory_efficient),
)
