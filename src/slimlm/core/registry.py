"""Methods and statistics by name: the folder is the list.

A method's name is its file's name, and its class is the file's only public dataclass; likewise for statistics.
"""

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
"""The key of a step in a recipe, which is also its folder in slimlm.methods, and what such a method is called."""


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of all methods of a kind, sorted."""
    package = importlib.import_module(f"slimlm.methods.{kind}")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


@cache
def find(kind: str, name: str) -> type[Step]:
    """The class of a method.

    Raises:
        RecipeError: there is no method of this name; the message suggests a similar one.
    """
    if name not in names(kind):
        near = get_close_matches(name, names(kind), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names(kind))}"
        raise RecipeError(f"no {KINDS[kind]} is called {name!r}; {hint}")
    module = importlib.import_module(f"slimlm.methods.{kind}.{name}")
    methods = cast("list[type[Step]]", [cls for cls in _public_classes(module) if dataclasses.is_dataclass(cls)])
    assert len(methods) == 1, f"{module.__name__} must define exactly one public dataclass"
    return methods[0]


@cache
def statistics() -> tuple[type[Statistic], ...]:
    """All statistics that calibration can measure, sorted by the names of their files."""
    package = importlib.import_module("slimlm.core.statistics")
    files = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "base")
    return tuple(_statistic(importlib.import_module(f"slimlm.core.statistics.{name}")) for name in files)


def _statistic(module: ModuleType) -> type[Statistic]:
    classes = [cls for cls in _public_classes(module) if issubclass(cls, Statistic)]
    assert len(classes) == 1, f"{module.__name__} must define exactly one public statistic"
    return classes[0]


def _public_classes(module: ModuleType) -> list[type]:
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    return [c for c in classes if not c.__name__.startswith("_")]
