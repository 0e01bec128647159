"""Why the Triton kernels decline a call: the machine, the call, or what is installed.

Whether jax-triton works with this jax and this triton is not read from a list of versions: a tiny
kernel is lowered once, and what comes of it is the answer.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from flash_attention_jax.kernels import hopper_support, triton_config

if TYPE_CHECKING:
    from flash_attention_jax._core.call import Call

INSTALL = "pip install 'flash-attention-jax[cuda13]'"


def why_not(call: Call) -> str | None:
    """Why the Triton kernels decline `call`, or None where they accept it."""
    return _wrong_machine(call) or _wrong_call(call) or _wrong_software(call)


def _wrong_machine(call: Call) -> str | None:
    if call.platform != "gpu":
        return (
            "it runs on NVIDIA GPUs of compute capability 8.0 and newer, "
            f"and this is traced for {call.platform}"
        )
    if call.capability is None:
        return (
            "it needs an NVIDIA GPU of compute capability 8.0 or newer, and this device's is "
            "unknown (ROCm is untested)"
        )
    if call.capability < triton_config.SMALLEST_CAPABILITY:
        found = "{}.{}".format(*call.capability)
        return f"it needs compute capability 8.0 (Ampere) or newer, and this device's is {found}"
    return None


def _wrong_call(call: Call) -> str | None:
    if call.dtype not in ("bfloat16", "float16", "float32"):
        return f"it computes in bfloat16, float16 and float32, and this call is {call.dtype}"
    if triton_config.input_precision(call) is None:
        return f"it has no way to multiply float32 with precision {call.precision!r}"
    return hopper_support.out_of_reach(call)


def _wrong_software(call: Call) -> str | None:
    if call.interpret:
        return _interpreter_why_not()
    major, minor = call.capability or triton_config.SMALLEST_CAPABILITY
    return _lowering_why_not(10 * major + minor)


def _interpreter_why_not() -> str | None:
    for name in ("triton", "torch"):
        if importlib.util.find_spec(name) is None:
            return f"its interpreter needs {name}, which is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "its interpreter needs TRITON_INTERPRET=1 in the environment from the start"
    return None


@functools.cache
def _lowering_why_not(capability: int) -> str | None:
    """What stands in the way of a kernel between here and the GPU's machine code."""
    for name, package in (("triton", "triton"), ("jax_triton", "jax-triton")):
        if importlib.util.find_spec(name) is None:
            return f"{package} is not installed: {INSTALL}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, under which nothing is compiled"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say of each other is not the user's
            _lower_a_kernel(capability)
    except Exception as error:  # noqa: BLE001 (whatever it is stands in the way)
        first = (str(error).splitlines() or [""])[0]
        return (
            f"jax-triton {_version('jax-triton')} does not lower a kernel with jax "
            f"{jax.__version__} and triton {_version('triton')}: {type(error).__name__}: {first}"
        )
    return None


def _version(package: str) -> str:
    return importlib.import_module("importlib.metadata").version(package)


def _lower_a_kernel(capability: int) -> None:
    jax_triton = importlib.import_module("jax_triton")
    probe = importlib.import_module("flash_attention_jax.kernels.triton_probe")

    def double(x: jax.Array) -> jax.Array:
        return jax_triton.triton_call(
            x,
            kernel=probe.triton_double,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(1,),
            compute_capability=capability,
            SIZE=16,
        )

    x = jax.ShapeDtypeStruct((16,), jnp.float32)
    jax.jit(double).trace(x).lower(lowering_platforms=("cuda",))
