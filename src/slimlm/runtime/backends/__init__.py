"""Ways to multiply by a sum of parts. `reference` is always right; faster ones answer for it or say why not."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from slimlm.core.parts.pack import PartEntries, Parts


@dataclass(frozen=True)
class Stored:
    """A layer's parts as they lie in a checkpoint; a kernel packs them without making a dense matrix of them."""

    shape: tuple[int, int]
    """out, in"""
    entries: PartEntries
    tensors: dict[str, Tensor]
    bias: Tensor | None
    blob: Tensor | None = None
    """what a kernel backend packed these parts into before, uint8 `[bytes]`; None: nothing was kept"""
    works_on: torch.device | None = None
    """where the layer multiplies, if that is not where its tensors rest"""

    @cached_property
    def device(self) -> torch.device:
        """Where the layer multiplies."""
        return self.works_on or next(iter(self.tensors.values())).device

    def parts(self) -> Parts:
        """The parts, unpacked, where the layer multiplies."""
        there = {name: tensor.to(self.device) for name, tensor in self.tensors.items()}
        return self.entries.from_stored(there, self.shape)


class Backend(Protocol):
    """One way to multiply activations by a layer's parts."""

    name: str

    def refuses(self, stored: Stored) -> str | None:
        """None when it can; otherwise the reason, in words for the user."""

    def prepare(self, stored: Stored) -> Any:
        """Repack once, at load or first use, or take the blob that was kept."""

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """`[..., in]` to `[..., out]`, the bias added, in the dtype of x."""
