"""Plain: floating-point weights, not quantized.

    weight = value

Stored: the bytes of the values, little-endian, those that a mask drops left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from slimlm.core.parts.base import Expected, not_finite
from slimlm.core.parts.elementwise import Elementwise, ElementwiseEntry
from slimlm.core.parts.fields import Fields, dtype_name
from slimlm.core.parts.kernel_layout import MatrixLayout, MatrixOperand
from slimlm.core.parts.trainable import TrainableElements, Trains

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PlainEntry(ElementwiseEntry):
    """What a checkpoint says of a `Plain`."""

    dtype: torch.dtype

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read the fields; see `Entry.parse`."""
        return cls(fields.dtype("dtype", _DTYPES))

    @property
    def element_bits(self) -> int:
        """Bits of a value."""
        return 8 * self.dtype.itemsize

    def expected_beside(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """No other tensors."""
        return {}

    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The values `[rows, count]` of their bytes."""
        return packed.contiguous().view(self.dtype)

    def assemble(self, elements: Tensor, beside: dict[str, Tensor]) -> "Plain":
        """The part of these values `[out, in]`."""
        return Plain(elements)

    def check_elements(self, packed: Tensor, name: str) -> Iterator[str]:
        """A message where values in packed rows, uint8 `[rows, bytes]`, are NaN or infinite."""
        return not_finite(name, self.unpack(packed.reshape(-1), packed.numel()))

    @property
    def trains(self) -> Trains:
        """The values."""
        return Trains.WEIGHTS

    def summary(self) -> str:
        """Such as "float16"."""
        return dtype_name(self.dtype)

    def kernel_layout(self) -> MatrixLayout:
        """Floats without scales."""
        return MatrixLayout("floats", self.element_bits, self.dtype)


@dataclass(frozen=True)
class Plain(Elementwise):
    """Floating-point weights: float16, bfloat16, float32 or float64."""

    values: Tensor
    """`[out, in]`"""

    @property
    def elements(self) -> Tensor:
        """The values."""
        return self.values

    def dense(self) -> Tensor:
        """The values in float32."""
        return self.values.float()

    def pack(self, elements: Tensor) -> Tensor:
        """The bytes of values `[rows, count]`."""
        return elements.contiguous().view(torch.uint8)

    def beside(self) -> dict[str, Tensor]:
        """No other tensors."""
        return {}

    def describe(self) -> PlainEntry:
        """The entry."""
        return PlainEntry(self.values.dtype)

    def trainable(self, trains: Trains) -> TrainableElements:
        """The values, which are weights."""
        return _TrainablePlain(self, trains)

    def kernel_operand(self) -> MatrixOperand:
        """The values."""
        return MatrixOperand(self.describe().kernel_layout(), self.values)


class _TrainablePlain(TrainableElements):
    def __init__(self, part: Plain, trains: Trains) -> None:
        super().__init__()
        self.original = part
        self.values = nn.Parameter(part.values.float().clone(), requires_grad=Trains.WEIGHTS in trains)

    def dense(self) -> Tensor:
        return self.values

    def part(self) -> Plain:
        if not self.values.requires_grad:
            return self.original
        return Plain(self.values.detach().to(self.original.values.dtype))
