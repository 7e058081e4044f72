"""One model compressed in several ways, each measured beside the original."""

import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlm.data.documents import documents
from slimlm.data.windows import token_stream, windows_of
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
    what: str
    """what it does, for a reader who knows no recipes"""
    recipe: str
    bits: float | None = None
    """a budget in bits per weight; None: none"""
    continues: bool = False
    """whether the compressed model also continues the prompt"""
    out: Path | None = None
    """folder to keep it in; None: it is dropped"""


@dataclass(frozen=True)
class Setting:
    """The text that a comparison uses: `data`'s calibration part to calibrate on, its evaluation part to measure on."""

    data: str
    samples: int
    length: int
    """tokens per sample, in calibration and in measuring"""
    measured_samples: int
    prompt: str


@dataclass(frozen=True)
class Row:
    """One model of a comparison."""

    name: str
    what: str
    bits_per_weight: float
    bytes: int
    perplexity: float
    seconds: float
    """that the compression took; 0 for the original"""


@dataclass(frozen=True)
class Comparison:
    """What the trials gave; the original is the first row."""

    rows: tuple[Row, ...]
    tokens: int
    """that were predicted"""
    prompt: str
    continuations: dict[str, str]
    """what some of the models wrote after the prompt, by row name"""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def compare_recipes(source: str | Path, trials: Sequence[Trial], setting: Setting, *, progress: Observer = quiet) -> Comparison:
    """Compress a model in several ways and measure each beside the original.

    Args:
        source: Folder or hub name of the original.
        trials: The ways to compress it, in order.
        setting: The text.
        progress: Told of every step; stages are those of `compress` after the trial's name.

    Raises:
        SlimlmError: What `compress` raises; before any work, CheckpointError where a folder to keep is taken.
    """
    for trial in trials:
        if trial.out is not None:
            refuse_occupied(trial.out)
    original = open_any(str(source))
    at_most = setting.measured_samples * setting.length
    tokens = token_stream(original.tokenizer, documents(setting.data, "evaluation"), at_most=at_most)
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
    """What a model writes after the prompt, drawn from a fixed seed; the likeliest tokens alone would repeat themselves."""
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
