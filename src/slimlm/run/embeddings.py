"""Input embedding and output head in few bits: most of what lies outside the blocks.

Each weight goes to the nearest code of an even grid, with one scale for 32 consecutive weights of a row, the largest of which
goes on the largest code. That takes no calibration and, at 8 bits, costs next to nothing. A head that is tied to the embedding
stays so, and is stored once. Position tables and projections beside the embedding stay as they are.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from slimlm.core import grid
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.uniform import Uniform
from slimlm.models.structure import swap
from slimlm.recipe import AS_STORED
from slimlm.record import LayerRecord
from slimlm.runtime.embedding import CompressedEmbedding, TiedLinear
from slimlm.runtime.linear import CompressedLinear

GROUP = 32
_WEIGHTS_AT_ONCE = 2**22
"""Weights that are worked on at a time: a vocabulary's matrix is the largest of a model, and one copy of it is enough."""
_PROBED = 8


@dataclass(frozen=True)
class Ends:
    """Where a model's tokens come in and go out, as far as that is to be compressed."""

    bits: int
    embedding: str | None
    """full name; None: it stays"""
    head: str | None
    """as above"""
    tied: bool
    """whether the two are one matrix"""
    left: dict[str, str]
    """what stays, and why"""


def ends_of(model: PreTrainedModel, bits: int) -> Ends:
    """What of embedding and head can be stored in so many bits; changes nothing."""
    if bits == AS_STORED:
        return Ends(bits, None, None, False, {})
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return Ends(bits, None, None, False, {"embedding and head": "transformers does not say which this model's are"})
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    reasons = {names[id(embedding)]: _embedding_stays(embedding) or _shared(model, embedding, head)}
    if head is None:
        return _ends(bits, names[id(embedding)], None, False, {**reasons, "output head": "transformers names none"})
    reasons[names[id(head)]] = _head_stays(head) or _shared(model, head, embedding)
    weights = [getattr(module, "weight", None) for module in (embedding, head)]
    tied = weights[0] is not None and weights[0] is weights[1]
    if tied and any(reasons.values()):
        reasons = {name: reason or "tied to one that stays" for name, reason in reasons.items()}
    return _ends(bits, names[id(embedding)], names[id(head)], tied, reasons)


def _ends(bits: int, embedding: str, head: str | None, tied: bool, reasons: dict[str, str | None]) -> Ends:
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    return Ends(bits, None if embedding in left else embedding, None if head in left else head, tied, left)


def _embedding_stays(module: nn.Module) -> str | None:
    """Why an embedding cannot be a `CompressedEmbedding`, in words; None: it can."""
    if not isinstance(module, nn.Embedding):
        return f"a {type(module).__name__}, not an nn.Embedding"
    if module.max_norm is not None:
        return "its rows change while they are looked up (max_norm)"
    if type(module) is nn.Embedding:
        return None
    if (factor := _factor(module)) is not None:
        ids = torch.arange(min(_PROBED, module.num_embeddings), device=module.weight.device)
        with torch.no_grad():
            if torch.equal(module(ids), F.embedding(ids, module.weight) * factor):
                return None
    return f"a {type(module).__name__}, which may do more than look up"


def _factor(module: nn.Module) -> float | None:
    """By which an embedding of a class like Gemma's multiplies what it looks up; None: it has no such number."""
    scale = getattr(module, "embed_scale", None)
    return float(scale) if isinstance(scale, Tensor) and scale.numel() == 1 else None


def _head_stays(module: nn.Module) -> str | None:
    return None if type(module) is nn.Linear else f"a {type(module).__name__}, not an nn.Linear"


def _shared(model: nn.Module, module: nn.Module, other_end: nn.Module | None) -> str | None:
    """Whether some module in between has the same matrix, in words."""
    for name, other in model.named_modules():
        if other is module or other is other_end:
            continue
        if any(parameter is module.weight for parameter in other.parameters(recurse=False)):
            return f"{name} has the same weight"
    return None


def compress_ends(model: PreTrainedModel, ends: Ends) -> list[LayerRecord]:
    """Put packed modules in the place of embedding and head; gives a record for each matrix, of which tied ends are one."""
    records = []
    embedding: CompressedEmbedding | None = None
    if ends.embedding is not None:
        old = model.get_submodule(ends.embedding)
        notes = (f"{ends.head} is the same matrix",) if ends.tied else ()
        part, record = _rounded(ends.embedding, old.get_parameter("weight").detach(), ends.bits)
        factor = _factor(old)
        embedding = CompressedEmbedding.from_part(part, torch.float32, factor=1.0 if factor is None else factor)
        swap(model, ends.embedding, embedding)
        records.append(dataclasses.replace(record, notes=notes))
    if ends.head is not None:
        head = model.get_submodule(ends.head)
        assert isinstance(head, nn.Linear)
        if ends.tied:
            assert embedding is not None, "a tied head is compressed with its embedding"
            new: CompressedLinear = TiedLinear(embedding, head.bias)
        else:
            part, record = _rounded(ends.head, head.weight.detach(), ends.bits)
            new = CompressedLinear.from_parts(Parts(part), head.bias)
            records.append(record)
        swap(model, ends.head, new)
    return records


def _rounded(name: str, weight: Tensor, bits: int) -> tuple[Uniform, LayerRecord]:
    """A matrix `[tokens, width]` on the grid, and its record; the error is that of the weights themselves.

    The weight may be of 16 bits: it is widened a piece at a time.
    """
    rows, width = weight.shape
    pieces = weight.split(max(1, _WEIGHTS_AT_ONCE // width))
    scales = [grid.absmax_scale(grid.rows_of(piece.float(), GROUP), bits).view(len(piece), -1) for piece in pieces]
    scale = grid.storable(torch.cat(scales))
    codes = torch.empty(rows, width, dtype=torch.int8)
    missed = total = 0.0
    for piece, found, own in zip(pieces, *(t.split(len(pieces[0])) for t in (codes, scale)), strict=True):
        wide = piece.float()
        found.copy_(grid.encode(wide, own, bits=bits, group_size=GROUP))
        missed += float((wide - grid.dense(found, own, GROUP)).double().square().sum())
        total += float(wide.double().square().sum())
    part = Uniform(codes, scale, bits, GROUP)
    error = (missed / total) ** 0.5 if total else 0.0
    return part, LayerRecord(name, (rows, width), part.summary(), part.storage_bits(), 0.0, 0, error)
