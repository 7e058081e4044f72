"""Backend selection: the fastest backend that can multiply by a layer, and why faster ones cannot."""

from dataclasses import dataclass
from typing import get_args

from slimlm.core.arguments import one_of
from slimlm.core.errors import KernelError
from slimlm.kernels import native
from slimlm.runtime.backends import Backend, Stored
from slimlm.runtime.backends.cpu import Cpu
from slimlm.runtime.backends.reference import Reference
from slimlm.runtime.backends.triton import Gpu
from slimlm.runtime.kernel_names import Kernels


@dataclass(frozen=True)
class Selection:
    """The backend selected for one layer."""

    backend: Backend
    """The backend."""
    refused: str | None
    """Why a faster backend does not take the layer; None: this one is the fastest, or the one that was asked for."""


def uses_cpu_kernels(kernels: Kernels) -> bool:
    """Whether this choice of kernels includes the CPU kernels and their library can be used on this machine."""
    return kernels not in ("reference", "gpu") and native.library() is not None


_REFERENCE = Reference()
_NAMED: dict[str, Cpu | Gpu] = {"precise": Cpu("precise"), "fast": Cpu("fast"), "gpu": Gpu()}


def reference_because(reason: str) -> Selection:
    """The reference backend for a layer that kernels could take but should not.

    Args:
        reason: why not the kernels; reported to the user.
    """
    return Selection(_REFERENCE, reason)


def select_backend(stored: Stored, kernels: Kernels) -> Selection:
    """Select the backend of a layer.

    Args:
        stored: the layer's parts and the device of its products.
        kernels: the arithmetic that was asked for.

    Raises:
        KernelError: `kernels` is none of the choices, or names kernels that do not take this layer.
    """
    one_of(kernels, "kernels", get_args(Kernels), KernelError)
    if kernels == "reference":
        return Selection(_REFERENCE, None)
    automatic = "gpu" if stored.device.type == "cuda" else "precise"
    backend = _NAMED[automatic if kernels == "auto" else kernels]
    reason = backend.refuses(stored)
    if reason is None:
        return Selection(backend, None)
    if kernels != "auto":
        raise KernelError(f'the {kernels} kernels were asked for, but {reason}; "auto" would take the reference there')
    return Selection(_REFERENCE, reason)
