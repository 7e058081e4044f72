"""Methods and statistics by name: the folder is the list, and other packages add to it.

A method's name is its file's name, and its class is the file's only public dataclass; likewise for statistics. Other packages
register methods by entry points (`GROUP`); a statistic of theirs is found by the `needs` of a method.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import cast

from slimlm.core.errors import RecipeError
from slimlm.core.statistics.base import Statistic
from slimlm.core.step import Step

KINDS = {"quantize": "quantizer", "prune": "pruner", "compensate": "compensator", "joint": "joint solver"}
"""The key of a step in a recipe, which is also its folder in slimlm.methods, and what such a method is called."""


GROUP = "slimlm.methods"
"""The group of entry points by which other packages add methods: KIND.NAME = "module:Class"."""


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of all methods of a kind, sorted: slimlm's own and those of other packages."""
    return tuple(sorted({*_own_names(kind), *(name for of, name in _entry_points() if of == kind and _well_named(of, name))}))


def _own_names(kind: str) -> list[str]:
    package = importlib.import_module(f"slimlm.methods.{kind}")
    return [module.name for module in pkgutil.iter_modules(package.__path__)]


def ill_named() -> dict[str, str]:
    """The entry points of other packages whose name is not KIND.NAME, and what is wrong with them, in a sentence."""
    return {
        entry.name: f"{_package_of(entry)} registers {entry.name!r} as a method of slimlm; the name must be KIND.NAME, such as "
        f"quantize.mine, with one of these kinds: {', '.join(KINDS)}"
        for (kind, name), entries in _entry_points().items()
        for entry in entries
        if not _well_named(kind, name)
    }


def _well_named(kind: str, name: str) -> bool:
    return kind in KINDS and name.isidentifier()


@cache
def _entry_points() -> dict[tuple[str, str], list[EntryPoint]]:
    """The methods of other packages, by kind and name; what is wrong with one of them is said when it is used."""
    found: dict[tuple[str, str], list[EntryPoint]] = {}
    # A package may be found twice, as where its folder stands twice on the path.
    for entry in dict.fromkeys(entry_points(group=GROUP)):
        kind, _, name = entry.name.partition(".")
        found.setdefault((kind, name), []).append(entry)
    return found


def _package_of(entry: EntryPoint) -> str:
    return f"the package {entry.dist.name}" if entry.dist is not None else "a package"


def usable() -> Iterator[tuple[str, type[Step]]]:
    """The names and classes of all methods but those of other packages that cannot be imported."""
    for kind in KINDS:
        for name in names(kind):
            with suppress(RecipeError):
                yield name, find(kind, name)


@cache
def find(kind: str, name: str) -> type[Step]:
    """The class of a method.

    Raises:
        RecipeError: There is no method of this name (the message suggests a similar one) or more than one, or the package that
            registers it cannot be imported.
    """
    if name not in names(kind):
        for entry, wrong in ill_named().items():
            if name in (entry, entry.rpartition(".")[2]):
                raise RecipeError(wrong)
        near = get_close_matches(name, names(kind), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names(kind))}"
        raise RecipeError(f"no {KINDS[kind]} is called {name!r}; {hint}")
    entries = _entry_points().get((kind, name), [])
    if not entries:
        module = importlib.import_module(f"slimlm.methods.{kind}.{name}")
        methods = _methods_in(module)
        assert len(methods) == 1, f"{module.__name__} must define exactly one public dataclass"
        return methods[0]
    owners = [*(["slimlm"] if name in _own_names(kind) else []), *map(_package_of, entries)]
    if len(owners) > 1:
        raise RecipeError(f"{' and '.join(owners)} each have a {KINDS[kind]} {name!r}; rename or uninstall one of them")
    return _method_of(entries[0])


def _method_of(entry: EntryPoint) -> type[Step]:
    """The class that another package registers."""
    where = f"{_package_of(entry)} registers the method {entry.name} = {entry.value!r}"
    try:
        found = entry.load()
    except Exception as error:  # what another package's code raises while it is imported may be anything
        raise RecipeError(f"{where}, which cannot be imported: {type(error).__name__}: {error}") from error
    if isinstance(found, ModuleType):
        found = next(iter(_methods_in(found)), None)
    if not (inspect.isclass(found) and dataclasses.is_dataclass(found) and hasattr(found, "needs") and hasattr(found, "brief")):
        raise RecipeError(
            f"{where}, which is no method; name a frozen dataclass that derives from slimlm.core.step.StepDefaults and has "
            "`needs` and a call"
        )
    return cast("type[Step]", found)


def _methods_in(module: ModuleType) -> list[type[Step]]:
    return cast("list[type[Step]]", [cls for cls in _public_classes(module) if dataclasses.is_dataclass(cls)])


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
