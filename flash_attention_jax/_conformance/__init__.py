"""What attention must do, claim by claim, and an independent reference to hold it against.

Users reach it by `flash_attention_jax.testing`.
"""
