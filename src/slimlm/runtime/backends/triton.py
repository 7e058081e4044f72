"""slimlm's own kernels for NVIDIA GPUs, written in Triton: 2:4 or dense codes of up to 4 bits, tables of 16 levels, an adapter.

One launch multiplies by the base, adds the adapter's second half and the bias; one before it takes the adapter's first half.
Activations are float16 or bfloat16 there, sums float32. For more tokens than `tiles.fused_up_to`, and for activations of
32 or 64 bits, the weight is unpacked for one product (in float32 then) and cuBLAS multiplies. Gradients flow to the
activations and the bias; the parts are frozen.

No GPU has run these kernels yet: Triton's interpreter has, and the machine code has been read (docs/gpu.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlm.runtime.backends import Stored
from slimlm.runtime.gpu import device, layout, products
from slimlm.runtime.gpu.layout import Joint, Layer, Packed, Values


@dataclass
class Ready:
    """A layer in the kernels' layout."""

    layer: Layer
    bias: Tensor | None
    """`[out]`, the layer's own, in its dtype"""
    joint: Joint | None = None
    """the weight of which this layer is a piece"""


class Gpu:
    """Products of packed layers on a GPU."""

    name = "gpu"

    def refuses(self, stored: Stored) -> str | None:
        """Without Triton or a card that it can use, off that card, and for parts that the layout does not hold."""
        return device.refuses(stored.device) or layout.unfit(stored.entries, stored.shape)

    def prepare(self, stored: Stored) -> Ready:
        """Pack a layer where its tensors lie; raises CheckpointError where these do not fit its description."""
        # What is made in inference mode could not be kept for gradients later.
        with torch.inference_mode(False):
            for dtype in products.NARROW:
                products.constants(stored.device, dtype)
            return Ready(layout.lay_out(stored), stored.bias)

    def matmul(self, x: Tensor, prepared: Ready) -> Tensor:
        """x W^T + bias, in the dtype of x. One layer must not run on two streams at the same time."""
        layer, t = prepared.layer, None
        tail: tuple[Tensor, Tensor | None, Tensor | None, int] | None = None
        if layer.tail is not None and layer.right is not None:
            t = _first_half(x, layer.right, layer.counters)
            own = layer.tail
            if own.packed is not None:
                tail = own.packed.words, own.packed.scale, own.packed.levels, own.group
            elif own.values is not None:
                tail = own.values, None, None, own.group
        if layer.channel_scale is not None:
            x = x * layer.channel_scale.to(x.dtype)
        return products.product(x, layer.base, layer.counters, bias=prepared.bias, t=t, tail=tail)


class Together:
    """Layers that share their input, multiplied in one launch (two with adapters).

    They become pieces of one weight, where they are not yet, and still multiply by themselves, too: with gradients, for more
    tokens than `tiles.fused_up_to` and for activations of 32 or 64 bits.
    """

    def __init__(self, ready: Sequence[Ready]) -> None:
        self.ready = tuple(ready)
        joint = ready[0].joint
        if joint is None or [id(own.layer) for own in ready] != [id(piece) for piece in joint.layers]:
            with torch.inference_mode(False):
                joint = layout.join([own.layer for own in ready])
            for own, piece in zip(ready, joint.layers, strict=True):
                own.layer, own.joint = piece, joint
        self.joint: Joint = joint
        self.bias = self._biases()

    def _biases(self) -> Tensor | None:
        """Of all rows `[rows]`, zero where a layer has none and where rows fill up."""
        found = [own.bias for own in self.ready if own.bias is not None]
        if not found:
            return None
        bias = found[0].new_zeros(self.joint.base.rows)
        for own, rows in zip(self.ready, self.joint.rows, strict=True):
            if own.bias is not None:
                bias[rows] = own.bias
        return bias.detach()

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """Each layer's x W^T + bias."""
        if not products.fits_one_launch(x, self.joint.base) or (torch.is_grad_enabled() and x.requires_grad):
            return tuple([Gpu().matmul(x, own) for own in self.ready])
        y = products.joint_product(x, self.joint, self.bias)
        return tuple([y[..., rows] for rows in self.joint.rows])


def _first_half(x: Tensor, right: Packed | Values, counters: Tensor) -> Tensor:
    """x R^T `[..., ranks]`."""
    if isinstance(right, Packed):
        return products.product(x, right, counters)
    return F.linear(x, right.of(x.dtype))
