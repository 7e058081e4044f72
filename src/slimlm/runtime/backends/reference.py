"""The reference: add up the dense parts once, then multiply.

Always right and as fast as the dense layer; it spends the dense layer's memory beside the packed tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.runtime.backends import Stored


@dataclass
class Dense:
    """The sum of the parts, kept in the dtype and on the device that it was last multiplied in."""

    weight: Tensor
    """`[out, in]`"""
    bias: Tensor | None
    stored: Stored

    def fit(self, x: Tensor) -> None:
        """Make weight and bias anew, from the parts, where x is of another dtype or elsewhere."""
        if self.weight.dtype == x.dtype and self.weight.device == x.device:
            return
        self.weight = self.stored.parts().dense().to(x)
        self.bias = None if self.stored.bias is None else self.stored.bias.to(x)


class Reference:
    """Dense arithmetic of the parts, in the dtype of the activations."""

    name = "reference"

    def refuses(self, stored: Stored) -> str | None:
        """It takes every part on every device."""
        del stored
        return None

    def prepare(self, stored: Stored) -> Dense:
        """The sum of the parts `[out, in]`, added in float32."""
        return Dense(stored.parts().dense(), None if stored.bias is None else stored.bias.float(), stored)

    def matmul(self, x: Tensor, prepared: Dense) -> Tensor:
        """x W^T + bias."""
        prepared.fit(x)
        return torch.nn.functional.linear(x, prepared.weight, prepared.bias)
