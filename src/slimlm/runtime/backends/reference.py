"""The reference: add up the dense parts once, then multiply.

Always right and as fast as the dense layer; it spends the dense layer's memory beside the packed tensors.
"""

import torch
from torch import Tensor

from slimlm.core.parts import Part, dense_of


class Reference:
    """Dense arithmetic of the parts, in the dtype of the activations."""

    def refuses(self, parts: tuple[Part, ...], device: torch.device) -> str | None:
        """It takes every part on every device."""
        del parts, device
        return None

    def prepare(self, parts: tuple[Part, ...], dtype: torch.dtype) -> Tensor:
        """The sum of the parts `[out, in]`, added in float32."""
        return dense_of(parts).to(dtype)

    def matmul(self, x: Tensor, prepared: Tensor) -> Tensor:
        """x W^T."""
        return torch.nn.functional.linear(x, prepared)
