"""Measurements: perplexity, activation rounding, and the record of a run."""
