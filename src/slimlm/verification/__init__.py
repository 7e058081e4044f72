"""Verification of a finished checkpoint."""
