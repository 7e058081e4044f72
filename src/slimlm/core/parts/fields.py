"""Entries of config.json read field by field; a missing or invalid field is refused with its name."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import torch

from slimlm.core.errors import CheckpointError
from slimlm.core.grid import GroupSize

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""Any value in JSON."""

LARGEST = 2**40
"""No number of rows, inputs or ranks is larger."""

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}
"""The dtypes of stored tensors by their names in entries."""


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in entries, such as "float16"."""
    return str(dtype).removeprefix("torch.")


def is_count(value: object) -> bool:
    """Whether a value from JSON is a whole number from 0 to 2^40."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


class Fields:
    """The fields of one entry; each method reads a field of one type, and raises CheckpointError where there is no such one."""

    def __init__(self, data: object, what: str) -> None:
        """Check that `data` is an object; `what` is its name in messages."""
        if not isinstance(data, Mapping):
            raise CheckpointError(f"{what} is {data!r}, not an object with fields")
        self.data: Mapping[str, object] = data
        self.what = what

    def count(self, name: str, *, least: int = 0) -> int:
        """A whole number of at least `least`."""
        value = self.data.get(name)
        if not isinstance(value, int) or not is_count(value) or value < least:
            raise CheckpointError(f"{name} is {value!r}, not a whole number of at least {least}")
        return value

    def bits(self, *, least: int) -> int:
        """Bits of a code, from `least` to 8."""
        value = self.data.get("bits")
        if not isinstance(value, int) or not is_count(value) or not least <= value <= 8:
            raise CheckpointError(f"{self.what} has {least} to 8 bits, not {value!r}")
        return value

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self.data.get(name)
        if not isinstance(value, bool):
            raise CheckpointError(f"{name} is {value!r}, neither true nor false")
        return value

    def text(self, name: str) -> str:
        """A string."""
        value = self.data.get(name)
        if not isinstance(value, str):
            raise CheckpointError(f"{name} is {value!r}, not a text")
        return value

    def group_size(self) -> GroupSize:
        """How many weights share a scale."""
        value = self.data.get("group_size")
        if value == "per-tensor":
            return "per-tensor"
        if value == "per-channel":
            return "per-channel"
        if not isinstance(value, int) or not is_count(value) or value < 1:
            raise CheckpointError(
                f'group_size is {value!r}; it is a number of inputs of at least 1, "per-channel" or "per-tensor"'
            )
        return value

    def dtype(self, name: str, among: Sequence[torch.dtype]) -> torch.dtype:
        """One of these dtypes."""
        value = self.data.get(name)
        found = DTYPES.get(value) if isinstance(value, str) else None
        if found is None or found not in among:
            raise CheckpointError(f"{name} is {value!r}; it can be {' or '.join(map(dtype_name, among))}")
        return found

    def shape(self, name: str) -> tuple[int, int]:
        """Two whole numbers of at least 1."""
        value = self.data.get(name)
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(is_count(n) and n >= 1 for n in value):
            raise CheckpointError(f"its {name} is {value!r}, not two numbers of at least 1")
        return value[0], value[1]
