"""The bridge to PyTorch: arrays and programs across it, an operator, and modules.

The public functions of it are in `flash_attention_jax.torch`.
"""
