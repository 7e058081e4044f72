"""The configuration of a run that tunes a compressed model: the options of `tune`, in one object."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypedDict, Unpack

import torch

from slimlm.core import arguments
from slimlm.core.errors import DataError, RecipeError
from slimlm.data.documents import Source, label_of, name_of
from slimlm.data.mixture import Mixture
from slimlm.data.windows import check_seed
from slimlm.run.config import count_of, device_name, text_source, versions
from slimlm.tuning.tuner import Tuner, tuner_of


class TuneOptions(TypedDict, total=False):
    """The options of a run that tunes, as users give them; `TuneConfig` documents them and their defaults."""

    method: str
    against: str | Path | None
    rate: float | None
    batch: int | None
    length: int | None
    seed: int
    device: str | torch.device
    memory: int | str | None


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """The configuration of a run that tunes a compressed model.

    Raises:
        RecipeError: The method is unknown, or its options make no sense.
        DataError: The tokens do not suffice for a step, or the text or the seed make no sense.
    """

    model: Path
    """The folder of the compressed model."""
    out: Path
    """The folder to write."""
    data: Source
    """The text: a file, a folder, a hub data set, "stdlib" or texts."""
    tokens: int
    """The number of tokens that all steps take at most; what is left of a step is not taken."""
    method: str = "end_to_end"
    """The name of a tuner (slimlm.tuning.tuners)."""
    against: str | None = None
    """The original model, a folder or a hub name; needed where the method's loss compares with it."""
    rate: float | None = None
    """The largest rate; None: the method's."""
    batch: int | None = None
    """Windows per step; None: the method's."""
    length: int | None = None
    """Tokens per window; None: the method's, or the model's context where that is shorter."""
    seed: int = 0
    """The seed by which windows are drawn."""
    device: str = "auto"
    """The device that one block at a time is run on: "auto", "cpu", "cuda" or "cuda:N"."""
    memory: int | None = None
    """Bytes that activations and blocks may take before they stay on the disk; None: half of the free memory."""

    @classmethod
    def of(cls, model: str | Path, out: str | Path, data: object, tokens: object, **options: Unpack[TuneOptions]) -> Self:
        """The configuration that a user asks for; refuses, by name, arguments that make no sense."""
        given: dict[str, Any] = {**options}
        source = text_source(data)
        if source is None or source == "self":
            raise DataError(
                '`data` names the text to tune on: a file, a folder, a hub data set, "stdlib", or a list of texts; text that '
                "the model writes itself would teach it nothing"
            )
        if isinstance(source, Mixture):
            names = ", ".join(label_of(portion.source) for portion in source.portions)
            raise DataError(f"`data` names several texts ({names}); tuning takes one: put them into one folder or file")
        checked: dict[str, Any] = {
            "method": str(given.get("method", cls.method)),
            "against": None if given.get("against") is None else arguments.model_source(given["against"], "against"),
            "rate": _rate(given.get("rate")),
            "batch": count_of(given.get("batch"), "batch", least=1, example=8),
            "length": count_of(given.get("length"), "length", least=2, example=512),
            "seed": arguments.whole_number(given.get("seed", 0), "seed", least=None, example=0, refusal=DataError),
            "device": device_name(given.get("device", "auto")),
            "memory": None if given.get("memory") is None else arguments.size(given["memory"], "memory"),
        }
        least = arguments.whole_number(tokens, "tokens", least=2, example=300_000, refusal=DataError)
        folder = arguments.path(out, "out")
        return cls(model=arguments.path(model, "model"), out=folder, data=source, tokens=least, **checked)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.asked_tuner.loss.needs_original and self.against is None:
            raise RecipeError(
                f"{self.method} lowers the divergence from the original model, and none is named; give it as `against`, or use "
                'a method that trains on the text alone (`method="slim_peft_paper"`)'
            )

    @cached_property
    def asked_tuner(self) -> Tuner:
        """The method with the options that are given."""
        asked: dict[str, Any] = {"rate": self.rate, "batch": self.batch, "length": self.length}
        return dataclasses.replace(tuner_of(self.method), **{k: v for k, v in asked.items() if v is not None})

    def tuner(self, context: int | None) -> Tuner:
        """The method for a model of this context.

        Raises:
            DataError: Windows are longer than the context, or the tokens do not suffice for one step.
        """
        asked = self.asked_tuner
        if context is not None and asked.length > context:
            if self.length is not None:
                raise DataError(f"`length={self.length}` is more than the model's context of {context} tokens")
            asked = dataclasses.replace(asked, length=context)
        if self.tokens < asked.batch * asked.length:
            raise DataError(
                f"`tokens={self.tokens}` do not suffice for one step, which takes {asked.batch} windows of {asked.length} "
                f"tokens, {asked.batch * asked.length} in all; give more, or a smaller `batch` or `length`"
            )
        return asked

    def identity(self, tuner: Tuner, model: str, against: dict[str, str] | None, device: torch.device) -> dict[str, Any]:
        """The data that the result depends on, except the text, which is compared when it is read.

        Args:
            tuner: The method with its options.
            model: The fingerprint of the compressed model.
            against: The identity of the original's files; None: there is none.
            device: The device of the run.
        """
        return {
            "model": model,
            "against": against,
            "method": self.method,
            "settings": settings_of(tuner),
            "data": name_of(self.data),
            "tokens": self.tokens,
            "seed": self.seed,
            "device": device.type,
            "versions": versions("slimlm", "torch", "transformers"),
        }


def settings_of(tuner: Tuner) -> dict[str, Any]:
    """A tuner as plain data for JSON."""
    settings = {key: value for key, value in vars(tuner).items() if key != "summary"}
    trains = [str(kind.name).lower() for kind in tuner.trains]
    return {**settings, "trains": trains, "loss": dataclasses.asdict(tuner.loss)}


def _rate(given: object) -> float | None:
    if given is None:
        return None
    rate = arguments.real_number(given, "rate", example=0.01, refusal=RecipeError)
    if not 0 <= rate < math.inf:
        raise RecipeError(f"`rate={rate}`: give a rate of at least 0, such as 0.01")
    return rate
