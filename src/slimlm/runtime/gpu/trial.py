"""The smallest kernel there is, started to find out whether Triton can start kernels at all."""

from typing import Any

import torch
import triton
import triton.language as tl

from slimlm.core.errors import KernelError

_WRITTEN = 7


def _write(out: Any, number: tl.constexpr) -> None:
    tl.store(out, number)


_KERNEL = triton.jit(_write)


def start(device: torch.device) -> None:
    """Write a number on a device by a kernel and read it.

    Raises:
        KernelError: another number was written. What Triton and the driver raise is raised, too.
    """
    with torch.inference_mode(False):
        out = torch.zeros(1, dtype=torch.int32, device=device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            _KERNEL[(1,)](out, number=_WRITTEN)
    else:
        _KERNEL[(1,)](out, number=_WRITTEN)
    if (found := int(out)) != _WRITTEN:
        raise KernelError(f"a kernel that writes {_WRITTEN} wrote {found}")
