"""The folder is the list: a method's name is its file's name, its class the file's one public dataclass."""

import dataclasses
import importlib
import inspect
import pkgutil
from difflib import get_close_matches
from functools import cache

from slimlm.core.errors import RecipeError

KINDS = {"quantize": "quantizer", "prune": "pruner", "compensate": "compensator", "joint": "joint solver"}
"""A recipe's verb and what does it; also the folders of slimlm.methods."""


@cache
def names(kind: str) -> tuple[str, ...]:
    """The names of all methods of a kind, sorted."""
    package = importlib.import_module(f"slimlm.methods.{kind}")
    return tuple(sorted(module.name for module in pkgutil.iter_modules(package.__path__)))


@cache
def find(kind: str, name: str) -> type:
    """The method's class; raises RecipeError naming near misses."""
    if name not in names(kind):
        near = get_close_matches(name, names(kind), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names(kind))}"
        raise RecipeError(f"no {KINDS[kind]} is called {name!r}; {hint}")
    module = importlib.import_module(f"slimlm.methods.{kind}.{name}")
    classes = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and c.__module__ == module.__name__ and dataclasses.is_dataclass(c) and callable(c)
    ]
    public = [c for c in classes if not c.__name__.startswith("_")]
    assert len(public) == 1, f"{module.__name__} must define exactly one public dataclass"
    return public[0]
