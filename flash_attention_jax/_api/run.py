"""From a public function to its implementation: read, choose, run."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from typing import Any, get_type_hints

import jax
import numpy as np

from flash_attention_jax._api import compilations, read
from flash_attention_jax._api.options import Options
from flash_attention_jax._core import check
from flash_attention_jax._core.call import Call
from flash_attention_jax._engines import dispatch, partition


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(call: Call, implementation: str, given: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Run one call; traced once per record."""
    compilations.compiled(call)
    return partition.attend(dispatch.named(implementation), call, read.arrays(call, given))


FOREIGN = {
    "attn_bias": "bias",
    "attn_mask": "mask",
    "dropout": "dropout_rate",
    "dropout_p": "dropout_rate",
    "dropout_rng": "dropout_key",
    "is_causal": "causal",
    "key_mask": "mask",
    "key_value_seq_lengths": "kv_lengths",
    "local_window_size": "window",
    "logits_soft_cap": "softcap",
    "query_seq_lengths": "q_lengths",
    "return_residual": "return_lse",
    "sm_scale": "scale",
    "softmax_scale": "scale",
    "window_size": "window",
}
"""What other libraries call the options: an error suggests what the option is called here."""


HINTS = {
    "block_mask": "Pass `mask`, `causal`, `window`, lengths or segment ids; blocks follow.",
    "key_padding_mask": "Pass ~key_padding_mask as `mask`: True = may attend, where torch hides.",
    "mask_mod": "Pass `mask`, `causal`, `window`, lengths or segment ids.",
    "score_mod": "Pass what it adds as `bias`, `alibi_slopes` or `relative_bias`; `softcap`.",
    "segment_ids": "Pass `q_segment_ids` and `kv_segment_ids`, for self-attention the same twice.",
}
"""What to do instead of an option of other libraries that none here stands for alone."""


COSINE = ("similarity", "groups", "l2norm_qk")
"""Arguments of the functions by cosine similarity and of `dot_product_attention`."""


def check_names(function: str, options: dict[str, Any], names: dict[str, str]) -> None:
    """Refuse options that the function does not have, with the name that may be meant."""
    own = {name: names.get(name, name) for name in get_type_hints(Options)}
    for name in options:
        if name in own.values():
            continue
        meant = FOREIGN.get(name, name)
        close = difflib.get_close_matches(own.get(meant, meant), [*own.values(), "mask"], 1)
        if name in HINTS:
            hint = HINTS[name]
        elif close:
            hint = f"Did you mean `{close[0]}`?"
        elif name in COSINE:
            hint = "`flash_cosine_sim_attention` is by cosine similarity."
        else:
            hint = f"Known: {', '.join(own.values())}."
        raise TypeError(f"`{function}` got an unexpected keyword argument {name!r}. {hint}")


def check_implementation(name: Any) -> None:
    advice = "Use None to let the library choose."
    if name == "xla":
        advice = "What jax.nn calls 'xla' is 'dense' here; None lets the library choose."
    elif name == "cudnn":
        advice = "cuDNN is jax.nn's; None lets the library choose its own fastest kernel."
    check.choice("implementation", name, dispatch.NAMES, none=True, advice=advice)


def _attend(reading: read.Reading, implementation: str | None, return_lse: bool) -> Any:
    check_implementation(implementation)
    chosen = dispatch.choose(reading.call, implementation)
    call, given = _with_offset_as_array(reading, chosen)
    with compilations.counted(given["q"]):
        out, lse = _run(call, chosen.name, given)
    out = out.reshape(reading.out_shape)
    return (out, lse.reshape(reading.lse_shape)) if return_lse else out


def _with_offset_as_array(
    reading: read.Reading, engine: dispatch.Engine
) -> tuple[Call, dict[str, Any]]:
    """The call with an offset that the user gave as an array, so that another needs no compiling.

    Kernels keep it: what they read of it is computed when they are traced.
    """
    call, given = reading.call, reading.given
    if not reading.offset_given or engine.kernel:
        return call, given
    terms = (*call.terms, ("q_offset", (1, 1), "int32"))
    offset = np.full((1, 1), call.offset, np.int32)
    return dataclasses.replace(call, offset=0, terms=terms), {**given, "q_offset": offset}


def run(
    function: str,
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    options: dict[str, Any],
    *,
    default: str | None = None,
    **fixed: Any,
) -> Any:
    """Run a function; the options have `Options`' names, and `fixed` goes to `_api.read.read`."""
    names = fixed.get("names") or {}
    check_names(function, options, {})
    reading = read.read(q, k, v, mask, options, **fixed)
    for name, x in reading.given.items():
        if isinstance(x, jax.ShapeDtypeStruct):
            advice = "`explain` and `jax.eval_shape` take shapes alone."
            got = type(x).__name__
            check.fail(names.get(name, name), "hold values", got, advice, TypeError)
    return_lse = check.flag(names.get("return_lse", "return_lse"), options.get("return_lse", False))
    implementation = options.get("implementation")
    return _attend(reading, default if implementation is None else implementation, return_lse)


def force_causal(function: str, options: Any) -> dict[str, Any]:
    """The options of a function that is causal by its name."""
    if not check.flag("causal", options.get("causal", True)):
        advice = f"Use `{function.replace('causal_', '')}`."
        check.fail("causal", f"be True in `{function}`", "False", advice)
    return {**options, "causal": True}
