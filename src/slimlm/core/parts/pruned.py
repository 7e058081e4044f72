"""Pruned: an elementwise part under a mask.

    weight = inner where the mask is 1, else 0

Stored: the inner part's elements that stay, without gaps, in order of input, and the mask as one bit per weight. For 2:4 that
bit costs exactly what two 2-bit positions per four inputs would, and it suits every other pattern, too. The mask keeps equally
many weights in every row, so that rows can be found in the packed elements.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from slimlm.core import bits as bitstream
from slimlm.core.errors import CheckpointError, RecipeError
from slimlm.core.mask import Pattern
from slimlm.core.parts.base import Entry, Expected, Part, fitting, joined
from slimlm.core.parts.elementwise import Elementwise, ElementwiseEntry, padding_set, parse_elementwise
from slimlm.core.parts.fields import Fields
from slimlm.core.parts.kernel_layout import MatrixLayout, MatrixOperand, Refusal
from slimlm.core.parts.trainable import Trainable, Trains

_BYTES_AT_ONCE = 2**22


def pattern_of(text: str) -> Pattern:
    """A pattern as an entry has it: "2:4", or the share of each row that was dropped, as text. Raises RecipeError."""
    try:
        return Pattern.parse(text if ":" in text else float(text))
    except (ValueError, OverflowError):
        return Pattern.parse(text)


@dataclass(frozen=True)
class PrunedEntry(Entry):
    """What a checkpoint says of a `Pruned`."""

    pattern: str
    """such as "2:4", or the share of each row that was dropped, as text"""
    inner: ElementwiseEntry

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read the fields; see `Entry.parse`."""
        pattern = fields.text("pattern")
        try:
            pattern_of(pattern)
        except RecipeError as error:
            raise CheckpointError(str(error)) from error
        return cls(pattern, parse_elementwise(fields.data.get("inner")))

    def expected(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The inner part's tensors, and the mask. Raises CheckpointError where the pattern does not divide the inputs."""
        pattern = pattern_of(self.pattern)
        if (reason := pattern.refuses("it", shape[1])) is not None:
            raise CheckpointError(reason)
        mask = Expected((torch.uint8,), (shape[0], bitstream.packed_bytes(shape[1], 1)))
        return {**self.inner.expected(shape, kept=pattern.kept_of(shape[1])), "mask": mask}

    def from_stored(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> "Pruned":
        """The part `[out, in]` of these tensors; see `Entry.from_stored`."""
        mask = fitting("mask", bitstream.unpack(tensors["mask"], 1, shape[1]).view(torch.bool), shape)
        return Pruned(self.inner.from_stored(tensors, shape, mask=mask), mask, self.pattern)

    def check(self, tensors: dict[str, Tensor], shape: tuple[int, int], name: str) -> Iterator[str]:
        """Faults of the mask `[out, in]`, or of the inner part where the mask has none; see `Entry.check`."""
        packed, width = tensors["mask"], shape[1]
        faults = list(_check_mask(joined(name, "mask"), pattern_of(self.pattern), packed, width))
        yield from faults
        if not faults:
            kept = int(bitstream.unpack(packed[:1], 1, width).sum())
            inner = {suffix: tensor for suffix, tensor in tensors.items() if suffix != "mask"}
            yield from self.inner.check(inner, shape, name, kept=kept)

    @property
    def trains(self) -> Trains:
        """What the inner part trains."""
        return self.inner.trains

    def summary(self) -> str:
        """Such as "2:4 of 4-bit (groups of 32)"."""
        pattern = self.pattern if ":" in self.pattern else f"{float(self.pattern):.0%} sparse"
        return f"{pattern} of {self.inner.summary()}"

    def kernel_layout(self) -> MatrixLayout | Refusal:
        """The inner part's layout under a mask."""
        inner = self.inner.kernel_layout()
        return inner if isinstance(inner, Refusal) else replace(inner, mask=pattern_of(self.pattern))


@dataclass(frozen=True)
class Pruned(Part):
    """A part under a mask, which is stored as one bit per weight."""

    inner: Elementwise
    mask: Tensor
    """bool `[out, in]`; True stays"""
    pattern: str
    """as in the entry"""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in)."""
        return self.inner.shape

    def dense(self) -> Tensor:
        """The inner part's matrix, zero where the mask drops a weight."""
        return self.inner.dense() * self.mask

    def tensors(self) -> dict[str, Tensor]:
        """The inner part's tensors without what the mask drops, and the mask."""
        return {**self.inner.tensors(mask=self.mask), "mask": bitstream.pack(self.mask.view(torch.uint8), 1)}

    def describe(self) -> PrunedEntry:
        """The entry."""
        return PrunedEntry(self.pattern, self.inner.describe())

    def trainable(self, trains: Trains) -> Trainable:
        """The inner part; the mask is not trained."""
        return _TrainablePruned(self, trains)

    def kernel_operand(self) -> MatrixOperand | Refusal:
        """The inner part's operand under the mask."""
        inner = self.inner.kernel_operand()
        if isinstance(inner, Refusal):
            return inner
        return replace(inner, layout=replace(inner.layout, mask=pattern_of(self.pattern)), mask=self.mask)


def pruned(base: Part, mask: Tensor, pattern: str) -> Pruned:
    """A base under a mask.

    Args:
        base: `[out, in]`.
        mask: bool `[out, in]`; True stays.
        pattern: of the mask, as in the entry.

    Raises:
        RecipeError: a part of this kind cannot leave elements out.
    """
    if not isinstance(base, Elementwise):
        raise RecipeError(
            f"a {base.describe().kind} part cannot be stored under a mask; drop the prune step, or quantize with a "
            "method whose parts derive from Elementwise"
        )
    return Pruned(base, mask, pattern)


class _TrainablePruned(Trainable):
    def __init__(self, part: Pruned, trains: Trains) -> None:
        super().__init__()
        self.original = part
        self.inner = part.inner.trainable(trains)

    def dense(self) -> Tensor:
        return self.inner.dense() * self.original.mask

    def part(self) -> Pruned:
        return Pruned(self.inner.part(), self.original.mask, self.original.pattern)


def _check_mask(name: str, pattern: Pattern, packed: Tensor, width: int) -> Iterator[str]:
    """n of every m inputs stay, or, where a share was dropped, as many in every row; packed uint8 `[out, bytes]`."""
    size, kept = (pattern.of, pattern.kept) if pattern.of else (width, int(bitstream.unpack(packed[:1], 1, width).sum()))
    wrong, first, done = 0, "", 0
    for piece in packed.split(max(1, _BYTES_AT_ONCE // max(1, packed.shape[1]))):
        counts = bitstream.unpack(piece, 1, width).view(len(piece), -1, size).sum(dim=2)
        bad = (counts != kept).nonzero()
        if len(bad) and not wrong:
            row, group = bad[0].tolist()
            first = f"in row {done + row}, inputs {group * size} to {group * size + size - 1}, {int(counts[row, group])} stay"
        wrong, done = wrong + len(bad), done + len(piece)
    if wrong:
        yield f"{name} does not fit {pattern}: {first}, not {kept}" + (f" ({wrong} such places)" if wrong > 1 else "")
    yield from padding_set(name, packed, width)
