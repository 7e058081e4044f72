"""Budgets: a plan chooses each layer's bits, group size, pattern and rank."""
