"""Ways to multiply by a sum of parts. `reference` is always right; faster ones answer for it or say why not."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from slimlm.core.parts import Description, Part, unpack_parts


@dataclass(frozen=True)
class Stored:
    """A layer's parts as they lie in a checkpoint; a kernel packs them without making a dense matrix of them."""

    shape: tuple[int, int]
    """out, in"""
    descriptions: Sequence[Description]
    tensors: dict[str, Tensor]
    bias: Tensor | None
    blob: Tensor | None = None
    """what a kernel backend packed these parts into before, uint8 `[bytes]`; None: nothing was kept"""
    compute_device: torch.device | None = None
    """where the layer multiplies; None: where its tensors are"""

    @cached_property
    def device(self) -> torch.device:
        """Where the layer multiplies."""
        return self.compute_device or next(iter(self.tensors.values())).device

    def parts(self) -> tuple[Part, ...]:
        """The parts, unpacked, where the layer multiplies."""
        there = {name: tensor.to(self.device) for name, tensor in self.tensors.items()}
        return unpack_parts(list(self.descriptions), there, self.shape)


class Backend(Protocol):
    """One way to multiply activations by a layer's parts."""

    name: str

    def refuses(self, stored: Stored) -> str | None:
        """None when it can; otherwise the reason, in words for the user."""

    def prepare(self, stored: Stored) -> Any:
        """Repack once, at load or first use, or take the blob that was kept."""

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """`[..., in]` to `[..., out]`, the bias added, in the dtype of x."""
