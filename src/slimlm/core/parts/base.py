"""The contracts of parts: `Entry`, what config.json says of one, and `Part`, its values."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Self

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.core.grid import GroupSize, scale_shape
from slimlm.core.parts.fields import Fields, Json, dtype_name
from slimlm.core.parts.kernel_layout import KernelLayout, KernelOperand, Refusal
from slimlm.core.parts.trainable import NOTHING, Frozen, Trainable, Trains


@dataclass(frozen=True)
class Expected:
    """A tensor that a part will store."""

    dtypes: tuple[torch.dtype, ...]
    """that it can have, the usual one first"""
    shape: tuple[int, ...]
    most: int | None = None
    """where a mask determines the last dimension: the largest that it can be; `shape` then has that of the pattern"""

    @property
    def bits(self) -> int:
        """Bits of the tensor in its usual dtype."""
        return 8 * math.prod(self.shape) * self.dtypes[0].itemsize

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be this tensor."""
        if self.most is None:
            return shape == self.shape
        return len(shape) == len(self.shape) and shape[:-1] == self.shape[:-1] and shape[-1] <= self.most

    def flattened(self) -> "Expected":
        """The same tensor as one dimension, row after row."""
        most = None if self.most is None else math.prod(self.shape[:-1]) * self.most
        return Expected(self.dtypes, (math.prod(self.shape),), most)

    def summary(self) -> str:
        """The shape for messages."""
        return str(list(self.shape)) if self.most is None else f"at most {[*self.shape[:-1], self.most]}"


class Entry(ABC):
    """What a checkpoint's config says of a part: a frozen dataclass of the JSON object's fields besides `kind`."""

    kind: ClassVar[str]
    """the kind's name, which is its file's"""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.kind = cls.__module__.rpartition(".")[2]

    @classmethod
    @abstractmethod
    def parse(cls, fields: Fields) -> Self:
        """Read an entry of this kind. Raises CheckpointError where a field is missing or invalid."""

    def to_json(self) -> dict[str, Json]:
        """The inverse of `parse_entry`."""
        options = {field.name: _to_json(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return {"kind": self.kind, **options}

    @abstractmethod
    def expected(self, shape: tuple[int, int]) -> dict[str, Expected]:
        """The tensors that a part `[out, in]` of this shape stores, by suffix.

        A part that can be a layer's base stores its elements under the suffix "", with `out` rows: they are flattened in the
        file, and given back as `[out, ...]` of two dimensions.

        Raises:
            CheckpointError: no part of this entry has this shape.
        """

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """The bits that `Part.storage_bits` will count for a part `[out, in]`, before there is one.

        Padding to whole bytes, masks, scales and codebooks are counted. Scales count 16 bits, a single one 32; where one is
        too small for float16 all of a part's take 32, which only their values tell.
        """
        return sum(tensor.bits for tensor in self.expected(shape).values())

    def check(self, tensors: dict[str, Tensor], shape: tuple[int, int], name: str) -> Iterator[str]:
        """Faults that packing never produces: NaN, a mask that does not fit its pattern, bits set in the padding.

        Args:
            tensors: Those that `expected` names, of the dtypes and shapes that it names.
            shape: `[out, in]` of the part.
            name: The prefix of their names, for the messages.

        Yields:
            A message for each fault.
        """
        for suffix, tensor in tensors.items():
            yield from not_finite(joined(name, suffix), tensor)

    @abstractmethod
    def from_stored(self, tensors: dict[str, Tensor], shape: tuple[int, int]) -> "Part":
        """The part `[out, in]` that was stored as these tensors. Raises CheckpointError where they do not fit."""

    @abstractmethod
    def summary(self) -> str:
        """A short description, such as "4-bit (groups of 32)"."""

    def kernel_layout(self) -> KernelLayout | Refusal:
        """What kernels need to know to take the part, or why they cannot."""
        return Refusal(f"there are no kernels for {self.kind} parts")

    @property
    def trains(self) -> Trains:
        """The kinds of values that `Part.trainable` can train in a part of this entry."""
        return NOTHING

    @property
    def added_rank(self) -> int:
        """The rank of a low-rank part; 0 for all others."""
        return 0

    def with_rank(self, rank: int) -> "Entry":
        """The same entry at another rank; itself where it has no rank."""
        return self


def _to_json(value: object) -> Json:
    if isinstance(value, Entry):
        return value.to_json()
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    assert value is None or isinstance(value, bool | int | float | str)
    return value


class Part(ABC):
    """One summand of a compressed weight: a frozen dataclass."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """The shape (out, in)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The float32 matrix `[out, in]` that it stands for."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by suffix."""

    @abstractmethod
    def describe(self) -> Entry:
        """The entry from which, with the tensors, the part can be read back."""

    def storage_bits(self) -> int:
        """Bits of all tensors that must be stored for this part, padding to whole bytes included."""
        return sum(8 * t.numel() * t.element_size() for t in self.tensors().values())

    def summary(self) -> str:
        """A short description; see `Entry.summary`."""
        return self.describe().summary()

    def trainable(self, trains: Trains) -> Trainable:
        """The part as float parameters, of which these kinds are trained; all other values keep their stored bits."""
        return Frozen(self)

    def kernel_operand(self) -> KernelOperand | Refusal:
        """What kernels pack, laid out as `describe().kernel_layout()` says, or why they cannot."""
        return Refusal(f"there are no kernels for {self.describe().kind} parts")


@cache
def kinds() -> dict[str, type[Entry]]:
    """The entries of all kinds of parts by the kind's name: those of the files in this folder."""
    package = importlib.import_module(__package__)
    entries: dict[str, type[Entry]] = {}
    for file in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{__package__}.{file.name}")
        for entry in vars(module).values():
            local = inspect.isclass(entry) and entry.__module__ == module.__name__
            if local and issubclass(entry, Entry) and not inspect.isabstract(entry):
                assert file.name not in entries, f"{module.__name__} must define one kind of part"
                entries[file.name] = entry
    return entries


def kind_of(data: object) -> type[Entry]:
    """The kind that a part's JSON object names. Raises CheckpointError where no kind has that name."""
    kind = Fields(data, "a part").data.get("kind")
    if not isinstance(kind, str) or kind not in kinds():
        raise CheckpointError(f"a part is of the unknown kind {kind!r}; this program knows {', '.join(sorted(kinds()))}")
    return kinds()[kind]


def parse_entry(data: object) -> Entry:
    """The typed entry of a part's JSON object. Raises CheckpointError for an unknown kind or invalid fields."""
    kind = kind_of(data)
    return kind.parse(Fields(data, kind.kind))


def joined(prefix: str, suffix: str) -> str:
    """The name of a part's tensor."""
    return f"{prefix}_{suffix}" if suffix else prefix


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of stored tensors (of any shapes, `[...]`) those named `prefix` or `prefix_...`, by the rest of their names."""
    return {n[len(prefix) :].removeprefix("_"): t for n, t in tensors.items() if n == prefix or n.startswith(prefix + "_")}


def fitting(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor itself, after a check of its shape.

    Args:
        name: of the tensor, for the message.
        tensor: of any shape `[...]`.
        shape: that it must have.

    Raises:
        CheckpointError: it has another shape.
    """
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"a stored {name} has the shape {list(tensor.shape)}; this layer's is {list(shape)}")
    return tensor


def expected_scale(shape: tuple[int, int], group_size: GroupSize) -> Expected:
    """The scales of a part `[out, in]`, `[1, 1]`, `[out, 1]` or `[out, groups]`: float16, a single one float32."""
    sizes = scale_shape(shape, group_size)
    dtypes = (torch.float16, torch.float32)
    return Expected(dtypes[::-1] if math.prod(sizes) == 1 else dtypes, sizes)


def describe_group_size(group_size: GroupSize) -> str:
    """How many weights share a scale, for descriptions."""
    return f"groups of {group_size}" if isinstance(group_size, int) else group_size


_VALUES_AT_ONCE = 2**22


def not_finite(name: str, tensor: Tensor) -> Iterator[str]:
    """A message where a floating-point tensor, of any shape `[...]`, holds NaN or infinity; read in pieces."""
    if tensor.is_floating_point():
        bad = sum(int((~piece.isfinite()).sum()) for piece in tensor.reshape(-1).split(_VALUES_AT_ONCE))
        if bad:
            yield f"{name} holds {bad} values of {tensor.numel()} that are NaN or infinite"
