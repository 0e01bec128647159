"""One table of bad calls: each is refused in full words, by the same words in every engine.

`name` must <requirement>, got <what was received>. <What to do.>
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flash_attention_jax as f
from flash_attention_jax._core import check
from flash_attention_jax._engines.dispatch import NO_FORWARD_MODE
from flash_attention_jax._flax.attention_fn import attention_fn, make_attention_fn
from flash_attention_jax.varlen import flash_attention_varlen

F32, I32 = np.float32, np.int32
ENGINES = ("dense", "blocked", "checkpointed")


def a(*shape: int, dtype=F32) -> np.ndarray:
    """An array of ones; NumPy's, so that a table of hundreds costs nothing to import."""
    return np.ones(shape, dtype)


# Heads first: batch 2, 4 heads, length 6, dimension 8; the same merged and alone; heads last.
q = k = v = a(2, 4, 6, 8)
q3, q2 = a(2, 6, 8), a(6, 8)
query = key = value = a(2, 6, 4, 8)
ids, three = a(2, 6, dtype=I32), a(3, dtype=I32)
starts = np.array([0, 4, 6], I32)

FLOATS = "have one of the dtypes float64, float32, bfloat16, float16"
NAMES = "'hopper', 'triton', 'blocked', 'checkpointed', 'dense' or None"
FEWER = "An axis may be 1; see the docstring for fewer axes."
GROUPED = "Query head n reads key head n // (heads // key heads)."
STATIC = "It is static: pass a Python bool."
UNBOUNDED = "Use None or -1 for an unbounded side."
WITHIN = "be 0 or from 1.175e-38 to 3.403e+38 in magnitude"
IN_FLOAT32 = "Logits are computed in float32."
CAPS = "be from 7.889e-31 to 1.268e+30 in magnitude"
QUOTIENT = "Beyond, the quotient of a logit and it leaves float32. Use None for none."
PER_TOKEN = "Pass one id per token; those that all batch entries share are ids[None]."
LENGTHS = "Lengths count tokens per sequence."
KEY = "Pass jax.random.key(seed)."
SHARE = "It is the share of probabilities that are dropped."
TRACED_NUMBER = "be a number known when the function is traced"
PRECISION = (
    "`precision` must be None, a jax.lax.Precision, one of 'default', 'high', 'highest', "
    "'fastest', 'bfloat16', 'bfloat16_3x', 'tensorfloat32', 'float32', a pair of these, or a "
    "jax.lax.DotAlgorithmPreset, got {}. None computes float32 in full float32."
)
KNOWN = (
    "Known: window, q_offset, q_segment_ids, kv_segment_ids, q_lengths, kv_lengths, softcap, "
    "sinks, alibi_slopes, relative_bias, dropout_rate, dropout_key, return_lse, {}, {}, "
    "implementation, differentiation, precision, deterministic_backward, scale, {}, causal."
)

# What is wrong -> (function, positional arguments, keyword arguments, error, its full text).
flash = f.flash_attention
cosine = f.flash_cosine_sim_attention
efficient = f.memory_efficient_attention
jaxs = f.dot_product_attention

Q, K, V, N = (q, k, v), (q2, q2, q2), (q3, q3, q3), (query, key, value)
HEADS_FIRST = {
    "list instead of an array": (
        (flash, ([[1.0]], q2, q2), {}),
        TypeError,
        "`q` must be an array, got list. Wrap it in jnp.asarray.",
    ),
    "key forgotten": (
        (flash, (q, None, v), {}),
        TypeError,
        "`k` must be an array, got NoneType. Wrap it in jnp.asarray.",
    ),
    "one axis": (
        (flash, (a(8), a(8), a(8)), {}),
        ValueError,
        "`q` must have the axes (n, d), (bh, n, d) or (b, h, n, d), got shape (8,). Reshape it.",
    ),
    "five axes": (
        (flash, (a(1, 1, 1, 6, 8), k, v), {}),
        ValueError,
        "`q` must have the axes (n, d), (bh, n, d) or (b, h, n, d), got shape (1, 1, 1, 6, 8). "
        "Reshape it.",
    ),
    "keys of two axes beside four": (
        (flash, (q, q2, q2), {}),
        ValueError,
        "`k` must have the axes of `q`, (b, h, n, d), or (b, n, d) for a single head, got shape "
        "(6, 8) beside q (2, 4, 6, 8). Reshape it.",
    ),
    "values of four axes beside three": (
        (flash, (q3, q3, v), {}),
        ValueError,
        "`v` must have the axes of `q`, (bh, n, d), got shape (2, 4, 6, 8) beside q (2, 6, 8). "
        "Reshape it.",
    ),
    "keys of three axes beside two": (
        (flash, (q2, q3, q3), {}),
        ValueError,
        "`k` must have the axes of `q`, (n, d), got shape (2, 6, 8) beside q (6, 8). Reshape it.",
    ),
    "lengths of keys and values": (
        (flash, (q, k, a(2, 4, 7, 8)), {}),
        ValueError,
        "`k` and `v` must agree in batch, heads and length, got k (2, 4, 6, 8) and "
        "v (2, 4, 7, 8). Only the dimension may differ.",
    ),
    "dimensions of queries and keys": (
        (flash, (q, a(2, 4, 6, 16), a(2, 4, 6, 16)), {}),
        ValueError,
        "`q` and `k` must agree in the dimension (last axis), got q (2, 4, 6, 8) and "
        "k (2, 4, 6, 16). Project them to the same.",
    ),
    "batch": (
        (flash, (q, a(3, 4, 6, 8), a(3, 4, 6, 8)), {}),
        ValueError,
        "`q` and `k` must agree in batch (first axis), got q (2, 4, 6, 8) and k (3, 4, 6, 8). "
        "Repeat or reshape one.",
    ),
    "merged batch and heads": (
        (flash, (a(8, 6, 8), q3, q3), {}),
        ValueError,
        "`q` and `k` must agree in batch (first axis), got q (8, 6, 8) and k (2, 6, 8). "
        "Repeat or reshape one.",
    ),
    "heads that don't divide": (
        (flash, (a(2, 6, 6, 8), k, v), {}),
        ValueError,
        f"`q` must have a multiple of the heads of `k`, got 6 heads and 4 key heads. {GROUPED}",
    ),
    "more key heads than heads": (
        (flash, (a(2, 2, 6, 8), k, v), {}),
        ValueError,
        f"`q` must have a multiple of the heads of `k`, got 2 heads and 4 key heads. {GROUPED}",
    ),
    "no heads": (
        (flash, (q, a(2, 0, 6, 8), a(2, 0, 6, 8)), {}),
        ValueError,
        "`k` must have at least 1 head, got shape (2, 0, 6, 8). Reshape it.",
    ),
    "no dimension": (
        (flash, (a(2, 4, 6, 0), a(2, 4, 6, 0), v), {}),
        ValueError,
        "`q` must have a dimension of at least 1, got shape (2, 4, 6, 0). Reshape it.",
    ),
    "mixed dtypes": (
        (flash, (q, k.astype(np.float16), v), {}),
        TypeError,
        "`q`, `k` and `v` must share one dtype, got q float32, k float16, v float32. "
        "Cast them to the same.",
    ),
    "integer queries": (
        (flash, (a(2, 4, 6, 8, dtype=I32), k, v), {}),
        TypeError,
        f"`q` must {FLOATS}, got int32. Cast it: q.astype(...).",
    ),
    "complex values": (
        (flash, (q, k, a(2, 4, 6, 8, dtype=np.complex64)), {}),
        TypeError,
        f"`v` must {FLOATS}, got complex64. Cast it: v.astype(...).",
    ),
    "shape without values": (
        (flash, (jax.ShapeDtypeStruct((2, 4, 6, 8), F32), k, v), {}),
        TypeError,
        "`q` must hold values, got ShapeDtypeStruct. `explain` and `jax.eval_shape` take shapes "
        "alone.",
    ),
    "causal twice over": (
        (f.causal_flash_attention, Q, {"causal": False}),
        ValueError,
        "`causal` must be True in `causal_flash_attention`, got False. Use `flash_attention`.",
    ),
    "causal twice over, by cosine": (
        (f.causal_cosine_sim_flash_attention, Q, {"causal": False}),
        ValueError,
        "`causal` must be True in `causal_cosine_sim_flash_attention`, got False. "
        "Use `cosine_sim_flash_attention`.",
    ),
    "causal twice over, in the oracle": (
        (f.causal_attention, Q, {"causal": False}),
        ValueError,
        "`causal` must be True in `causal_attention`, got False. Use `attention`.",
    ),
}

MASKS = {
    "mask of floats": (
        (flash, (*Q, a(2, 6) - 3), {}),
        TypeError,
        "`mask` must be boolean or integer (1 = may attend), got float32. "
        "Pass an additive mask as `bias`.",
    ),
    "mask of floats that are 0 and 1": (
        (flash, (*Q, np.eye(2, 6, dtype=F32)), {}),
        TypeError,
        "`mask` must be boolean or integer (1 = may attend), got float32. "
        "Pass mask != 0 if 1 means may attend; an additive mask is `bias`.",
    ),
    "ids as a mask": (
        (flash, (*Q, np.arange(12, dtype=I32).reshape(2, 6)), {}),
        ValueError,
        "`mask` must hold 0 and 1 where it is of integers, got 2. "
        "Pass mask != 0, or ids as `q_segment_ids` and `kv_segment_ids`.",
    ),
    "mask without axes": (
        (flash, (*Q, np.array(True)), {}),
        ValueError,
        "`mask` must have the axes (b, j), or three or four that broadcast to (b, h, i, j), got "
        "shape ().",
    ),
    "mask of one axis beside four": (
        (flash, (*Q, a(6, dtype=bool)), {}),
        ValueError,
        "`mask` must have the axes (b, j), or three or four that broadcast to (b, h, i, j), got "
        "shape (6,). For all of the batch pass mask[None].",
    ),
    "mask without axes in JAX's convention": (
        (jaxs, N, {"mask": np.array(True)}),
        ValueError,
        "`mask` must have the axes (b, h, i, j), got shape ().",
    ),
    "mask of one axis beside merged heads": (
        (flash, (q3, q3, q3, a(6, dtype=bool)), {}),
        ValueError,
        "`mask` must have the axes (bh, j) or (bh, i, j), got shape (6,).",
    ),
    "mask of floats where the bias is attn_bias": (
        (cosine, (*Q, a(2, 6) / 2), {}),
        TypeError,
        "`mask` must be boolean or integer (1 = may attend), got float32. "
        "Pass an additive mask as `attn_bias`.",
    ),
    "mask as a list": (
        (flash, (*Q, [True] * 6), {}),
        TypeError,
        "`mask` must be an array, got list. Wrap it in jnp.asarray.",
    ),
    "mask as a bool": (
        (flash, (*Q, True), {}),
        TypeError,
        "`mask` must be an array, got bool. Wrap it in jnp.asarray.",
    ),
    "mask of another length": (
        (flash, (*Q, a(2, 7, dtype=bool)), {}),
        ValueError,
        f"`mask` must broadcast to (b, j) = (2, 6), got shape (2, 7). {FEWER}",
    ),
    "mask of another batch": (
        (flash, (*Q, a(3, 6, dtype=bool)), {}),
        ValueError,
        f"`mask` must broadcast to (b, j) = (2, 6), got shape (3, 6). {FEWER}",
    ),
    "mask of queries and keys without the axes before": (
        (flash, (a(2, 4, 5, 8), k, v, a(5, 6, dtype=bool)), {}),
        ValueError,
        "`mask` must broadcast to (b, j) = (2, 6), got shape (5, 6). "
        "One for every batch entry is mask[None, None].",
    ),
    "mask per batch entry without the axis of the heads": (
        (flash, (*Q, a(2, 6, 6, dtype=bool)), {}),
        ValueError,
        "`mask` must broadcast to (b, h, i, j) = (2, 4, 6, 6), got shape (2, 6, 6). "
        "One per batch entry is mask[:, None].",
    ),
    "mask of five axes": (
        (flash, (*Q, a(1, 2, 4, 6, 6, dtype=bool)), {}),
        ValueError,
        f"`mask` must broadcast to (b, h, i, j) = (2, 4, 6, 6), got shape (1, 2, 4, 6, 6). {FEWER}",
    ),
    "mask beside merged inputs": (
        (flash, (*V, a(3, 6, dtype=bool)), {}),
        ValueError,
        f"`mask` must broadcast to (bh, j) = (2, 6), got shape (3, 6). {FEWER}",
    ),
    "mask of queries and keys beside merged inputs": (
        (flash, (a(2, 5, 8), q3, q3, a(5, 6, dtype=bool)), {}),
        ValueError,
        "`mask` must broadcast to (bh, j) = (2, 6), got shape (5, 6). "
        "One for every batch entry is mask[None].",
    ),
    "mask beside two axes": (
        (flash, (*K, a(1, 6, 6, dtype=bool)), {}),
        ValueError,
        f"`mask` must broadcast to (j,) or (i, j) = (6, 6), got shape (1, 6, 6). {FEWER}",
    ),
    "bias that is a mask": (
        (flash, Q, {"bias": a(6, 6, dtype=bool)}),
        TypeError,
        "`bias` must be of a float dtype, got bool. Pass a boolean mask as `mask`.",
    ),
    "bias of integers": (
        (flash, Q, {"bias": a(6, 6, dtype=I32)}),
        TypeError,
        f"`bias` must {FLOATS}, got int32. Cast it: bias.astype(...).",
    ),
    "bias of another length": (
        (flash, Q, {"bias": a(6, 7)}),
        ValueError,
        f"`bias` must broadcast to (b, h, i, j) = (2, 4, 6, 6), got shape (6, 7). {FEWER}",
    ),
    "bias of another batch": (
        (flash, Q, {"bias": a(3, 4, 6, 6)}),
        ValueError,
        f"`bias` must broadcast to (b, h, i, j) = (2, 4, 6, 6), got shape (3, 4, 6, 6). {FEWER}",
    ),
    "bias as a number": (
        (flash, Q, {"bias": 1.0}),
        TypeError,
        "`bias` must be an array, got float. Wrap it in jnp.asarray.",
    ),
    "bias beside merged inputs": (
        (flash, V, {"bias": a(1, 2, 6, 6)}),
        ValueError,
        "`bias` must broadcast to (bh, i, j) or (i, j) = (2, 6, 6), got shape (1, 2, 6, 6). "
        f"{FEWER}",
    ),
    "bias per batch entry without its flag": (
        (cosine, (*Q, None, a(2, 6, 6)), {}),
        ValueError,
        "`attn_bias` must broadcast to (b, h, i, j) = (2, 4, 6, 6), got shape (2, 6, 6). "
        "One per batch entry is attn_bias[:, None].",
    ),
    "bias per head with the flag of the batch": (
        (cosine, (*Q, None, a(4, 6, 6)), {"attn_bias_batch_dim": True}),
        ValueError,
        f"`attn_bias` must broadcast to (b, i, j) = (2, 6, 6), got shape (4, 6, 6). {FEWER}",
    ),
    "flag of the batch as a number": (
        (cosine, Q, {"attn_bias_batch_dim": 1}),
        TypeError,
        f"`attn_bias_batch_dim` must be True or False, got int 1. {STATIC}",
    ),
    "relative bias": (
        (flash, Q, {"relative_bias": a(4, 12)}),
        ValueError,
        "`relative_bias` must have shape (heads, q_len + k_len - 1) = (4, 11) or without the "
        "heads, got shape (4, 12). Entry j - i + q_len - 1 is that of query i and key j.",
    ),
}

BAND = {
    "negative window": (
        (flash, Q, {"window": -2}),
        ValueError,
        f"`window` must not be negative, got -2. {UNBOUNDED}",
    ),
    "negative side": (
        (flash, Q, {"window": (-3, 0)}),
        ValueError,
        f"`window` must not be negative, got (-3, 0). {UNBOUNDED}",
    ),
    "window of three": (
        (flash, Q, {"window": (1, 2, 3)}),
        TypeError,
        "`window` must be an integer or a pair (left, right), got tuple (1, 2, 3). " + UNBOUNDED,
    ),
    "window as a float": (
        (flash, Q, {"window": 2.0}),
        TypeError,
        f"`window` must be an integer or a pair (left, right), got float 2.0. {UNBOUNDED}",
    ),
    "window of floats": (
        (flash, Q, {"window": (2.0, 0)}),
        TypeError,
        "`window` must hold integers or None, got float 2.0. It is static: pass Python ints.",
    ),
    "window beyond int32": (
        (flash, Q, {"window": 2**63 - 1}),
        ValueError,
        f"`window` must be at most 1073741824, got 9223372036854775807. {UNBOUNDED}",
    ),
    "causal as a number": (
        (flash, Q, {"causal": 1}),
        TypeError,
        f"`causal` must be True or False, got int 1. {STATIC}",
    ),
    "bias where causal stands": (
        (efficient, (*Q, None, a(6, 6)), {}),
        TypeError,
        f"`causal` must be True or False, got float32[6, 6]. {STATIC}",
    ),
    "offset as a float": (
        (flash, Q, {"q_offset": 1.5}),
        TypeError,
        "`q_offset` must be an integer or an integer array, got float 1.5. Pass a Python int.",
    ),
    "offset of floats": (
        (flash, Q, {"q_offset": a(2)}),
        TypeError,
        "`q_offset` must be of an integer dtype, got float32. Cast it: q_offset.astype(jnp.int32).",
    ),
    "offset of another batch": (
        (flash, Q, {"q_offset": three}),
        ValueError,
        "`q_offset` must have shape (), (batch,) = (2,) or (batch, q_len) = (2, 6), got shape "
        "(3,). Pass one for all, one per batch entry or one per query.",
    ),
    "offset beyond int32": (
        (flash, Q, {"q_offset": 2**40}),
        ValueError,
        "`q_offset` must be within +-1073741824, got 1099511627776. "
        "It is the number of keys before the first query.",
    ),
    "offsets beyond int32": (
        (flash, Q, {"q_offset": np.array([0, -(2**31)])}),
        ValueError,
        "`q_offset` must be within +-1073741824, got 2147483648. "
        "It is the number of keys before the first query.",
    ),
}

TOKENS = {
    "segments of the queries alone": (
        (flash, Q, {"q_segment_ids": ids}),
        ValueError,
        "`kv_segment_ids` must come with `q_segment_ids`, got None. "
        "Pass the same ids twice for self-attention.",
    ),
    "segments of the keys alone": (
        (jaxs, N, {"kv_segment_ids": ids}),
        ValueError,
        "`q_segment_ids` must come with `kv_segment_ids`, got None. "
        "Pass the same ids twice for self-attention.",
    ),
    "segments of another length": (
        (flash, Q, {"q_segment_ids": ids, "kv_segment_ids": ids[:, :5]}),
        ValueError,
        f"`kv_segment_ids` must have shape (batch, length) = (2, 6), got shape (2, 5). {PER_TOKEN}",
    ),
    "segments without the batch": (
        (flash, Q, {"q_segment_ids": ids[0], "kv_segment_ids": ids[0]}),
        ValueError,
        f"`q_segment_ids` must have shape (batch, length) = (2, 6), got shape (6,). {PER_TOKEN}",
    ),
    "segments of floats": (
        (flash, Q, {"q_segment_ids": ids, "kv_segment_ids": a(2, 6)}),
        TypeError,
        "`kv_segment_ids` must be of an integer dtype, got float32. "
        "Cast it: kv_segment_ids.astype(jnp.int32).",
    ),
    "segments that int32 would merge": (
        (flash, Q, {"q_segment_ids": ids, "kv_segment_ids": np.full((2, 6), 2**32 + 1)}),
        ValueError,
        "`kv_segment_ids` must fit int32, got 4294967297. Number the segments from 0.",
    ),
    "lengths beyond the array": (
        (flash, Q, {"kv_lengths": np.array([7, 3], I32)}),
        ValueError,
        f"`kv_lengths` must be within 0 and the array's length 6, got 7. {LENGTHS}",
    ),
    "negative lengths": (
        (flash, Q, {"q_lengths": np.array([-1, 3], I32)}),
        ValueError,
        f"`q_lengths` must be within 0 and the array's length 6, got -1. {LENGTHS}",
    ),
    "lengths beyond the array, in jax.nn's words": (
        (jaxs, N, {"key_value_seq_lengths": np.array([9, 3], I32)}),
        ValueError,
        f"`key_value_seq_lengths` must be within 0 and the array's length 6, got 9. {LENGTHS}",
    ),
    "lengths of another batch, in jax.nn's words": (
        (jaxs, N, {"query_seq_lengths": three}),
        ValueError,
        "`query_seq_lengths` must have shape (batch,) = (2,), got shape (3,). "
        "Pass one length per batch entry.",
    ),
    "lengths of floats": (
        (flash, Q, {"kv_lengths": a(2)}),
        TypeError,
        "`kv_lengths` must be of an integer dtype, got float32. "
        "Cast it: kv_lengths.astype(jnp.int32).",
    ),
    "lengths as a list": (
        (flash, Q, {"kv_lengths": [3, 3]}),
        TypeError,
        "`kv_lengths` must be an array, got list. Wrap it in jnp.asarray.",
    ),
}

NUMBERS = {
    "scale NaN": (
        (flash, Q, {"scale": float("nan")}),
        ValueError,
        "`scale` must be finite, got nan. Look for where it was computed.",
    ),
    "scale NaN in one head": (
        (flash, Q, {"scale": np.array([1, 2, 3, np.nan], F32)}),
        ValueError,
        "`scale` must be finite, got [1.0, 2.0, 3.0, nan]. Look for where it was computed.",
    ),
    "scale infinite": (
        (cosine, Q, {"scale": float("inf")}),
        ValueError,
        "`scale` must be finite, got inf. Look for where it was computed.",
    ),
    "scale of another number of heads": (
        (flash, Q, {"scale": a(3)}),
        ValueError,
        "`scale` must have shape () or (heads,) = (4,), got shape (3,). "
        "Pass one for all or one per head.",
    ),
    "scale as text": (
        (flash, Q, {"scale": "8"}),
        TypeError,
        "`scale` must be a number or an array, got str '8'. Pass a Python float.",
    ),
    "scale of integers": (
        (flash, Q, {"scale": a(4, dtype=I32)}),
        TypeError,
        f"`scale` must {FLOATS}, got int32. Cast it: scale.astype(...).",
    ),
    "softcap over float32": (
        (flash, Q, {"softcap": 1e39}),
        ValueError,
        f"`softcap` must {CAPS}, got 1e+39. {QUOTIENT}",
    ),
    "softcap under float32": (
        (jaxs, N, {"logits_soft_cap": 1e-40}),
        ValueError,
        f"`logits_soft_cap` must {CAPS}, got 1e-40. {QUOTIENT}",
    ),
    "softcap by which logits vanish": (
        (flash, Q, {"softcap": 1e38}),
        ValueError,
        f"`softcap` must {CAPS}, got 1e+38. {QUOTIENT}",
    ),
    "scale of 401 digits": (
        (flash, Q, {"scale": 10**400}),
        ValueError,
        f"`scale` must {WITHIN}, got int .... {IN_FLOAT32}",
    ),
    "scale over float32": (
        (flash, Q, {"scale": -1e39}),
        ValueError,
        f"`scale` must {WITHIN}, got -1e+39. {IN_FLOAT32}",
    ),
    "scale under float32": (
        (cosine, Q, {"scale": 1e-46}),
        ValueError,
        f"`scale` must {WITHIN}, got 1e-46. {IN_FLOAT32}",
    ),
    "softcap zero": (
        (flash, Q, {"softcap": 0.0}),
        ValueError,
        "`softcap` must be positive, got 0.0. Use None for none.",
    ),
    "softcap negative, in jax.nn's words": (
        (jaxs, N, {"logits_soft_cap": -5}),
        ValueError,
        "`logits_soft_cap` must be positive, got -5. Use None for none.",
    ),
    "softcap as an array": (
        (flash, Q, {"softcap": np.ones((), F32)}),
        TypeError,
        f"`softcap` must {TRACED_NUMBER}, got float32[]. Pass a Python float.",
    ),
    "sinks of another number of heads": (
        (flash, Q, {"sinks": a(3)}),
        ValueError,
        "`sinks` must have shape (heads,) = (4,), got shape (3,). Pass one entry per head.",
    ),
    "slopes per batch entry": (
        (flash, Q, {"alibi_slopes": a(2, 4)}),
        ValueError,
        "`alibi_slopes` must have shape (heads,) = (4,), got shape (2, 4). "
        "Pass one entry per head.",
    ),
    "slopes as a flag": (
        (flash, Q, {"alibi_slopes": True}),
        TypeError,
        "`alibi_slopes` must be an array, got bool. Wrap it in jnp.asarray.",
    ),
    "groups that don't divide": (
        (cosine, Q, {"groups": 3}),
        ValueError,
        "`groups` must divide the dimension, got 3 for 8. Use a divisor of it.",
    ),
    "no groups": (
        (cosine, Q, {"groups": 0}),
        ValueError,
        "`groups` must be at least 1, got 0.",
    ),
    "groups of the dot product": (
        (jaxs, N, {"groups": 2}),
        ValueError,
        "`groups` must be 1 with similarity='dot', got 2. Use similarity='cosine'.",
    ),
    "block of nothing": (
        (flash, Q, {"block_q": 0}),
        ValueError,
        "`block_q` must be at least 1, got 0. Use None for the library's choice.",
    ),
    "bucket of nothing": (
        (efficient, Q, {"q_bucket_size": 0}),
        ValueError,
        "`q_bucket_size` must be at least 1, got 0. Use None for the library's choice.",
    ),
    "bucket as text": (
        (efficient, Q, {"k_bucket_size": "512"}),
        TypeError,
        "`k_bucket_size` must be an integer known when the function is traced, got str '512'. "
        "Pass a Python int.",
    ),
}

DROPOUT = {
    "key missing": (
        (flash, Q, {"dropout_rate": 0.1}),
        ValueError,
        f"`dropout_key` must be given when `dropout_rate` is over 0, got None. {KEY}",
    ),
    "rate of one": (
        (flash, Q, {"dropout_rate": 1.0}),
        ValueError,
        f"`dropout_rate` must be in [0, 1), got 1.0. {SHARE}",
    ),
    "negative rate": (
        (flash, Q, {"dropout_rate": -0.1}),
        ValueError,
        f"`dropout_rate` must be in [0, 1), got -0.1. {SHARE}",
    ),
    "seed instead of a key": (
        (flash, Q, {"dropout_rate": 0.1, "dropout_key": 3}),
        TypeError,
        f"`dropout_key` must be an array, got int. {KEY}",
    ),
    "several keys": (
        (flash, Q, {"dropout_rate": 0.1, "dropout_key": a(2, 2, dtype=np.uint32)}),
        TypeError,
        f"`dropout_key` must be one JAX random key, got uint32[2, 2]. {KEY}",
    ),
    "empty key": (
        (flash, Q, {"dropout_rate": 0.1, "dropout_key": a(0, dtype=np.uint32)}),
        TypeError,
        f"`dropout_key` must be one JAX random key, got uint32[0]. {KEY}",
    ),
}

CHOICES = {
    "unknown implementation": (
        (flash, Q, {"implementation": "cutlass"}),
        ValueError,
        f"`implementation` must be one of {NAMES}, got 'cutlass'. "
        "Use None to let the library choose.",
    ),
    "implementation in capitals": (
        (flash, Q, {"implementation": "Blocked"}),
        ValueError,
        f"`implementation` must be one of {NAMES}, got 'Blocked'. Did you mean 'blocked'?",
    ),
    "jax.nn's name of the plain implementation": (
        (jaxs, N, {"implementation": "xla"}),
        ValueError,
        f"`implementation` must be one of {NAMES}, got 'xla'. "
        "What jax.nn calls 'xla' is 'dense' here; None lets the library choose.",
    ),
    "jax.nn's name of NVIDIA's implementation": (
        (jaxs, N, {"implementation": "cudnn"}),
        ValueError,
        f"`implementation` must be one of {NAMES}, got 'cudnn'. "
        "cuDNN is jax.nn's; None lets the library choose its own fastest kernel.",
    ),
    "forward mode of the custom rule": (
        (flash, Q, {"implementation": "blocked", "differentiation": "any"}),
        NotImplementedError,
        "implementation='blocked' declines this call: its custom rule has no forward mode "
        "(differentiation='any'). Use implementation=None to let the library choose.",
    ),
    "deterministic_backward that is no flag": (
        (flash, Q, {"deterministic_backward": 1}),
        TypeError,
        "`deterministic_backward` must be True or False, got int 1. It is static: "
        "pass a Python bool.",
    ),
    "unknown differentiation": (
        (flash, Q, {"differentiation": "forward"}),
        ValueError,
        "`differentiation` must be one of 'reverse', 'any', got 'forward'. Pass one of these.",
    ),
    "unknown similarity": (
        (jaxs, N, {"similarity": "cos"}),
        ValueError,
        "`similarity` must be one of 'dot', 'cosine', got 'cos'. Did you mean 'cosine'?",
    ),
    "unknown precision": (
        (flash, Q, {"precision": "HIGHEST"}),
        ValueError,
        PRECISION.format("'HIGHEST'"),
    ),
    "precision as a number": (
        (flash, Q, {"precision": 3}),
        TypeError,
        PRECISION.format("int 3"),
    ),
    "precision of one operand": (
        (flash, Q, {"precision": ("high", None)}),
        ValueError,
        PRECISION.format("tuple ('high', None)"),
    ),
    "flag of lse": (
        (flash, Q, {"return_lse": 1}),
        TypeError,
        f"`return_lse` must be True or False, got int 1. {STATIC}",
    ),
    "flag of the residual": (
        (jaxs, N, {"return_residual": None}),
        TypeError,
        f"`return_residual` must be True or False, got NoneType None. {STATIC}",
    ),
}

KEYWORDS = {
    "misspelt": (
        (flash, Q, {"casual": True}),
        TypeError,
        "`flash_attention` got an unexpected keyword argument 'casual'. Did you mean `causal`?",
    ),
    "misspelt to explain": (
        (f.explain, Q, {"casual": True}),
        TypeError,
        "`explain` got an unexpected keyword argument 'casual'. Did you mean `causal`?",
    ),
    "jax.nn's name": (
        (f.attention, Q, {"is_causal": True}),
        TypeError,
        "`attention` got an unexpected keyword argument 'is_causal'. Did you mean `causal`?",
    ),
    "another function's name of the bias": (
        (flash, Q, {"attn_bias": a(6, 6)}),
        TypeError,
        "`flash_attention` got an unexpected keyword argument 'attn_bias'. Did you mean `bias`?",
    ),
    "bias where it is attn_bias": (
        (cosine, Q, {"bias": a(6, 6)}),
        TypeError,
        "`flash_cosine_sim_attention` got an unexpected keyword argument 'bias'. "
        "Did you mean `attn_bias`?",
    ),
    "bias where it is attn_bias, in the oracle": (
        (f.plain_cosine_sim_attention, Q, {"bias": a(6, 6)}),
        TypeError,
        "`plain_cosine_sim_attention` got an unexpected keyword argument 'bias'. "
        "Did you mean `attn_bias`?",
    ),
    "block size where it is a bucket size": (
        (efficient, Q, {"block_q": 64}),
        TypeError,
        "`memory_efficient_attention` got an unexpected keyword argument 'block_q'. "
        "Did you mean `q_bucket_size`?",
    ),
    "upstream's dropout": (
        (efficient, Q, {"dropout": 0.1}),
        TypeError,
        "`memory_efficient_attention` got an unexpected keyword argument 'dropout'. "
        "Did you mean `dropout_rate`?",
    ),
    "upstream's key_mask": (
        (flash, Q, {"key_mask": a(2, 6, dtype=bool)}),
        TypeError,
        "`flash_attention` got an unexpected keyword argument 'key_mask'. Did you mean `mask`?",
    ),
    "cosine of the wrong function": (
        (flash, Q, {"groups": 2}),
        TypeError,
        "`flash_attention` got an unexpected keyword argument 'groups'. "
        "`flash_cosine_sim_attention` is by cosine similarity.",
    ),
    "unknown": (
        (flash, Q, {"heads": 8}),
        TypeError,
        "`flash_attention` got an unexpected keyword argument 'heads'. "
        + KNOWN.format("block_q", "block_kv", "bias"),
    ),
    "unknown where names differ": (
        (efficient, Q, {"eps": 1e-8}),
        TypeError,
        "`memory_efficient_attention` got an unexpected keyword argument 'eps'. "
        + KNOWN.format("q_bucket_size", "k_bucket_size", "attn_bias"),
    ),
}

JAX_CONVENTION = {
    "two axes": (
        (jaxs, K, {}),
        ValueError,
        "`query` must have the axes (length, heads, dim) or (batch, length, heads, dim), got "
        "shape (6, 8). Reshape it.",
    ),
    "keys without the batch": (
        (jaxs, (query, a(6, 4, 8), a(6, 4, 8)), {}),
        ValueError,
        "`key` must have the axes of `query`, (batch, length, key heads, dim), got shape "
        "(6, 4, 8) beside query (2, 6, 4, 8). Reshape it.",
    ),
    "values of another length": (
        (jaxs, (query, key, a(2, 5, 4, 8)), {}),
        ValueError,
        "`key` and `value` must agree in batch, length and heads, got key (2, 6, 4, 8) and "
        "value (2, 5, 4, 8). Only the dimension may differ.",
    ),
    "keys of another dimension": (
        (jaxs, (query, a(2, 6, 4, 7), a(2, 6, 4, 7)), {}),
        ValueError,
        "`query` and `key` must agree in the dimension (last axis), got query (2, 6, 4, 8) and "
        "key (2, 6, 4, 7). Project them to the same.",
    ),
    "keys of a batch of one": (
        (jaxs, (query, a(1, 6, 4, 8), a(1, 6, 4, 8)), {}),
        ValueError,
        "`query` and `key` must agree in batch (first axis), got query (2, 6, 4, 8) and "
        "key (1, 6, 4, 8). Repeat or reshape one.",
    ),
    "heads": (
        (jaxs, (query, a(2, 6, 3, 8), a(2, 6, 3, 8)), {}),
        ValueError,
        "`query` must have a multiple of the heads of `key`, got 4 heads and 3 key heads. "
        f"{GROUPED}",
    ),
    "dtypes": (
        (jaxs, (query, key.astype(np.float16), value), {}),
        TypeError,
        "`query`, `key` and `value` must share one dtype, got query float32, key float16, value "
        "float32. Cast them to the same.",
    ),
    "mask in the place of the bias": (
        (jaxs, (*N, a(6, 6, dtype=bool)), {}),
        TypeError,
        "`bias` must be of a float dtype, got bool. Pass a boolean mask as `mask`.",
    ),
    "padding mask of two axes": (
        (jaxs, N, {"mask": a(2, 6, dtype=bool)}),
        ValueError,
        f"`mask` must broadcast to (b, h, i, j) = (2, 4, 6, 6), got shape (2, 6). {FEWER}",
    ),
    "window of three": (
        (jaxs, N, {"local_window_size": (1, 2, 3)}),
        TypeError,
        "`local_window_size` must be an integer or a pair (left, right), got tuple (1, 2, 3). "
        f"{UNBOUNDED}",
    ),
    "causal as a number": (
        (jaxs, N, {"is_causal": 1}),
        TypeError,
        f"`is_causal` must be True or False, got int 1. {STATIC}",
    ),
}

RELATIVES = {
    "nothing to merge": (
        (f.merge_attention, (), {}),
        ValueError,
        "`parts` must hold at least one pair (out, lse), got none. Call with return_lse=True.",
    ),
    "parts without lse": (
        (f.merge_attention, (q, k), {}),
        TypeError,
        "`parts[0]` must be a pair (out, lse), got float32[2, 4, 6, 8]. Call with return_lse=True.",
    ),
    "parts in a list": (
        (f.merge_attention, ([(q, a(2, 4, 6))] * 3,), {}),
        TypeError,
        "`parts[0]` must be a pair (out, lse), got a list of pairs. "
        "Unpack it: merge_attention(*pairs).",
    ),
    "parts of other queries": (
        (f.merge_attention, ((q, a(2, 4, 6)), (a(2, 4, 5, 8), a(2, 4, 5))), {}),
        ValueError,
        "`parts[0][0]` and `parts[1][0]` must agree in shape, got parts[0][0] (2, 4, 6, 8) and "
        "parts[1][0] (2, 4, 5, 8). Split the keys, not the queries.",
    ),
    "lse of another call": (
        (f.merge_attention, ((q, a(2, 4, 6)), (q, a(2, 4, 5))), {}),
        ValueError,
        "`parts[1][0]` and `parts[1][1]` must agree in all axes but the last of the first, got "
        "parts[1][0] (2, 4, 6, 8) and parts[1][1] (2, 4, 5). Use the lse of the same call.",
    ),
    "numbers to merge": (
        (f.merge_attention, ((a(), a()),), {}),
        ValueError,
        "`parts[0][0]` must have at least 1 axis, got shape (). Reshape it.",
    ),
    "integers to normalise": (
        (f.l2norm_tensors, (q, ids), {}),
        TypeError,
        f"`tensors[1]` must {FLOATS}, got int32. Cast it: tensors[1].astype(...).",
    ),
    "number to normalise": (
        (f.l2norm_tensors, (a(),), {}),
        ValueError,
        "`tensors[0]` must have at least 1 axis, got shape (). Reshape it.",
    ),
    "groups to normalise": (
        (f.l2norm_tensors, (q,), {"groups": 3}),
        ValueError,
        "`groups` must divide the last axis, got 3 for tensors[0] (2, 4, 6, 8). "
        "Use a divisor of it.",
    ),
    "layout to explain": (
        (f.explain, Q, {"layout": "bhnd"}),
        ValueError,
        "`layout` must be one of 'heads_first', 'heads_last', got 'bhnd'. Pass one of these.",
    ),
    "platform to explain": (
        (f.explain, Q, {"platform": "cuda12"}),
        ValueError,
        "`platform` must be one of 'cpu', 'gpu', 'cuda', 'rocm', 'tpu', got 'cuda12'. "
        "Did you mean 'cuda'?",
    ),
    "capability to explain": (
        (f.explain, Q, {"platform": "gpu", "capability": 9.0}),
        TypeError,
        "`capability` must be two integers, got float 9.0. (9, 0) is an H100.",
    ),
    "shapes to explain": (
        (f.explain, ((2, 4, 6, 8), k, v), {}),
        TypeError,
        "`q` must be an array, got tuple. Wrap it in jnp.asarray.",
    ),
    "sequences that are not sorted": (
        (flash_attention_varlen, (*[a(6, 4, 8)] * 3, np.array([0, 4, 2], I32)), {}),
        ValueError,
        "`cu_seqlens_q` must not decrease, got 2 after 4. "
        "Pass 0 and the cumulative sum of the lengths, such as [0, 3, 7].",
    ),
    "window of packed sequences": (
        (flash_attention_varlen, (*[a(6, 4, 8)] * 3, starts), {"window": -2}),
        ValueError,
        f"`window` must not be negative, got -2. {UNBOUNDED}",
    ),
    "implementation of packed sequences": (
        (flash_attention_varlen, (*[a(6, 4, 8)] * 3, starts), {"implementation": "xla"}),
        ValueError,
        f"`implementation` must be one of {NAMES}, got 'xla'. "
        "What jax.nn calls 'xla' is 'dense' here; None lets the library choose.",
    ),
    "lengths of the difference": (
        (f.value_and_grad_difference, (flash, flash), {"k_seq_len": 0}),
        ValueError,
        "`k_seq_len` must be at least 1, got 0.",
    ),
    "functions of the difference": (
        (f.value_and_grad_difference, (flash, "attention"), {}),
        TypeError,
        "`fn2` must be a function, got str 'attention'. Pass one such as `flash_attention`.",
    ),
    "seed of the keys": (
        (f.PRNGKeyGenerator, ("seed",), {}),
        TypeError,
        "`seed` must be an integer known when the function is traced, got str 'seed'. "
        "Pass a Python int.",
    ),
}

TABLES = [HEADS_FIRST, MASKS, BAND, TOKENS, NUMBERS, DROPOUT, CHOICES, KEYWORDS, JAX_CONVENTION]
ATTENTION = {name: case for table in TABLES for name, case in table.items()}
BAD_CALLS = {
    f"{case[0][0].__name__}: {name}": case
    for table in [*TABLES, RELATIVES]
    for name, case in table.items()
}


def refused(call, error, text):
    """Runs a call and holds its error against the whole text."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == text


def test_table_is_long_and_no_name_hides_another():
    assert len(BAD_CALLS) == sum(map(len, [*TABLES, RELATIVES]))
    assert len(BAD_CALLS) >= 45


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused_in_full_words(name):
    (function, arguments, options), error, text = BAD_CALLS[name]
    refused(functools.partial(function, *arguments, **options), error, text)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_text_says_what_was_wrong_and_what_to_do(name):
    _, _, text = BAD_CALLS[name]
    assert "got" in text or "declines" in text
    assert text.endswith((".", "?"))


def named(case):
    """Whether the call could name an engine: it is attention's, and its fault is no name."""
    (function, _, options), error, _ = case
    return function is not f.explain and "implementation" not in options and error is not None


@pytest.mark.parametrize("implementation", ENGINES)
def test_every_engine_refuses_in_the_same_words(implementation):
    cases = [case for case in ATTENTION.values() if named(case)]
    assert len(cases) > 80
    for (function, arguments, options), error, text in cases:
        attend = functools.partial(function, *arguments, **options, implementation=implementation)
        refused(attend, error, text)


# The arrays of a call become tracers, as under jit; what only values can tell is not seen then.
SEEN = ("segments that int32", "lengths beyond", "negative lengths", "in one head", "offsets bey")
SEEN += ("ids as a mask", "that are 0 and 1")
SHAPES = [
    name
    for name, (call, _, text) in ATTENTION.items()
    if all(hasattr(x, "__array__") for x in call[1] if x is not None)
    and not any(name.startswith(seen) or seen in name for seen in SEEN)
    and call[0] is not f.explain
    # What must be a number or a key is another thing when it is traced.
    and not ("got uint32[" in text or "float32[]" in text)
]


def traceable(call):
    """The call as a function of its float arrays, and these."""
    function, arguments, options = call
    named = {f"{i}": x for i, x in enumerate(arguments) if x is not None} | options
    arrays = {name: x for name, x in named.items() if isinstance(x, np.ndarray) and x.ndim}

    def attend(arrays):
        positional = [arrays.get(f"{i}", x) for i, x in enumerate(arguments)]
        keywords = {name: arrays.get(name, x) for name, x in options.items()}
        return function(*positional, **keywords)

    return attend, arrays


@pytest.mark.parametrize("name", SHAPES)
def test_jit_raises_the_same_error_when_it_traces(name):
    call, error, text = ATTENTION[name]
    attend, arrays = traceable(call)
    refused(lambda: jax.eval_shape(jax.jit(attend), arrays), error, text)


TRANSFORMED = ["lengths of keys and values", "heads that don't divide", "bias of another length"]
TRANSFORMED += ["mask of another batch", "negative window", "scale NaN", "key missing", "misspelt"]


@pytest.mark.parametrize("name", TRANSFORMED)
def test_grad_and_vmap_raise_the_same_error(name):
    call, error, text = ATTENTION[name]
    attend, arrays = traceable(call)
    floats = {name: x for name, x in arrays.items() if x.dtype == F32}
    others = {name: x for name, x in arrays.items() if x.dtype != F32}
    refused(lambda: jax.grad(lambda x: attend(x | others).sum())(floats), error, text)
    stacked = jax.tree.map(lambda x: x[None], arrays)
    refused(lambda: jax.vmap(attend)(stacked), error, text)


STATIC_OPTIONS = {
    "window": (3, "must be an integer or a pair (left, right), got int64[]. " + UNBOUNDED),
    "causal": (True, f"must be True or False, got bool[]. {STATIC}"),
    "dropout_rate": (0.5, f"must {TRACED_NUMBER}, got float64[]. Pass a Python float."),
    "softcap": (5.0, f"must {TRACED_NUMBER}, got float64[]. Pass a Python float."),
    "block_q": (
        64,
        "must be an integer known when the function is traced, got int64[]. Pass a Python int.",
    ),
    "return_lse": (True, f"must be True or False, got bool[]. {STATIC}"),
}


@pytest.mark.parametrize("name", STATIC_OPTIONS)
def test_static_option_that_is_traced_is_refused(name):
    x, text = STATIC_OPTIONS[name]
    options = {"dropout_key": np.array([0, 1], np.uint32)} if name == "dropout_rate" else {}
    attend = jax.jit(lambda x: flash(*Q, **options, **{name: x}))
    refused(lambda: attend(x), TypeError, f"`{name}` {text}")


def test_pair_with_a_traced_side_is_refused():
    text = "`window` must hold integers or None, got int64[]. It is static: pass Python ints."
    refused(lambda: jax.jit(lambda w: flash(*Q, window=(w, 0)))(3), TypeError, text)


def test_values_that_are_traced_are_not_looked_at():
    # Neither an error nor a concretisation: they cannot be seen.
    attend = jax.jit(lambda n, s: flash(*Q, kv_lengths=n, scale=s))
    out = jax.eval_shape(attend, np.array([9, -1], I32), np.full(4, np.nan, F32))
    assert out.shape == (2, 4, 6, 8)


def test_several_typed_keys_are_refused():
    keys = jax.random.split(jax.random.key(0), 2)
    text = f"`dropout_key` must be one JAX random key, got key<fry>[2]. {KEY}"
    attend = functools.partial(flash, *Q, dropout_rate=0.1, dropout_key=keys)
    refused(attend, TypeError, text)


def test_key_without_a_rate_changes_nothing():
    # As in evaluation: the rate is 0 and the key is still passed.
    out = flash(*Q, dropout_key=jax.random.key(0), implementation="dense")
    assert (np.asarray(out) == np.asarray(flash(*Q, implementation="dense"))).all()


def test_array_of_another_library_is_refused():
    class Tensor:
        shape, dtype = (6, 8), "torch.float32"

    text = "`k` must be an array, got Tensor. Wrap it in jnp.asarray."
    refused(lambda: flash(q2, Tensor(), q2), TypeError, text)


def test_keyword_misspelt_where_python_knows_all_names_is_pythons_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        jaxs(*N, casual=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'casual'"):
        flash_attention_varlen(*[a(6, 4, 8)] * 3, starts, casual=True)


def test_long_value_is_not_spelled_out():
    assert check.shown([1.0] * 1000) == "list ..."
    assert check.shown(jnp.ones((2, 3), jnp.float32)) == "float32[2, 3]"
    assert check.shown((1, 2)) == "tuple (1, 2)"


@pytest.mark.parametrize(
    ("option", "value"),
    [("sinks", np.nan), ("sinks", np.inf), ("alibi_slopes", np.nan), ("alibi_slopes", -np.inf)],
)
def test_terms_of_heads_that_are_no_numbers_are_refused(option, value):
    with pytest.raises(ValueError, match=f"`{option}` must be finite, got"):
        flash(q, k, v, **{option: np.array([0, 1, value, 0], F32)})


def test_array_that_was_deleted_is_named():
    given = jax.numpy.ones((6, 8), F32)
    given.delete()
    says = r"`k` must hold values, got float32\[6, 8\], which is deleted\. It was donated"
    with pytest.raises(ValueError, match=says):
        flash(q2, given, q2)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("key_padding_mask", r"Pass ~key_padding_mask as `mask`: True = may attend"),
        ("score_mod", r"Pass what it adds as `bias`"),
        ("mask_mod", r"Pass `mask`, `causal`, `window`"),
        ("block_mask", r"Pass `mask`, `causal`, `window`"),
        ("attn_bias", r"Did you mean `bias`\?"),
        ("segment_ids", r"Pass `q_segment_ids` and `kv_segment_ids`"),
    ],
)
def test_option_of_another_library_is_told_what_stands_for_it(option, says):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'.* {says}"):
        flash(q, k, v, **{option: None})


@pytest.mark.parametrize("rate", [-0.1, float("nan"), 1.0])
def test_rate_is_checked_before_it_is_found_to_be_none(rate):
    for attend in (attention_fn, make_attention_fn(similarity="cosine")):
        with pytest.raises(ValueError, match="`dropout_rate` must be"):
            attend(query, key, value, dropout_rate=rate)
        with pytest.raises(ValueError, match="`dropout_rate` must be"):
            attend(query, key, value, dropout_rate=rate, deterministic=True)


def test_forward_mode_of_the_default_is_refused_in_the_documented_words():
    # JAX raises it, and nobody else can: so the words have to be found by a search.
    attend = lambda q: flash(q, q2, q2)  # noqa: E731
    for differentiate in (
        lambda: jax.jvp(attend, (q2,), (q2,)),
        lambda: jax.jacfwd(attend)(q2),
        lambda: jax.hessian(lambda q: attend(q).sum())(q2),
    ):
        with pytest.raises(TypeError) as raised:
            differentiate()
        assert str(raised.value) == NO_FORWARD_MODE
    for function in (f.flash_attention, f.dot_product_attention):
        assert NO_FORWARD_MODE in " ".join((function.__doc__ or "").split())
    page = Path(__file__).parents[1] / "docs" / "questions.md"
    assert NO_FORWARD_MODE in page.read_text(encoding="utf-8")
    assert NO_FORWARD_MODE in str(f.explain(q, q, q))
    assert NO_FORWARD_MODE not in str(f.explain(q, q, q, differentiation="any"))
    assert jax.jvp(lambda q: flash(q, q2, q2, differentiation="any"), (q2,), (q2,))
