"""What the attention layer is told: its attributes, and the options of one call."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypedDict

import jax.numpy as jnp
from jax.nn import initializers
from jaxtyping import Array

from flash_attention_jax._core.types import ArrayLike
from flash_attention_jax._flax.attention_fn import Similarity
from flash_attention_jax.sharding import Placement

Initializer: TypeAlias = Callable[..., Any]
"""(key, shape, dtype) -> array, as in `jax.nn.initializers`."""


def lecun_normal(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """`jax.nn.initializers.lecun_normal()`, which is a closure, under a name that pickle finds."""
    return initializers.lecun_normal()(key, shape, dtype)


class CallOptions(TypedDict, total=False):
    """Keyword arguments of a call of `Attention`, as its docstring says."""

    segment_ids: ArrayLike | None
    context_segment_ids: ArrayLike | None
    positions: ArrayLike | None
    lengths: ArrayLike | None
    memory_efficient: bool | None
    q_bucket_size: int | None
    k_bucket_size: int | None
    implementation: str | None


@dataclasses.dataclass(eq=False)
class Attributes:
    """The attributes of multi-head attention with its projections.

        q, k, v = x @ query, c @ key, c @ value        c = context, or x where there is none
        q, k    = rotary(norm(q)), rotary(norm(k))     where asked for
        y       = concatenate_heads(attention(q, k, v)) @ out

    What attention means is as in `flash_attention_jax.flash_attention`, in the order of its terms;
    causal and windows are end-aligned: the last query sees the last key. Memory grows with the
    length and not with its square, whatever the arguments, but for `memory_efficient=False`.

    Attributes:
        dim: Features of the input and of the output.
        heads: Number of query heads.
        dim_head: Features of each head, even where `rotary`; `None` = dim // heads.
        dropout: Probability of dropping an attention weight, 0 <= rate < 1.
        causal: A token attends to itself and to those before it.
        memory_efficient: False = the dense engine, in memory that grows with the square of the
            length; True or `None` = an engine in O(n) memory.
        q_bucket_size: Queries per block; `None` = the engine's own. It changes rounding, no more.
        k_bucket_size: Keys per block, the same.
        kv_heads: Heads of keys and values, a divisor of `heads`; `None` = heads, 1 = multi-query.
        window: How far left and right of its own place a token attends, w or (left, right), both
            inclusive; `None` or -1 = all.
        similarity: "dot" or "cosine".
        scale: Factor of the similarities; `None` = 1 / sqrt(dim_head), or 10 for cosine.
        learned_scale: Make the scale a parameter, one per head, that starts at `scale`.
        groups: Chunks of a head that cosine similarity normalises apart, a divisor of `dim_head`.
        qk_norm: RMS normalisation of queries and keys over each head, with a learned gain per
            feature, before the rotation.
        rotary: Give queries and keys their positions by rotation.
        rotary_base: Base of its angles.
        rotary_scaling: What divides the positions.
        alibi: Subtract slope * distance from the logits, with the paper's slope for each head.
        softcap: Logits become softcap * tanh(logits / softcap).
        sinks: A learned logit per head in the denominator, at first 0.
        use_bias: Biases in the projections, at first 0.
        implementation: The engine that must run it; `None` lets the library choose.
        precision: Of the matrix products, as in JAX.
        dtype: Dtype of the computation; `None` = the common one of the input and the parameters.
        param_dtype: Dtype of the parameters.
        deterministic: No dropout. Where `dropout` is positive, say it here or in the call.
        kernel_init: Initialiser of the projections, for a shape (features in, features out), as a
            function or with Flax's partitioning metadata: names of these two axes, of which that of
            (heads, dim_head) cuts the heads, or of the parameter's three.
        value_init: Initialiser of the projection to values; `None` = kernel_init.
        out_init: Initialiser of the output projection; `None` = kernel_init.
        placement: A mesh and its axes, over which sequences, batch and heads are cut; a cache is
            read on one device. `None` = as the arrays lie.

    References:
        Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762, section 3.2.
        Ainslie et al. 2023, "GQA", arXiv:2305.13245 (kv_heads).
        Henry et al. 2020, "Query-Key Normalization for Transformers", arXiv:2010.04245 (cosine with
        a learned scale); Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion
        Parameters", arXiv:2302.05442 (qk_norm).
        Press et al. 2022, "Train Short, Test Long", arXiv:2108.12409, section 3 (alibi).
    """

    dim: int
    heads: int = 8
    dim_head: int | None = 64
    dropout: float = 0.0
    causal: bool = False
    memory_efficient: bool | None = None
    q_bucket_size: int | None = None
    k_bucket_size: int | None = None
    kv_heads: int | None = None
    window: int | tuple[int | None, int | None] | None = None
    similarity: Similarity = "dot"
    scale: float | None = None
    learned_scale: bool = False
    groups: int = 1
    qk_norm: bool = False
    rotary: bool = False
    rotary_base: float = 10000.0
    rotary_scaling: float = 1.0
    alibi: bool = False
    softcap: float | None = None
    sinks: bool = False
    use_bias: bool = False
    implementation: str | None = None
    precision: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    deterministic: bool | None = None
    kernel_init: Initializer = lecun_normal
    value_init: Initializer | None = None
    out_init: Initializer | None = None
    placement: Placement | None = None
