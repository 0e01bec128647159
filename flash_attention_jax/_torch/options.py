"""What torch's users do differently: masks, dropout from torch's generator, and autocast.

The functions are compiled by JAX, where no values are known: masks are looked at here.
"""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false, reportPrivateImportUsage=false

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from flash_attention_jax._core import check
from flash_attention_jax._core.optional import needs
from flash_attention_jax._torch.read import values

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch

__all__ = ["autocast", "floating", "kept", "seeded"]

FLOATS = tuple(getattr(torch, name) for name in check.FLOATS)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in the dtype that `torch.autocast` asks for, where it is on; float64 stays."""
    kind = next((x.device.type for x in tensors if isinstance(x, torch.Tensor)), "cpu")
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return tensors
    dtype, lower = torch.get_autocast_dtype(kind), FLOATS[1:]
    return tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype in lower else x for x in tensors
    )


def floating(q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
    """Queries, keys and values, cast by autocast.

    Raises:
        TypeError: One that is no tensor, or array, of floats.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, (torch.Tensor, jax.Array, np.ndarray)):
            got, advice = type(x).__name__, "Wrap it in torch.as_tensor."
            check.fail(name, "be a tensor", got, advice, TypeError)
        if isinstance(x, torch.Tensor) and x.dtype not in FLOATS:
            requirement = f"have one of the dtypes {', '.join(check.FLOATS)}"
            advice = "Cast it with .to(torch.float32)."
            check.fail(name, requirement, str(x.dtype), advice, TypeError)
    q, k, v = autocast(q, k, v)
    return q, k, v


def kept(mask: Any) -> Any:
    """A mask as a boolean one: torch's integers have 64 bits, which JAX may not have.

    Raises:
        TypeError: Floats of zeros and ones, which as a bias would mask nothing.
        ValueError: Integers that are neither: ids, say.
    """
    if isinstance(mask, (list, tuple)):
        got, advice = type(mask).__name__, "Wrap it in torch.as_tensor."
        check.fail("mask", "be a tensor", got, advice, TypeError)
    mask = torch.as_tensor(mask) if isinstance(mask, np.ndarray) else mask
    if not isinstance(mask, torch.Tensor) or mask.dtype is torch.bool:
        return mask
    known = values(mask)
    strange = None if known is None else known[(known != 0) & (known != 1)]
    if mask.is_floating_point() or mask.is_complex():
        if strange is not None and not strange.numel():
            requirement = "be boolean or integer (nonzero = may attend)"
            got, advice = f"{mask.dtype} of zeros and ones", "Pass `mask != 0`."
            check.fail("mask", requirement, got, advice, TypeError)
        return mask
    if strange is not None and strange.numel():
        got = f"{mask.dtype} with {strange.flatten()[0].item()}"
        advice = "Pass `mask != 0` if nonzero = may attend, and ids as segment ids."
        check.fail("mask", "hold 0 and 1 if it is of integers", got, advice)
    return mask != 0


def seeded(options: dict[str, Any], q: Any) -> dict[str, Any]:
    """The options, with a key from torch's generator where dropout has none."""
    if not options.get("dropout_rate") or options.get("dropout_key") is not None:
        return options
    device = q.device if isinstance(q, torch.Tensor) else None
    words = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device)
    return {**options, "dropout_key": words.view(torch.uint32)}
