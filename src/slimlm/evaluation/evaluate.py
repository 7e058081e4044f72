"""What `slimlm.evaluate` does: a model measured on a text and on tasks, alone or against its original.

Models are opened and their texts compared before anything is measured. A dense model stays in its files and is run a block at a
time, so that the original of a compressed model never has to fit in memory; a compressed model is opened with its kernels,
or is run from its files as well where it is larger than the memory that it may take.
"""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimlm.calibration.capture import batches_of
from slimlm.core import arguments
from slimlm.core.defaults import usual_defaults
from slimlm.core.errors import DataError, KernelError, SlimlmError
from slimlm.data.documents import Source, name_of
from slimlm.data.windows import refuse_unknown_tokens
from slimlm.display import Show, shown
from slimlm.evaluation.activation_formats import ActivationFormat
from slimlm.evaluation.activations import rounded_activations
from slimlm.evaluation.compare import OpenModel, dense_bits_per_weight, open_any
from slimlm.evaluation.divergence import (
    Predictions,
    divergence_of,
    perplexity_from,
    predictions_of,
    rise_of,
)
from slimlm.evaluation.logits import InFiles, InMemory, Logits
from slimlm.evaluation.perplexity import pieces_of
from slimlm.evaluation.samples import DEFAULT_TEXT, text_windows, wikitext
from slimlm.evaluation.stored_model import StoredModel, stored_checkpoint
from slimlm.evaluation.tasks import Task, TaskScore, run_tasks, tasks_of
from slimlm.events import Event, Notify, Observer, logged
from slimlm.inference.load import read_description, refuse_other
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.models.opening import fetch, open_tokenizer, quantization_of, read_config
from slimlm.models.structure import blocks_of, context_length, vocabulary_size
from slimlm.record import Divergence, Measured
from slimlm.runtime.arguments import DEVICES
from slimlm.runtime.arguments import device as device_of
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.memory import format_bytes, total_and_free
from slimlm.runtime.whole_model import describe
from slimlm.storage import checkpoint
from slimlm.storage.mapping import MappedFiles


@dataclass(frozen=True)
class EvaluatedModel:
    """What was measured of one model."""

    model: str
    """The folder or hub name."""
    kernels: str | None
    """The kernels that ran it; None: it is not compressed."""
    activations: str
    """How the activations of its linear layers were rounded."""
    bits_per_weight: float
    """Stored bits per weight of the linear layers in the blocks."""
    bytes: int
    """The size of its tensors as stored."""
    perplexity: Measured | None
    """The perplexity on the text; None: no text was measured."""
    tasks: tuple[TaskScore, ...] = ()
    """The scores on tasks."""


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`."""

    text: str | None
    """The name of the text; None: none was measured."""
    tokens: int
    """The number of tokens of it that were predicted."""
    windows: int
    """The number of windows."""
    length: int
    """Tokens per window."""
    models: tuple[EvaluatedModel, ...]
    """The model, and the original where there is one."""
    divergence: Divergence | None = None
    """The divergence of the model from the original, on the same tokens."""
    rise: Measured | None = None
    """The rise of the mean loss, which is the logarithm of the perplexity, over the original's, in nats."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _Asked:
    """The arguments of `evaluate`, checked."""

    device: torch.device
    kernels: Kernels
    memory: int
    notify: Notify


@dataclass(frozen=True)
class _Wanted:
    """The tasks to score, and how many items of each."""

    tasks: tuple[Task, ...]
    limit: int | None


@dataclass(frozen=True)
class _Reading:
    """The text to measure on, and how much of it is read."""

    text: Source
    tokens: int | None
    length: int | None


@dataclass(frozen=True)
class _Opened:
    """A model that can be run, with what is reported of it."""

    about: EvaluatedModel
    runs: Logits
    tokenizer: PreTrainedTokenizerBase
    context: int | None
    vocabulary: int


@usual_defaults()
def evaluate(  # noqa: PLR0913  # the options of a verb
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    length: int | None = None,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    activations: ActivationFormat | None = None,
    kernels: Kernels = "auto",
    device: str | torch.device = "auto",
    memory: int | str | None = None,
    progress: Show = "auto",
    notify: Notify = logged,
) -> Evaluation:
    """Measure a model on a text and on tasks, alone or against its original on the same tokens.

    Against an original: KL(original || model) per token in nats (mean, median, 99th percentile, maximum), the share of tokens
    whose most probable successor is the same, and both perplexities, with standard errors (slimlm.evaluation.divergence).

    Args:
        model: A folder or hub name, compressed or not.
        against: The original, or any model that cuts text into the same tokens.
        text: A file, a folder, a hub data set, "stdlib", or a list of texts; None: the test part of WikiText-2, where no tasks
            are given.
        tokens: Tokens that are read of the text; None: all.
        length: Tokens per window; None: the context of the models, at most 2048. Windows do not overlap.
        tasks: Names of tasks of lm_eval, or .jsonl files of tasks (their forms: slimlm.evaluation.tasks); they need the extra
            `eval`.
        limit: Items of each task; None: all.
        activations: How the activations of the first model's linear layers are rounded.
        kernels: As in `slimlm.load`, for compressed models.
        device: "auto", "cpu", "cuda" or "cuda:N".
        memory: Bytes ("8GB") that a compressed model may take in memory; a larger one is run from its files, a block at a time,
            without kernels. None: half of the free memory. A dense model is run so unless its activations are rounded. For
            tasks each model is in memory as a whole, one after the other, whatever this says.
        progress: As for `compress`.
        notify: As for `compress`.

    Raises:
        SlimlmError: A model, the text or a task cannot be used, or the models do not cut the text into the same tokens.
    """
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    sources = [arguments.model_source(model, "model")]
    sources += [] if against is None else [arguments.model_source(against, "against")]
    for name, least, value in (("tokens", 2, tokens), ("length", 2, length), ("limit", 1, limit)):
        if value is not None:
            arguments.whole_number(value, name, least=least, example=1024, refusal=DataError)
    if limit is not None and not names:
        raise DataError("`limit` counts the items of `tasks`, and none are named")
    source = _text(text)
    if source is None and names and not (tokens is None and length is None):
        raise DataError("`tokens` and `length` say how much of a text is read, and no `text` is named")
    if activations is not None and source is None and names:
        raise DataError("`activations` are rounded where a text is measured, and no `text` is named")
    asked = _Asked(_device(device), _kernels(kernels), _memory(memory), notify)
    wanted = _Wanted(tasks_of(names), limit)
    for folder in map(Path, sources):
        if (folder / checkpoint.RECORD).is_file():
            checkpoint.verify_files(folder)
    if source is None and names:
        return Evaluation(None, 0, 0, 0, tuple(_scored(sources, (), wanted, asked)))
    reading = _Reading(wikitext() if source is None else source, tokens, length)
    with TemporaryDirectory(prefix="slimlm-") as scratch, shown(progress) as observer:
        opened = [_open(each, Path(scratch) / str(i), asked, activations if i == 0 else None) for i, each in enumerate(sources)]
        windows = _windows(opened, reading, notify)
        found = _predictions(opened, windows, activations, observer)
        losses = [each for each in (found.losses, found.original_losses) if each is not None]
        pairs = zip(opened, losses, strict=True)
        rows = [dataclasses.replace(each.about, perplexity=perplexity_from(own)) for each, own in pairs]
    return Evaluation(
        text=DEFAULT_TEXT if source is None else name_of(source),
        tokens=windows[:, 1:].numel(),
        windows=len(windows),
        length=windows.shape[1],
        models=tuple(_scored(sources, rows, wanted, asked)),
        divergence=divergence_of(found),
        rise=rise_of(found),
    )


def _device(given: str | torch.device) -> torch.device:
    if given == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return device_of(given, f'"auto", {DEVICES}')


def _kernels(given: Kernels) -> Kernels:
    arguments.one_of(given, "kernels", get_args(Kernels), KernelError)
    return given


def _memory(given: int | str | None) -> int:
    """The bytes that a compressed model may take."""
    if given is not None:
        return arguments.size(given, "memory")
    free = total_and_free()[1]
    return 2**63 if free is None else free // 2


def _text(given: str | Path | Sequence[str] | None) -> Source | None:
    if given is None or (isinstance(given, str) and given):
        return given
    if isinstance(given, os.PathLike):
        return str(arguments.path(given, "text", DataError))
    if isinstance(given, list | tuple) and given and all(isinstance(text, str) for text in given):
        return tuple(given)
    raise DataError('`text` is none; give the name of a text (a file, a folder, a hub data set, "stdlib"), or a list of texts')


def _is_compressed(source: str) -> bool:
    return quantization_of(read_config(source), source).get("quant_method") == checkpoint.METHOD


def _open(source: str, scratch: Path, asked: _Asked, activations: ActivationFormat | None) -> _Opened:
    """Open a model, in memory or to be run from its files."""
    if not _is_compressed(source):
        if activations is None:
            return _opened_dense(open_lazy(source, scratch, asked.notify), asked.device)
    elif (size := checkpoint.stored_bytes(Path(fetch(source)))) > asked.memory:
        if activations is not None or asked.kernels not in ("auto", "reference"):
            raise SlimlmError(
                f"{source} takes {format_bytes(size)}, more than the `memory` of {format_bytes(asked.memory)}, and is run "
                "from its files; `activations` and kernels need it in memory"
            )
        asked.notify(f"{source} takes {format_bytes(size)} and is run from its files, a block at a time and without kernels")
        return _opened_packed(source, asked.device)
    opened = open_any(source, kernels=asked.kernels, device=asked.device, notify=asked.notify)
    model, about = opened.model, _about(opened, activations)
    return _Opened(about, InMemory(model), opened.tokenizer, context_length(model), vocabulary_size(model))


def _tokenizer(source: str, found: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if found is None:
        raise DataError(f"{source} has no tokenizer, so text cannot be read; add its tokenizer files to the folder")
    return found


def _opened_dense(dense: LazyModel, device: torch.device) -> _Opened:
    bits = dense_bits_per_weight(blocks_of(dense.model), dense.bits)
    about = EvaluatedModel(dense.source, None, "as they are", bits, dense.bytes, None)
    runs = InFiles(StoredModel(dense.model, dense.weights, dense.release), device)
    tokenizer = _tokenizer(dense.source, dense.tokenizer)
    return _Opened(about, runs, tokenizer, context_length(dense.model), vocabulary_size(dense.model))


def _opened_packed(source: str, device: torch.device) -> _Opened:
    refuse_other(source)
    folder = fetch(source)
    described, files = read_description(folder), MappedFiles.of(checkpoint.check_files(folder))
    stored_model = stored_checkpoint(folder, files, described)
    meta = stored_model.meta_model
    blocks = tuple(f"{name}." for name in blocks_of(meta))
    inside = {name: entry for name, entry in described.layers.items() if name.startswith(blocks)}
    stored = [files.tensors[f"{name}.{key}"] for name, entry in inside.items() for key in entry.tensors]
    bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in stored)
    weights = sum(entry.shape[0] * entry.shape[1] for entry in inside.values())
    size = checkpoint.stored_bytes(folder)
    about = EvaluatedModel(source, "none: run from its files", "as they are", bits / max(1, weights), size, None)
    runs = InFiles(stored_model, device)
    return _Opened(about, runs, _tokenizer(source, open_tokenizer(source)), context_length(meta), vocabulary_size(meta))


def _windows(opened: Sequence[_Opened], reading: _Reading, notify: Notify) -> Tensor:
    """The windows that all models are measured on; raises DataError where they do not agree about tokens."""
    context = min((each.context for each in opened if each.context is not None), default=None)

    def read(each: _Opened, notify: Notify) -> Tensor:
        return text_windows(
            each.tokenizer, reading.text, length=reading.length, context=context, at_most=reading.tokens, notify=notify
        )

    windows = read(opened[0], notify)
    for other in opened[1:]:
        if not torch.equal(windows, read(other, lambda _: None)):
            raise DataError(
                f"{opened[0].about.model} and {other.about.model} cut text into different tokens; figures per token cannot be "
                "compared"
            )
        if opened[0].vocabulary != other.vocabulary:
            raise DataError(
                f"{opened[0].about.model} predicts {opened[0].vocabulary} tokens and {other.about.model} {other.vocabulary}; "
                "distributions over different vocabularies cannot be compared"
            )
    return windows


def _predictions(
    opened: Sequence[_Opened], windows: Tensor, activations: ActivationFormat | None, observer: Observer
) -> Predictions:
    """What the models predict, a batch of windows at a time."""
    first, others = opened[0].runs, [each.runs for each in opened[1:]]
    if isinstance(first, InMemory):
        refuse_unknown_tokens(windows, first.model)
    batches, found = batches_of(windows), []
    with _rounded(first, activations):
        for done, batch in enumerate(batches, 1):
            pieces = pieces_of(batch, opened[0].vocabulary)
            original = others[0].logits(batch, pieces) if others else None
            found.append(predictions_of(first.logits(batch, pieces), batch, pieces, original))
            observer(Event(f"evaluate {opened[0].about.model}", done, len(batches)))
    return Predictions.joined(found)


@contextmanager
def _rounded(runs: Logits, activations: ActivationFormat | None) -> Iterator[None]:
    if activations is None:
        yield
        return
    assert isinstance(runs, InMemory), "a model whose activations are rounded is in memory"
    with rounded_activations(runs.model, activations):
        yield


def _about(opened: OpenModel, activations: ActivationFormat | None = None) -> EvaluatedModel:
    """What is known of a model in memory before it is measured."""
    rounded = activations or "as they are"
    return EvaluatedModel(opened.source, describe(opened.model), rounded, opened.bits_per_weight, opened.bytes, None)


def _scored(sources: Sequence[str], rows: Sequence[EvaluatedModel], wanted: _Wanted, asked: _Asked) -> list[EvaluatedModel]:
    """The rows of models, made where there are none, with scores on tasks; each model is in memory as a whole meanwhile."""
    if not wanted.tasks:
        return list(rows)
    found = []
    for i, source in enumerate(sources):
        opened = open_any(source, kernels=asked.kernels, device=asked.device, notify=asked.notify)
        scores = run_tasks(opened.model, opened.tokenizer, wanted.tasks, wanted.limit)
        found.append(dataclasses.replace(rows[i] if rows else _about(opened), tasks=scores))
    return found
