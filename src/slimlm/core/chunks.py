"""How many elements are worked on at a time: what a CPU's cache holds, and more on a GPU. It changes no result.

A long tensor is taken in pieces, so that intermediate values stay in the cache; on a GPU the pieces are larger, so that
fewer kernels are launched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

GPU_FACTOR = 32
"""How much larger the pieces are on a GPU than in a CPU's cache: tens of megabytes, so that a launch is worth its overhead."""

_FIXED: ContextVar[int | None] = ContextVar("elements of every piece", default=None)


def at_once(elements: int, device: torch.device) -> int:
    """How many elements to work on at a time on a device.

    Args:
        elements: how many fit in a CPU's cache for this operation.
        device: where the tensors are.

    Returns:
        `elements` on a CPU, `GPU_FACTOR` times as many elsewhere; always n inside `pieces_of(n)`.
    """
    fixed = _FIXED.get()
    if fixed is not None:
        return fixed
    return elements if device.type == "cpu" else GPU_FACTOR * elements


@contextmanager
def pieces_of(elements: int) -> Iterator[None]:
    """Within this context every function of this thread works on this many elements at a time, on every device.

    For measurements, and for tests that the size of the pieces changes no result.
    """
    token = _FIXED.set(elements)
    try:
        yield
    finally:
        _FIXED.reset(token)
