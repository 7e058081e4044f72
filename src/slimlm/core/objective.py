"""What a budget may count; a module of its own, so that naming it imports no torch."""

from typing import Literal

Objective = Literal["size", "speed"]
"""What a budget counts: stored bits ("size"), or the time of a prompt and its continuation ("speed")."""
