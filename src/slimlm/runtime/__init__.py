"""A compressed weight at work: `CompressedLinear` and the backends that multiply with it."""
