"""How many elements are worked on at a time: what a CPU's cache holds, and more on a GPU. It changes no result.

A long tensor is taken in pieces, so that what lies in between stays in the cache; on a GPU the pieces are larger, so that
fewer kernels are launched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

GPU_FACTOR = 32
"""How much larger the pieces are on a GPU than in a CPU's cache: tens of megabytes, so that a launch pays."""

_FIXED: ContextVar[int | None] = ContextVar("elements of every piece", default=None)


def at_once(elements: int, device: torch.device) -> int:
    """How many elements to work on at a time on a device.

    Args:
        elements: how many fit a CPU's cache at this place.
        device: where the tensors are.

    Returns:
        `elements` on a CPU, `GPU_FACTOR` times as many elsewhere; inside `pieces_of(n)` n, whatever the place asks for.
    """
    fixed = _FIXED.get()
    if fixed is not None:
        return fixed
    return elements if device.type == "cpu" else GPU_FACTOR * elements


@contextmanager
def pieces_of(elements: int) -> Iterator[None]:
    """Inside it work is done on this many elements at a time, everywhere and on every device, in this thread.

    For measurements, and for tests that the size of the pieces changes no result.
    """
    token = _FIXED.set(elements)
    try:
        yield
    finally:
        _FIXED.reset(token)
