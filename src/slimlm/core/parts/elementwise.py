"""Parts with one element per weight (a value, a code, an index): they can be pruned, and be factors of a low-rank part.

The elements of a row, without those that a mask drops, are packed and padded to whole bytes; row follows row. Scales and a
codebook are further tensors.
"""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from slimlm.core.bits import packed_bytes
from slimlm.core.errors import CheckpointError
from slimlm.core.parts.base import Entry, Expected, Part, fitting, joined, kind_of, not_finite
from slimlm.core.parts.fields import Fields
from slimlm.core.parts.kernel_layout import MatrixLayout, MatrixOperand, Refusal
from slimlm.core.parts.trainable import TrainableElements, Trains
from slimlm.kernels import compression

_SIZES = (1, 2, 4)
"""Bytes of the elements that the loops in C++ move under a mask."""


class ElementwiseEntry(Entry):
    """The entry of an elementwise part."""

    @property
    @abstractmethod
    def element_bits(self) -> int:
        """Bits that an element takes where it is stored."""

    @abstractmethod
    def expected_beside(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The tensors other than the elements, by suffix."""

    @abstractmethod
    def unpack(self, packed: Tensor, count: int) -> Tensor:
        """The elements `[rows, count]` of packed rows, uint8 `[rows, bytes]`."""

    @abstractmethod
    def assemble(self, elements: Tensor, beside: dict[str, Tensor]) -> "Elementwise":
        """The part of elements `[out, in]` and the other tensors, by suffix."""

    @abstractmethod
    def kernel_layout(self) -> MatrixLayout | Refusal:
        """What kernels need to know to take the part, or why they cannot."""

    def check_elements(self, packed: Tensor, name: str) -> Iterator[str]:
        """A message for each fault in packed elements, uint8 `[rows, bytes]`; by default all bit patterns are valid."""
        return iter(())

    def expected(self, shape: tuple[int, int], *, kept: int | None = None) -> dict[str, Expected]:
        """The stored tensors, by suffix. `kept`: how many elements of a row stay under a mask; None: there is none."""
        rows, width = shape
        if kept is None:
            elements = Expected((torch.uint8,), (rows, self._row_bytes(width)))
        else:
            elements = Expected((torch.uint8,), (rows, self._row_bytes(kept)), self._row_bytes(width))
        return {"": elements, **self.expected_beside(shape)}

    def from_stored(self, tensors: dict[str, Tensor], shape: tuple[int, int], *, mask: Tensor | None = None) -> "Elementwise":
        """The part that was stored as these tensors; see `Entry.from_stored`.

        Args:
            tensors: by suffix.
            shape: (out, in).
            mask: bool `[out, in]`, True where an element is stored; None: all are.
        """
        elements = self.unpack(tensors[""], shape[1] if mask is None else _kept_per_row(mask))
        beside = {name: fitting(name, tensors[name], each.shape) for name, each in self.expected_beside(shape).items()}
        return self.assemble(_scattered(elements, shape, mask), beside)

    def check(self, tensors: dict[str, Tensor], shape: tuple[int, int], name: str, *, kept: int | None = None) -> Iterator[str]:
        """Faults that packing never produces in a part `[out, in]`; see `Entry.check`. `kept`: as for `expected`."""
        for suffix, tensor in tensors.items():
            yield from not_finite(joined(name, suffix), tensor)
        count, packed = shape[1] if kept is None else kept, tensors[""]
        rows, size = shape[0], self._row_bytes(count)
        if packed.numel() != rows * size:
            bits = self.element_bits
            yield f"{name} holds {packed.numel()} bytes; {rows} rows of {count} elements of {bits} bits take {rows * size}"
        else:
            yield from padding_set(name, packed.view(rows, size), count * self.element_bits)
            yield from self.check_elements(packed.view(rows, size), name)

    def _row_bytes(self, count: int) -> int:
        return packed_bytes(count, self.element_bits)


class Elementwise(Part):
    """A part that holds one element for each weight."""

    @property
    @abstractmethod
    def elements(self) -> Tensor:
        """The elements `[out, in]`."""

    @abstractmethod
    def pack(self, elements: Tensor) -> Tensor:
        """Elements `[rows, count]` of this part's kind as they are stored: uint8 `[rows, bytes]`."""

    @abstractmethod
    def beside(self) -> dict[str, Tensor]:
        """The tensors other than the elements, by suffix."""

    @abstractmethod
    def describe(self) -> ElementwiseEntry:
        """The entry from which, with the tensors, the part can be read back."""

    @abstractmethod
    def trainable(self, trains: Trains) -> TrainableElements:
        """The part as float parameters; see `Part.trainable`."""

    @abstractmethod
    def kernel_operand(self) -> MatrixOperand | Refusal:
        """What kernels pack, or why they cannot."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in)."""
        return self.elements.shape[0], self.elements.shape[1]

    def tensors(self, *, mask: Tensor | None = None) -> dict[str, Tensor]:
        """What is stored, by suffix; of the elements only those where a mask `[out, in]` is True, equally many in each row."""
        elements = self.elements if mask is None else _kept(self.elements, mask)
        return {"": self.pack(elements), **self.beside()}


def parse_elementwise(data: object) -> ElementwiseEntry:
    """As `parse_entry`, for elementwise parts. Raises CheckpointError for other kinds before their fields are read."""
    kind = kind_of(data)
    if not issubclass(kind, ElementwiseEntry):
        raise CheckpointError(f"a {kind.kind} part cannot have a mask or be a factor")
    return kind.parse(Fields(data, kind.kind))


def padding_set(name: str, packed: Tensor, used: int) -> Iterator[str]:
    """A message where bits of packed rows, uint8 `[rows, bytes]`, are set beyond the `used` ones; packing sets none."""
    if used % 8 and len(packed):
        rows = (packed[:, -1] >> used % 8).nonzero().flatten()
        if len(rows):
            yield f"{name} has bits set beyond the end of {len(rows)} rows, the first of them {int(rows[0])}"


def _kept_per_row(mask: Tensor) -> int:
    counts = mask.view(torch.uint8).sum(dim=1, dtype=torch.int32)
    if mask.shape[0] == 0:
        return 0
    if bool((counts != counts[0]).any()):
        raise CheckpointError("a stored mask keeps different numbers of weights in different rows")
    return int(counts[0])


def _kept(elements: Tensor, mask: Tensor) -> Tensor:
    """The elements `[out, kept]` that a mask `[out, in]` keeps, equally many in each row."""
    if compression.takes_bytes(elements, mask, sizes=_SIZES):
        return compression.gather(elements, mask, _kept_per_row(mask))
    return elements[mask].view(len(elements), -1)


def _scattered(elements: Tensor, shape: tuple[int, int], mask: Tensor | None) -> Tensor:
    """Stored elements at their places in `[out, in]`, zero where the mask drops a weight."""
    if mask is None:
        return fitting("weight", elements, shape)
    kept = int(mask.view(torch.uint8).sum(dtype=torch.int64))
    if elements.numel() != kept:
        raise CheckpointError(f"a stored mask keeps {kept} weights, but {elements.numel()} are stored")
    if compression.takes_bytes(elements, mask, sizes=_SIZES):
        return compression.scatter(elements, mask)
    return torch.zeros(shape, dtype=elements.dtype, device=elements.device).masked_scatter_(mask, elements)
