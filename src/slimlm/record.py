"""The record of a compression: what each layer became, and the totals. Plain data; saved as slimlm.json."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.core.layer import Layer
from slimlm.core.profiling import profiled


@dataclass(frozen=True)
class LayerRecord:
    """One linear layer after compression."""

    name: str
    shape: tuple[int, int]
    """(out, in)"""
    parts: str
    """in words, such as "2:4 of 4-bit (per-tensor) + rank 25 at 4 bits" """
    bits: int
    """stored bits of all parts together: codes, masks, scales, adapters, padding to whole bytes"""
    sparsity: float
    """share of weights that the mask drops from the base"""
    rank: int
    error: float
    """relative output error ||(W - W') D|| / ||W D||, D = diag(rms of the inputs), W' all parts together"""
    notes: tuple[str, ...] = ()
    """what the user should know of how it was decided"""
    reconstruction: tuple[float, float] | None = None
    """Of its block: squared output error over squared output, on samples held back, before and after block reconstruction."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the original matrix."""
        return self.bits / (self.shape[0] * self.shape[1])

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "LayerRecord":
        """A record from plain data, as `dataclasses.asdict` and JSON make them."""
        reconstruction = row.get("reconstruction")
        lists = {"shape": tuple(row["shape"]), "notes": tuple(row.get("notes", ()))}
        return cls(**{**row, **lists, "reconstruction": None if reconstruction is None else tuple(reconstruction)})


@dataclass(frozen=True)
class Compared:
    """Perplexity before and after, on the same tokens."""

    dense: float
    compressed: float
    tokens: int
    """that were predicted"""

    @property
    def exploded(self) -> bool:
        """Whether so much was lost that something is likely to be wrong."""
        return not self.compressed <= _EXPLODED * self.dense


_EXPLODED = 2.0
"""By what factor a perplexity grows that is warned of: 0.69 nats a token."""


@dataclass(frozen=True)
class Record:
    """A finished compression."""

    model: str
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    """source, samples, length, tokens, seed"""
    layers: tuple[LayerRecord, ...]
    skipped: dict[str, str]
    """weights that were not compressed, and why"""
    coverage: float
    """compressed weights over all matrix weights in the blocks"""
    original_bytes: int
    """the tensors of the original model, tied ones once"""
    stored_bytes: int
    """the weight files on disk"""
    seconds: float
    peak_memory: int | None
    """bytes; of the whole process, where the system tells"""
    versions: dict[str, str]
    embeddings: tuple[LayerRecord, ...] = ()
    """input embedding and output head, where they are compressed; one where they are tied. Shapes are (tokens, width), errors
    those of the weights themselves. No part of bits per weight and of coverage, which are about the blocks"""
    plan: dict[str, Any] | None = None
    """where bits or ranks were planned: the options, what was measured and what was chosen"""
    perplexity: Compared | None = None
    """on a few of the calibration samples, as a check; None in records of before it was measured"""

    @property
    def bits_per_weight(self) -> float:
        """Over all compressed layers."""
        weights = sum(r.shape[0] * r.shape[1] for r in self.layers)
        return sum(r.bits for r in self.layers) / weights

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, totals included."""
        data = dataclasses.asdict(self)
        data["bits_per_weight"] = self.bits_per_weight
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Record":
        """The inverse of `to_dict`; other keys are ignored. Raises CheckpointError where one is missing or makes no sense."""
        try:
            record = TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"the record of the checkpoint is incomplete: {where}: {first['msg']}") from error
        lost = [f"calibration.{key}" for key in ("data", "samples", "length") if key not in record.calibration]
        lost += [f"recipe.{key}" for key in ("name", "summary") if not isinstance(record.recipe.get(key), str)]
        if lost or not record.layers or record.original_bytes < 1:
            missing = lost[0] if lost else "layers" if not record.layers else "original_bytes"
            raise CheckpointError(f"the record of the checkpoint is incomplete: {missing}")
        if small := [row.name for row in (*record.layers, *record.embeddings) if min(row.shape) < 1]:
            raise CheckpointError(f"the record of the checkpoint is damaged: {small[0]} has no size")
        return record


def explosion(record: Record) -> str | None:
    """A warning in words where the perplexity exploded, with the layers whose outputs err most; None: it did not."""
    found = record.perplexity
    if found is None or not found.exploded:
        return None
    worst = sorted(record.layers, key=lambda row: row.error, reverse=True)[:3]
    named = ", ".join(f"{row.name} ({row.error:.3f})" for row in worst)
    return (
        f"the perplexity exploded: {found.dense:.4g} before, {found.compressed:.4g} after, on {found.tokens} tokens of the "
        f"calibration text. The layers with the largest relative output errors: {named}. Give them more bits with a rule, "
        "or leave them out (ignore = [...] in the recipe), or calibrate on more text"
    )


@profiled("record")
def record_of(layer: Layer, energy: Tensor) -> LayerRecord:
    """Sum a decided layer up; `energy` `[in]` is the mean square of its inputs."""
    parts = layer.parts()
    return LayerRecord(
        name=layer.name,
        shape=layer.shape,
        parts=parts.summary(),
        bits=parts.storage_bits(),
        sparsity=0.0 if layer.mask is None else 1 - float(layer.mask.float().mean()),
        rank=parts.describe().added_rank,
        error=relative_error(layer.original, layer.original - layer.error, energy),
        notes=layer.notes,
    )


def relative_error(weight: Tensor, found: Tensor, energy: Tensor) -> float:
    """||(W - W') D|| / ||W D|| for D = diag(energy)^(1/2); 0 where no input fires or the weight is zero."""
    root = energy.to(weight).sqrt()
    size = (weight * root).norm()
    return float(((weight - found) * root).norm() / size) if float(size) > 0 else 0.0
