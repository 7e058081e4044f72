"""The record of a compression: what each layer became, and the totals. Plain data; saved as slimlm.json."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.core.layer import Layer
from slimlm.core.profiling import profiled


@dataclass(frozen=True)
class LayerRecord:
    """One linear layer after compression."""

    name: str
    """The layer's full name."""
    shape: tuple[int, int]
    """The weight's shape (out, in)."""
    parts: str
    """A description of the parts, such as "2:4 of 4-bit (per-tensor) + rank 25 at 4 bits"."""
    bits: int
    """Stored bits of all parts together: codes, masks, scales, adapters, padding to whole bytes."""
    sparsity: float
    """The share of weights that the mask drops from the base."""
    rank: int
    """The rank of the adapter; 0: there is none."""
    error: float
    """The diagonal error ||(W - W') D|| / ||W D||, D = diag(rms of the inputs), W' all parts together. It is the relative
    output error of inputs that are uncorrelated. Methods that use correlations of the inputs (GPTQ, for example) make it
    larger where they make the output error smaller, so it compares layers and not recipes."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the layer was compressed."""
    reconstruction: tuple[float, float] | None = None
    """The squared output error of its block over its squared output, on samples held back, before and after block
    reconstruction."""
    output_error: float | None = None
    """The relative output error ||(W - W') X|| / ||W X|| on the calibration inputs X `[in, tokens]`, from their covariance; of
    a layer with more than 512 outputs an estimate from 256 random sums of them, the same ones in every run.
    None where the recipe does not measure that, and after block reconstruction."""

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
class Measured:
    """A figure measured on windows of text, or on the items of a task."""

    value: float
    """The figure."""
    standard_error: float | None
    """Its standard error. Tokens within a window are correlated, so windows, or items, are the units that it counts; None:
    there is only one."""


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from the original's, on the same tokens."""

    mean: Measured
    """The mean over tokens of KL(original || compressed), in nats."""
    median: Measured
    """The median over tokens."""
    percentile_99: Measured
    """What 99 of 100 tokens stay below."""
    maximum: float
    """The largest of all tokens; a maximum has no standard error."""
    same_top: Measured
    """The share of tokens whose most probable successor is the same in both models."""
    windows: int
    """The number of windows."""
    length: int
    """Tokens per window; all but its first are predicted."""

    @property
    def tokens(self) -> int:
        """The number of tokens that were predicted."""
        return self.windows * (self.length - 1)


@dataclass(frozen=True)
class Compared:
    """Perplexity before and after, on the same tokens."""

    dense: float
    """The perplexity of the original model."""
    compressed: float
    """The perplexity of the compressed model."""
    tokens: int
    """The number of tokens that were predicted."""

    @property
    def ok(self) -> bool:
        """Whether the perplexity rose so little that the compressed model is likely to be of use."""
        return self.compressed <= _MOST_GROWTH * self.dense


_MOST_GROWTH = 2.0
"""The factor of growth in perplexity up to which the quality check succeeds: 0.69 nats per token."""

Quality = Literal["ok", "failed", "not measured"]
"""The result of the quality check: the perplexity on a few calibration samples before and after."""


@dataclass(frozen=True)
class Source:
    """All that the original's folder held, and what became of it."""

    tensors: dict[str, str]
    """The dtype and shape of every tensor of its weight files, "BF16 [48, 88]", by its name there."""
    became: dict[str, tuple[str, ...]]
    """For tensors that are in the checkpoint under other names, or in several tensors, these names; all others that are not
    left out are there under their own. A compressed layer stands for its `weight`. Names in `taken_apart` stand for others."""
    taken_apart: dict[str, tuple[str, ...]]
    """The names in the checkpoint of the parts of tensors of several experts, which are stored expert by expert."""
    unplaced: tuple[str, ...]
    """The names of those that the model's class has no place for, which are stored as they are."""
    left_out: dict[str, str]
    """The names of those that are not in the checkpoint, and why."""
    files: dict[str, str]
    """What became of every file and folder: read, copied, replaced, or left out, and why."""
    stored_as: str | None = None
    """The format of the codes that the files held in place of weights, which had been rounded to it before; None: weights."""

    def names_of(self, tensor: str) -> tuple[str, ...]:
        """The names under which a tensor is in the checkpoint; none where it is left out."""
        names = () if tensor in self.left_out else self.became.get(tensor, (tensor,))
        return tuple(part for name in names for part in self.taken_apart.get(name, (name,)))

    @property
    def files_left_out(self) -> list[str]:
        """The names of the files and folders that are not in the checkpoint."""
        return [name for name, what in self.files.items() if what.startswith(LEFT_OUT)]


@dataclass(frozen=True)
class HeldBackLoss:
    """How a model does on windows that are held back while it is tuned."""

    loss: float
    """What the tuner lowers, per token in nats."""
    perplexity: Measured
    """The perplexity."""
    divergence: Divergence | None
    """The divergence from the original; None: no original was given."""


@dataclass(frozen=True)
class Tuning:
    """What was done to tune a compressed model."""

    method: str
    """The method's name."""
    settings: dict[str, Any]
    """Its settings, those of the run included."""
    data: str
    """The name of the text."""
    against: str | None
    """The name of the original model; None: none was given."""
    tokens: int
    """The number of tokens that all steps took."""
    steps: int
    """The number of steps."""
    best_step: int
    """The number of steps after which the stored form was best on the windows that are held back; 0: before the first one, so
    that the model is the given one."""
    before: HeldBackLoss
    """The given model on the windows that are held back."""
    after: HeldBackLoss
    """The tuned model, as it is stored, on the same windows."""
    seconds: float
    """The time that all runs took together."""
    peak_memory: int | None
    """Bytes that the whole process held at most; None where the system does not report it."""
    versions: dict[str, str]
    """The versions of slimlm, Python and the packages that the result depends on."""


READ = "read: its tensors are listed"
"""What `Source.files` says of a weight file."""
COPIED = "copied"
"""What `Source.files` says of a file that is in the checkpoint as it was."""
LEFT_OUT = "left out: "
"""The beginning of what `Source.files` says of a file that is not in the checkpoint; the reason follows."""


@dataclass(frozen=True)
class Record:
    """A finished compression."""

    model: str
    """The name of the original model."""
    recipe: dict[str, Any]
    """The recipe that was carried out, as `Recipe.to_dict` gives it."""
    calibration: dict[str, Any]
    """The calibration: data, samples, length, tokens, seed, and the number of samples that was asked for."""
    layers: tuple[LayerRecord, ...]
    """The compressed layers of the blocks."""
    skipped: dict[str, str]
    """Weights that were not compressed, and why."""
    coverage: float
    """Compressed weights over all matrix weights in the blocks."""
    original_bytes: int
    """The size of the original model's tensors, tied ones counted once."""
    stored_bytes: int
    """The size of the weight files on disk."""
    seconds: float
    """The time that all runs took together."""
    peak_memory: int | None
    """Bytes that the whole process held at most; None where the system does not report it."""
    versions: dict[str, str]
    """The versions of slimlm, Python and the packages that the result depends on."""
    embeddings: tuple[LayerRecord, ...] = ()
    """Input embedding and output head, where they are compressed; one where they are tied. Shapes are (tokens, width), errors
    those of the weights themselves. Bits per weight and coverage are about the blocks and do not count them."""
    plan: dict[str, Any] | None = None
    """Where bits or ranks were planned: the options, their measured losses, and which was chosen."""
    source: Source | None = None
    """All that the original's folder held; None in folders of older versions."""
    perplexity: Compared | None = None
    """Perplexities on a few of the calibration samples, as a check; None where they were not measured."""
    divergence: Divergence | None = None
    """How far its predictions are from the original's, on windows of the calibration text that were held back; None: there were
    none."""
    edited: tuple[str, ...] = ()
    """The names of tensors that are no longer those of the run, because an opened model was changed and saved again."""
    tuning: tuple[Tuning, ...] = ()
    """How the model was tuned after the run, one after the other. The figures above are those of the run: of before."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of all compressed layers together."""
        weights = sum(r.shape[0] * r.shape[1] for r in self.layers)
        return sum(r.bits for r in self.layers) / weights

    @property
    def quality(self) -> Quality:
        """The result of the quality check."""
        if self.perplexity is None:
            return "not measured"
        return "ok" if self.perplexity.ok else "failed"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, totals included; `edited` and `tuning` only where they are not empty."""
        data = dataclasses.asdict(self)
        for name in ("edited", "tuning"):
            if not data[name]:
                del data[name]
        return {**data, "bits_per_weight": self.bits_per_weight, "quality": self.quality}

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


def quality_warning(record: Record) -> str | None:
    """What a failed quality check found and what to do, with the layers of the largest errors; None: it did not fail."""
    found = record.perplexity
    if found is None or found.ok:
        return None
    worst = sorted(record.layers, key=lambda row: row.error, reverse=True)[:3]
    named = ", ".join(f"{row.name} ({row.error:.3f})" for row in worst)
    return (
        f"the quality check failed: the perplexity rose from {found.dense:.4g} to {found.compressed:.4g} on {found.tokens} "
        "tokens of the calibration text. Use a recipe with more bits, more calibration text (`samples`, `length`) or text that "
        "is more like what the model was trained on; or give the layers with the largest errors more bits with a rule, or "
        f"exclude them (`ignore`): {named}"
    )


@profiled("record")
def record_of(layer: Layer, second_moment: Tensor, covariance: Tensor | None) -> LayerRecord:
    """The record of a layer that all steps were applied to.

    Args:
        layer: The layer.
        second_moment: The mean square of its inputs, `[in]`.
        covariance: The covariance of its inputs, `[in, in]`; None: it was not measured.
    """
    parts = layer.parts()
    return LayerRecord(
        name=layer.name,
        shape=layer.shape,
        parts=parts.summary(),
        bits=parts.storage_bits(),
        sparsity=0.0 if layer.mask is None else 1 - float(layer.mask.float().mean()),
        rank=parts.describe().added_rank,
        error=relative_error(layer.original, layer.original - layer.error, second_moment),
        notes=layer.notes,
        output_error=None if covariance is None else output_error(layer.original, layer.error, covariance),
    )


def relative_error(weight: Tensor, found: Tensor, second_moment: Tensor) -> float:
    """The diagonal error ||(W - W') D|| / ||W D||, D = diag(second_moment)^(1/2); 0 where W D is zero.

    Args:
        weight: The original weight W, `[out, in]`.
        found: The compressed weight W', `[out, in]`.
        second_moment: The mean square of the layer's inputs, `[in]`.
    """
    root = second_moment.to(weight).sqrt()
    size = (weight * root).norm()
    return float(((weight - found) * root).norm() / size) if float(size) > 0 else 0.0


_EXACT_ROWS = 512
"""The most rows of a weight whose output error is computed exactly."""
_SUMS = 256
"""The number of random sums of the rows of others. The relative standard deviation of the estimate is at most 1/16, where all
outputs are proportional, and falls with the number of directions in which they vary."""


def output_error_operations(shape: tuple[int, int]) -> int:
    """Operations of `output_error` for a weight of this shape `(out, in)`."""
    out, width = shape
    rows, summed = (out, 0) if out <= _EXACT_ROWS else (_SUMS, _SUMS * out * width)
    return 2 * 2 * (rows * width**2 + summed)


def output_error(weight: Tensor, error: Tensor, covariance: Tensor) -> float:
    """The relative output error ||E X|| / ||W X||, from the covariance H of the inputs X: ||E X||^2 ~ tr(E H E^T).

    Of a layer with many outputs it is estimated from random sums of the rows, with signs s that are the same in every run: the
    expectation of ||s^T E X||^2 is ||E X||^2. Products of the whole matrices with H can take as long as the recipe's steps.

    Args:
        weight: The original weight W, `[out, in]`.
        error: What the parts lack of it, E = W - W', `[out, in]`.
        covariance: H, `[in, in]`.

    Returns:
        The square root of the ratio; 0 where W X is zero.
    """
    covariance = covariance.to(weight)
    rows = [weight, error.to(weight)]
    if len(weight) > _EXACT_ROWS:
        drawn = torch.randint(2, (_SUMS, len(weight)), generator=torch.Generator().manual_seed(0))
        signs = (2 * drawn - 1).to(weight)
        rows = [signs @ matrix for matrix in rows]
    size, lost = (float(((matrix @ covariance) * matrix).sum()) for matrix in rows)
    return math.sqrt(max(0.0, lost) / size) if size > 0 else 0.0
