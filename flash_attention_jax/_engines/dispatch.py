"""The choice of an engine when the function is traced, and why no other was chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flash_attention_jax._core.call import Arrays, Call
from flash_attention_jax._core.results import Results
from flash_attention_jax._engines import blocked, blocked_backward, checkpointed, dense
from flash_attention_jax._engines.recomputed import recomputing
from flash_attention_jax.kernels import hopper_support, triton_support

Attend = Callable[[Call, Arrays], Results]


def _hopper(call: Call, arrays: Arrays) -> Results:
    """The kernels, imported when a call first runs on them; blocked nests their derivatives."""
    from flash_attention_jax.kernels import hopper_attention

    return hopper_attention.attend(blocked.attend, call, arrays)


def _triton(call: Call, arrays: Arrays) -> Results:
    from flash_attention_jax.kernels import triton_attention

    return triton_attention.attend(blocked.attend, call, arrays)


@dataclasses.dataclass(frozen=True)
class Engine:
    """One way to run a call.

    Attributes:
        name: What the user writes as `implementation`.
        why_not: Why it cannot run a call, or None.
        attend: Runs it: (call, arrays) -> `Results`, with out in the call's dtype.
        gradients: (call, floats, others, results, (dout, dlse)) -> the shares of a call in the
            gradients where results and cotangents are those of a larger call that it is a part of;
            None = JAX differentiates `attend`.
        unrounded: As `attend`, for a part, on arrays that are normalised already and with out in
            the accumulator's dtype; None = it is `attend` that computes parts.
        chosen: Whether it is taken without being named.
        forward_mode: Whether `jax.jvp` differentiates it: it has no rule of its own.
        kernel: Whether it is one of a GPU, which gains from numbers that are known when traced.
    """

    name: str
    why_not: Callable[[Call], str | None]
    attend: Attend
    gradients: Callable[..., dict[str, Any]] | None = None
    unrounded: Attend | None = None
    chosen: bool = True
    forward_mode: bool = False
    kernel: bool = False

    @property
    def normalised(self) -> bool:
        """Whether parts want q and k as the product does."""
        return self.unrounded is not None

    @property
    def of_part(self) -> Attend:
        """Runs a part of a larger call."""
        return self.unrounded or self.attend


TABLE = (
    # Fastest first: the first that does not decline is taken.
    Engine(
        "hopper",
        hopper_support.why_not,
        _hopper,
        gradients=recomputing(_hopper),
        kernel=True,
    ),
    Engine("triton", triton_support.why_not, _triton, gradients=recomputing(_triton), kernel=True),
    # O(n) memory everywhere, reverse mode to any order.
    Engine(
        "blocked",
        blocked.why_not,
        blocked.attend,
        gradients=blocked_backward.gradients,
        unrounded=blocked.unrounded,
    ),
    # Every mode of differentiation, about twice the work backward.
    Engine("checkpointed", checkpointed.why_not, checkpointed.attend, forward_mode=True),
    # O(T * S) memory: the oracle, chosen unasked only where a length is symbolic.
    Engine("dense", dense.why_not, dense.attend, chosen=False, forward_mode=True),
)

NAMES = tuple(entry.name for entry in TABLE)


def choose(call: Call, name: str | None) -> Engine:
    """The engine for a call: the one named, or the first that does not decline.

    Raises:
        NotImplementedError: If the one named declines.
    """
    if name is None:
        unasked = (entry for entry in TABLE if entry.chosen or call.symbolic_length)
        return next(entry for entry in unasked if entry.why_not(call) is None)
    entry = named(name)
    reason = entry.why_not(call)
    if reason is not None:
        raise NotImplementedError(
            f"implementation={name!r} declines this call: {reason}. "
            "Use implementation=None to let the library choose."
        )
    return entry


def named(name: str) -> Engine:
    """The engine of that name."""
    return next(entry for entry in TABLE if entry.name == name)


NO_FORWARD_MODE = "can't apply forward-mode autodiff (jvp) to a custom_vjp function."
"""What JAX says, and nobody can catch, where forward mode meets a rule of reverse mode alone."""


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What would run a call, and why nothing else would.

    Attributes:
        forward: Name of the engine of the forward pass.
        backward: Name of that of the backward pass; the two are chosen together.
        platform: What the choice was made for: "cpu", "gpu" or "tpu", with the compute capability.
        reasons: For each other engine, why it was not chosen.
        call: The call's static record.
    """

    forward: str
    backward: str
    platform: str
    reasons: dict[str, str]
    call: Any = dataclasses.field(repr=False)

    def __str__(self) -> str:
        """The choice and the reasons, a line each."""
        lines = [
            f"forward:  {self.forward}",
            f"backward: {self.backward}",
            f"platform: {self.platform}",
        ]
        if not named(self.forward).forward_mode:
            lines.append(f"jvp:      JAX {NO_FORWARD_MODE!r}; pass differentiation='any'")
        width = max(map(len, self.reasons))
        return "\n".join(
            lines + [f"not {name:<{width}}  {reason}" for name, reason in self.reasons.items()]
        )


def explanation(call: Call, name: str | None) -> Explanation:
    """Explain the choice for a call."""
    taken = choose(call, name)
    reasons = {}
    for entry in TABLE:
        if entry is taken:
            continue
        reason = entry.why_not(call)
        if reason is None and name is not None:
            reason = f"implementation={name!r} was asked for"
        elif reason is None and not entry.chosen:
            reason = "never chosen unless named: its memory grows with q_len * k_len"
        elif reason is None:
            reason = f"{taken.name} comes first"
        reasons[entry.name] = reason
    where = (
        call.platform
        if call.capability is None
        else f"{call.platform} sm_{call.capability[0]}{call.capability[1]}"
    )
    return Explanation(taken.name, taken.name, where, reasons, call)
