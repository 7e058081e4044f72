"""Uniform: integer codes on an even grid.

    weight = code x scale (x channel_scale, per input, where there is one)

Stored: the codes, each with 2^(bits-1) added, as a stream of bits (slimlm.core.bits); scales per tensor, per channel or per
group of inputs.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.parts.base import Expected, Part, describe_group_size, expected_scale
from slimlm.core.parts.elementwise import Elementwise, ElementwiseEntry
from slimlm.core.parts.fields import Fields
from slimlm.core.parts.kernel_layout import MatrixLayout, MatrixOperand
from slimlm.core.parts.trainable import TrainableElements, TrainableScale, straight_through


@dataclass(frozen=True)
class UniformEntry(ElementwiseEntry):
    """What a checkpoint says of a `Uniform`."""

    bits: int
    group_size: grid.GroupSize
    channel_scale: bool = False
    """whether there is a factor for each input"""

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read the fields; see `Entry.parse`."""
        return cls(fields.bits(least=2), fields.group_size(), fields.flag("channel_scale"))

    @property
    def element_bits(self) -> int:
        """Bits of a code."""
        return self.bits

    def expected_beside(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The scales, and the factors of the inputs."""
        expected = {"scale": expected_scale(shape, self.group_size)}
        if self.channel_scale:
            expected["channel_scale"] = Expected((torch.float16,), (shape[1],))
        return expected

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The codes int8 `[rows, count]`."""
        return (bitstream.unpack(packed, self.bits, count) - 2 ** (self.bits - 1)).view(torch.int8)

    def assemble(self, elements: Tensor, beside: dict[str, Tensor]) -> "Uniform":
        """The part of codes `[out, in]`, and its scales `[rows, groups]` and channel scales `[in]` by suffix."""
        return Uniform(elements, beside["scale"], self.bits, self.group_size, beside.get("channel_scale"))

    def summary(self) -> str:
        """Such as "4-bit (groups of 32)"."""
        return f"{self.bits}-bit ({describe_group_size(self.group_size)})"

    def kernel_layout(self) -> MatrixLayout:
        """Signed integers under scales."""
        return MatrixLayout("integers", self.bits, group_size=self.group_size, channel_scale=self.channel_scale)


@dataclass(frozen=True)
class Uniform(Elementwise):
    """Integer codes on an even grid: weight = codes x scale (x channel_scale, per input, where there is one)."""

    codes: Tensor
    """int8 `[out, in]`, from -2^(bits-1) to 2^(bits-1) - 1"""
    scale: Tensor
    """`[1, 1]`, `[out, 1]` or `[out, groups]`, in its storage dtype"""
    bits: int
    group_size: grid.GroupSize
    channel_scale: Tensor | None = None
    """float16 `[in]`, or None for ones"""

    @property
    def elements(self) -> Tensor:
        """The codes."""
        return self.codes

    def dense(self) -> Tensor:
        """codes x scale x channel_scale, float32 `[out, in]`."""
        dense = grid.dense(self.codes, self.scale, self.group_size)
        return dense if self.channel_scale is None else dense * self.channel_scale.float()

    def pack(self, elements: Tensor) -> Tensor:
        """Codes `[rows, count]` as unsigned ones in a stream of bits."""
        return bitstream.pack(elements.view(torch.uint8) + 2 ** (self.bits - 1), self.bits)

    def beside(self) -> dict[str, Tensor]:
        """The scales, and the factors of the inputs."""
        tensors = {"scale": self.scale.contiguous()}
        if self.channel_scale is not None:
            tensors["channel_scale"] = self.channel_scale
        return tensors

    def describe(self) -> UniformEntry:
        """The entry."""
        return UniformEntry(self.bits, self.group_size, self.channel_scale is not None)

    def trainable(self, *, codes: bool) -> TrainableElements:
        """Scales are trained, and with `codes` the codes, as latent ones that are rounded in the forward pass."""
        return _TrainableUniform(self, codes)

    def kernel_operand(self) -> MatrixOperand:
        """Codes and scales."""
        layout = self.describe().kernel_layout()
        return MatrixOperand(layout, self.codes, self.scale, channel_scale=self.channel_scale)


def as_uniform(part: Part) -> Uniform:
    """The part itself, typed as `Uniform`, where the caller knows that it is one."""
    assert isinstance(part, Uniform), f"integer codes were expected, and this is {part.summary()}"
    return part


class _TrainableUniform(TrainableElements):
    def __init__(self, part: Uniform, codes: bool) -> None:
        super().__init__()
        self.original = part
        self.scale = TrainableScale(part.scale)
        self.codes = nn.Parameter(part.codes.float(), requires_grad=codes)

    def dense(self) -> Tensor:
        codes: Tensor = self.codes
        if self.codes.requires_grad:
            codes = straight_through(self.codes, grid.nearest_code(self.codes, self.original.bits))
        dense = codes * grid.spread(self.scale(), codes.shape[1], self.original.group_size)
        return dense if self.original.channel_scale is None else dense * self.original.channel_scale.float()

    def part(self) -> Uniform:
        part = self.original
        codes = grid.nearest_code(self.codes.detach(), part.bits).to(torch.int8)
        return Uniform(codes, self.scale.stored(), part.bits, part.group_size, part.channel_scale)
