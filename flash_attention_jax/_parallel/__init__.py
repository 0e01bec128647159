"""One length over many devices: rings, all-to-all, and the order of the tokens.

The public functions of it are in `flash_attention_jax.sharding`.
"""
