"""Who multiplies: the fastest backend that takes a layer, and why the others do not."""

from dataclasses import dataclass
from typing import get_args

from slimlm.core.errors import KernelError
from slimlm.runtime.backends import Backend, Stored
from slimlm.runtime.backends.cpu import Cpu
from slimlm.runtime.backends.reference import Reference
from slimlm.runtime.backends.triton import Gpu
from slimlm.runtime.cpu import native
from slimlm.runtime.kernel_names import Kernels


@dataclass(frozen=True)
class Choice:
    """A backend for one layer."""

    backend: Backend
    refused: str | None
    """why a faster one was not taken, in words; None where none was passed over"""


def available(wanted: Kernels) -> bool:
    """Whether CPU kernels are asked for and there are any on this machine."""
    return wanted not in ("reference", "gpu") and native.library() is not None


_REFERENCE = Reference()
_NAMED: dict[str, Cpu | Gpu] = {"precise": Cpu("precise"), "fast": Cpu("fast"), "gpu": Gpu()}


def passed_over(reason: str) -> Choice:
    """The reference, where kernels would take a layer and are not the faster ones."""
    return Choice(_REFERENCE, reason)


def choose(stored: Stored, wanted: Kernels) -> Choice:
    """The backend for a layer. Raises KernelError where kernels are asked for by name and none takes the layer."""
    if wanted not in get_args(Kernels):
        raise KernelError(f"kernels = {wanted!r}: give one of {', '.join(get_args(Kernels))}")
    if wanted == "reference":
        return Choice(_REFERENCE, None)
    automatic = "gpu" if stored.device.type == "cuda" else "precise"
    backend = _NAMED[automatic if wanted == "auto" else wanted]
    reason = backend.refuses(stored)
    if reason is None:
        return Choice(backend, None)
    if wanted != "auto":
        raise KernelError(f'the {wanted} kernels were asked for, but {reason}; "auto" would take the reference there')
    return Choice(_REFERENCE, reason)
