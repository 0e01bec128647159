"""Why a kernel declines a call: the answers that the choice of implementation is made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash_attention_jax._call import Call


def hopper_why_not(call: Call) -> str | None:
    """Why the Hopper kernels decline `call`, or None where they accept it."""
    del call  # There is nothing yet that a call's facts could change.
    return _not_written("Hopper")


def triton_why_not(call: Call) -> str | None:
    """Why the Triton kernels decline `call`, or None where they accept it."""
    del call
    return _not_written("Triton")


def _not_written(kernels: str) -> str:
    return f"the {kernels} kernels are not written yet in this version"
