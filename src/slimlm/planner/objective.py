"""What a budget may count; apart from the planner, so that naming it imports no torch."""

from typing import Literal

Objective = Literal["size", "speed"]
"""Stored bits ("size"), or bytes moved and operations ("speed")."""
