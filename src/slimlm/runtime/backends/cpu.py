"""slimlm's own kernels for CPUs: 2:4, 2 to 8 bits, codebooks and low-rank parts, multiplied without unpacking them.

Activations are float32 or bfloat16 (other types are widened to float32 on the way in and narrowed on the way out) and
become integers inside, with one scale for 128 of them: 8 bits in "fast", 16 bits in "precise", which errs by less than
rounding the activations to bfloat16 would. Gradients flow to the activations and the bias; the parts are frozen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.errors import CheckpointError
from slimlm.core.mask import Pattern
from slimlm.core.parts.base import fitting, under
from slimlm.core.parts.kernel_layout import KernelLayout, MatrixLayout, ProductLayout, Refusal
from slimlm.core.parts.pack import PartEntries, tensors_of
from slimlm.kernels import native
from slimlm.runtime.backends import Stored
from slimlm.runtime.cpu import bindings
from slimlm.runtime.cpu.bindings import Matrix, PackedProducts, Precision

_TWO_OF_FOUR = Pattern.parse("2:4")


@dataclass
class PreparedOnCpu:
    """A layer in the kernels' layout."""

    blob: Tensor
    """uint8 `[size]`"""
    bias: Tensor | None
    """float32 `[out]`"""
    stored: Stored

    @cached_property
    def packed(self) -> PackedProducts:
        """The layer ready to multiply."""
        return PackedProducts([self.blob], [self.bias], [self.stored.shape[0]], self.stored.shape[1])


class Cpu:
    """Products of packed layers on the CPU."""

    name = "cpu"

    def __init__(self, precision: Precision) -> None:
        self.precision: Precision = precision

    def refuses(self, stored: Stored) -> str | None:
        """Why the kernels cannot run here, or do not take the layer; None: they can."""
        if native.library() is None:
            return f"there are no CPU kernels: {native.status().reason}"
        if stored.device.type != "cpu":
            return f"the layer is on {stored.device}, and these kernels run on the CPU"
        return unfit(stored.entries) or _lacks_zero(stored)

    def prepare(self, stored: Stored) -> PreparedOnCpu:
        """Pack a layer, unless that was done earlier.

        Raises:
            CheckpointError: its tensors do not fit their description.
        """
        blob = pack(stored) if stored.blob is None else stored.blob
        return PreparedOnCpu(blob, _floats(stored.bias), stored)

    def with_bias(self, prepared: PreparedOnCpu, bias: Tensor | None) -> PreparedOnCpu:
        """A packed layer with another bias `[out]`."""
        return PreparedOnCpu(prepared.blob, _floats(bias), replace(prepared.stored, bias=bias))

    def matmul(self, x: Tensor, prepared: PreparedOnCpu) -> Tensor:
        """x W^T + bias `[..., out]` for x `[..., in]`, in the dtype of x."""
        if torch.is_grad_enabled() and _wants_gradient(x, prepared):
            return _Product.apply(x, prepared.stored.bias, prepared, self.precision)
        if torch.compiler.is_compiling():
            return _product(x, prepared.blob, prepared.bias, prepared.stored.shape[0], self.precision)
        return prepared.packed(x, self.precision)[0]


def _floats(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()


def unfit(entries: PartEntries) -> str | None:
    """Why the layout cannot hold parts with these entries; None: it can."""
    base = entries.base.kernel_layout()
    if isinstance(base, ProductLayout):
        return "its base is of low rank; the kernels want a matrix there"
    factors: list[MatrixLayout] = []
    for entry in entries.added:
        layout = entry.kernel_layout()
        if isinstance(layout, Refusal):
            return layout.reason
        if not isinstance(layout, ProductLayout):
            return f"the kernels add low-rank parts to a base, not a {entry.kind} part"
        factors += [layout.left, layout.right]
    if any(factor.zero for factor in factors):
        return "a factor of its adapter has zeros beside its scales"
    if isinstance(base, Refusal):
        return base.reason
    if base.mask is not None and base.elements == "floats":
        return "its base is pruned but not quantized; the kernels take pruned weights of 2 to 8 bits"
    return next((reason for layout in (base, *factors) if (reason := _unfit(layout))), None)


def _unfit(layout: MatrixLayout) -> str | None:
    if layout.elements == "indices" and layout.bits > 4:
        return f"its codebook has {layout.bits} bits; the kernels take codebooks of up to 4"
    if layout.elements == "floats" and layout.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its values are {str(layout.dtype).removeprefix('torch.')}; the kernels take float32, float16 and bfloat16"
    return None


def _lacks_zero(stored: Stored) -> str | None:
    """A codebook under a mask, in the layout without places, where no code can stand for what is left out."""
    base = stored.entries.base.kernel_layout()
    if not isinstance(base, MatrixLayout) or base.mask is None or base.elements != "indices":
        return None
    if _two_of_four(base, stored.shape[1]) or (tensors_of("base", stored.tensors)["codebook"] == 0).any():
        return None
    return f"its codebook has no zero for the elements that its mask ({base.mask}) drops"


def _two_of_four(layout: MatrixLayout, width: int) -> bool:
    """Whether a masked matrix is laid out as 2:4.

    Groups that would tear a four apart are laid out as zeros in full. So are grids with zeros: a zero multiplies the sum of the
    inputs of its weights, and under a mask every row would have sums of its own.
    """
    size = layout.group_size
    whole = not isinstance(size, int) or size >= width or size % 4 == 0
    return layout.mask == _TWO_OF_FOUR and whole and not layout.zero


def pack(stored: Stored) -> Tensor:
    """The layer's bytes in the kernels' layout, uint8 `[size]`."""
    filled = stored.entries.filled()
    return pack_sum([(entry.kernel_layout(), tensors_of(slot, stored.tensors)) for slot, entry in filled], stored.shape)


def pack_sum(parts: Sequence[tuple[KernelLayout | Refusal, dict[str, Tensor]]], shape: tuple[int, int]) -> Tensor:
    """The bytes, uint8 `[size]`, of a base and up to eight low-rank parts `[out, in]`: layouts and stored tensors by suffix."""
    # The matrices hold addresses only; this list keeps alive what lies there.
    alive: list[Tensor] = []
    matrices = []
    for part, tensors in parts:
        for name, layout, sizes in _matrices(part, shape):
            own = under(name, tensors) if name else tensors
            matrices.append(_matrix(layout, own, sizes, name == "left", alive))
    return bindings.pack(matrices)


def _matrices(layout: KernelLayout | Refusal, shape: tuple[int, int]) -> Iterator[tuple[str, MatrixLayout, tuple[int, int]]]:
    """Of a part `[out, in]`: what its matrices' tensors begin with, their layouts and shapes, in the order of the bindings."""
    if isinstance(layout, Refusal):
        raise CheckpointError(f"a layer that the kernels do not take was to be packed for them: {layout.reason}")
    if isinstance(layout, MatrixLayout):
        yield "", layout, shape
    else:
        yield "right", layout.right, (layout.rank, shape[1])
        yield "left", layout.left, (layout.rank, shape[0])


def _matrix(
    layout: MatrixLayout, tensors: dict[str, Tensor], shape: tuple[int, int], transposed: bool, alive: list[Tensor]
) -> Matrix:
    def address(name: str, dtype: torch.dtype, size: tuple[int, ...]) -> int:
        tensor = tensors[name].contiguous()
        fitting(name, tensor, size)
        alive.append(tensor.to(dtype))
        return bindings.address(alive[-1], dtype, alive[-1].numel())

    # Their number is checked by the library, which is given the bytes.
    alive.append(tensors[""].contiguous())
    values = bindings.address(alive[-1], torch.uint8, alive[-1].numel())
    found = Matrix(rows=shape[0], columns=shape[1], transposed=int(transposed), values=values)
    found.values_bytes = alive[-1].numel() * alive[-1].element_size()
    if layout.dtype is not None:
        found.type = bindings.float_type(layout.dtype)
        return found
    scale = tensors["scale"]
    found.bits = layout.bits
    found.scale_type = bindings.float_type(scale.dtype if scale.dtype == torch.float16 else torch.float32)
    sizes = grid.scale_shape(shape, layout.group_size)
    found.scale = address("scale", torch.float16 if scale.dtype == torch.float16 else torch.float32, sizes)
    found.scale_rows, found.scale_columns = sizes
    found.group = layout.group_size if isinstance(layout.group_size, int) else 0
    if layout.zero:
        found.zero = address("zero", torch.uint8, (bitstream.packed_bytes(sizes[0] * sizes[1], layout.bits),))
    if layout.elements == "indices":
        found.levels = address("codebook", torch.float16, (2**layout.bits,))
    if layout.channel_scale:
        found.input_scale = address("channel_scale", torch.float16, (shape[1],))
    if layout.mask is not None:
        found.keep = address("mask", torch.uint8, (shape[0], bitstream.packed_bytes(shape[1], 1)))
        found.two_of_four = int(_two_of_four(layout, shape[1]))
    return found


def _wants_gradient(x: Tensor, prepared: PreparedOnCpu) -> bool:
    bias = prepared.stored.bias
    return x.requires_grad or (bias is not None and bias.requires_grad)


class _Product(torch.autograd.Function):
    """The product with gradients to x and the bias; the weight is unpacked for the backward pass and dropped again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, prepared: PreparedOnCpu, precision: Precision) -> Tensor:
        del bias  # of the prepared layer; an argument so that its gradient is asked for
        ctx.prepared = prepared
        return prepared.packed(x, precision)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        weight = ctx.prepared.stored.parts().dense() if ctx.needs_input_grad[0] else None
        to_x = None if weight is None else (gradient.float() @ weight).to(gradient.dtype)
        to_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None, None


@torch.library.custom_op("slimlm::packed_linear", mutates_args=())
def _product(x: Tensor, blob: Tensor, bias: Tensor | None, out: int, precision: str) -> Tensor:
    """The product as one operation that is opaque to torch.compile."""
    return PackedProducts([blob], [bias], [out], x.shape[-1])(x, "fast" if precision == "fast" else "precise")[0]


@_product.register_fake
def _(x: Tensor, blob: Tensor, bias: Tensor | None, out: int, precision: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)
