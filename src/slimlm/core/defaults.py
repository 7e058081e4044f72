"""Torch's defaults for new tensors, which belong to the whole process and which users may have set otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Within this context new tensors are float32 on the CPU unless they name something else; a decorator, too.

    The default dtype is one for all threads, so threads that compute meanwhile see float32, too.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # A context of torch.device costs time at every operation, so there is one only where it changes something.
        with nullcontext() if torch.empty(0).is_cpu else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
