"""A recipe: the steps in order, as plain data.

    name = "my-recipe"
    summary = "one line"
    leave = ["*.down_proj"]        # layers to leave as they are, by pattern on their full name (optional)

    [[steps]]
    quantize = "slim_quant"        # verb = method; its options follow
    bits = 4

    [[steps]]
    prune = "wanda"
    pattern = "2:4"

Order is data: each step works on what the steps before it decided.
"""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from slimlm.core import registry
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Need, Step
from slimlm.core.lowrank import rank_of
from slimlm.core.masks import Pattern


@dataclass(frozen=True)
class NamedStep:
    """A step with the verb and name it was asked for by."""

    kind: str
    method: str
    step: Step

    def to_dict(self) -> dict[str, Any]:
        """As a recipe file would say it, every option spelled out."""
        return {self.kind: self.method, **dataclasses.asdict(self.step)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class Recipe:
    """What to do to every linear layer, in order."""

    name: str
    summary: str
    steps: tuple[NamedStep, ...]
    leave: tuple[str, ...] = ()

    @property
    def needs(self) -> Need:
        """The statistics its steps need together."""
        return reduce(lambda needs, named: needs | named.step.needs, self.steps, Need.NOTHING)

    def leaves(self, layer: str) -> bool:
        """Whether this layer (by full name) stays as it is."""
        return any(fnmatchcase(layer, pattern) for pattern in self.leave)

    def refuses(self, layer: str, shape: tuple[int, int]) -> str | None:
        """Why a layer of this shape (out, in) cannot take the recipe, or None."""
        for named in self.steps:
            pattern = getattr(named.step, "pattern", None)
            if pattern is not None and (reason := Pattern.parse(pattern).refuses(layer, shape[1])):
                return f"{reason}. Choose a pattern that divides it, or a share such as pattern = 0.5"
            rank = getattr(named.step, "rank", None)
            if rank and rank_of(rank, shape) == 0:
                least = 1 / min(shape)
                return f"rank = {rank} of {layer} ({shape[0]} x {shape[1]}) is less than rank 1; give at least {least:.3g}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `recipe_from_dict` reads back."""
        steps = [named.to_dict() for named in self.steps]
        return {"name": self.name, "summary": self.summary, "leave": list(self.leave), "steps": steps}


def recipe_from_dict(data: dict[str, Any], *, source: str) -> Recipe:
    """Check plain data and build the recipe; raises RecipeError saying which step and option is wrong."""
    unknown = set(data) - {"name", "summary", "leave", "steps"}
    if unknown:
        raise RecipeError(f"{source}: unknown key {sorted(unknown)[0]!r}; a recipe has name, summary, leave and [[steps]]")
    steps, leave = data.get("steps"), data.get("leave", [])
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) for s in steps):
        raise RecipeError(f"{source}: a recipe needs at least one [[steps]] table")
    if not isinstance(leave, list) or not all(isinstance(p, str) for p in leave):
        raise RecipeError(f'{source}: leave is a list of name patterns, such as ["*.down_proj"]')
    named = tuple(_step(step, f"{source}, step {i}") for i, step in enumerate(steps, 1))
    pruners = [s.method for s in named if getattr(s.step, "pattern", None) not in (None, "")]
    if len(pruners) > 1:
        raise RecipeError(f"{source}: a recipe prunes at most once; {' and '.join(pruners)} would each choose a mask")
    if named[0].kind == "compensate":
        raise RecipeError(f"{source}: the first step is a repair, but nothing is damaged yet; quantize or prune before it")
    return Recipe(str(data.get("name", source)), str(data.get("summary", "")), named, tuple(leave))


def _step(data: dict[str, Any], where: str) -> NamedStep:
    verbs = [kind for kind in registry.KINDS if kind in data]
    if len(verbs) != 1:
        raise RecipeError(f"{where}: give exactly one of {', '.join(registry.KINDS)}; found {', '.join(data) or 'nothing'}")
    kind = verbs[0]
    try:
        method = registry.find(kind, str(data[kind]))
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    options = {key: value for key, value in data.items() if key != kind}
    known = [f.name for f in dataclasses.fields(method)]
    for option in options:
        if option not in known:
            raise RecipeError(f"{where} ({data[kind]}): has no option {option!r}; its options are {', '.join(known)}")
    try:
        # By way of JSON, because pydantic's strict mode takes no dictionary for a dataclass otherwise.
        step: Step = TypeAdapter(method).validate_json(json.dumps(options, default=str), strict=True)
        return NamedStep(kind, str(data[kind]), step)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        raise RecipeError(f"{where} ({data[kind]}): {option} = {options.get(option)!r}: {first['msg']}") from None
    except RecipeError as error:
        raise RecipeError(f"{where} ({data[kind]}): {error}") from None


def shipped() -> dict[str, str]:
    """The recipes that come with slimlm: name and one line each, sorted."""
    return {name: open_recipe(name).summary for name in _shipped_names()}


def _shipped_names() -> list[str]:
    folder = resources.files("slimlm.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def open_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a .toml file."""
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise RecipeError(f"no recipe file at {name}")
        content, source = path.read_bytes(), name
    else:
        names = _shipped_names()
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise RecipeError(f"no recipe is called {name!r}; {hint} (a file of your own ends in .toml)")
        content, source = (resources.files("slimlm.recipes") / f"{name}.toml").read_bytes(), f"recipe {name}"
    try:
        return recipe_from_dict(tomllib.loads(content.decode()), source=source)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{source} is not TOML: {error}") from error
