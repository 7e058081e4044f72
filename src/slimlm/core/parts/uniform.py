"""Uniform: integer codes on an even grid.

    weight = (code - zero) x scale (x channel_scale, per input, where there is one)

The grid is symmetric where there are no zeros, which is zero = 0; else each scale comes with a zero, the code that stands for
zero, and with b bits the grid lies anywhere between [0, 2^b - 1] x scale and [1 - 2^b, 0] x scale.

Stored: the codes, each with 2^(bits-1) added, as a stream of bits (slimlm.core.bits); scales per tensor, per channel or per
group of inputs; zeros as the codes are, all in one stream without gaps.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.parts.base import Expected, Part, describe_group_size, expected_scale, joined
from slimlm.core.parts.elementwise import Elementwise, ElementwiseEntry, padding_set
from slimlm.core.parts.fields import Fields, Json
from slimlm.core.parts.kernel_layout import MatrixLayout, MatrixOperand
from slimlm.core.parts.trainable import TrainableElements, TrainableScale, Trains, straight_through


@dataclass(frozen=True)
class UniformEntry(ElementwiseEntry):
    """What a checkpoint says of a `Uniform`."""

    bits: int
    group_size: grid.GroupSize
    channel_scale: bool = False
    """whether there is a factor for each input"""
    zero: bool = False
    """whether each scale comes with a zero"""

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read the fields; see `Entry.parse`."""
        zero = "zero" in fields.data and fields.flag("zero")
        return cls(fields.bits(least=2), fields.group_size(), fields.flag("channel_scale"), zero)

    def to_json(self) -> dict[str, Json]:
        """The fields; `zero` only where it is true, as older readers do not know it."""
        fields = super().to_json()
        return fields if self.zero else {name: value for name, value in fields.items() if name != "zero"}

    @property
    def element_bits(self) -> int:
        """Bits of a code."""
        return self.bits

    def expected_beside(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The scales, the factors of the inputs and the zeros."""
        expected = {"scale": expected_scale(shape, self.group_size)}
        if self.zero:
            expected["zero"] = Expected((torch.uint8,), (bitstream.packed_bytes(self._zeros(shape), self.bits),))
        if self.channel_scale:
            expected["channel_scale"] = Expected((torch.float16,), (shape[1],))
        return expected

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The codes int8 `[rows, count]`."""
        return (bitstream.unpack(packed, self.bits, count) - 2 ** (self.bits - 1)).view(torch.int8)

    def assemble(self, elements: Tensor, beside: dict[str, Tensor]) -> "Uniform":
        """The part of codes `[out, in]`, and its scales `[rows, groups]`, zeros and channel scales `[in]` by suffix."""
        scale, zero = beside["scale"], None
        if self.zero:
            zero = self.unpack(beside["zero"][None], scale.numel()).view(scale.shape)
        return Uniform(elements, scale, self.bits, self.group_size, beside.get("channel_scale"), zero)

    def check(self, tensors: dict[str, Tensor], shape: tuple[int, int], name: str, *, kept: int | None = None) -> Iterator[str]:
        """Faults that packing never produces in a part `[out, in]`; see `ElementwiseEntry.check`."""
        yield from super().check(tensors, shape, name, kept=kept)
        if self.zero:
            yield from padding_set(joined(name, "zero"), tensors["zero"][None], self._zeros(shape) * self.bits)

    def _zeros(self, shape: tuple[int, int]) -> int:
        rows, groups = grid.scale_shape(shape, self.group_size)
        return rows * groups

    @property
    def trains(self) -> Trains:
        """Scales and codes."""
        return Trains.SCALES | Trains.CODES

    def summary(self) -> str:
        """Such as "4-bit (groups of 32)", or "4-bit with zeros (groups of 32)"."""
        return f"{self.bits}-bit{' with zeros' if self.zero else ''} ({describe_group_size(self.group_size)})"

    def kernel_layout(self) -> MatrixLayout:
        """Signed integers under scales, and zeros where there are any."""
        return MatrixLayout("integers", self.bits, group_size=self.group_size, channel_scale=self.channel_scale, zero=self.zero)


@dataclass(frozen=True)
class Uniform(Elementwise):
    """Integer codes on an even grid: weight = (codes - zero) x scale (x channel_scale, per input, where there is one)."""

    codes: Tensor
    """int8 `[out, in]`, from -2^(bits-1) to 2^(bits-1) - 1"""
    scale: Tensor
    """`[1, 1]`, `[out, 1]` or `[out, groups]`, in its storage dtype"""
    bits: int
    group_size: grid.GroupSize
    channel_scale: Tensor | None = None
    """float16 `[in]`, or None for ones"""
    zero: Tensor | None = None
    """int8, of the shape of `scale`, the code that stands for zero; None: 0 everywhere"""

    @property
    def elements(self) -> Tensor:
        """The codes."""
        return self.codes

    def dense(self) -> Tensor:
        """(codes - zero) x scale x channel_scale, float32 `[out, in]`."""
        dense = grid.dense(self.codes, self.scale, self.group_size, self.zero)
        return dense if self.channel_scale is None else dense * self.channel_scale.float()

    def pack(self, elements: Tensor) -> Tensor:
        """Codes `[rows, count]` as unsigned ones in a stream of bits."""
        return bitstream.pack(elements.view(torch.uint8) + 2 ** (self.bits - 1), self.bits)

    def beside(self) -> dict[str, Tensor]:
        """The scales, the factors of the inputs and the zeros."""
        tensors = {"scale": self.scale.contiguous()}
        if self.zero is not None:
            tensors["zero"] = self.pack(self.zero.reshape(1, -1))[0]
        if self.channel_scale is not None:
            tensors["channel_scale"] = self.channel_scale
        return tensors

    def describe(self) -> UniformEntry:
        """The entry."""
        return UniformEntry(self.bits, self.group_size, self.channel_scale is not None, self.zero is not None)

    def trainable(self, trains: Trains) -> TrainableElements:
        """Scales, and codes as latent ones that are rounded in the forward pass; zeros stay."""
        return _TrainableUniform(self, trains)

    def kernel_operand(self) -> MatrixOperand:
        """Codes, scales and zeros."""
        layout = self.describe().kernel_layout()
        return MatrixOperand(layout, self.codes, self.scale, channel_scale=self.channel_scale, zero=self.zero)


def as_uniform(part: Part) -> Uniform:
    """The part itself, typed as `Uniform`, where the caller knows that it is one."""
    assert isinstance(part, Uniform), f"integer codes were expected, and this is {part.summary()}"
    return part


class _TrainableUniform(TrainableElements):
    def __init__(self, part: Uniform, trains: Trains) -> None:
        super().__init__()
        self.original = part
        self.scale = TrainableScale(part.scale, trains)
        self.codes = nn.Parameter(part.codes.float(), requires_grad=Trains.CODES in trains)

    def dense(self) -> Tensor:
        codes: Tensor = self.codes
        if self.codes.requires_grad:
            codes = straight_through(self.codes, grid.nearest_code(self.codes, self.original.bits))
        if self.original.zero is not None:
            codes = codes - grid.spread(self.original.zero, codes.shape[1], self.original.group_size)
        dense = codes * grid.spread(self.scale(), codes.shape[1], self.original.group_size)
        return dense if self.original.channel_scale is None else dense * self.original.channel_scale.float()

    def part(self) -> Uniform:
        part = self.original
        codes = grid.nearest_code(self.codes.detach(), part.bits).to(torch.int8)
        return Uniform(codes, self.scale.stored(), part.bits, part.group_size, part.channel_scale, part.zero)
