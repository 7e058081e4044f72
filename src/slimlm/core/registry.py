"""The folder is the list: a method's name is its file's name, its class the file's one public dataclass; so are statistics."""

import dataclasses
import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from functools import cache
from types import ModuleType
from typing import cast

from slimlm.core.errors import RecipeError
from slimlm.core.statistics.base import Statistic
from slimlm.core.step import Step

KINDS = {"quantize": "quantizer", "prune": "pruner", "compensate": "compensator", "joint": "joint solver"}
"""A recipe's verb and what does it; also the folders of slimlm.methods."""


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of all methods of a kind, sorted."""
    package = importlib.import_module(f"slimlm.methods.{kind}")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


@cache
def find(kind: str, name: str) -> type[Step]:
    """The method's class; raises RecipeError naming near misses."""
    if name not in names(kind):
        near = get_close_matches(name, names(kind), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names(kind))}"
        raise RecipeError(f"no {KINDS[kind]} is called {name!r}; {hint}")
    module = importlib.import_module(f"slimlm.methods.{kind}.{name}")
    found = cast("list[type[Step]]", [own for own in _public_classes(module) if dataclasses.is_dataclass(own)])
    assert len(found) == 1, f"{module.__name__} must define exactly one public dataclass"
    return found[0]


@cache
def statistics() -> tuple[type[Statistic], ...]:
    """All statistics that calibration can measure, sorted by the names of their files."""
    package = importlib.import_module("slimlm.core.statistics")
    files = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")
    return tuple(_statistic(importlib.import_module(f"slimlm.core.statistics.{name}")) for name in files)


def _statistic(module: ModuleType) -> type[Statistic]:
    found = [own for own in _public_classes(module) if issubclass(own, Statistic)]
    assert len(found) == 1, f"{module.__name__} must define exactly one public statistic"
    return found[0]


def _public_classes(module: ModuleType) -> list[type]:
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [c for c in own if not c.__name__.startswith("_")]
