"""The weights of the attention layer: a table of names, initialisers and shapes.

query_kernel (dim, heads, dim_head)           query_bias (heads, dim_head)       where use_bias
key_kernel   (dim, kv_heads, dim_head)        key_bias   (kv_heads, dim_head)
value_kernel (dim, kv_heads, dim_head)        value_bias (kv_heads, dim_head)
out_kernel   (heads, dim_head, dim)           out_bias   (dim,)
query_gain, key_gain (dim_head,)              where qk_norm
head_scale (heads,)                           where learned_scale
sink_logits (heads,)                          where sinks
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.nn import initializers

from flash_attention_jax._flax.checks import check_attributes, first_scale
from flash_attention_jax._flax.options import Attributes, Initializer


class Weight(NamedTuple):
    """How a weight is made; its dtype is the layer's `param_dtype`."""

    init: Initializer
    shape: tuple[int, ...]


def weights_of(layer: Attributes) -> dict[str, Weight]:
    """Checks the attributes; returns name -> weight, in the order in which keys are drawn."""
    heads, kv_heads, dim_head = check_attributes(layer)
    # The order is part of the result: nnx draws one key for each weight, one after the other.
    projections = {
        "query": (layer.kernel_init, heads),
        "key": (layer.kernel_init, kv_heads),
        "value": (layer.value_init or layer.kernel_init, kv_heads),
    }
    table = {
        f"{name}_kernel": Weight(_as_matrix(init, 1), (layer.dim, count, dim_head))
        for name, (init, count) in projections.items()
    }
    out_init = _as_matrix(layer.out_init or layer.kernel_init, 2)
    table["out_kernel"] = Weight(out_init, (heads, dim_head, layer.dim))
    if layer.use_bias:
        for name, (_, count) in projections.items():
            table[f"{name}_bias"] = Weight(initializers.zeros, (count, dim_head))
        table["out_bias"] = Weight(initializers.zeros, (layer.dim,))
    if layer.qk_norm:
        for name in ("query", "key"):
            table[f"{name}_gain"] = Weight(initializers.ones, (dim_head,))
    if layer.learned_scale:
        table["head_scale"] = Weight(initializers.constant(first_scale(layer)), (heads,))
    if layer.sinks:
        table["sink_logits"] = Weight(initializers.zeros, (heads,))
    return table


def _as_matrix(init: Initializer, inputs: int) -> Initializer:
    """`init` for a matrix, whose rows are the first `inputs` axes of the shape.

    Initialisers read the number of inputs and outputs from a shape of two axes; of three axes they
    would take another one for the inputs, and the variance would be wrong.
    """

    def initialise(key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
        matrix = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
        return _reshaped(init(key, matrix, dtype), shape, inputs)

    return initialise


def _reshaped(matrix: Any, shape: tuple[int, ...], inputs: int) -> Any:
    """A matrix in its weight's shape; a box of linen or of nnx keeps its partitioning.

    The boxes are told apart by their attributes, because this module imports neither library.
    """
    if hasattr(matrix, "raw_value"):  # flax.nnx.VariableMetadata
        metadata = {
            name: _names_of_three(x, inputs)
            if name in ("out_sharding", "sharding", "sharding_names")
            else x
            for name, x in matrix.metadata.items()
        }
        array = matrix.raw_value.reshape(shape)
        return dataclasses.replace(matrix, raw_value=array, metadata=metadata)
    # A box of linen is a pytree of one array, and so is a bare array.
    weight = jax.tree.map(lambda x: x.reshape(shape), matrix)
    if hasattr(weight, "names"):  # flax.linen.Partitioned, LogicallyPartitioned
        return dataclasses.replace(weight, names=_names_of_three(weight.names, inputs))
    return weight


def _names_of_three(names: Any, inputs: int) -> Any:
    """The names of a matrix's two axes as those of its weight's three; other names unchanged.

    The axis of a matrix that stands for (heads, dim_head) cuts the heads: a device then has whole
    heads, and can attend with them alone.
    """
    if names is None or isinstance(names, str) or len(names) != 2:
        return names
    rows, columns = names
    three = (rows, columns, None) if inputs == 1 else (rows, None, columns)
    # A PartitionSpec takes its names one by one, a tuple or list takes them together.
    return type(names)(three) if isinstance(names, (tuple, list)) else type(names)(*three)
