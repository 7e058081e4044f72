"""Timing of layers and of whole models, and tuning of GPU tiles."""
