"""Verify a checkpoint from its folder alone, one tensor and one block at a time.

Every shard, every tensor and the config is compared with its recorded SHA-256, the index with the shards, every packed layer
with its description (masks, scales, padding), every tensor and linear layer with the model's class, and the record with all of
these; the tokenizer is opened; and then the model is run, block by block, on a few tokens or on a text. The comparison with the
model in memory, while it is compressed, is in slimlm.run.assemble.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.core.arguments import path
from slimlm.core.defaults import usual_defaults
from slimlm.core.errors import CheckpointError, ModelError, NumericsError, first_line
from slimlm.core.parts.base import not_finite
from slimlm.evaluation.perplexity import Perplexity, perplexity
from slimlm.evaluation.stored_model import StoredModel, stored_checkpoint
from slimlm.inference.load import read_description, refuse_other, take, take_others
from slimlm.models.meta import meta_model, misfits
from slimlm.models.opening import open_generation_config, open_tokenizer
from slimlm.models.structure import linears_of, vocabulary_size
from slimlm.record import COPIED, Quality, Record, Source, quality_warning
from slimlm.runtime import arguments
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description
from slimlm.storage.mapping import MappedFiles
from slimlm.storage.streams import tensor_sum

_CPU = torch.device("cpu")
_TOKENS = 8
"""The number of tokens that a model is run on where no text is given."""


@dataclass(frozen=True)
class Verified:
    """The findings on a checkpoint's folder."""

    folder: str
    """The folder that was checked."""
    problems: tuple[str, ...]
    """Messages about what is wrong, each naming the tensor or layer; without any the checkpoint is sound."""
    notes: tuple[str, ...]
    """Warnings, and checks that were not possible."""
    shards: int
    """The number of weight files."""
    tensors: int
    """The number of tensors that they hold."""
    bytes: int
    """The size of the weight files."""
    checksums: str
    """Whether checksums of "tensors" are recorded, or only of "shards", as in folders of older versions."""
    compressed: int
    """The number of linear layers that are packed."""
    skipped: tuple[str, ...]
    """The names of linear layers that are dense."""
    embeddings: int
    """The number of embeddings that are packed."""
    recorded: dict[str, Any] | None
    """The perplexity before and after that the run recorded."""
    measured: dict[str, Any] | None
    """The perplexity on the samples given."""
    quality: Quality
    """The quality check of the run that wrote the folder, which is apart from whether the folder is what was written."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"sound": self.sound, **dataclasses.asdict(self)}

    def raise_if_unsound(self) -> None:
        """Raise CheckpointError, with the first problems, where there are any."""
        if self.problems:
            more = f"; and {len(self.problems) - 3} more" if len(self.problems) > 3 else ""
            raise CheckpointError(f"verification of {self.folder} failed: {'; '.join(self.problems[:3])}{more}")


@dataclass(frozen=True)
class _Opened:
    """A folder whose config and record could be read."""

    folder: Path
    record: dict[str, Any]
    """The content of slimlm.json."""
    about: Description
    """The description in the `quantization_config`."""
    recorded: checkpoint.Files
    """The recorded sizes and checksums."""
    files: MappedFiles
    """The weight files."""

    @classmethod
    def of(cls, folder: Path) -> "_Opened":
        """Open a folder; raises CheckpointError where it is no checkpoint, or too damaged to be read."""
        record = checkpoint.read_record(folder)
        refuse_other(str(folder))
        about, recorded = read_description(folder), checkpoint.recorded_files(folder)
        return cls(folder, record, about, recorded, MappedFiles.of(checkpoint.check_files(folder)))

    @property
    def sums_tensors(self) -> bool:
        """Whether checksums of single tensors are recorded."""
        return all("tensors" in entry for entry in self.recorded.values())

    def meta_model(self) -> PreTrainedModel:
        """The model's class without values; raises CheckpointError where the config does not give one."""
        try:
            return meta_model(self.folder, self.files.tensors, self.about.experts)
        except ModelError as error:
            raise CheckpointError(str(error)) from error

    def stored_model(self) -> StoredModel:
        """The model that runs from the stored tensors."""
        return stored_checkpoint(self.folder, self.files, self.about)


@usual_defaults()
def verify(folder: str | Path, samples: Tensor | None = None, *, device: torch.device = _CPU) -> Verified:
    """Check a checkpoint from its folder: checksums, packed layers, the record, and that the model runs.

    Args:
        folder: The checkpoint.
        samples: Token ids `[count, length]` to measure the perplexity on; None: the model is run on a few tokens.
        device: The device that blocks are run on.

    Returns:
        The findings; `problems` says what is wrong.

    Raises:
        CheckpointError: The folder is no checkpoint, or too damaged to be read.
    """
    device = arguments.device(device)
    if samples is not None:
        samples = arguments.token_ids(samples, "samples")
    opened = _Opened.of(path(folder, "folder"))
    problems = [*_checksums(opened), *_index(opened), *_unopened(opened.folder), *_packed(opened)]
    empty = opened.meta_model()
    packed = set(opened.about.packed_names())
    rest = {name: tensor for name, tensor in opened.files.tensors.items() if name not in packed}
    try:
        take_others(rest, opened.about)
    except CheckpointError as error:
        problems.append(str(error))
    problems += misfits(empty, opened.about, rest)
    skipped = tuple(name for name in linears_of(empty) if name not in opened.about.layers)
    record, notes = _record_of(opened.record)
    if record is not None:
        problems += _unlike_record(record, opened.about, skipped)
        problems += _unlike_source(record.source, opened, empty)
        if (warning := quality_warning(record)) is not None:
            notes.append(warning)
        for done in record.tuning:
            notes.append(
                f"tuned after the run by {done.method}, on {done.tokens} tokens of {done.data}: the run's figures are those of "
                f"before; on windows that were held back the loss fell from {done.before.loss:.4g} to {done.after.loss:.4g}"
            )
        if edited := record.edited:
            first = edited[0] if len(edited) == 1 else f"{edited[0]} and {len(edited) - 1} more"
            notes.append(f"{first}: changed and saved again after the run, whose figures are about the tensors of before")
    beside, about_them = _beside(opened.folder)
    problems += beside
    notes += about_them
    if not opened.sums_tensors:
        notes.append("the folder was written by an older slimlm: it records checksums of its shards, none of single tensors")
    measured = None
    if not problems:
        found = _run(opened.stored_model(), samples, device)
        problems += [found] if isinstance(found, str) else []
        measured = found if isinstance(found, Perplexity) else None
    compared = None if record is None or record.perplexity is None else dataclasses.asdict(record.perplexity)
    return Verified(
        folder=str(folder),
        problems=tuple(problems),
        notes=tuple(notes),
        shards=len(opened.files.files),
        tensors=len(opened.files.tensors),
        bytes=sum(entry["bytes"] for entry in opened.recorded.values()),
        checksums="tensors" if opened.sums_tensors else "shards",
        compressed=len(opened.about.layers),
        skipped=skipped,
        embeddings=len(opened.about.embeddings),
        recorded=compared,
        measured=None if measured is None else dataclasses.asdict(measured),
        quality="not measured" if record is None else record.quality,
    )


def _beside(folder: Path) -> tuple[list[str], list[str]]:
    """Problems and notes about the files other than weights: config, tokenizer and others.

    A changed config is a problem, because the model's outputs depend on it; the user may edit the others.
    """
    found = checkpoint.changed_beside(folder)
    if found is None:
        return [], ["the folder was written by an older slimlm: it records no checksums of its config and tokenizer"]
    changed, gone = found
    problems = [f"{name} is missing" for name in gone]
    problems += [f"{name} is not what was written: its SHA-256 differs" for name in changed if name == "config.json"]
    return problems, [f"{name} was changed since it was written" for name in changed if name != "config.json"]


def _unopened(folder: Path) -> Iterator[str]:
    """Problems where transformers cannot open the tokenizer or the generation config."""
    for open_ in (lambda: open_tokenizer(str(folder)), lambda: open_generation_config(folder)):
        try:
            open_()
        except ModelError as error:
            yield str(error)


def _checksums(opened: _Opened) -> Iterator[str]:
    """Shards and tensors whose checksum differs. A shard is a header and tensors without gaps, so it is read only once."""
    files = opened.files.files
    for name, file in files.items():
        whole = hashlib.sha256(file.header)
        wanted = opened.recorded[name].get("tensors")
        for key, tensor in file.tensors.items():
            sum_of = tensor_sum(tensor, whole)
            file.release([tensor])
            if wanted is not None and wanted.get(key) != sum_of:
                yield f"{key} in {name} is not what was written: its SHA-256 is not the recorded one"
        for key in sorted(set(wanted or {}) - set(file.tensors)):
            yield f"{key} is recorded in {name}, which does not hold it"
        if whole.hexdigest() != opened.recorded[name]["sha256"]:
            yield f"{opened.folder / name} is corrupt: its SHA-256 is not the recorded one"
    places: dict[str, str] = {}
    for name, file in files.items():
        for key in file.tensors:
            if (first := places.setdefault(key, name)) != name:
                yield f"{key} is stored twice, in {first} and in {name}"


def _index(opened: _Opened) -> Iterator[str]:
    """Where the index and the shards disagree; transformers opens several shards by the index alone."""
    path, files = opened.folder / checkpoint.INDEX, opened.files.files
    if not path.is_file():
        if len(files) > 1:
            yield f"{path} is missing, and there are {len(files)} shards"
        return
    try:
        places = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"{path} is damaged: {first_line(error)}"
        return
    held = {key: name for name, file in files.items() for key in file.tensors}
    for key in sorted({*places, *held}):
        if places.get(key) != held.get(key):
            yield f"{key} is in {held.get(key, 'no shard')}; the index says {places.get(key, 'nothing of it')!r}"


def _packed(opened: _Opened) -> Iterator[str]:
    """Problems of single tensors: invalid ones of packed layers, and NaN or infinity in the others."""
    rest, release, others = dict(opened.files.tensors), opened.files.release, set(opened.about.others)
    for name, entry in opened.about.own().items():
        try:
            own = take(rest, name, entry.tensors)
        except CheckpointError as error:
            yield str(error)
            continue
        for problem in entry.parts.check(own, entry.shape):
            yield f"{name}: {problem}"
        release(own.values())
    for name, tensor in rest.items():
        if name not in others:
            yield from not_finite(name, tensor)
        release([tensor])


def _record_of(record: dict[str, Any]) -> tuple[Record | None, list[str]]:
    try:
        return Record.from_dict(record), []
    except CheckpointError as error:
        return None, [f"the figures of layers in slimlm.json are not compared: {error}"]


def _unlike_record(record: Record, about: Description, skipped: tuple[str, ...]) -> Iterator[str]:
    """Where the record and the description disagree, and linear layers that neither accounts for."""
    entries = about.own()
    rows = {row.name: row for row in (*record.layers, *record.embeddings)}
    for name in skipped:
        if name not in record.skipped:
            yield f"{name} is a linear layer that is neither compressed nor recorded as skipped"
    for name in sorted({*rows, *entries}):
        if name not in rows or name not in entries:
            where = ("compressed", "the record does not name it") if name in entries else ("recorded", "it is not compressed")
            yield f"{name} is {where[0]}, and {where[1]}"
            continue
        row, entry = rows[name], entries[name]
        for what, ours, theirs in (
            ("shape", list(entry.shape), list(row.shape)),
            ("stored bits", entry.stored_bits, row.bits),
            ("rank", entry.parts.added_rank, row.rank),
        ):
            if ours != theirs:
                yield f"{name}: {what} {ours}, and the record says {theirs}"


def _unlike_source(source: Source | None, opened: _Opened, empty: PreTrainedModel) -> Iterator[str]:
    """What the original held and the folder does not: tensors that were not left out, and files that were copied."""
    if source is None:
        return
    entries = {**opened.about.layers, **opened.about.embeddings}
    held = {*opened.files.tensors, *(f"{name}.weight" for name in entries)}
    state = empty.state_dict(keep_vars=True)
    tied = {id(state[name]) for name in held if name in state}
    for tensor in source.tensors:
        for name in source.names_of(tensor):
            if name not in held and not (name in state and id(state[name]) in tied):
                yield f"{tensor} of the original should be here as {name}, and is not"
    for name in sorted({*source.unplaced} ^ {*opened.about.others}):
        yield f"{name} is stored as it was in the original by only one of config.json and {checkpoint.RECORD}"
    for file, what in source.files.items():
        # Those with a recorded checksum are looked for already.
        if what == COPIED and file not in opened.record.get("beside", {}) and not (opened.folder / file).is_file():
            yield f"{file} was copied from the original, and is not here"


def _run(model: StoredModel, samples: Tensor | None, device: torch.device) -> Perplexity | str | None:
    """The perplexity on samples, or, without any, None where a few tokens give finite logits; else a problem."""
    try:
        assembled = model.assembled(device)
        if samples is not None:
            return perplexity(assembled, samples)
        with torch.no_grad():
            logits = assembled(torch.arange(_TOKENS)[None] % vocabulary_size(model.meta_model), use_cache=False).logits
    except NumericsError as error:
        return str(error)
    return None if bool(logits.isfinite().all()) else "the model's logits hold NaN or infinity"
