"""The configuration of a run: the options of `compress`, `plan` and `estimate`, in one object."""

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack, get_args

import torch

from slimlm.calibration.samples import Calibration
from slimlm.core import arguments
from slimlm.core.errors import DataError, RecipeError, SlimlmError
from slimlm.core.objective import Objective
from slimlm.data.documents import DEFAULT_DATA, name_of
from slimlm.data.mixture import Data, Mixture, portions_of
from slimlm.data.rows import Chat
from slimlm.data.windows import check_seed
from slimlm.distributed.environment import local_rank, world_size
from slimlm.planner.options import Budget, options_of
from slimlm.planner.plan import asked_budget
from slimlm.recipe import Recipe, check_embedding_bits, open_recipe, recipe_from_dict
from slimlm.recipes import DEFAULT_RECIPE
from slimlm.runtime.arguments import DEVICES
from slimlm.runtime.arguments import device as device_of
from slimlm.storage.identity import files_identity


class RunOptions(TypedDict, total=False):
    """The options of a run as users give them; `RunConfig` documents them and their defaults."""

    recipe: str | Path | dict[str, Any] | Recipe
    bits: float | None
    objective: Objective
    embedding_bits: int | None
    ignore: str | Sequence[str] | None
    data: str | Path | Sequence[str] | Mapping[str, float] | Mapping[Path, float] | None
    chat: Chat
    samples: int | None
    length: int | None
    seed: int
    device: str | torch.device
    memory: int | str | None


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The configuration of a run.

    Raises:
        RecipeError: The recipe is unknown or makes no sense.
        DataError: The samples, their length or the seed make no sense.
    """

    model: str
    """The model: a folder or a hub name."""
    out: Path | None = None
    """The folder to write; None: nothing is written."""
    recipe: str | Recipe = DEFAULT_RECIPE
    """The recipe: a shipped name, a .toml file or a Recipe."""
    bits: float | None = None
    """Average bits per weight that may be spent, everything counted; how each layer is stored is then planned."""
    objective: Objective = "size"
    """The unit of a budget: stored bits ("size"), or bytes and operations ("speed")."""
    embedding_bits: int | None = None
    """Bits of input embedding and output head, 4 to 8, or 16 to keep them as stored; None: the recipe's."""
    ignore: str | Sequence[str] | None = None
    """Patterns on the full names of layers that are not compressed, besides those that the recipe ignores."""
    data: Data | None = None
    """The calibration text: a file, a folder, a hub data set, "stdlib", "self" or texts, or several with shares; None: the
    default data set."""
    chat: Chat = "auto"
    """What the tokenizer's chat template is applied to: conversations ("auto"), text, too ("yes"), or nothing ("no")."""
    samples: int | None = None
    """The number of calibration samples; None: as many as the model and the recipe need (slimlm.preflight.calibration)."""
    length: int | None = None
    """Tokens per sample, at most the model's context; None: 512."""
    seed: int = 0
    """The seed by which samples are drawn."""
    device: str = "auto"
    """The device that one block at a time is worked on: "auto", "cpu", "cuda" or "cuda:N"."""
    memory: int | None = None
    """Bytes that calibration activations may take before they stay on the disk; None: half of the free memory."""

    @classmethod
    def of(cls, model: str | Path, out: str | Path | None = None, **options: Unpack[RunOptions]) -> Self:
        """The configuration that a user asks for; refuses, by name, arguments that make no sense."""
        given: dict[str, Any] = dict(options)
        checked = {name: _CHECKS[name](value) if name in _CHECKS else value for name, value in given.items()}
        folder = None if out is None else arguments.path(out, "out")
        return cls(model=arguments.model_source(model, "model"), out=folder, **checked)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.data == "self" and self.chat != "auto":
            raise DataError(
                f'`chat="{self.chat}"` says how text is read, and with `data="self"` the model writes it; leave one out'
            )
        Calibration(
            DEFAULT_DATA, samples=1 if self.samples is None else self.samples, length=2 if self.length is None else self.length
        )
        _ = self.opened_recipe  # raises RecipeError where it cannot be opened

    @cached_property
    def opened_recipe(self) -> Recipe:
        """The recipe, with the bits of embedding and head that `embedding_bits` gives, and what `ignore` adds."""
        recipe = open_recipe(self.recipe) if isinstance(self.recipe, str) else self.recipe
        if self.ignore is not None:
            recipe = recipe.ignoring(self.ignore)
        if self.embedding_bits is None:
            return recipe
        return dataclasses.replace(recipe, embedding_bits=check_embedding_bits(self.embedding_bits, "embedding_bits"))

    @cached_property
    def calibration(self) -> Calibration:
        """The calibration text and how much of it is used, once that is decided."""
        assert self.samples is not None and self.length is not None, "chosen when the model was opened"
        return Calibration(self.data or DEFAULT_DATA, self.samples, self.length, self.seed, self.chat)

    @property
    def planned(self) -> bool:
        """Whether a plan chooses how layers are stored."""
        return self.bits is not None or self.opened_recipe.needs_plan

    @property
    def model_name(self) -> str:
        """The model's name as it is recorded."""
        return name_of(self.model)

    def budget(self) -> Budget | None:
        """The budget where bits are asked for; raises RecipeError where that makes no sense, whatever the model."""
        recipe = self.opened_recipe
        if self.bits is not None:
            return asked_budget(recipe, self.bits, self.objective)
        if recipe.needs_plan:
            options_of(recipe, None, self.objective)
        elif self.objective != "size":
            raise RecipeError(f"`objective` {self.objective} is the unit of a budget, and there is no budget; give `bits`")
        return None

    def identity(self, files: list[Path], config: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """The data that the result depends on, except weights and calibration text, which are compared when they are read.

        Args:
            files: The model's weight files.
            config: The model's configuration.
            device: The device of the run.
        """
        return {
            "model": files_identity(files),
            "config": config,
            "recipe": self.opened_recipe.to_dict(),
            "budget": {"bits": self.bits, "objective": self.objective},
            "calibration": {
                **dataclasses.asdict(self.calibration),
                "data": [[name_of(portion.source), portion.share] for portion in portions_of(self.calibration.data)],
            },
            "device": device.type,
            "versions": versions("slimlm", "torch", "transformers"),
        }


def _recipe(given: object) -> str | Recipe:
    if isinstance(given, str | Recipe):
        return given
    if isinstance(given, os.PathLike):
        return str(arguments.path(given, "recipe", RecipeError))
    if isinstance(given, dict) and all(isinstance(key, str) for key in given):
        return recipe_from_dict({"name": "given", **given}, source="`recipe`")
    raise RecipeError(
        f"`recipe` is of type {type(given).__name__}; give the name of a shipped recipe, a .toml file, its content as a dict, "
        "or a Recipe"
    )


def text_source(given: object) -> Data | None:
    """The text that `data` names; raises DataError where it makes no sense."""
    if given is None or (isinstance(given, str) and given):
        return given
    if isinstance(given, os.PathLike):
        return str(arguments.path(given, "data", DataError))
    if isinstance(given, list | tuple) and given and all(isinstance(text, str) for text in given):
        return tuple(given)
    if isinstance(given, Mapping) and given:
        shares = {_source_name(name): share for name, share in given.items()}
        mixture = Mixture.of(shares)
        return mixture if len(shares) > 1 else next(iter(shares))
    found = "empty" if isinstance(given, str | list | tuple | Mapping) and not given else f"of type {type(given).__name__}"
    raise DataError(
        f'`data` is {found}; give the name of a text (a file, a folder, a hub data set, "stdlib" or "self"), names with shares '
        '({"a.jsonl": 0.7, "b.txt": 0.3}), or a list of texts'
    )


def _source_name(given: object) -> str:
    path = arguments.path(given, "data", DataError)
    return given if isinstance(given, str) else str(path)


def device_name(given: object) -> str:
    """The name of the device that `device` asks for; raises SlimlmError where it is none."""
    return "auto" if isinstance(given, str) and given == "auto" else str(device_of(given, _DEVICES))


_DEVICES = f'"auto", {DEVICES}'


def _bits(given: object) -> float | None:
    if given is None or isinstance(given, float):
        return given  # NaN and infinity are outside the range, which `budget` names
    return arguments.real_number(given, "bits", example=4, refusal=RecipeError)


def count_of(given: object, name: str, *, least: int, example: int) -> int | None:
    """The whole number that an argument gives, or None; raises DataError where it is none or too small."""
    return None if given is None else arguments.whole_number(given, name, least=least, example=example, refusal=DataError)


def _embedding_bits(given: object) -> int | None:
    return None if given is None else check_embedding_bits(given, "`embedding_bits`")


_CHECKS: dict[str, Callable[[object], Any]] = {
    "recipe": _recipe,
    "bits": _bits,
    "objective": lambda given: arguments.one_of(given, "objective", get_args(Objective), RecipeError),
    "embedding_bits": _embedding_bits,
    "data": text_source,
    "chat": lambda given: arguments.one_of(given, "chat", get_args(Chat), DataError),
    "samples": lambda given: count_of(given, "samples", least=1, example=128),
    "length": lambda given: count_of(given, "length", least=2, example=2048),
    "seed": lambda given: arguments.whole_number(given, "seed", least=None, example=0, refusal=DataError),
    "device": device_name,
    "memory": lambda given: None if given is None else arguments.size(given, "memory"),
}
"""What makes a value of each option from what a user gives, or refuses it."""


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of these packages."""
    return {name: version(name) for name in packages}


def environment() -> dict[str, str]:
    """The versions that a record and a log contain."""
    return {**versions("slimlm", "torch", "transformers", "safetensors"), "python": platform.python_version()}


def pick_device(name: str) -> torch.device:
    """The device of a name; "auto" is cuda where there is one, else the CPU. Several ranks take a GPU each.

    Raises:
        SlimlmError: The name is no device, or the device is not there.
    """
    if name == "auto":
        return pick_device("cuda" if torch.cuda.is_available() else "cpu")
    found = device_of(name, _DEVICES)
    if found.type == "cuda" and world_size() > 1:
        if found.index is not None or local_rank() >= torch.cuda.device_count():
            raise SlimlmError(
                f'`device="{name}"`: each process on a machine takes a GPU of its own; this is number {local_rank() + 1}, and '
                f'torch finds {torch.cuda.device_count()}. Start one for each GPU with `device="cuda"`, or give `device="cpu"`'
            )
        return torch.device("cuda", local_rank())
    return found
