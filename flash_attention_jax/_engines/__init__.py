"""How attention is computed in JAX, and the choice of who computes a call.

`dense` is the oracle, `blocked` the reference in linear memory, `checkpointed` the one for every
mode of differentiation. `dispatch` is the table of them and of the kernels, which lie below.
"""
