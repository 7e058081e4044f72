"""slimlm's own kernels for NVIDIA GPUs, written in Triton: 2:4 or dense codes of up to 4 bits, codebooks, an adapter.

One launch multiplies by the base, adds the product with the adapter's second factor and the bias; one before it multiplies by
the adapter's first factor. Activations are float16 or bfloat16 there, sums float32. For more tokens than `tiles.fused_up_to`,
and for activations of 32 or 64 bits, the weight is unpacked for one product (in float32 then) and cuBLAS multiplies. Gradients
flow to the activations and the bias; the parts are frozen.

No GPU has run these kernels yet: Triton's interpreter has, and the machine code has been read (docs/gpu.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlm.runtime.backends import Stored
from slimlm.runtime.gpu import device, layout, products, stacking
from slimlm.runtime.gpu.layout import GpuLayer, Packed, Values
from slimlm.runtime.gpu.products import SecondFactor
from slimlm.runtime.gpu.stacking import Stack


@dataclass
class PreparedOnGpu:
    """A layer in the kernels' layout, with its bias."""

    layer: GpuLayer
    bias: Tensor | None
    """`[out]`, the layer's own, in its dtype"""
    stack: Stack | None = None
    """the stacked weight of which this layer is a view"""


class Gpu:
    """Products of packed layers on a GPU."""

    name = "gpu"

    def refuses(self, stored: Stored) -> str | None:
        """Why the kernels cannot run here, or do not take the layer; None: they can.

        They need Triton and a GPU that it can use, and layers that are on this GPU and fit the layout.
        """
        return device.refuses(stored.device) or layout.unfit(stored.entries, stored.shape)

    def prepare(self, stored: Stored) -> PreparedOnGpu:
        """Pack a layer on the device where its tensors are.

        Raises:
            CheckpointError: the tensors do not fit their description.
        """
        # What is made in inference mode could not be kept for gradients later.
        with torch.inference_mode(False):
            for dtype in products.NARROW:
                products.constants(stored.device, dtype)
            return PreparedOnGpu(layout.lay_out(stored), stored.bias)

    def with_bias(self, prepared: PreparedOnGpu, bias: Tensor | None) -> PreparedOnGpu:
        """A packed layer, which may be part of a stack, with another bias `[out]`."""
        return replace(prepared, bias=bias)

    def matmul(self, x: Tensor, prepared: PreparedOnGpu) -> Tensor:
        """x W^T + bias `[..., out]` for x `[..., in]`, in the dtype of x; not for one layer on two streams at the same time."""
        layer = prepared.layer
        second = None
        if layer.tail is not None and layer.right is not None:
            second = _second_factor(_times_right(x, layer.right, layer.counters), layer.tail)
        if layer.channel_scale is not None:
            x = x * layer.channel_scale.to(x.dtype)
        return products.product(x, layer.base, layer.counters, bias=prepared.bias, second=second)


def _times_right(x: Tensor, right: Packed | Values, counters: Tensor) -> Tensor:
    """x times the adapter's first factor, `[..., ranks]`."""
    if isinstance(right, Packed):
        return products.product(x, right, counters)
    return F.linear(x, right.of(x.dtype))


def _second_factor(t: Tensor, tail: layout.Tail) -> SecondFactor | None:
    if tail.packed is not None:
        return SecondFactor(t, tail.packed.words, tail.packed.scale, tail.packed.codebook, tail.group)
    return None if tail.values is None else SecondFactor(t, tail.values, None, None, tail.group)


class StackedLayers:
    """Layers that share their input, multiplied in one launch (two with adapters).

    They become views of one weight, unless they are already, and can still multiply by themselves, as they do with gradients,
    for more tokens than `tiles.fused_up_to` and for activations of 32 or 64 bits.

    Args:
        prepared: layers that `stacking.refuses` accepts.
    """

    def __init__(self, prepared: Sequence[PreparedOnGpu]) -> None:
        self.prepared = tuple(prepared)
        stack = prepared[0].stack
        if stack is None or [id(own.layer) for own in prepared] != [id(view) for view in stack.layers]:
            with torch.inference_mode(False):
                stack = stacking.stack([own.layer for own in prepared])
            for own, view in zip(prepared, stack.layers, strict=True):
                own.layer, own.stack = view, stack
        self.stack: Stack = stack
        self.bias = self._biases()

    def _biases(self) -> Tensor | None:
        """The biases of all rows `[rows]`, zero for padding and layers without one."""
        found = [own.bias for own in self.prepared if own.bias is not None]
        if not found:
            return None
        bias = found[0].new_zeros(self.stack.base.rows)
        for own, rows in zip(self.prepared, self.stack.rows, strict=True):
            if own.bias is not None:
                bias[rows] = own.bias
        return bias.detach()

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Each layer's x W^T + bias `[..., out]` for x `[..., in]`."""
        if not products.fits_one_launch(x, self.stack.base) or (torch.is_grad_enabled() and x.requires_grad):
            return tuple([Gpu().matmul(x, own) for own in self.prepared])
        y = products.stacked_product(x, self.stack, self.bias)
        return tuple([y[..., rows] for rows in self.stack.rows])
