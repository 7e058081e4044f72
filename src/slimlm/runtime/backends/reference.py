"""The reference: add up the dense parts once, then multiply.

It takes every part and is as fast as the dense layer; it needs the dense layer's memory in addition to the packed tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.runtime.backends import Stored


@dataclass
class DenseWeight:
    """The sum of the parts, in the dtype and on the device of its last product."""

    weight: Tensor
    """`[out, in]`"""
    bias: Tensor | None
    stored: Stored

    def fit(self, x: Tensor) -> None:
        """Make weight and bias again from the parts, where x `[..., in]` has another dtype or device."""
        if self.weight.dtype == x.dtype and self.weight.device == x.device:
            return
        self.weight = self.stored.parts().dense().to(x)
        self.bias = None if self.stored.bias is None else self.stored.bias.to(x)


class Reference:
    """Dense arithmetic of the parts, in the dtype of the activations."""

    name = "reference"

    def refuses(self, stored: Stored) -> str | None:
        """None: it takes every part on every device."""
        del stored
        return None

    def prepare(self, stored: Stored) -> DenseWeight:
        """The sum of the parts `[out, in]`, added in float32."""
        return DenseWeight(stored.parts().dense(), None if stored.bias is None else stored.bias.float(), stored)

    def matmul(self, x: Tensor, prepared: DenseWeight) -> Tensor:
        """x W^T + bias `[..., out]` for x `[..., in]`."""
        prepared.fit(x)
        return torch.nn.functional.linear(x, prepared.weight, prepared.bias)
