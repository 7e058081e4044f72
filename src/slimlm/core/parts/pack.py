"""A layer's parts by slot, the names of their tensors, and the layer's entry in config.json.

slot        names of its tensors
base        weight (the elements, one-dimensional), weight_scale, weight_mask, ...
outliers    outliers_...
adapter     adapter_left, adapter_left_scale, adapter_right, ...
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.core.parts.base import Entry, Expected, Part, joined, parse_entry, under
from slimlm.core.parts.fields import DTYPES, Fields, Json, dtype_name, is_count

_PREFIXES = {"base": "weight", "outliers": "outliers", "adapter": "adapter"}
"""The prefixes of the names of a slot's tensors."""

_LARGEST_FACTOR = torch.finfo(torch.float32).max

T = TypeVar("T")


@dataclass(frozen=True)
class Slots(Generic[T]):
    """The slots of a layer: a base, and an adapter, outliers, both or neither."""

    base: T
    adapter: T | None = None
    outliers: T | None = None

    def filled(self) -> Iterator[tuple[str, T]]:
        """The slots that are not empty by name, in the order in which parts are added up."""
        for slot, held in (("base", self.base), ("outliers", self.outliers), ("adapter", self.adapter)):
            if held is not None:
                yield slot, held

    def __iter__(self) -> Iterator[T]:
        return (held for _, held in self.filled())

    @property
    def added(self) -> tuple[T, ...]:
        """The filled slots other than the base."""
        return tuple(held for held in (self.outliers, self.adapter) if held is not None)


@dataclass(frozen=True)
class Parts(Slots[Part]):
    """The parts of a layer: its weight is their sum."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (out, in)."""
        return self.base.shape

    def dense(self) -> Tensor:
        """The float32 matrix `[out, in]` that the parts stand for together."""
        total = self.base.dense()
        for part in self.added:
            total = total + part.dense()
        return total

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors of all parts, by name.

        `weight` itself, the base's elements, is one-dimensional, row after row, so that no program mistakes it for a matrix.
        """
        tensors = {
            joined(_PREFIXES[slot], suffix): tensor for slot, part in self.filled() for suffix, tensor in part.tensors().items()
        }
        return {**tensors, "weight": tensors["weight"].flatten()}

    def describe(self) -> "PartEntries":
        """The entries of all parts."""
        return PartEntries(**{slot: part.describe() for slot, part in self.filled()})

    def storage_bits(self) -> int:
        """Bits of all stored tensors."""
        return sum(part.storage_bits() for part in self)

    def summary(self) -> str:
        """A short description; see `PartEntries.summary`."""
        return self.describe().summary()


@dataclass(frozen=True)
class PartEntries(Slots[Entry]):
    """The entries of a layer's parts."""

    @classmethod
    def parse(cls, fields: Fields) -> Self:
        """Read the slots of a layer's entry. Raises CheckpointError where there is no base, or a part is invalid."""
        held = {slot: data for slot in _PREFIXES if (data := fields.data.get(slot)) is not None}
        if "base" not in held:
            raise CheckpointError("it has no base")
        return cls(**{slot: parse_entry(data) for slot, data in held.items()})

    def to_json(self) -> dict[str, Json]:
        """The slots that are not empty."""
        return {slot: entry.to_json() for slot, entry in self.filled()}

    def expected(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The stored tensors of a layer `[out, in]` by name. Raises CheckpointError where these parts do not fit it."""
        expected = {
            joined(_PREFIXES[slot], suffix): tensor
            for slot, entry in self.filled()
            for suffix, tensor in entry.expected(shape).items()
        }
        if "weight" not in expected:
            raise CheckpointError(f"its base is {self.base.kind}, which has no elements of its own")
        return {**expected, "weight": expected["weight"].flattened()}

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits of all parts of a layer `[out, in]`; see `Entry.stored_bits`."""
        return sum(entry.stored_bits(shape) for entry in self)

    def from_stored(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Parts:
        """The inverse of `Parts.tensors` of a layer `[out, in]`. Raises CheckpointError where entry and tensors disagree."""
        parts = {}
        for slot, entry in self.filled():
            try:
                parts[slot] = entry.from_stored(_in_rows(slot, tensors, shape), shape)
            except (KeyError, RuntimeError) as error:
                raise CheckpointError(
                    f"a {entry.kind} part of shape {shape} does not fit its stored tensors: {error}"
                ) from error
        return Parts(**parts)

    def check(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> Iterator[str]:
        """Faults that packing never produces in a layer `[out, in]`; see `Entry.check`."""
        for slot, entry in self.filled():
            yield from entry.check(_in_rows(slot, tensors, shape), shape, _PREFIXES[slot])

    def summary(self) -> str:
        """A short description, such as "2:4 of 4-bit (groups of 32) + rank 25 at 4 bits"."""
        return " + ".join(entry.summary() for entry in self)

    @property
    def added_rank(self) -> int:
        """The rank of all low-rank parts together."""
        return sum(entry.added_rank for entry in self)

    def with_rank(self, rank: int) -> "PartEntries":
        """The same parts, those of low rank at another one."""
        return PartEntries(**{slot: entry.with_rank(rank) for slot, entry in self.filled()})


def tensors_of(slot: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a layer's stored tensors, of any shapes `[...]`, those of the part in a slot, by suffix."""
    return under(_PREFIXES[slot], tensors)


def _in_rows(slot: str, tensors: dict[str, Tensor], shape: tuple[int, int]) -> dict[str, Tensor]:
    """As `tensors_of`, the elements of a base in rows again."""
    by_suffix = tensors_of(slot, tensors)
    if slot == "base" and "" in by_suffix:
        by_suffix[""] = by_suffix[""].view(shape[0], -1)
    return by_suffix


@dataclass(frozen=True)
class TensorEntry:
    """What config.json says of a stored tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorEntry":
        """The entry of a tensor of any shape `[...]`. Raises CheckpointError for a dtype that `parse` does not know."""
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(f"a tensor of {dtype_name(tensor.dtype)} cannot be stored; it can be {' or '.join(DTYPES)}")
        return cls(tensor.dtype, tuple(tensor.shape))

    @classmethod
    def parse(cls, data: object, name: str) -> "TensorEntry":
        """Read `[dtype, shape]`. Raises CheckpointError where it is neither."""
        if not isinstance(data, list | tuple) or len(data) != 2:
            raise CheckpointError(f"{name} has no dtype and shape")
        dtype = DTYPES.get(data[0]) if isinstance(data[0], str) else None
        if dtype is None:
            raise CheckpointError(f"{name} is of the unknown dtype {data[0]!r}; it can be {' or '.join(DTYPES)}")
        if not isinstance(data[1], list | tuple) or not all(is_count(n) for n in data[1]):
            raise CheckpointError(f"{name} has the shape {data[1]!r}, which are no sizes")
        return cls(dtype, tuple(data[1]))

    def to_json(self) -> list[Json]:
        """The inverse of `parse`."""
        return [dtype_name(self.dtype), list(self.shape)]

    @property
    def bits(self) -> int:
        """Bits of the tensor."""
        return 8 * math.prod(self.shape) * self.dtype.itemsize

    def empty(self) -> Tensor:
        """The tensor, without values, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


@dataclass(frozen=True, kw_only=True)
class StoredEntry:
    """What config.json says of a packed matrix `[out, in]`."""

    shape: tuple[int, int]
    parts: PartEntries
    tensors: Mapping[str, TensorEntry]
    """by name"""

    def check(self) -> None:
        """Raise CheckpointError where the tensors are not those that the parts store.

        Shape and parts determine name, dtype and size of every tensor, except for how many weights a mask keeps. So a valid
        entry is unpacked into at most 32 times the bytes of its file: a weight takes at least one bit, and is unpacked into 32.
        """
        expected = self.parts.expected(self.shape)
        if self.tensors.keys() != expected.keys():
            named = ", ".join(self.tensors) or "none"
            raise CheckpointError(f"its parts are stored in {', '.join(expected)}; it names {named}")
        for name, expectation in expected.items():
            found = self.tensors[name]
            if found.dtype not in expectation.dtypes:
                among = " or ".join(sorted(map(dtype_name, expectation.dtypes)))
                raise CheckpointError(f"{name} is {dtype_name(found.dtype)}; it can be {among}")
            if not expectation.fits(found.shape):
                raise CheckpointError(f"{name} is {list(found.shape)}; of these parts it is {expectation.summary()}")

    @property
    def stored_bits(self) -> int:
        """Bits of all tensors."""
        return sum(tensor.bits for tensor in self.tensors.values())

    def empty_tensors(self) -> dict[str, Tensor]:
        """The tensors, without values, on the meta device."""
        return {name: tensor.empty() for name, tensor in self.tensors.items()}

    def _to_json(self, **others: Json) -> dict[str, Json]:
        tensors = {name: tensor.to_json() for name, tensor in self.tensors.items()}
        return {"shape": list(self.shape), **others, **self.parts.to_json(), "tensors": tensors}


@dataclass(frozen=True, kw_only=True)
class LayerEntry(StoredEntry):
    """What config.json says of a compressed linear layer."""

    bias: bool
    """whether the layer has one"""
    tied_to: str | None = None
    """the embedding whose matrix it is; its tensors are stored under that name"""

    @classmethod
    def parse(cls, data: object) -> "LayerEntry":
        """Read an entry. Raises CheckpointError where a field is missing or invalid."""
        fields = Fields(data, "it")
        return cls(
            shape=fields.shape("shape"),
            bias=fields.flag("bias"),
            parts=PartEntries.parse(fields),
            tensors=_parse_tensors(fields),
            tied_to=fields.text("tied_to") if "tied_to" in fields.data else None,
        )

    def to_json(self) -> dict[str, Json]:
        """The inverse of `parse`."""
        tied: dict[str, Json] = {} if self.tied_to is None else {"tied_to": self.tied_to}
        return {**self._to_json(bias=self.bias), **tied}


@dataclass(frozen=True, kw_only=True)
class EmbeddingEntry(StoredEntry):
    """What config.json says of a compressed embedding `[tokens, width]`."""

    factor: float
    """that the rows that are looked up are multiplied by"""

    @classmethod
    def parse(cls, data: object) -> "EmbeddingEntry":
        """Read an entry. Raises CheckpointError where a field is missing or invalid."""
        fields = Fields(data, "it")
        factor = fields.data.get("factor")
        # NaN fails this comparison, too.
        if not isinstance(factor, int | float) or isinstance(factor, bool) or not abs(factor) <= _LARGEST_FACTOR:
            raise CheckpointError(f"factor is {factor!r}, not a number")
        return cls(shape=fields.shape("shape"), factor=factor, parts=PartEntries.parse(fields), tensors=_parse_tensors(fields))

    def to_json(self) -> dict[str, Json]:
        """The inverse of `parse`."""
        return self._to_json(factor=self.factor)


def _parse_tensors(fields: Fields) -> dict[str, TensorEntry]:
    tensors = fields.data.get("tensors")
    if not isinstance(tensors, Mapping):
        raise CheckpointError("its tensors have no names")
    return {str(name): TensorEntry.parse(about, str(name)) for name, about in tensors.items()}
