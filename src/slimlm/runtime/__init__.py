"""Running compressed weights: `CompressedLinear` and the backends that multiply by it."""
