"""Backends, which multiply by a sum of parts. The reference takes every layer; faster ones give a reason where they do not."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from slimlm.core.parts.pack import PartEntries, Parts


@dataclass(frozen=True)
class Stored:
    """A layer's parts as a checkpoint stores them; kernels pack them without making a dense matrix of them."""

    shape: tuple[int, int]
    """The shape (out, in)."""
    entries: PartEntries
    """The entries of the parts."""
    tensors: dict[str, Tensor]
    """The stored tensors by name."""
    bias: Tensor | None
    """The bias `[out]`."""
    blob: Tensor | None = None
    """The parts as packed by the CPU kernels, uint8 `[bytes]`; None: they are not packed."""
    compute_device: torch.device | None = None
    """The device of the layer's products; None: that of its tensors."""

    @cached_property
    def device(self) -> torch.device:
        """The device on which the layer multiplies."""
        return self.compute_device or next(iter(self.tensors.values())).device

    def parts(self) -> Parts:
        """The parts, unpacked, on the device on which the layer multiplies."""
        there = {name: tensor.to(self.device) for name, tensor in self.tensors.items()}
        return self.entries.from_stored(there, self.shape)


class Backend(Protocol):
    """Multiplies activations by a layer's parts."""

    name: str

    def refuses(self, stored: Stored) -> str | None:
        """Why it does not take a layer, for the user; None: it does."""

    def prepare(self, stored: Stored) -> Any:
        """Repack a layer once, at load or first use, unless it was packed earlier."""

    def with_bias(self, prepared: Any, bias: Tensor | None) -> Any:
        """A layer that is repacked already, with another bias `[out]`."""

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """`[..., in]` to `[..., out]`, the bias added, in the dtype of x."""
