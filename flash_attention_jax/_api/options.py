"""The options of the public functions: their types for signatures, and JAX's names for them."""

from __future__ import annotations

from typing import Any, TypedDict


class CommonOptions(TypedDict, total=False):
    """Keyword-only options that every heads-first function has, as `flash_attention` says."""

    window: int | tuple[int | None, int | None] | None
    q_offset: Any
    q_segment_ids: Any
    kv_segment_ids: Any
    q_lengths: Any
    kv_lengths: Any
    softcap: float | None
    sinks: Any
    alibi_slopes: Any
    relative_bias: Any
    dropout_rate: float
    dropout_key: Any
    return_lse: bool
    block_q: int | None
    block_kv: int | None
    implementation: str | None
    differentiation: str
    precision: Any
    deterministic_backward: bool


class ScaleOptions(CommonOptions, total=False):
    """Those, and the scale: for functions that name bias and causal in their signature."""

    scale: Any


class Options(ScaleOptions, total=False):
    """All of them: for functions that name none in their signature."""

    bias: Any
    causal: bool


JAX_NAMES = {
    "q": "query",
    "k": "key",
    "v": "value",
    "causal": "is_causal",
    "window": "local_window_size",
    "softcap": "logits_soft_cap",
    "q_lengths": "query_seq_lengths",
    "kv_lengths": "key_value_seq_lengths",
    "return_lse": "return_residual",
}
"""What `dot_product_attention` calls the options; the rest has one name in both families."""
