"""Why a Hopper kernel declines a call, from static facts; and what declines in every backend.

Nothing here imports Pallas or Triton before a call has passed every check that needs neither.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

import jax

from flash_attention_jax._core.platform import HOPPER
from flash_attention_jax.kernels.hopper_config import LARGEST_DIM

if TYPE_CHECKING:
    from flash_attention_jax._core.call import Call


def interpreter(call: Call) -> Any:
    """Parameters of the kernels' interpreter for a call, None where they are compiled."""
    if not call.interpret:
        return None
    plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    return plgpu.InterpretGPUParams(detect_races=True)


def why_not(call: Call) -> str | None:
    """Why the Hopper kernels decline `call`, or None where they accept it."""
    return _wrong_machine(call) or _wrong_call(call) or _wrong_software(call)


def _wrong_machine(call: Call) -> str | None:
    if call.platform != "gpu":
        return f"it runs on NVIDIA Hopper GPUs, and this is traced for {call.platform}"
    if call.capability != HOPPER:
        found = "unknown" if call.capability is None else "{}.{}".format(*call.capability)
        return f"it needs compute capability 9.0 (H100, H200), and this device's is {found}"
    return None


def _wrong_call(call: Call) -> str | None:
    if call.dtype not in ("bfloat16", "float16"):
        return f"it computes in bfloat16 and float16, and this call is {call.dtype}"
    if call.has("relative_bias"):
        return "it does not add a `relative_bias` yet: give it as a `bias`, or let another run it"
    return out_of_reach(call)


def out_of_reach(call: Call) -> str | None:
    """Why no kernel takes `call`, of whatever backend, or None."""
    if call.differentiation == "any":
        return "its custom rule has no forward mode (differentiation='any')"
    for name, size in call.symbols.items():
        return f"its grid needs numbers, and {name} is symbolic ({size})"
    if 0 in (call.batch, call.q_len, call.k_len, call.heads):
        return "there is nothing to compute: an axis has size 0"
    for name, size in (("head dimension", call.dim), ("v's dimension", call.v_dim)):
        if size > LARGEST_DIM:
            return f"{name} {size} is over {LARGEST_DIM}"
    if call.block_q is not None or call.block_kv is not None:
        return "its tile sizes are its own: leave `block_q` and `block_kv` out"
    return None


def _wrong_software(call: Call) -> str | None:
    reason = _pallas_why_not(call.interpret)
    if reason is None and call.banded and not call.interpret:
        reason = _runtime_why_not(_cuda_runtime())
    return reason


PACKAGES = {"absl": "absl-py"}  # those whose name is not their module's
# What the kernels use of Pallas; the interpreter came later than the rest.
_NEEDED = ("kernel", "wgmma", "copy_gmem_to_smem", "set_max_registers", "layout_cast", "Barrier")


@functools.cache
def _pallas_why_not(interpret: bool) -> str | None:
    try:
        plgpu = importlib.import_module("jax.experimental.pallas.mosaic_gpu")
    except ModuleNotFoundError as error:
        package = PACKAGES.get(error.name or "", error.name)
        return (
            f"Pallas for Mosaic GPU of jax {jax.__version__} needs the module {error.name}, which "
            f"is not installed: pip install {package}"
        )
    except Exception as error:  # noqa: BLE001 (a broken install must not break the import of ours)
        return f"Pallas for Mosaic GPU does not import with jax {jax.__version__}: {error}"
    missing = [name for name in _NEEDED if not hasattr(plgpu, name)]
    if missing:
        return f"Pallas of jax {jax.__version__} lacks {', '.join(missing)}"
    if interpret and not hasattr(plgpu, "InterpretGPUParams"):
        return f"the interpreter of its kernels needs jax 0.11, and this is jax {jax.__version__}"
    return None


def _cuda_runtime() -> int | None:
    """The version of the CUDA runtime, 12090 for 12.9, None where it cannot be asked."""
    try:
        versions = importlib.import_module("jax._src.lib").cuda_versions
        return None if versions is None else int(versions.cuda_runtime_get_version())
    except Exception:  # noqa: BLE001 (jax's internals may move; then the check is skipped)
        return None


def _runtime_why_not(version: int | None) -> str | None:
    if version is not None and 12080 <= version < 12091:
        text = f"{version // 1000}.{version % 1000 // 10}.{version % 10}"
        return (
            f"CUDA {text} compiles a masked kernel wrongly (ptxas of 12.8.0 to 12.9.0): "
            "install CUDA 12.9.1 or newer"
        )
    return None
