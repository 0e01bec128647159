"""What the Flax layers of linen and nnx share: the layer itself, and their `attention_fn`."""
