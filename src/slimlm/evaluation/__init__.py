"""Measurements of quality: perplexity, and 8-bit activations."""
