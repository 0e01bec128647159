"""Checks of what the attention layer is told, and the values that follow from it.

Every check names the argument as the user wrote it. The attributes are checked where the weights
are listed, so that `init` refuses them; the rest of a call is checked before anything is computed.
"""

from __future__ import annotations

from typing import NamedTuple

from flash_attention_jax._core import check
from flash_attention_jax._core.call import COSINE_SCALE
from flash_attention_jax._core.types import ArrayLike
from flash_attention_jax._flax.options import Attributes, CallOptions
from flash_attention_jax.cache import KVCache


class Sizes(NamedTuple):
    """The sizes that attributes may leave to their defaults."""

    heads: int
    kv_heads: int
    dim_head: int


class Tuning(NamedTuple):
    """The engine and its blocks; None leaves the choice to the library."""

    implementation: str | None
    block_q: int | None
    block_kv: int | None


def check_attributes(layer: Attributes) -> Sizes:
    """Checks what the weights depend on; returns their sizes."""
    sizes = sizes_of(layer)
    check.choice("similarity", layer.similarity, ("dot", "cosine"))
    check.rate("dropout", layer.dropout)
    return sizes


def sizes_of(layer: Attributes) -> Sizes:
    """Checks the sizes, and puts numbers for those that are None."""
    dim = check.whole("dim", layer.dim, least=1)
    heads = check.whole("heads", layer.heads, least=1)
    kv_heads = heads if layer.kv_heads is None else layer.kv_heads
    check.whole("kv_heads", kv_heads, least=1, advice="Use None for as many as `heads`.")
    if heads % kv_heads:
        got = f"{heads} with kv_heads={kv_heads}"
        check.fail("heads", "be a multiple of `kv_heads`", got, "Change one of them.")
    if layer.dim_head is None and dim % heads:
        got, advice = f"{dim} with heads={heads}", "Change one of them, or give `dim_head`."
        check.fail("dim", "be a multiple of `heads` where dim_head=None", got, advice)
    dim_head = dim // heads if layer.dim_head is None else layer.dim_head
    check.whole("dim_head", dim_head, least=1, advice="Use None for dim // heads.")
    if layer.rotary and dim_head % 2:
        advice = "Rotation turns pairs of features: use an even number, or rotary=False."
        check.fail("dim_head", "be even where `rotary`", str(dim_head), advice)
    groups = check.whole("groups", layer.groups, least=1)
    if dim_head % groups:
        got, advice = f"{groups} with dim_head={dim_head}", "Use a divisor of it."
        check.fail("groups", "divide `dim_head`", got, advice)
    return Sizes(heads, kv_heads, dim_head)


def first_scale(layer: Attributes) -> float:
    """The scale before any training."""
    if layer.scale is not None:
        return check.number("scale", layer.scale)
    # Cosine similarities lie in [-1, 1]: without a large scale their softmax is nearly flat.
    return COSINE_SCALE if layer.similarity == "cosine" else sizes_of(layer).dim_head ** -0.5


def window_left(layer: Attributes) -> int | None:
    """How many tokens back a token sees; None = all."""
    return check.window("window", layer.window)[0]


def draws_dropout(layer: Attributes, deterministic: bool | None) -> bool:
    """Whether this call drops weights.

    Neither default is safe: dropout in evaluation spoils the result silently, and so does training
    without it. So a layer with dropout asks for the answer.
    """
    if not layer.dropout:
        return False
    decided = layer.deterministic if deterministic is None else deterministic
    if decided is None:
        got = f"None with dropout={layer.dropout}"
        advice = "Pass False to train and True to evaluate, to the layer or to the call."
        check.fail("deterministic", "be True or False where there is dropout", got, advice)
    return not decided


def tuning(layer: Attributes, options: CallOptions) -> Tuning:
    """The engine and its blocks: those of the call, and where it has none those of the layer."""
    chosen = {}
    for name in ("memory_efficient", "q_bucket_size", "k_bucket_size", "implementation"):
        of_call = options.get(name)
        chosen[name] = getattr(layer, name) if of_call is None else of_call
    implementation = chosen["implementation"]
    if chosen["memory_efficient"] is False:
        if implementation not in (None, "dense"):
            got = f"{implementation!r} with memory_efficient=False"
            check.fail("implementation", "be None or 'dense'", got, "Leave one of them out.")
        implementation = "dense"
    return Tuning(implementation, chosen["q_bucket_size"], chosen["k_bucket_size"])


def check_arrays(layer: Attributes, x: ArrayLike, context: ArrayLike | None) -> None:
    """Checks the dtypes and shapes of the inputs."""
    for name, array in (("x", x), ("context", context)):
        if array is not None:
            check.floating(name, array)
            if len(array.shape) != 3 or array.shape[-1] != layer.dim:
                requirement = f"have shape (batch, length, dim) with dim={layer.dim}"
                advice = f"Set the `dim` of this Attention to the features of `{name}`."
                check.fail(name, requirement, f"shape {tuple(array.shape)}", advice)


def check_options(layer: Attributes, context: ArrayLike | None, options: CallOptions) -> None:
    """Checks the names of the options, and that they fit the context."""
    unknown = set(options) - CallOptions.__annotations__.keys()
    if unknown:
        known = ", ".join(CallOptions.__annotations__)
        raise TypeError(
            f"`Attention` got an unexpected keyword argument {min(unknown)!r}. Known: {known}."
        )
    if context is not None and layer.rotary:
        advice = "Positions in two sequences are not comparable: use rotary=False here."
        check.fail("context", "be None where `rotary`", check.shown(context), advice)
    if context is None and options.get("context_segment_ids") is not None:
        got = check.shown(options.get("context_segment_ids"))
        advice = "Pass `segment_ids` alone for self-attention."
        check.fail("context_segment_ids", "be None without `context`", got, advice)


def check_decoding(
    layer: Attributes, context: ArrayLike | None, cache: KVCache, options: CallOptions
) -> None:
    """Checks that the layer and the call can do with a cache."""
    # Attention to a cache takes the window from it, so the layer's own would be ignored silently.
    if cache.window != window_left(layer):
        got = f"{cache.window} with window={layer.window}"
        advice = "Make the cache with this layer's init_cache."
        check.fail("cache", "have the window of the layer", got, advice)
    if not layer.causal:
        advice = "A cache grows by tokens that those before them do not see."
        check.fail("causal", "be True where decode=True", str(layer.causal), advice)
    if context is not None:
        advice = "Keys of a context do not grow: leave decode out."
        check.fail("context", "be None where decode=True", check.shown(context), advice)
    if options.get("segment_ids") is not None:
        got = check.shown(options.get("segment_ids"))
        advice = "Give each sequence a row of the batch, with `lengths`."
        check.fail("segment_ids", "be None where decode=True", got, advice)
