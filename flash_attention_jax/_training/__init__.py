"""The training loop of `flash_attention_jax.train`: steps, devices, checkpoints, curves."""
