"""Gradient descent on the continuous values of compressed blocks: scales, codebooks, adapters, norms."""
