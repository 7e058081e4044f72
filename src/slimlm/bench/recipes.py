"""A model compressed in several ways, each compared with the original."""

import dataclasses
import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError, SlimlmError
from slimlm.data.windows import tokens_of, windows_of
from slimlm.evaluation.compare import OpenModel, open_any
from slimlm.evaluation.perplexity import perplexity
from slimlm.events import Event, Notify, Observer, logged, quiet
from slimlm.pipeline import compress
from slimlm.recipe import open_recipe
from slimlm.record import Record
from slimlm.run.config import versions
from slimlm.run.log import log_path
from slimlm.storage.checkpoint import RECORD, read_record, refuse_occupied, refuse_taken, verify_files

_NEW_TOKENS = 60


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
    """Whether the compressed model also continues the prompts."""
    out: Path | None = None
    """The folder that the compressed model is moved to at the end; None: it is not kept."""


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
    prompts: tuple[str, ...]
    """Texts that some of the models continue."""


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
    prompts: tuple[str, ...]
    """The prompts."""
    continuations: dict[str, tuple[str, ...]]
    """Continuations of the prompts by some of the models, by row name."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def compare_recipes(
    source: str | Path,
    trials: Sequence[Trial],
    setting: Setting,
    *,
    store: Path,
    progress: Observer = quiet,
    notify: Notify = logged,
    each: Callable[[Row], None] | None = None,
) -> Comparison:
    """Compress a model in several ways and compare each with the original.

    Args:
        source: Folder or hub name of the original.
        trials: The ways to compress it, in order.
        setting: The text.
        store: A folder for the compressed models until all are done. A call that was stopped continues with what is there, and
            removes it when it is done. It is made where it does not exist.
        progress: An observer of the events; stages are those of `compress` after the number and the name of the trial.
        notify: Is given what the user should know, before a Ctrl-C.
        each: A function that is called with each row as soon as it is known.

    Raises:
        SlimlmError: As for `compress`; before any work, CheckpointError where a folder to write holds files, or the
            store cannot be written.
    """
    for trial in trials:
        if trial.out is not None:
            refuse_occupied(trial.out)
    _make(store)
    original = open_any(str(source))
    at_most = setting.measured_samples * setting.length
    tokens = tokens_of(original.tokenizer, setting.data, "evaluation", at_most=at_most)
    samples = windows_of(tokens, setting.length, source=setting.data)
    rows = [_row("original", "as it was trained", original, samples, 0.0, _named("original", progress))]
    each = each or _ignore
    each(rows[0])
    continuations = {"original": _continuations(original, setting.prompts)}
    folders = [store / f"{trial.name.replace(' ', '-')}-{_key(source, trial, setting)}" for trial in trials]
    for number, (trial, folder) in enumerate(zip(trials, folders, strict=True), 1):
        observer = _named(f"recipe {number} of {len(trials)}, {trial.name}", progress)
        opened, seconds = _compressed(source, trial, setting, folder, observer, notify)
        rows.append(_row(trial.name, trial.what, opened, samples, seconds, observer))
        each(rows[-1])
        if trial.continues:
            continuations[trial.name] = _continuations(opened, setting.prompts)
    for trial, folder in zip(trials, folders, strict=True):
        if trial.out is not None:
            if trial.out.is_dir():
                trial.out.rmdir()
            shutil.move(folder, trial.out)
        shutil.rmtree(folder, ignore_errors=True)
        log_path(folder).unlink(missing_ok=True)
    with suppress(OSError):  # other calls may have folders there
        store.rmdir()
    return Comparison(tuple(rows), samples[:, 1:].numel(), setting.prompts, continuations)


def _make(store: Path) -> None:
    """Make the folder where it does not exist; raises CheckpointError where it cannot be written."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store):
            pass
    except OSError as error:
        raise CheckpointError(
            f"cannot write to {store}, which holds the compressed models until all are done: {error.strerror or error}; name "
            "another folder, for slimlm demo in the environment variable XDG_CACHE_HOME"
        ) from error


def _ignore(row: Row) -> None:
    """Ignore the row."""


def _key(source: str | Path, trial: Trial, setting: Setting) -> str:
    """A name for what a compressed model depends on."""
    about = {
        "source": str(source),
        "recipe": open_recipe(trial.recipe).to_dict(),
        "bits": trial.bits,
        "calibration": [setting.data, setting.samples, setting.length],
        "versions": versions("slimlm", "torch", "transformers"),
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def _compressed(
    source: str | Path, trial: Trial, setting: Setting, folder: Path, progress: Observer, notify: Notify
) -> tuple[OpenModel, float]:
    """The compressed model of a trial, which an earlier call may have made, and the seconds that it took."""
    _drop_if_damaged(folder, notify)
    if (folder / RECORD).is_file():
        seconds = Record.from_dict(read_record(folder)).seconds
    else:
        result = compress(
            source,
            folder,
            recipe=trial.recipe,
            bits=trial.bits,
            data=setting.data,
            samples=setting.samples,
            length=setting.length,
            progress=progress,
            notify=_until_stopped(notify),
        )
        seconds = result.record.seconds
    return open_any(str(folder), notify=notify), seconds


def _until_stopped(notify: Notify) -> Notify:
    """The same function, silent while a Ctrl-C is handled: `compress` then speaks of one model of several."""

    def told(text: str) -> None:
        if not isinstance(sys.exception(), KeyboardInterrupt):
            notify(text)

    return told


def _drop_if_damaged(folder: Path, notify: Notify) -> None:
    """Remove what an earlier call has left in a folder if it is neither a whole compressed model nor an unfinished one."""
    try:
        if (folder / RECORD).is_file():
            verify_files(folder)
            Record.from_dict(read_record(folder))
        else:
            refuse_taken(folder)
    except SlimlmError as error:
        notify(f"{folder}, from an earlier call, is damaged and is made again: {error}")
        shutil.rmtree(folder)


def _named(name: str, progress: Observer) -> Observer:
    return lambda event: progress(dataclasses.replace(event, stage=f"{name}: {event.stage}"))


def _row(name: str, what: str, opened: OpenModel, samples: Tensor, seconds: float, progress: Observer) -> Row:
    def report(done: int, total: int) -> None:
        progress(Event("evaluate", done, total))

    measured = perplexity(opened.model, samples, progress=report)
    return Row(name, what, opened.bits_per_weight, opened.bytes, measured.value, seconds)


def _continuations(opened: OpenModel, prompts: Sequence[str]) -> tuple[str, ...]:
    """Continuations of the prompts, drawn with a fixed seed and fewer repetitions, because small models repeat themselves."""
    tokenizer = opened.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = []
    for prompt in prompts:
        ids = torch.tensor([[*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = opened.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_NEW_TOKENS,
                do_sample=True,
                temperature=0.7,
                repetition_penalty=1.15,
                pad_token_id=0,
            )
        found.append(str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)))
    return tuple(found)
