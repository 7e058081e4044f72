"""From a journal of finished blocks to a checkpoint: embedding and head, the files, and what is checked once they are written.

Nothing of it holds the whole model: tensors go from mapped files to the shards one at a time, and the check runs the blocks as
they read back, one after another.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.calibration.capture import BlockInputs, first_inputs
from slimlm.core.errors import CheckpointError
from slimlm.evaluation.perplexity import few_of, perplexity_of, pieces_of
from slimlm.inference.load import load
from slimlm.models.lazy import StreamedModel, skeleton_copy
from slimlm.models.structure import vocabulary_size
from slimlm.record import Compared, LayerRecord
from slimlm.run.embeddings import Ends, compress_ends
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint
from slimlm.storage.journal import Journal
from slimlm.storage.mapping import map_file
from slimlm.verification.folder import verify as check_folder
from slimlm.verification.stored_model import StoredModel

_TOLERANCE = 1e-4
"""By how much of their size the last block's outputs, and the logits, may differ between the model in memory and the one read
back."""


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint holds, most of it in mapped files."""

    tensors: dict[str, Tensor]
    """as they are stored, by name"""
    layers: dict[str, Any]
    """what the config says of compressed layers, by name"""
    embeddings: dict[str, Any]
    ends: list[LayerRecord]
    release: Callable[[Iterable[Tensor]], Any]
    """drops the pages of those of these tensors that are views of a file"""


def contents_of(dense: StreamedModel, blocks: Iterable[str], ends: Ends, journal: Journal) -> Contents:
    """What the journal, embedding and head, and the original's other tensors come to."""
    packed, about, embeddings, records = _packed_ends(dense, ends)
    held = journal.spill_tensors("ends", packed)
    finished, release_finished = journal.tensors()
    replaced = tuple(f"{name}." for name in (ends.embedding, ends.head) if name is not None)
    cast: dict[int, Tensor] = {}
    tensors = {}
    for name in dense.outside(blocks):
        if not name.startswith(replaced):
            # Tied tensors are one before a cast and must be one after it.
            tensors[name] = cast.setdefault(dense.weights[name].data_ptr(), dense.stored(name).contiguous())

    def release(wanted: Iterable[Tensor]) -> None:
        views = list(wanted)
        for drop in (dense.release, held.release, release_finished):
            drop(views)

    layers = {name: entry for block in journal.blocks for name, entry in block.layers.items()}
    return Contents({**tensors, **held.tensors, **finished}, {**layers, **about}, embeddings, records, release)


def _packed_ends(
    dense: StreamedModel, ends: Ends
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], list[LayerRecord]]:
    """Embedding and head as they are stored: tensors, what the config says of layers and of embeddings, records."""
    model = skeleton_copy(dense.model)
    names = [name for name in (ends.embedding, ends.head) if name is not None]
    for name in names:
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            # The matrix as it is stored: it is widened piece by piece.
            tensor.data = dense.weights[f"{name}.{key}"] if key == "weight" else dense.weights[f"{name}.{key}"].float()
    records = compress_ends(model, ends)
    tensors = {}
    for name in names:
        module: Any = model.get_submodule(name)
        for key, tensor in module.state_dict().items():
            full = f"{name}.{key}"
            tensors[full] = (tensor if key in module.packed_names else tensor.to(dense.dtypes[full])).contiguous()
    modules = {name: model.get_submodule(name) for name in names}
    layers = {name: module for name, module in modules.items() if isinstance(module, CompressedLinear)}
    embeddings = {name: module for name, module in modules.items() if isinstance(module, CompressedEmbedding)}
    dense.release(dense.weights[f"{name}.weight"] for name in names)
    return tensors, _described(layers, embeddings), {name: module.about() for name, module in embeddings.items()}, records


def _described(layers: dict[str, CompressedLinear], embeddings: dict[str, CompressedEmbedding]) -> dict[str, dict[str, Any]]:
    """What a checkpoint's config says of compressed layers by name; of a tied one, whose tensors it multiplies by."""
    owners = {id(module): name for name, module in embeddings.items()}
    tied = {name: {"tied_to": owners[id(m.embedding)]} for name, m in layers.items() if isinstance(m, TiedLinear)}
    return {name: module.about() | tied.get(name, {}) for name, module in layers.items()}


def write(folder: Path, dense: StreamedModel, contents: Contents) -> checkpoint.Files:
    """Write weights, config and tokenizer; gives the sizes and checksums of the weights."""
    files = checkpoint.write_weights(folder, contents.tensors, contents.release)
    checkpoint.write_config(folder, dense.config, contents.layers, contents.embeddings, dense.experts)
    if dense.tokenizer is not None:
        try:
            dense.tokenizer.save_pretrained(folder)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # What the tokenizers library raises where the disk refuses.
            raise OSError(f"the tokenizer cannot be written: {error}") from error
    if (dense.folder / "generation_config.json").is_file():
        shutil.copyfile(dense.folder / "generation_config.json", folder / "generation_config.json")
    return files


def verify(
    folder: Path,
    dense: StreamedModel,
    blocks: dict[str, nn.Module],
    contents: Contents,
    flow: BlockInputs,
    windows: Tensor,
    device: torch.device,
) -> Compared:
    """The folder is sound and opens as a user would open it, and the model read back gives the logits of that in memory.

    flow: the outputs of the last block in memory. Logits are those of a few of the `windows`, which go through the blocks that
    are read back one after another, and through the dense ones, for the perplexity before and after, which is returned. Raises
    CheckpointError where anything differs, NumericsError where logits hold NaN.
    """
    check_folder(folder).raise_if_unsound()
    load(folder, kernels="reference")
    files = [map_file(path) for path in checkpoint.check_files(folder)]
    stored = {name: tensor for file in files for name, tensor in file.tensors.items()}
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]

    def release(wanted: Iterable[Tensor]) -> None:
        views = list(wanted)
        for file in files:
            file.release(views)

    written = {tensor.data_ptr(): name for name, tensor in reversed(contents.tensors.items())}
    for name, tensor in contents.tensors.items():
        theirs = stored.get(name if tensor.numel() == 0 else written[tensor.data_ptr()])
        if theirs is None or theirs.dtype != tensor.dtype or not torch.equal(tensor, theirs):
            raise CheckpointError(f"verification failed: {name} reads back different from what was written")
        contents.release([tensor])
        release([theirs])
    few = few_of(windows[: len(flow.hidden[0])], vocabulary_size(dense.model))
    reloaded = StoredModel(dense.model, stored, release, about["layers"], about.get("embeddings", {}))
    here = StoredModel(dense.model, contents.tensors, contents.release, contents.layers, contents.embeddings)
    original = StoredModel(dense.model, dense.weights, dense.release)
    first = None
    if contents.embeddings:
        # The blocks were compressed on what the original embedding gives them.
        model = original.assembled(device)
        first = next(first_inputs(model, {name: model.get_submodule(name) for name in blocks}, few))
    outputs = reloaded.outputs(few, device, first=first)
    given = flow.hidden[0][: len(few), : few.shape[1]]
    _refuse_different("the outputs of the blocks that were", zip(_hidden(outputs), given, strict=True))
    in_memory = (given,) if isinstance(outputs, tuple) else given
    pieces = pieces_of(few, vocabulary_size(dense.model))
    both = zip(reloaded.logits(outputs, few, pieces), here.logits(in_memory, few, pieces), strict=True)
    _refuse_different("the logits of the model that was", both)
    if first is not None:
        outputs = reloaded.outputs(few, device)
    after = perplexity_of(reloaded.logits(outputs, few, pieces), few, pieces)
    before = perplexity_of(original.logits(original.outputs(few, device), few, pieces), few, pieces)
    return Compared(before.value, after.value, after.tokens)


def _hidden(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def _refuse_different(what: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Raise CheckpointError where what was read back, first in each pair, is too far from what it should be."""
    difference = size = 0.0
    for found, expected in pairs:
        # NaN is no less than anything, and must not be lost in a maximum.
        off = float((found - expected).abs().max())
        difference = off if math.isnan(off) else max(difference, off)
        size = max(size, float(expected.abs().max()))
        if math.isnan(difference):
            break
    if not difference < _TOLERANCE * max(1.0, size):
        raise CheckpointError(f"verification failed: {what} read back differ by up to {difference:.3g}")
