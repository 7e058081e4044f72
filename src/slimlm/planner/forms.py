"""How steps store a layer: found by applying them to a small random layer, so that no method has to declare it."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from slimlm.core.grid import LARGEST_CODEBOOK_BITS
from slimlm.core.layer import Layer
from slimlm.core.parts.codebook import codebook_bits
from slimlm.core.parts.kernel_layout import MatrixLayout
from slimlm.core.parts.pack import PartEntries
from slimlm.core.solvers.low_rank import rank_of
from slimlm.core.statistics.base import Batch, Needs, Source, Statistic, Stats
from slimlm.core.step import Step
from slimlm.recipe import NamedStep, apply_steps

Steps = tuple[NamedStep, ...]

_SMALL = 32
"""The least side of the random layer."""
_TRIED_RANK = 0.25
"""The rank in place of the recipe's own, which may be 0 for so small a layer."""
_TOKENS_PER_INPUT = 4
"""Random tokens for each input of a random layer."""


@dataclass(frozen=True)
class Form:
    """How a layer of any shape is stored."""

    parts: PartEntries
    """The entries of its parts."""
    rank: float
    """The rank of adapters, as a share of the smaller side."""
    codebook_bits: int = 0
    """The bits of a codebook that a step may fit or not, and that `parts` do not have."""

    def bits(self, shape: tuple[int, int]) -> int:
        """Stored bits of a layer of shape (out, in); a codebook that may be fitted is counted."""
        return self.parts.with_rank(rank_of(self.rank, shape)).stored_bits(shape) + self.codebook_bits


@lru_cache(maxsize=256)
def form_of(steps: Steps, dtype: torch.dtype) -> Form:
    """How these steps store a weight of this dtype."""
    tried = tuple(_with_step(n, n.step.with_rank(_TRIED_RANK)) if _fits_adapter(n.step) else n for n in brief(steps))
    shape = fitting((_SMALL, _SMALL), steps)
    made = apply_steps(tried, *drawn_layer(shape, needs_of(tried), dtype=dtype, length=8))
    maybe = any(named.step.may_fit_codebook for named in steps)
    entries = made.parts().describe()
    return Form(entries, share_of(steps), _spared(entries) if maybe else 0)


def _fits_adapter(step: Step) -> bool:
    return step.adapter is not None and step.adapter.rank > 0


def brief(steps: Steps) -> Steps:
    """The steps as they are for a trial: iterative ones with few rounds."""
    return tuple(_with_step(named, named.step.brief()) for named in steps)


def resolved(steps: Steps) -> Steps:
    """The steps with the default, whose cost a plan may spend, in place of "auto"."""
    return tuple(_with_step(named, named.step.resolved()) for named in steps)


def _with_step(named: NamedStep, step: Step) -> NamedStep:
    return dataclasses.replace(named, step=step)


def _spared(entries: PartEntries) -> int:
    """Bits of the codebook that a base of integer codes would have where one pays."""
    layout = entries.base.kernel_layout()
    if not isinstance(layout, MatrixLayout) or layout.elements != "integers" or layout.bits > LARGEST_CODEBOOK_BITS:
        return 0
    return codebook_bits(layout.bits)


def share_of(steps: Steps) -> float:
    """The rank of the last adapter that the steps fit, as a share."""
    ranks = [named.step.adapter.rank for named in steps if named.step.adapter is not None]
    return ranks[-1] if ranks else 0.0


def needs_of(steps: Steps) -> Needs:
    """The statistics that the steps need together."""
    return frozenset().union(*(named.step.needs for named in steps))


def fitting(shape: tuple[int, int], steps: Steps) -> tuple[int, int]:
    """This shape with its inputs rounded up to a multiple that the steps' pattern divides."""
    out, width = shape
    for named in steps:
        if (sparsity := named.step.sparsity) is not None and sparsity.of:
            width = -(-width // sparsity.of) * sparsity.of
    return out, width


def drawn_layer(
    shape: tuple[int, int], needs: Needs, *, dtype: torch.dtype, length: int, device: torch.device | None = None
) -> tuple[Layer, Stats]:
    """A random layer, and the statistics of random inputs.

    The inputs are mixtures of directions of decreasing variance, like those of a real layer, so that iterative solvers take
    about as many rounds.

    Args:
        shape: The shape (out, in) of the layer.
        needs: The statistics to compute.
        dtype: The dtype in which the weight is stored.
        length: Tokens per sample, for statistics of whole samples.
        device: Where the weight is; None: the CPU.
    """
    out, width = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    tokens = _TOKENS_PER_INPUT * width
    if any(statistic.source is Source.SAMPLES for statistic in needs):
        tokens = -(-tokens // length) * length
    weight = draw(out, width) * width**-0.5
    deviations = torch.arange(1, width + 1) ** -0.5
    x = (draw(tokens, width) * deviations) @ (draw(width, width) * width**-0.5) + 0.02 * draw(tokens, width)
    z = x + 0.1 * x.square().mean().sqrt() * draw(tokens, width)
    batch = Batch(x, length, original_inputs=z, output_residuals=(z - x) @ weight.T)
    values: dict[type[Statistic], Tensor | None] = {}
    for statistic in needs:
        running = statistic()
        running.add(batch)
        values[statistic] = running.result(tokens, length)
    return Layer.of("a random layer", weight.to(device), dtype), Stats(tokens, values)
