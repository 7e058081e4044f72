"""A model compressed in several ways, each compared with the original."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlm.data.windows import tokens_of, windows_of
from slimlm.evaluation.compare import OpenModel, open_any
from slimlm.evaluation.perplexity import perplexity
from slimlm.events import Event, Observer, quiet
from slimlm.pipeline import compress
from slimlm.storage.checkpoint import refuse_occupied

_NEW_TOKENS = 80


@dataclass(frozen=True)
class Trial:
    """One way to compress a model."""

    name: str
    """The name in the table."""
    what: str
    """A description for readers who do not know the recipes."""
    recipe: str
    """The recipe."""
    bits: float | None = None
    """The budget in bits per weight; None: there is none."""
    continues: bool = False
    """Whether the compressed model also continues the prompt."""
    out: Path | None = None
    """The folder to write; None: a temporary one."""


@dataclass(frozen=True)
class Setting:
    """The text of a comparison: the calibration part of `data` to calibrate on, its evaluation part to measure on."""

    data: str
    """The text."""
    samples: int
    """The number of calibration samples."""
    length: int
    """Tokens per sample, in calibration and evaluation."""
    measured_samples: int
    """The number of samples that the perplexity is measured on."""
    prompt: str
    """A text that some of the models continue."""


@dataclass(frozen=True)
class Row:
    """One model of a comparison."""

    name: str
    """The name."""
    what: str
    """The description."""
    bits_per_weight: float
    """Stored bits per weight of the compressed layers."""
    bytes: int
    """The size of the model."""
    perplexity: float
    """The perplexity on the evaluation text."""
    seconds: float
    """The time of the compression; 0 for the original."""


@dataclass(frozen=True)
class Comparison:
    """The results of a comparison."""

    rows: tuple[Row, ...]
    """A row per model; the original is the first."""
    tokens: int
    """The number of tokens that were predicted."""
    prompt: str
    """The prompt."""
    continuations: dict[str, str]
    """Continuations of the prompt by some of the models, by row name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def compare_recipes(source: str | Path, trials: Sequence[Trial], setting: Setting, *, progress: Observer = quiet) -> Comparison:
    """Compress a model in several ways and compare each with the original.

    Args:
        source: Folder or hub name of the original.
        trials: The ways to compress it, in order.
        setting: The text.
        progress: An observer of the events; stages are those of `compress` after the trial's name.

    Raises:
        SlimlmError: As for `compress`; before any work, CheckpointError where a folder to write holds files.
    """
    for trial in trials:
        if trial.out is not None:
            refuse_occupied(trial.out)
    original = open_any(str(source))
    at_most = setting.measured_samples * setting.length
    tokens = tokens_of(original.tokenizer, setting.data, "evaluation", at_most=at_most)
    samples = windows_of(tokens, setting.length, source=setting.data)
    rows = [_row("original", "as it was trained", original, samples, 0.0, progress)]
    continuations = {"original": _continuation(original, setting.prompt)}
    for trial, opened, seconds in _compressed(source, trials, setting, progress):
        rows.append(_row(trial.name, trial.what, opened, samples, seconds, progress))
        if trial.continues:
            continuations[trial.name] = _continuation(opened, setting.prompt)
    return Comparison(tuple(rows), samples[:, 1:].numel(), setting.prompt, continuations)


def _compressed(
    source: str | Path, trials: Sequence[Trial], setting: Setting, progress: Observer
) -> Iterator[tuple[Trial, OpenModel, float]]:
    """Each trial with its compressed model and the seconds that it took."""
    with tempfile.TemporaryDirectory(prefix="slimlm-recipes-") as scratch:
        for number, trial in enumerate(trials):
            result = compress(
                source,
                trial.out or Path(scratch) / str(number),
                recipe=trial.recipe,
                bits=trial.bits,
                data=setting.data,
                samples=setting.samples,
                length=setting.length,
                progress=_named(trial.name, progress),
            )
            yield trial, open_any(str(result.path)), result.record.seconds


def _named(name: str, progress: Observer) -> Observer:
    return lambda event: progress(dataclasses.replace(event, stage=f"{name}: {event.stage}"))


def _row(name: str, what: str, opened: OpenModel, samples: Tensor, seconds: float, progress: Observer) -> Row:
    def report(done: int, total: int) -> None:
        progress(Event(f"{name}: evaluate", done, total))

    measured = perplexity(opened.model, samples, progress=report)
    return Row(name, what, opened.bits_per_weight, opened.bytes, measured.value, seconds)


def _continuation(opened: OpenModel, prompt: str) -> str:
    """A continuation of the prompt, drawn with a fixed seed, because the likeliest tokens would repeat themselves."""
    tokenizer = opened.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([[*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = opened.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_NEW_TOKENS,
            do_sample=True,
            temperature=0.8,
            pad_token_id=0,
        )
    return str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
