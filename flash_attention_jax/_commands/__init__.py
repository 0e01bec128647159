"""The commands of `flash-attention-jax`, a module each, and the kit that they share (`line`)."""
