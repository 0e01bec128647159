"""What torch's users pass differently: integer masks of 64 bits, and dropout without a key."""

# Where torch is not installed, pyright takes torch.py of this folder for it.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from flash_attention_jax._optional import needs

with needs("flash_attention_jax.torch", "torch", extra="torch"):
    import torch

__all__ = ["kept", "seeded"]


def kept(mask: Any) -> Any:
    """An integer mask as a boolean one: torch's integers have 64 bits, which JAX may not have."""
    if not isinstance(mask, torch.Tensor) or mask.is_floating_point() or mask.is_complex():
        return mask
    return mask if mask.dtype is torch.bool else mask != 0


def seeded(options: dict[str, Any], q: Any) -> dict[str, Any]:
    """The options, with a key from torch's generator where dropout has none."""
    if not options.get("dropout_rate") or options.get("dropout_key") is not None:
        return options
    device = q.device if isinstance(q, torch.Tensor) else None
    words = torch.randint(-(2**31), 2**31, (2,), dtype=torch.int32, device=device)
    return {**options, "dropout_key": words.view(torch.uint32)}
