"""Codebook: indices into one list of values.

    weight = values[index] x scale

Stored: the indices as a stream of bits (slimlm.core.bits); the values, one codebook for the whole matrix; scales as of integer
codes.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.parts.base import Expected, describe_group_size, expected_scale
from slimlm.core.parts.elementwise import Elementwise, ElementwiseEntry
from slimlm.core.parts.fields import Fields
from slimlm.core.parts.kernel_layout import MatrixLayout, MatrixOperand
from slimlm.core.parts.trainable import TrainableElements, TrainableScale, Trains


@dataclass(frozen=True)
class CodebookEntry(ElementwiseEntry):
    """What a checkpoint says of a `Codebook`."""

    bits: int
    group_size: grid.GroupSize

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read the fields; see `Entry.parse`."""
        return cls(fields.bits(least=1), fields.group_size())

    @property
    def element_bits(self) -> int:
        """Bits of an index."""
        return self.bits

    def expected_beside(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The scales and the codebook's values."""
        return {
            "scale": expected_scale(shape, self.group_size),
            "codebook": _expected_values(self.bits),
        }

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The indices uint8 `[rows, count]`."""
        return bitstream.unpack(packed, self.bits, count)

    def assemble(self, elements: Tensor, beside: dict[str, Tensor]) -> "Codebook":
        """The part of indices `[out, in]`, and its values `[2^bits]` and scales `[rows, groups]` by suffix."""
        return Codebook(elements, beside["codebook"], beside["scale"], self.bits, self.group_size)

    @property
    def trains(self) -> Trains:
        """Scales, values and indices."""
        return Trains.SCALES | Trains.CODEBOOKS | Trains.CODES

    def summary(self) -> str:
        """Such as "4-bit codebook (groups of 32)"."""
        return f"{self.bits}-bit codebook ({describe_group_size(self.group_size)})"

    def kernel_layout(self) -> MatrixLayout:
        """Indices under scales."""
        return MatrixLayout("indices", self.bits, group_size=self.group_size)


@dataclass(frozen=True)
class Codebook(Elementwise):
    """Indices into one codebook: weight = values[index] x scale."""

    index: Tensor
    """uint8 `[out, in]`, from 0 to 2^bits - 1"""
    values: Tensor
    """float16 `[2^bits]`, for the whole matrix"""
    scale: Tensor
    """`[1, 1]`, `[out, 1]` or `[out, groups]`, in its storage dtype"""
    bits: int
    group_size: grid.GroupSize

    @property
    def elements(self) -> Tensor:
        """The indices."""
        return self.index

    def dense(self) -> Tensor:
        """values[index] x scale, float32 `[out, in]`."""
        index = self.index.flatten().int()
        return grid.dense(self.values.float().index_select(0, index).view(self.shape), self.scale, self.group_size)

    def pack(self, elements: Tensor) -> Tensor:
        """Indices `[rows, count]` as a stream of bits."""
        return bitstream.pack(elements, self.bits)

    def beside(self) -> dict[str, Tensor]:
        """The scales and the codebook's values."""
        return {"scale": self.scale.contiguous(), "codebook": self.values}

    def describe(self) -> CodebookEntry:
        """The entry."""
        return CodebookEntry(self.bits, self.group_size)

    def trainable(self, trains: Trains) -> TrainableElements:
        """Scales, values, and indices as latent values that are rounded to the nearest one."""
        return _TrainableCodebook(self, trains)

    def kernel_operand(self) -> MatrixOperand:
        """Indices, values and scales."""
        return MatrixOperand(self.describe().kernel_layout(), self.index, self.scale, codebook=self.values)


def codebook_bits(bits: int) -> int:
    """Stored bits of a codebook for indices of so many bits."""
    return _expected_values(bits).bits


def _expected_values(bits: int) -> Expected:
    return Expected((torch.float16,), (2**bits,))


class _TrainableCodebook(TrainableElements):
    def __init__(self, part: Codebook, trains: Trains) -> None:
        super().__init__()
        self.original = part
        self.scale = TrainableScale(part.scale, trains)
        self.values = nn.Parameter(part.values.float().clone(), requires_grad=Trains.CODEBOOKS in trains)
        # In units of the values, so that the weights of a value or a scale change with it.
        self.latent = nn.Parameter(self.values.detach()[part.index.long()]) if Trains.CODES in trains else None

    def _values(self) -> Tensor:
        """A value of zero stays zero."""
        return self.values * (self.original.values != 0)

    def _index(self) -> Tensor:
        if self.latent is None:
            return self.original.index.long()
        return nearest_value(self.latent.detach(), self._values().detach())

    def dense(self) -> Tensor:
        values = self._values()[self._index()]
        if self.latent is not None:
            values = values + (self.latent - self.latent.detach())
        return values * grid.spread(self.scale(), values.shape[1], self.original.group_size)

    def part(self) -> Codebook:
        part = self.original
        values = self._values().detach().to(part.values.dtype)
        return Codebook(self._index().to(part.index.dtype), values, self.scale.stored(), part.bits, part.group_size)


def nearest_value(points: Tensor, values: Tensor) -> Tensor:
    """The index (int64) of the nearest of `values` `[n]`, in any order, for each point; of the shape of `points`."""
    ordered, order = values.sort()
    return order[torch.bucketize(points, (ordered[1:] + ordered[:-1]) / 2)]
