"""Input embedding and output head in few bits: most of the weights outside the blocks.

Each weight is rounded to the nearest code of an even grid, with one scale for 32 consecutive weights of a row that maps the
largest of them to the largest code. That needs no calibration and, at 8 bits, loses almost nothing. A head that is tied to the
embedding stays tied, and is stored once. Position embeddings and projections next to the embedding are not compressed.
"""

import dataclasses

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.core import grid
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.uniform import Uniform
from slimlm.models.embeddings import GROUP_SIZE, Embeddings, output_factor
from slimlm.models.structure import swap
from slimlm.record import LayerRecord
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.linear import CompressedLinear

_WEIGHTS_AT_ONCE = 2**22
"""Weights that are widened to float32 at a time: the embedding is the largest matrix of a model."""


def compress_embeddings(model: PreTrainedModel, embeddings: Embeddings) -> list[LayerRecord]:
    """Replace embedding and head by packed modules; gives a record for each matrix, one where they are tied."""
    records = []
    embedding: CompressedEmbedding | None = None
    if embeddings.embedding is not None:
        old = model.get_submodule(embeddings.embedding)
        notes = (f"{embeddings.head} is the same matrix",) if embeddings.tied else ()
        part, record = _round(embeddings.embedding, old.get_parameter("weight").detach(), embeddings.bits)
        factor = output_factor(old)
        embedding = CompressedEmbedding.from_part(part, torch.float32, factor=1.0 if factor is None else factor)
        swap(model, embeddings.embedding, embedding)
        records.append(dataclasses.replace(record, notes=notes))
    if embeddings.head is not None:
        head = model.get_submodule(embeddings.head)
        assert isinstance(head, nn.Linear)
        if embeddings.tied:
            assert embedding is not None, "a tied head is compressed with its embedding"
            new: CompressedLinear = TiedLinear(embedding, head.bias)
        else:
            part, record = _round(embeddings.head, head.weight.detach(), embeddings.bits)
            new = CompressedLinear.from_parts(Parts(part), head.bias)
            records.append(record)
        swap(model, embeddings.head, new)
    return records


def _round(name: str, weight: Tensor, bits: int) -> tuple[Uniform, LayerRecord]:
    """A matrix `[tokens, width]` rounded to the grid, and its record; the error is that of the weights themselves.

    A weight in 16 bits is widened piece by piece.
    """
    rows, width = weight.shape
    pieces = weight.split(max(1, _WEIGHTS_AT_ONCE // width))
    scales = [grid.absmax_scale(grid.scale_sets(piece.float(), GROUP_SIZE), bits).view(len(piece), -1) for piece in pieces]
    scale = grid.storable(torch.cat(scales))
    codes = torch.empty(rows, width, dtype=torch.int8)
    squared_error = squared_size = 0.0
    for piece, found, own in zip(pieces, *(t.split(len(pieces[0])) for t in (codes, scale)), strict=True):
        wide = piece.float()
        found.copy_(grid.encode(wide, own, bits=bits, group_size=GROUP_SIZE))
        squared_error += float((wide - grid.dense(found, own, GROUP_SIZE)).double().square().sum())
        squared_size += float(wide.double().square().sum())
    part = Uniform(codes, scale, bits, GROUP_SIZE)
    error = (squared_error / squared_size) ** 0.5 if squared_size else 0.0
    return part, LayerRecord(name, (rows, width), part.summary(), part.storage_bits(), 0.0, 0, error)
