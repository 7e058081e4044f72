"""How much is worked on at a time."""

import torch

ON_A_CARD = 32
"""Times as much as what fits a processor's cache: tens of megabytes, so that a launch has more to do than to be launched."""


def at_once(elements: int, device: torch.device) -> int:
    """How many elements to work on at a time, where this many fit a processor's cache; on a card more."""
    return elements if device.type == "cpu" else ON_A_CARD * elements
