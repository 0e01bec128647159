"""Checks of user input: each rule once, in one wording, for every function and engine.

    `name` must <requirement>, got <what was received>. <What to do.>

Everything here reads shapes, dtypes and Python values. Values of arrays are looked at only where
they are small and already there (never under a trace).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from flash_attention_jax._core.call import Size, symbolic

FARTHEST = 2**30
"""The largest offset or window: sums of two of them are still int32."""

_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

FLOATS = ("float64", "float32", "bfloat16", "float16")
PRECISIONS = (
    "default",
    "high",
    "highest",
    "fastest",
    "bfloat16",
    "bfloat16_3x",
    "tensorfloat32",
    "float32",
)


def shown(value: Any) -> str:
    """How an error shows a value: an array by dtype and shape, anything else by its repr."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else '...'}"


def fail(
    name: str, requirement: str, got: str, advice: str, error: type[Exception] = ValueError
) -> NoReturn:
    """Raise in the house wording."""
    raise error(f"`{name}` must {requirement}, got {got}. {advice}".rstrip())


def array(name: str, x: Any, advice: str = "Wrap it in jnp.asarray.") -> None:
    """An array of JAX or NumPy, a tracer, or a jax.ShapeDtypeStruct."""
    known = isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
    if not (known or hasattr(x, "__jax_array__")):
        fail(name, "be an array", type(x).__name__, advice, TypeError)
    if isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted():
        advice = (
            "It was donated to a jitted function or deleted: pass what that returned, or a copy."
        )
        fail(name, "hold values", f"{shown(x)}, which is deleted", advice)


def dtype_name(x: Any) -> str:
    """The dtype that JAX gives this array here (float64 is float32 unless x64 is on)."""
    return str(jax.dtypes.canonicalize_dtype(x.dtype))


def floating(name: str, x: Any) -> None:
    """A float dtype that every engine knows."""
    array(name, x)
    if str(x.dtype) not in FLOATS:
        fail(
            name,
            f"have one of the dtypes {', '.join(FLOATS)}",
            str(x.dtype),
            f"Cast it: {name}.astype(...).",
            TypeError,
        )


def same_dtype(names: Sequence[str], arrays: Sequence[Any]) -> None:
    """q, k and v share one dtype."""
    dtypes = [dtype_name(x) for x in arrays]
    if len(set(dtypes)) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in zip(names, dtypes, strict=True))
        fail(
            f"{names[0]}`, `{names[1]}` and `{names[2]}",
            "share one dtype",
            listed,
            "Cast them to the same.",
            TypeError,
        )


def integer(name: str, x: Any) -> None:
    """An integer dtype."""
    array(name, x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        fail(
            name,
            "be of an integer dtype",
            str(x.dtype),
            f"Cast it: {name}.astype(jnp.int32).",
            TypeError,
        )


def boolean_or_integer(name: str, x: Any, additive: str) -> None:
    """A mask: boolean, or an integer of 1 = may attend and 0, as far as its values can be seen."""
    array(name, x)
    if x.dtype == bool:
        return
    values = concrete(x)
    marks = values is not None and np.isin(values, (0, 1)).all()
    if not jnp.issubdtype(x.dtype, jnp.integer):
        advice = f"Pass an additive mask as `{additive}`."
        if marks:
            advice = f"Pass {name} != 0 if 1 means may attend; an additive mask is `{additive}`."
        fail(name, "be boolean or integer (1 = may attend)", str(x.dtype), advice, TypeError)
    if values is not None and not marks:
        odd = values[~np.isin(values, (0, 1))].flat[0]
        advice = f"Pass {name} != 0, or ids as `q_segment_ids` and `kv_segment_ids`."
        fail(name, "hold 0 and 1 where it is of integers", str(odd), advice)


def rank(name: str, x: Any, ranks: Sequence[int], meaning: str, beside: str = "") -> None:
    """One of a few numbers of axes."""
    if len(x.shape) not in ranks:
        fail(name, f"have the axes {meaning}", f"shape {tuple(x.shape)}{beside}", "Reshape it.")


def agree(names: Sequence[str], what: str, arrays: Sequence[Any], advice: str) -> NoReturn:
    """Two arrays disagree in something."""
    listed = " and ".join(f"{name} {tuple(x.shape)}" for name, x in zip(names, arrays, strict=True))
    raise ValueError(f"`{names[0]}` and `{names[1]}` must agree in {what}, got {listed}. {advice}")


def broadcasts(name: str, x: Any, target: Sequence[Size], axes: str, advice: str) -> None:
    """Every axis is 1 or the full size, counted from the last."""
    shape = tuple(x.shape)
    if len(shape) > len(target) or any(
        size not in (1, full)
        for size, full in zip(reversed(shape), reversed(tuple(target)), strict=False)
    ):
        fail(name, f"broadcast to {axes} = {tuple(target)}", f"shape {shape}", advice)


def shape_is(
    name: str, x: Any, shapes: Iterable[tuple[Size, ...]], meaning: str, advice: str
) -> None:
    """One of a few shapes."""
    if tuple(x.shape) not in set(shapes):
        fail(name, f"have shape {meaning}", f"shape {tuple(x.shape)}", advice)


def number(
    name: str,
    x: Any,
    *,
    positive: bool = False,
    within: tuple[float, float] = (_LEAST, _MOST),
    why: str = "Logits are computed in float32.",
) -> float:
    """A finite Python or NumPy number: 0, or one whose magnitude is `within` a range.

    The range is that of float32's normal numbers, if no other is given, and `why` says why.
    """
    if isinstance(x, bool) or not isinstance(x, (int, float, np.integer, np.floating)):
        fail(
            name,
            "be a number known when the function is traced",
            shown(x),
            "Pass a Python float.",
            TypeError,
        )
    # An int may be too long for a float, and for an error to spell out.
    if not isinstance(x, (int, np.integer)) and not math.isfinite(x):
        fail(name, "be finite", repr(float(x)), "Look for where it was computed.")
    if positive and x <= 0:
        fail(name, "be positive", repr(x), "Use None for none.")
    if x and not within[0] <= abs(x) <= within[1]:
        requirement = f"be from {within[0]:.4g} to {within[1]:.4g} in magnitude"
        if not positive:
            requirement = f"be 0 or {requirement.removeprefix('be ')}"
        got = shown(x) if isinstance(x, int) else repr(float(x))
        fail(name, requirement, got, why)
    return float(x)


def softcap(name: str, x: Any) -> float:
    """A bound of the logits that keeps them: logits / softcap may neither vanish nor overflow."""
    why = "Beyond, the quotient of a logit and it leaves float32. Use None for none."
    return number(name, x, positive=True, within=(2.0**-100, 2.0**100), why=why)


def rate(name: str, x: Any) -> float:
    """A probability of dropping."""
    value = number(name, x)
    if not 0 <= value < 1:
        fail(name, "be in [0, 1)", repr(x), "It is the share of probabilities that are dropped.")
    return value


def flag(name: str, x: Any) -> bool:
    """A Python bool."""
    if not isinstance(x, (bool, np.bool_)):
        fail(name, "be True or False", shown(x), "It is static: pass a Python bool.", TypeError)
    return bool(x)


def whole(name: str, x: Any, *, least: int, advice: str = "") -> int:
    """A Python integer of at least `least`."""
    if isinstance(x, bool) or not isinstance(x, (int, np.integer)):
        fail(
            name,
            "be an integer known when the function is traced",
            shown(x),
            "Pass a Python int.",
            TypeError,
        )
    if x < least:
        fail(name, f"be at least {least}", repr(int(x)), advice)
    return int(x)


def choice(
    name: str, x: Any, known: Sequence[str], *, none: bool = False, advice: str = ""
) -> None:
    """One of a few names."""
    if (none and x is None) or (isinstance(x, str) and x in known):
        return
    listed = ", ".join(repr(item) for item in known) + (" or None" if none else "")
    close = difflib.get_close_matches(x.lower(), known, 1) if isinstance(x, str) else []
    hint = f"Did you mean {close[0]!r}?" if close else advice or "Pass one of these."
    got = repr(x) if x is None or isinstance(x, str) else shown(x)
    fail(name, f"be one of {listed}", got, hint)


def window(name: str, x: Any) -> tuple[int | None, int | None]:
    """An int w = (w, w), or (left, right); -1 or None = unbounded."""
    pair = (
        (x, x) if x is None or (isinstance(x, (int, np.integer)) and not isinstance(x, bool)) else x
    )
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        fail(
            name,
            "be an integer or a pair (left, right)",
            shown(x),
            "Use None or -1 for an unbounded side.",
            TypeError,
        )
    sides = []
    for side in pair:
        if side is None:
            sides.append(None)
            continue
        if isinstance(side, bool) or not isinstance(side, (int, np.integer)):
            fail(
                name,
                "hold integers or None",
                shown(side),
                "It is static: pass Python ints.",
                TypeError,
            )
        if side < -1:
            fail(name, "not be negative", repr(x), "Use None or -1 for an unbounded side.")
        if side > FARTHEST:
            fail(name, f"be at most {FARTHEST}", repr(x), "Use None or -1 for an unbounded side.")
        sides.append(None if side == -1 else int(side))
    return sides[0], sides[1]


def precision(name: str, x: Any) -> None:
    """What `jnp.einsum` takes."""
    algorithms = (jax.lax.DotAlgorithmPreset, jax.lax.DotAlgorithm)
    if x is None or isinstance(x, (jax.lax.Precision, *algorithms)):
        return
    if isinstance(x, str) and x in (*PRECISIONS, *jax.lax.DotAlgorithmPreset.__members__):
        return
    if isinstance(x, tuple) and len(x) == 2:
        texts = [isinstance(side, str) and side in PRECISIONS for side in x]
        if all(texts) or all(isinstance(side, jax.lax.Precision) for side in x):
            return
    fail(
        name,
        f"be None, a jax.lax.Precision, one of {', '.join(map(repr, PRECISIONS))}, "
        "a pair of these, or a jax.lax.DotAlgorithmPreset",
        repr(x) if isinstance(x, str) else shown(x),
        "None computes float32 in full float32.",
        ValueError if isinstance(x, str | tuple) else TypeError,
    )


def concrete(x: Any) -> np.ndarray | None:
    """The values of a small array that is there, None under a trace or for a ShapeDtypeStruct."""
    if isinstance(x, Tracer) or not isinstance(x, (np.ndarray, np.generic, jax.Array)):
        return None
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return None
    return np.asarray(x)


def fits_int32(name: str, x: Any, advice: str = "Number the segments from 0.") -> None:
    """Values that keep their meaning as int32, where they can be seen."""
    values = concrete(x) if x.dtype.itemsize > 4 else None
    if values is not None and values.size:
        worst = max(int(values.max()), -int(values.min()) - 1)
        if worst >= 2**31:
            fail(name, "fit int32", str(worst), advice)


def offset_within(name: str, x: Any) -> None:
    """An offset, or offsets, far from overflow, where they can be seen."""
    values = np.asarray(x, np.int64) if isinstance(x, int) else concrete(x)
    if values is None or not values.size:
        return
    worst = max(int(values.max()), -int(values.min()))
    if worst > FARTHEST:
        advice = "It is the number of keys before the first query."
        fail(name, f"be within +-{FARTHEST}", str(worst), advice)


def lengths_within(name: str, x: Any, limit: Size) -> None:
    """Lengths of 0 .. limit, where they can be seen."""
    values = concrete(x)
    limit = math.inf if symbolic(limit) else limit
    if values is not None and values.size and (values.min() < 0 or values.max() > limit):
        worst = int(values.max() if values.max() > limit else values.min())
        fail(
            name,
            f"be within 0 and the array's length {limit}",
            str(worst),
            "Lengths count tokens per sequence.",
        )


def finite(name: str, x: Any, *, or_less: bool = False) -> None:
    """Finite values, or with `or_less` -inf too, where they can be seen."""
    values = concrete(x)
    if values is None:
        return
    values = values.astype(np.float64)
    if not (np.isfinite(values) | (or_less & (values == -np.inf))).all():
        fail(name, "be finite", str(values.tolist()), "Look for where it was computed.")


def random_key(name: str, x: Any) -> None:
    """One JAX random key, new-style or raw."""
    array(name, x, "Pass jax.random.key(seed).")
    typed = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    raw = x.dtype == jnp.uint32 and x.shape in ((2,), (4,))
    if not (typed and x.shape == ()) and not raw:
        fail(name, "be one JAX random key", shown(x), "Pass jax.random.key(seed).", TypeError)
