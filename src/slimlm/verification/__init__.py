"""A finished folder checked from end to end."""
