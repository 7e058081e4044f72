"""The reference: add up the dense parts once, then multiply.

It takes every part and is as fast as the dense layer; it needs the dense layer's memory in addition to the packed tensors.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slimlm.runtime.backends import Stored


@dataclass
class DenseWeight:
    """The sum of the parts, in the dtype and on the device of its last product."""

    values: tuple[Tensor, Tensor | None]
    """The weight `[out, in]` and the bias `[out]`; in one value, which threads replace whole."""
    stored: Stored

    def fitting(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, made again from the parts where x `[..., in]` has another dtype or device than the last one."""
        found = self.values
        if found[0].dtype != x.dtype or found[0].device != x.device:
            bias = self.stored.bias
            self.values = found = self.stored.parts().dense().to(x), None if bias is None else bias.to(x)
        return found


class Reference:
    """Dense arithmetic of the parts, in the dtype of the activations."""

    name = "reference"

    def refuses(self, stored: Stored) -> str | None:
        """None: it takes every part on every device."""
        del stored
        return None

    def prepare(self, stored: Stored) -> DenseWeight:
        """The sum of the parts `[out, in]`, added in float32."""
        return DenseWeight((stored.parts().dense(), None if stored.bias is None else stored.bias.float()), stored)

    def with_bias(self, prepared: DenseWeight, bias: Tensor | None) -> DenseWeight:
        """The same sum with another bias `[out]`."""
        weight = prepared.values[0]
        return DenseWeight((weight, None if bias is None else bias.to(weight)), replace(prepared.stored, bias=bias))

    def matmul(self, x: Tensor, prepared: DenseWeight) -> Tensor:
        """x W^T + bias `[..., out]` for x `[..., in]`."""
        return torch.nn.functional.linear(x, *prepared.fitting(x))
