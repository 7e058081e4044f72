"""Solvers that methods share: sweep, scale search, coordinate descent, low-rank products."""
