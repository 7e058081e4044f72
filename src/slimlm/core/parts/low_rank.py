"""Low rank: a product of two thin factors, such as an adapter.

    weight = left^T @ right

Stored: the factors, elementwise parts `[rank, out]` and `[rank, in]`, so that groups that share a scale run along the long
side.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from slimlm.core.parts.base import Entry, Expected, Part, joined, under
from slimlm.core.parts.elementwise import Elementwise, ElementwiseEntry, parse_elementwise
from slimlm.core.parts.fields import Fields
from slimlm.core.parts.kernel_layout import ProductLayout, ProductOperand, Refusal
from slimlm.core.parts.trainable import EVERYTHING, Trainable, Trains

_SIDES = ("left", "right")
_SHARED = Trains.SCALES | Trains.CODEBOOKS
"""What is trained in the factors where these values are trained in all parts and adapters are not trained as a whole."""


@dataclass(frozen=True)
class LowRankEntry(Entry):
    """What a checkpoint says of a `LowRank`."""

    rank: int
    left: ElementwiseEntry
    right: ElementwiseEntry

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read the fields; see `Entry.parse`."""
        rank = fields.count("rank")
        left, right = (parse_elementwise(fields.data.get(side)) for side in _SIDES)
        return cls(rank, left, right)

    def _factors(self, shape: tuple[int, int]) -> Iterator[tuple[str, ElementwiseEntry, tuple[int, int]]]:
        """Name, entry and shape of both factors."""
        yield "left", self.left, (self.rank, shape[0])
        yield "right", self.right, (self.rank, shape[1])

    def expected(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The factors' tensors."""
        return {
            joined(side, suffix): tensor
            for side, factor, sizes in self._factors(shape)
            for suffix, tensor in factor.expected(sizes).items()
        }

    def from_stored(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> "LowRank":
        """The part `[out, in]` of these tensors; see `Entry.from_stored`."""
        left, right = (factor.from_stored(under(side, tensors), sizes) for side, factor, sizes in self._factors(shape))
        return LowRank(left, right)

    def check(self, tensors: dict[str, Tensor], shape: tuple[int, int], name: str) -> Iterator[str]:
        """Faults of the factors, `[rank, out]` and `[rank, in]`; see `Entry.check`."""
        for side, factor, sizes in self._factors(shape):
            yield from factor.check(under(side, tensors), sizes, joined(name, side))

    def summary(self) -> str:
        """Such as "rank 25 at 4 bits"."""
        return f"rank {self.rank} at {self.left.element_bits} bits"

    @property
    def trains(self) -> Trains:
        """The factors as a whole, or their scales and codebooks."""
        return Trains.ADAPTERS | (_SHARED & (self.left.trains | self.right.trains))

    def kernel_layout(self) -> ProductLayout | Refusal:
        """The layouts of both factors."""
        left, right = self.left.kernel_layout(), self.right.kernel_layout()
        if isinstance(left, Refusal):
            return left
        if isinstance(right, Refusal):
            return right
        return ProductLayout(self.rank, left, right)

    @property
    def added_rank(self) -> int:
        """The rank."""
        return self.rank

    def with_rank(self, rank: int) -> "LowRankEntry":
        """The same factors at another rank."""
        return replace(self, rank=rank)


@dataclass(frozen=True)
class LowRank(Part):
    """A product of two thin factors: dense = left.dense()^T @ right.dense(), with left `[rank, out]` and right `[rank, in]`."""

    left: Elementwise
    right: Elementwise

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in)."""
        return self.left.shape[1], self.right.shape[1]

    @property
    def rank(self) -> int:
        """The number of components."""
        return self.left.shape[0]

    def dense(self) -> Tensor:
        """The product, float32 `[out, in]`."""
        return self.left.dense().T @ self.right.dense()

    def tensors(self) -> dict[str, Tensor]:
        """The factors' tensors."""
        factors = zip(_SIDES, (self.left, self.right), strict=True)
        return {joined(side, suffix): tensor for side, factor in factors for suffix, tensor in factor.tensors().items()}

    def describe(self) -> LowRankEntry:
        """The entry."""
        return LowRankEntry(self.rank, self.left.describe(), self.right.describe())

    def trainable(self, trains: Trains) -> Trainable:
        """Both factors, codes included where adapters are trained; else their scales and codebooks alone."""
        return _TrainableLowRank(self, EVERYTHING if Trains.ADAPTERS in trains else trains & _SHARED)

    def kernel_operand(self) -> ProductOperand | Refusal:
        """The operands of both factors."""
        left, right = self.left.kernel_operand(), self.right.kernel_operand()
        if isinstance(left, Refusal):
            return left
        if isinstance(right, Refusal):
            return right
        return ProductOperand(left, right)


class _TrainableLowRank(Trainable):
    def __init__(self, part: LowRank, trains: Trains) -> None:
        super().__init__()
        self.left = part.left.trainable(trains)
        self.right = part.right.trainable(trains)

    def dense(self) -> Tensor:
        return self.left.dense().T @ self.right.dense()

    def part(self) -> LowRank:
        return LowRank(self.left.part(), self.right.part())
