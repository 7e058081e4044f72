"""A recipe: the steps in order, as plain data.

    name = "my-recipe"
    summary = "one line"
    ignore = ["*.down_proj"]       # layers that are not compressed, by pattern on their full name (optional)
    embedding_bits = 8             # of input embedding and output head, 4 to 8; 16, the default: they are not compressed

    [[steps]]
    quantize = "slim_quant"        # verb = method; its options follow
    bits = 4

    [[steps]]
    prune = "wanda"
    pattern = "2:4"

    [[rules]]                      # other options for some layers (optional); the last rule that fits a layer applies
    layers = ["*.mlp.*"]
    quantize = "slim_quant"        # the step that is meant (optional; else every step that has the option)
    bits = 3

    [block_reconstruction]         # gradient descent on each finished block (optional); see slimlm.tuning.block_reconstruction
    passes = 10

Order is data: each step works on the result of the steps before it. `sequential = true` compresses the layers of a block in the
order in which their inputs are computed, each measured on the outputs of the compressed layers before it.
"""

import dataclasses
import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError

from slimlm.core import arguments, registry
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.step import Step

_KEYS = {"name", "summary", "ignore", "sequential", "embedding_bits", "steps", "rules", "block_reconstruction"}
AS_STORED = 16
"""`embedding_bits` with which embedding and head are not compressed: they stay in the 16 or 32 bits of the model's files."""


def apply_steps(steps: tuple["NamedStep", ...], layer: Layer, stats: Stats) -> Layer:
    """Apply steps to a layer in their order, each with the statistics that it needs and no others.

    The result's tensors are inference tensors, of which only copies may be part of a gradient: sweeps do many small operations,
    and in inference mode these take a tenth less time.
    """
    with torch.inference_mode():
        for named in steps:
            layer = named.step(layer, stats.restricted_to(named.step.needs))
    return layer


def check_embedding_bits(bits: object, where: str) -> int:
    """The bits of embedding and head, 4 to 8 or 16; raises RecipeError for anything else."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not (4 <= bits <= 8 or bits == AS_STORED):
        raise RecipeError(f"{where} = {bits!r}: embedding and head take 4 to 8 bits, or {AS_STORED} to stay as they are stored")
    return bits


@dataclass(frozen=True)
class ReconstructionOptions:
    """How blocks are reconstructed."""

    passes: int = 4
    """Passes over the samples that are not held back."""
    rate: float = 0.02
    """Adam's first step for a tensor, as a share of the tensor's root mean square; it falls to zero as a cosine."""
    codes: Literal["frozen", "ste"] = "ste"
    """Whether the base's codes are "frozen", or tuned through latent codes ("ste")."""
    held_back: float = 0.125
    """The share of the samples, at least one, on which iterates are compared."""
    inputs: Literal["compressed", "dense", "asymmetric"] = "asymmetric"
    """Which inputs and targets the run passes in. "compressed": inputs from the compressed blocks before, targets from the
    dense block on the same;
    "dense": both from the dense model; "asymmetric": inputs from the compressed blocks, targets from the dense model."""
    batch: int = 2
    """Samples per step, at most as many as one batch of the inputs holds."""

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise RecipeError(f"passes = {self.passes}: block reconstruction needs at least one pass over the samples")
        if not 0 < self.rate < 1:
            raise RecipeError(f"rate = {self.rate}: give the first step as a share of a tensor's size, between 0 and 1")
        if self.codes not in ("frozen", "ste"):
            raise RecipeError(f'codes = {self.codes!r}: give "frozen", or "ste" to move the codes of the base')
        if not 0 < self.held_back < 1:
            raise RecipeError(f"held_back = {self.held_back}: give a share of the samples, between 0 and 1")
        if self.inputs not in ("compressed", "dense", "asymmetric"):
            raise RecipeError(f'inputs = {self.inputs!r}: give "compressed", "dense" or "asymmetric"')
        if self.batch < 1:
            raise RecipeError(f"batch = {self.batch}: a step needs at least one sample")


@dataclass(frozen=True)
class NamedStep:
    """A step with its kind and its method's name, as a recipe gives them."""

    kind: str
    """The kind of step: "quantize", "prune", "compensate" or "joint"."""
    method: str
    """The method's name, which is its file's name."""
    step: Step
    """The step with its options."""

    def to_dict(self) -> dict[str, Any]:
        """The step as a recipe file gives it, with the values of all options."""
        return {self.kind: self.method, **dataclasses.asdict(self.step)}


@dataclass(frozen=True)
class Rule:
    """Other options for the layers whose names fit one of the patterns."""

    layers: tuple[str, ...]
    """Patterns on the full names of layers."""
    options: tuple[tuple[str, Any], ...]
    """Names and values of options, and the step that is meant (kind and method), where the rule names one."""

    def to_dict(self) -> dict[str, Any]:
        """The rule as a recipe file gives it."""
        return {"layers": list(self.layers), **dict(self.options)}


@dataclass(frozen=True)
class Recipe:
    """What is done to every linear layer, in order."""

    name: str
    """The recipe's name."""
    summary: str
    """One line on what it does."""
    steps: tuple[NamedStep, ...]
    """The steps, in the order in which they are applied."""
    ignore: tuple[str, ...] = ()
    """Patterns on the full names of layers that are not compressed."""
    rules: tuple[Rule, ...] = ()
    """Other options for some layers; the last rule that fits a layer applies."""
    sequential: bool = False
    """Whether the layers of a block are compressed in the order in which their inputs are computed."""
    block_reconstruction: ReconstructionOptions | None = None
    """How finished blocks are reconstructed; None: they are not."""
    embedding_bits: int = AS_STORED
    """Bits of input embedding and output head, 4 to 8; 16: they are not compressed."""

    @property
    def needs(self) -> Needs:
        """The statistics that its steps need together."""
        varied = [_overridden(named, rule, f"recipe {self.name}") for rule in self.rules for named in self.steps]
        return frozenset().union(*(named.step.needs for named in (*self.steps, *varied)))

    @property
    def needs_original(self) -> bool:
        """Whether the original model's activations have to be computed as well as those of the compressed blocks."""
        targets = self.block_reconstruction is not None and self.block_reconstruction.inputs != "compressed"
        return targets or any(statistic.source.compares for statistic in self.needs)

    @property
    def needs_plan(self) -> bool:
        """Whether an option of a step is left to a plan ("auto")."""
        return any(named.step.needs_plan for named in self.steps)

    def steps_for(self, layer: str) -> tuple[NamedStep, ...]:
        """The steps with the options that the rules give for a layer, by its full name."""
        steps = self.steps
        for rule in self.rules:
            if any(fnmatchcase(layer, pattern) for pattern in rule.layers):
                steps = tuple(_overridden(named, rule, f"recipe {self.name}, rule for {rule.layers[0]}") for named in steps)
        return steps

    def ignores(self, layer: str) -> bool:
        """Whether a layer, by its full name, is not compressed."""
        return any(fnmatchcase(layer, pattern) for pattern in self.ignore)

    def ignoring(self, patterns: str | Sequence[str]) -> "Recipe":
        """The recipe that also ignores the layers whose full names fit one of these patterns.

        Raises:
            RecipeError: `patterns` is no text and no list of texts.
        """
        listed = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(listed, list | tuple) or not all(isinstance(pattern, str) and pattern for pattern in listed):
            raise RecipeError(
                f'`ignore` = {patterns!r}: give a pattern on the full names of layers, such as "*.down_proj", or several'
            )
        return dataclasses.replace(self, ignore=(*self.ignore, *(p for p in listed if p not in self.ignore)))

    def refuses(self, layer: str, shape: tuple[int, int]) -> str | None:
        """Why a layer of this shape (out, in) cannot take the recipe, or None."""
        return refusal_of(self.steps_for(layer), layer, shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `recipe_from_dict` reads back."""
        data: dict[str, Any] = {"name": self.name, "summary": self.summary, "ignore": list(self.ignore)}
        data |= {"sequential": self.sequential, "embedding_bits": self.embedding_bits}
        data["steps"] = [named.to_dict() for named in self.steps]
        if self.rules:
            data["rules"] = [rule.to_dict() for rule in self.rules]
        if self.block_reconstruction is not None:
            data["block_reconstruction"] = dataclasses.asdict(self.block_reconstruction)
        return data


def refusal_of(steps: tuple[NamedStep, ...], layer: str, shape: tuple[int, int]) -> str | None:
    """Why a layer of this shape (out, in) cannot take these steps, or None."""
    for step in (named.step for named in steps):
        if step.sparsity is not None and (reason := step.sparsity.refuses(layer, shape[1])):
            return f"{reason}. Choose a pattern that divides it, or a share such as pattern = 0.5"
        if step.needs_plan or step.adapter is None:
            continue
        rank = step.adapter.rank
        if rank and step.adapter.rank_of(shape) == 0:
            least = 1 / min(shape)
            return f"rank = {rank} of {layer} ({shape[0]} x {shape[1]}) is less than rank 1; give at least {least:.3g}"
    return None


def recipe_from_dict(data: dict[str, Any], *, source: str) -> Recipe:
    """Check plain data and build the recipe.

    Args:
        data: The recipe as a TOML file gives it.
        source: The name of the file or recipe, for messages.

    Raises:
        RecipeError: Something is wrong; the message names the step and the option.
    """
    unknown = set(data) - _KEYS
    if unknown:
        raise RecipeError(
            f"{source}: unknown key {sorted(unknown)[0]!r}; a recipe has name, summary, ignore, sequential, embedding_bits, "
            "[[steps]], [[rules]] and [block_reconstruction]"
        )
    steps, ignore = data.get("steps"), data.get("ignore", [])
    if not isinstance(steps, list) or not steps or not all(isinstance(s, dict) for s in steps):
        raise RecipeError(f"{source}: a recipe needs at least one [[steps]] table")
    if not isinstance(ignore, list) or not all(isinstance(p, str) for p in ignore):
        raise RecipeError(f'{source}: ignore is a list of name patterns, such as ["*.down_proj"]')
    named = tuple(_step(step, f"{source}, step {i}") for i, step in enumerate(steps, 1))
    _refuse_order(named, source)
    if named[0].kind == "compensate":
        raise RecipeError(
            f"{source}: the first step fits an adapter to the compression error, and there is none yet; quantize or prune first"
        )
    sequential = data.get("sequential", False)
    if not isinstance(sequential, bool):
        raise RecipeError(f"{source}: sequential = {sequential!r}; give true or false")
    embedding_bits = check_embedding_bits(data.get("embedding_bits", AS_STORED), f"{source}: embedding_bits")
    own_rules, own_reconstruction = data.get("rules", []), data.get("block_reconstruction")
    if not isinstance(own_rules, list) or not all(isinstance(rule, dict) for rule in own_rules):
        raise RecipeError(f"{source}: rules are [[rules]] tables, each with layers and options")
    if "block_reconstruction" in data and not isinstance(own_reconstruction, dict):
        raise RecipeError(
            f"{source}: block_reconstruction = {own_reconstruction!r}; give a [block_reconstruction] table, which may be empty"
        )
    rules = tuple(_rule(rule, named, f"{source}, rule {i}") for i, rule in enumerate(own_rules, 1))
    where = f"{source}, block_reconstruction"
    reconstruction = None if own_reconstruction is None else _options(ReconstructionOptions, own_reconstruction, where)
    name, summary = str(data.get("name", source)), str(data.get("summary", ""))
    return Recipe(name, summary, named, tuple(ignore), rules, sequential, reconstruction, embedding_bits)


def _refuse_order(steps: tuple[NamedStep, ...], where: str) -> None:
    """Raise RecipeError where two steps would prune, or one would change weights that are quantized already."""
    pruners = [named.method for named in steps if named.step.sparsity is not None]
    if len(pruners) > 1:
        raise RecipeError(f"{where}: a recipe prunes at most once; {' and '.join(pruners)} would each choose a mask")
    coded = ""
    for i, named in enumerate(steps):
        undone = [before.method for before in steps[:i] if before.kind != "prune" or before.step.moves_weights]
        if named.kind == "joint" and undone:
            raise RecipeError(f"{where}: {named.method} replaces what {undone[0]} did before it; take {undone[0]} out")
        if coded and named.step.moves_weights:
            raise RecipeError(f"{where}: {named.method} changes weights that {coded} has quantized; put it before {coded}")
        if named.kind in ("quantize", "joint"):
            coded = named.method


def _rule(data: dict[str, Any], steps: tuple[NamedStep, ...], where: str) -> Rule:
    layers = data.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(p, str) for p in layers):
        raise RecipeError(f'{where}: a rule names its layers, such as layers = ["*.down_proj"], and then options')
    rule = Rule(tuple(layers), tuple((key, value) for key, value in data.items() if key != "layers"))
    fields = {field.name for named in steps for field in dataclasses.fields(named.step)}
    for option, value in rule.options:
        if option in registry.KINDS:
            if not any((named.kind, named.method) == (option, value) for named in steps):
                own = ", ".join(f"{named.kind} = {named.method!r}" for named in steps)
                raise RecipeError(f"{where}: no step has {option} = {value!r}; there are {own}")
        elif option not in fields:
            raise RecipeError(f"{where}: no step has the option {option!r}; there are {', '.join(sorted(fields))}")
    decided = (dataclasses.replace(named, step=named.step.resolved()) for named in steps)
    varied = tuple(_overridden(named, rule, where) for named in decided)
    if any(named.step.needs_plan for named in varied):
        planned = next(option for option, value in rule.options if value == "auto")
        raise RecipeError(f'{where}: {planned} = "auto" is for all layers; put it into the step, or give a number here')
    _refuse_order(varied, where)
    return rule


def _overridden(named: NamedStep, rule: Rule, where: str) -> NamedStep:
    """The step with the rule's options, of those that it has."""
    own = {field.name for field in dataclasses.fields(named.step)}
    verbs = {key: value for key, value in rule.options if key in registry.KINDS}
    if verbs and verbs.get(named.kind) != named.method:
        return named
    changed = {key: value for key, value in rule.options if key in own}
    if not changed:
        return named
    options = {**dataclasses.asdict(named.step), **changed}
    return NamedStep(named.kind, named.method, _options(type(named.step), options, f"{where} ({named.method})"))


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
    step: Step = _options(method, options, f"{where} ({data[kind]})")
    return NamedStep(kind, str(data[kind]), step)


def _options(of: Any, options: dict[str, Any], where: str) -> Any:
    """A dataclass from plain data; raises RecipeError naming the option that is wrong."""
    known = [f.name for f in dataclasses.fields(of)]
    for option in options:
        if option not in known:
            raise RecipeError(f"{where}: has no option {option!r}; its options are {', '.join(known)}")
    try:
        # By way of JSON, because pydantic's strict mode takes no dictionary for a dataclass otherwise.
        return TypeAdapter(of).validate_json(json.dumps(options, default=str), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0])
        raise RecipeError(f"{where}: {option} = {options.get(option)!r}: {first['msg']}") from None
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None


def to_toml(recipe: Recipe) -> str:
    """The recipe as a file that `open_recipe` reads."""
    data = recipe.to_dict()
    top = {key: value for key, value in data.items() if not isinstance(value, dict) and key not in ("steps", "rules")}
    lines = [f"{key} = {_toml(value)}" for key, value in top.items()]
    for table in ("steps", "rules"):
        for row in data.get(table, []):
            lines += ["", f"[[{table}]]", *(f"{key} = {_toml(value)}" for key, value in row.items())]
    if "block_reconstruction" in data:
        table = data["block_reconstruction"]
        lines += ["", "[block_reconstruction]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value in TOML: strings, numbers, truth values and lists of them are written as in JSON."""
    return json.dumps(value, ensure_ascii=False)


def shipped() -> dict[str, str]:
    """The recipes that come with slimlm: name and one line each, sorted."""
    return {name: open_recipe(name).summary for name in _shipped_names()}


def _shipped_names() -> list[str]:
    folder = resources.files("slimlm.recipes")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def open_recipe(name: str | Path) -> Recipe:
    """A shipped recipe by name, or one from a .toml file."""
    given = arguments.path(name, "recipe", RecipeError)
    text = source_text(str(name))
    source, own = (str(name), given.stem) if given.suffix == ".toml" else (f"recipe {name}", str(name))
    try:
        # The file's folders are private and must not go into the record, so only its name is passed on.
        return recipe_from_dict({"name": own, **tomllib.loads(text)}, source=source)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source} is not TOML: {error}") from error


def source_text(name: str) -> str:
    """The text of a shipped recipe's file by its name, or of a .toml file."""
    path = Path(name)
    if name.endswith(".toml"):
        if not path.is_file():
            raise RecipeError(f"no recipe file at {name}")
        content = path.read_bytes()
    else:
        names = _shipped_names()
        if name not in names:
            near = get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            raise RecipeError(f"no recipe is called {name!r}; {hint} (a file of your own ends in .toml)")
        content = (resources.files("slimlm.recipes") / f"{name}.toml").read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not TOML: {error}") from error
