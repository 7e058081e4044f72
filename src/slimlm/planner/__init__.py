"""Budgets: which pattern, how many bits, groups and what rank each layer gets."""
