"""What users give as arguments, made into one type; anything else is refused in a message that names the argument."""

import math
import operator
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

from slimlm.core.errors import CheckpointError, ModelError, SlimlmError

Refusal = type[SlimlmError]

_MOST = 2**63
"""Where the sizes end that torch calculates with."""
_UNITS = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
"""Bytes of the units of sizes; those without "i" are decimal, as in what slimlm prints."""


def model_source(value: object, name: str) -> str:
    """A model's folder or name, as text; raises ModelError for anything else, such as a model that is in memory."""
    if isinstance(value, str | os.PathLike):
        given = path(value, name, ModelError)
        return value if isinstance(value, str) else str(given)
    raise ModelError(
        f"`{name}` is of type {type(value).__name__}; give the folder that holds its files, or a name on the hub. A model that "
        "is in memory is stored by its own save_pretrained(folder), and its tokenizer by the tokenizer's"
    )


def path(value: object, name: str, refusal: Refusal = CheckpointError) -> Path:
    """A path; raises the refusal for anything that is none."""
    if isinstance(value, str | os.PathLike):
        given = os.fspath(value)
        if isinstance(given, str):
            _refuse_unusable(given, name, refusal)
            return Path(given)
    raise refusal(f"`{name}` is of type {type(value).__name__}; give a path, as text or as pathlib.Path")


def _refuse_unusable(text: str, name: str, refusal: Refusal) -> None:
    """Raise the refusal for a text that no path can have as its name."""
    if not text.strip():
        raise refusal(f"`{name}` is empty; give a path")
    try:
        Path(text).stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:  # too long, a null character, characters that the system cannot encode
        reason = getattr(error, "strerror", None) or error
        raise refusal(f"`{name}` cannot be a path ({reason}); it begins with {text[:80]!r}") from error


def whole_number(value: object, name: str, *, least: int | None, example: int, refusal: Refusal) -> int:
    """A whole number, numpy's included; raises the refusal for anything else, and below `least`."""
    asked = "a whole number" if least is None else f"a whole number of at least {least}"
    number = _index(value)
    if number is not None and (least is None or least <= number < _MOST):
        return number
    raise refusal(f"`{name}={_short(value)}`: give {asked}, such as {example}")


def real_number(value: object, name: str, *, example: float, refusal: Refusal) -> float:
    """A finite number; raises the refusal for anything else."""
    if not isinstance(value, bool | str | bytes) and isinstance(value, SupportsFloat):
        try:
            number = float(value)
        except (TypeError, ValueError, RuntimeError):  # a tensor of several elements
            number = math.nan
        if math.isfinite(number):
            return value if isinstance(value, int | float) else number
    raise refusal(f"`{name}={_short(value)}`: give a number, such as {example}")


def size(value: object, name: str) -> int:
    """A number of bytes, given as such or as text with a unit ("8GB", "7.5GiB"); raises SlimlmError for anything else."""
    number = _index(value) or 0
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
        if found is not None and found[2] in _UNITS:
            number = int(Decimal(found[1]) * _UNITS[found[2]])
    if number < 1:
        raise SlimlmError(f"`{name}={_short(value)}`: give a number of bytes, or a size such as 8GB, 500MB or 7.5GiB")
    return number


def one_of(value: object, name: str, choices: tuple[str, ...], refusal: Refusal = SlimlmError) -> str:
    """One of these texts; raises the refusal for anything else."""
    if isinstance(value, str) and value in choices:
        return value
    raise refusal(f"`{name}={_short(value)}`: give one of {', '.join(map(repr, choices))}")


def flag(value: object, name: str) -> bool:
    """True or False; raises SlimlmError for anything else."""
    if isinstance(value, bool):
        return value
    raise SlimlmError(f"`{name}={_short(value)}`: give True or False")


def function(value: object, name: str, given: str) -> None:
    """Raise SlimlmError for anything that cannot be called."""
    if not callable(value):
        raise SlimlmError(f"`{name}={_short(value)}`: give a function that is called with {given}")


def _index(value: object) -> int | None:
    """A whole number as Python's; None for anything else, True and False included."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # an array of several elements
        return None


def _short(value: object) -> str:
    """A value in a message: its type where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"<{type(value).__name__}>"
