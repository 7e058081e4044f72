"""From a journal of finished blocks to a checkpoint: embedding and head, the files, and the check of what was written.

The whole model is never in memory: tensors go from mapped files to the shards one at a time, and the check runs the blocks that
are read back, one after another.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.core.errors import CheckpointError
from slimlm.core.parts.pack import LayerEntry
from slimlm.evaluation.divergence import divergence_of, predictions_of
from slimlm.evaluation.perplexity import perplexity_of, pieces_of
from slimlm.evaluation.stored_model import LastOutputs, StoredModel
from slimlm.inference.load import load
from slimlm.models.beside import copy_beside
from slimlm.models.embeddings import Embeddings
from slimlm.models.lazy import LazyModel
from slimlm.models.placeholders import meta_copy
from slimlm.models.structure import vocabulary_size
from slimlm.record import Compared, Divergence, LayerRecord, Record, Source
from slimlm.run.config import environment
from slimlm.run.embeddings import compress_embeddings
from slimlm.run.prepare import Prepared
from slimlm.run.resume import Run
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint
from slimlm.storage.entries import Description, parse_description
from slimlm.storage.journal import Journal
from slimlm.storage.mapping import TEMPORARY, MappedFiles, map_and_unlink
from slimlm.storage.streams import write_tensors
from slimlm.verification.folder import verify

_TOLERANCE = 1e-4
"""The relative difference that the last block's outputs, and the logits, may have between the model in memory and the one that
is read back."""

_ARRAYS_OF_TWO = 4
"""Arrays of logits that a divergence holds at a time, as multiples of those that a perplexity does, about."""


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint holds, most of it in mapped files."""

    tensors: dict[str, Tensor]
    """The tensors as they are stored, by name."""
    description: Description
    """The entries of the compressed layers and embeddings in the config."""
    layer_records: tuple[LayerRecord, ...]
    """The records of the layers inside the blocks."""
    embedding_records: tuple[LayerRecord, ...]
    """The records of embedding and head, where they are compressed."""
    sources: tuple[Callable[[Iterable[Tensor]], Any], ...]
    """For each set of files the function that drops the pages of tensors that are views of them."""

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Drop the memory pages of those of these tensors, of any shape `[...]`, that are views of a file."""
        views = list(tensors)
        for release in self.sources:
            release(views)


@dataclass(frozen=True)
class PackedEmbeddings:
    """Embedding and head as they are stored."""

    tensors: dict[str, Tensor]
    """Their tensors, by full name."""
    description: Description
    """Their entries in the config."""
    records: tuple[LayerRecord, ...]
    """A record for each matrix."""


@dataclass(frozen=True)
class Before:
    """What the original model gives."""

    perplexity: float
    """Its perplexity on `Prepared.few_samples`."""
    outputs: LastOutputs | None
    """Its last block's outputs for the windows that are held back; None: there are none."""


def contents_of(prepared: Prepared, journal: Journal) -> Contents:
    """All that the checkpoint will hold: the journal's blocks, embedding and head, and the original's other tensors."""
    dense, embeddings = prepared.dense, prepared.embeddings
    packed = _packed_embeddings(dense, embeddings)
    spilled = _in_temporary_file(packed.tensors, journal.folder / f"embeddings{TEMPORARY}")
    finished = journal.tensors()
    replaced = tuple(f"{name}." for name in embeddings.names)
    cast: dict[int, Tensor] = {}
    tensors = {}
    for name in dense.outside(prepared.blocks):
        if not name.startswith(replaced):
            # Tied tensors are cast once, so that they are still tied after the cast.
            tensors[name] = cast.setdefault(dense.weights[name].data_ptr(), dense.stored(name).contiguous())
    layers = {name: LayerEntry.parse(entry) for block in journal.blocks for name, entry in block.layers.items()}
    outside = packed.description
    return Contents(
        tensors={**tensors, **spilled.tensors, **finished.tensors, **dense.unplaced.stored},
        description=Description(
            {**layers, **outside.layers}, outside.embeddings, tuple(dense.experts), tuple(dense.unplaced.stored)
        ),
        layer_records=tuple(LayerRecord.from_dict(row) for block in journal.blocks for row in block.records),
        embedding_records=packed.records,
        sources=(dense.release, spilled.release, finished.release),
    )


def _in_temporary_file(tensors: dict[str, Tensor], path: Path) -> MappedFiles:
    """The tensors in a file without a name, so that they need not stay in memory."""
    write_tensors(path, tensors)
    return MappedFiles({path.name: map_and_unlink(path)})


def _packed_embeddings(dense: LazyModel, embeddings: Embeddings) -> PackedEmbeddings:
    """Compress embedding and head, read from the model's files."""
    model = meta_copy(dense.model)
    assert isinstance(model, PreTrainedModel)
    for name in embeddings.names:
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            # The matrix as it is stored: it is widened piece by piece.
            tensor.data = dense.weights[f"{name}.{key}"] if key == "weight" else dense.weights[f"{name}.{key}"].float()
    records = compress_embeddings(model, embeddings)
    tensors = {}
    for name in embeddings.names:
        module: Any = model.get_submodule(name)
        for key, tensor in module.state_dict().items():
            full = f"{name}.{key}"
            tensors[full] = (tensor if key in module.packed_names else tensor.to(dense.dtypes[full])).contiguous()
    modules = {name: model.get_submodule(name) for name in embeddings.names}
    heads = {name: module for name, module in modules.items() if isinstance(module, CompressedLinear)}
    tables = {name: module for name, module in modules.items() if isinstance(module, CompressedEmbedding)}
    dense.release(dense.weights[f"{name}.weight"] for name in embeddings.names)
    return PackedEmbeddings(tensors, _described(heads, tables), tuple(records))


def _described(layers: dict[str, CompressedLinear], embeddings: dict[str, CompressedEmbedding]) -> Description:
    """The entries of these modules in the config; that of a tied layer names the embedding whose tensors it uses."""
    owners = {id(module): name for name, module in embeddings.items()}
    entries = {}
    for name, module in layers.items():
        tied_to = owners[id(module.embedding)] if isinstance(module, TiedLinear) else None
        entries[name] = dataclasses.replace(module.describe(), tied_to=tied_to)
    return Description(entries, {name: module.describe() for name, module in embeddings.items()})


def assemble(folder: Path, contents: Contents, prepared: Prepared, run: Run) -> tuple[Record, checkpoint.Files]:
    """Write weights, config, tokenizer and record.

    Args:
        folder: The folder to write.
        contents: The tensors and their description.
        prepared: The original model and the decisions of the run.
        run: The run.

    Returns:
        The record, and the sizes and checksums of the weight files.
    """
    files, beside = _write(folder, prepared.dense, contents)
    inside = sum(p.numel() for block in prepared.blocks.values() for p in block.parameters() if p.ndim > 1)
    record = Record(
        model=prepared.config.model_name,
        recipe=prepared.recipe.to_dict(),
        calibration=prepared.calibration,
        layers=contents.layer_records,
        embeddings=contents.embedding_records,
        skipped=prepared.skipped,
        coverage=sum(r.shape[0] * r.shape[1] for r in contents.layer_records) / inside,
        original_bytes=prepared.dense.bytes,
        stored_bytes=checkpoint.stored_bytes(folder),
        seconds=0.0,
        peak_memory=None,
        versions=environment(),
        plan=prepared.plan,
        source=source_of(prepared.dense, beside),
    )
    checkpoint.write_record(folder, record.to_dict(), files)
    return record, files


def source_of(dense: LazyModel, files: dict[str, str]) -> Source:
    """What the original's folder held, and what became of it; `files` says that of each file."""
    unplaced = dense.unplaced
    return Source(
        tensors=dense.listed,
        became={name: names for name, names in dense.became.items() if names != (name,)},
        taken_apart=dense.taken_apart,
        unplaced=tuple(unplaced.stored),
        left_out=unplaced.left_out,
        files=files,
        stored_as=dense.stored_as,
    )


def _write(folder: Path, dense: LazyModel, contents: Contents) -> tuple[checkpoint.Files, dict[str, str]]:
    """Write weights, config and tokenizer, and copy what belongs with them; says what became of each file of the original."""
    files = checkpoint.write_weights(folder, contents.tensors, contents.release)
    checkpoint.write_config(folder, dense.config, contents.description)
    if dense.tokenizer is not None:
        try:
            dense.tokenizer.save_pretrained(folder)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # The tokenizers library raises a plain Exception where the disk refuses.
            raise OSError(f"the tokenizer cannot be written: {error}") from error
    return files, copy_beside(dense.folder, folder, dense.files)


def peak_memory() -> int | None:
    """The most memory this process has held, in bytes; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def verify_written(
    folder: Path, contents: Contents, outputs: Tensor, prepared: Prepared, before: Before
) -> tuple[Compared, Divergence | None]:
    """Verify that the folder is sound, opens as a user would open it, and gives the logits of the model in memory.

    The blocks that are read back are run one after another on a few calibration samples; the logits of the first are compared
    with those of the model in memory, and the perplexity is that of all of them.

    Args:
        folder: The checkpoint.
        contents: The tensors that were written, and their description.
        outputs: The last block's outputs in memory for the first batch of samples, `[samples, length, width]`.
        prepared: The original model, the samples and the device.
        before: What the original model gives.

    Returns:
        The perplexity before and after, and the divergence from the original on the windows that are held back.

    Raises:
        CheckpointError: Something reads back different from what was written.
        NumericsError: Logits hold NaN.
    """
    verify(folder).raise_if_unsound()
    load(folder, kernels="reference")
    dense, device = prepared.dense, prepared.device
    files = MappedFiles.of(checkpoint.check_files(folder))
    _refuse_different_tensors(contents, files)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    written, own = parse_description(config["quantization_config"], folder), contents.description
    reloaded = StoredModel(dense.model, files.tensors, files.release, written.layers, written.embeddings)
    in_memory = StoredModel(dense.model, contents.tensors, contents.release, own.layers, own.embeddings)
    original = StoredModel(dense.model, dense.weights, dense.release)
    few = prepared.few_samples
    # The blocks were compressed on the outputs of the original embedding.
    read_back = reloaded.outputs(few, device, outside=original if own.embeddings else None)
    given = dataclasses.replace(read_back, hidden=outputs[: len(few), : few.shape[1]])
    _refuse_different("the outputs of the blocks that were", zip(read_back.hidden, given.hidden, strict=True))
    pieces = pieces_of(few, vocabulary_size(dense.model))
    # The hidden states of all samples are the same by now; of one sample the logits show whether the head is.
    of_first = pieces_of(few[:1], vocabulary_size(dense.model))
    both = zip(reloaded.logits(read_back, of_first), in_memory.logits(given, of_first), strict=True)
    _refuse_different("the logits of the model that was", both)
    if own.embeddings:
        read_back = reloaded.outputs(few, device)
    after = perplexity_of(reloaded.logits(read_back, pieces), few, pieces)
    compared = Compared(before.perplexity, after.value, after.tokens)
    return compared, None if before.outputs is None else _divergence(reloaded, original, before.outputs, device)


def _divergence(reloaded: StoredModel, original: StoredModel, before: LastOutputs, device: torch.device) -> Divergence | None:
    """The divergence of the model that was read back from the original, of which the last block's outputs are given."""
    # Of two models several arrays as large as the logits are held at a time.
    pieces = pieces_of(before.tokens, _ARRAYS_OF_TWO * vocabulary_size(original.meta_model))
    after = reloaded.outputs(before.tokens, device)
    logits, theirs = reloaded.logits(after, pieces), original.logits(before, pieces)
    return divergence_of(predictions_of(logits, before.tokens, pieces, theirs))


def _refuse_different_tensors(contents: Contents, files: MappedFiles) -> None:
    """Raise CheckpointError where a tensor reads back different from what was written."""
    written = {tensor.data_ptr(): name for name, tensor in reversed(contents.tensors.items())}
    for name, tensor in contents.tensors.items():
        theirs = files.tensors.get(name if tensor.numel() == 0 else written[tensor.data_ptr()])
        if theirs is None or theirs.dtype != tensor.dtype or not torch.equal(tensor, theirs):
            raise CheckpointError(f"verification failed: {name} reads back different from what was written")
        contents.release([tensor])
        files.release([theirs])


def _refuse_different(what: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise CheckpointError where values that were read back, first in each pair, differ too much from the expected ones."""
    difference = size = 0.0
    for found, expected in pairs:
        # `max` would drop a NaN, which compares as false with everything.
        off = float((found - expected).abs().max())
        difference = off if math.isnan(off) else max(difference, off)
        size = max(size, float(expected.abs().max()))
        if math.isnan(difference):
            break
    if not difference < _TOLERANCE * max(1.0, size):
        raise CheckpointError(f"verification failed: {what} read back differ by up to {difference:.3g}")
