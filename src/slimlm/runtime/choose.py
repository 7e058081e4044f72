"""Who multiplies: the fastest backend that takes a layer, and why the others do not."""

from dataclasses import dataclass
from typing import Literal, get_args

from slimlm.core.errors import KernelError
from slimlm.runtime import native
from slimlm.runtime.backends import Backend, Stored
from slimlm.runtime.backends.cpu import Cpu
from slimlm.runtime.backends.reference import Reference

Kernels = Literal["auto", "precise", "fast", "reference"]
"""Whose arithmetic: kernels with 16-bit ("precise") or 8-bit activations ("fast"), or dense matrices ("reference").

"auto" is "precise" where there are kernels for a layer, else "reference"."""


@dataclass(frozen=True)
class Choice:
    """A backend for one layer."""

    backend: Backend
    refused: str | None
    """why a faster one was not taken, in words; None where none was passed over"""


def available(wanted: Kernels) -> bool:
    """Whether kernels are asked for and there are any on this machine."""
    return wanted != "reference" and native.library() is not None


_REFERENCE = Reference()
_CPU = {"precise": Cpu("precise"), "fast": Cpu("fast")}


def choose(stored: Stored, wanted: Kernels) -> Choice:
    """The backend for a layer. Raises KernelError where kernels are asked for by name and none takes the layer."""
    if wanted not in get_args(Kernels):
        raise KernelError(f"kernels = {wanted!r}: give one of {', '.join(get_args(Kernels))}")
    if wanted == "reference":
        return Choice(_REFERENCE, None)
    cpu = _CPU["precise" if wanted == "auto" else wanted]
    reason = cpu.refuses(stored)
    if reason is None:
        return Choice(cpu, None)
    if wanted != "auto":
        raise KernelError(f'the {wanted} kernels were asked for, but {reason}; "auto" would take the reference there')
    return Choice(_REFERENCE, reason)
