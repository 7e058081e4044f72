"""What steps compute from statistics alone, for the next layer that has the same inputs."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Value = TypeVar("Value")


class Cache:
    """Values by their type and a key, each computed once.

    A cache belongs to the statistics of one input: layers that share the input (q, k and v) share it, others never do, so a
    key holds the options that a value depends on and not the statistics themselves.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[type, Hashable], Any] = {}

    def __len__(self) -> int:
        return len(self._values)

    def get(self, kind: type[Value], key: Hashable, compute: Callable[[], Value]) -> Value:
        """The value of this type and key; `compute` is called if there is none yet.

        Args:
            kind: The value's type; keys of different types are independent.
            key: What the value depends on besides the statistics, such as a damping.
            compute: Gives the value, which must not be changed afterwards.

        Returns:
            The value, the same object for every caller.
        """
        full_key = kind, key
        if full_key not in self._values:
            self._values[full_key] = compute()
        value = self._values[full_key]
        assert isinstance(value, kind), f"computed as a {kind.__name__}, found a {type(value).__name__}"
        return value
