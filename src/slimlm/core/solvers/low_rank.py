"""From an error to a stored low-rank part: rank, best product, balance, rounding, refit.

Every compensator ends here; they differ in the norm (energies of the inputs, or their covariance) and in the error they
hand over.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import RecipeError
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.uniform import Uniform, as_uniform
from slimlm.core.solvers import linalg
from slimlm.core.solvers.sweep import Across, Along, Inverse, coded, inverse_of, sweep

_REFITS = 2
"""Rounds of refitting; the first brings most of the gain, a third next to nothing."""

AdapterBits = Literal[4, 8, 16]


@dataclass(frozen=True)
class AdapterFormat:
    """How large an adapter may be and how its factors are stored."""

    rank: float
    """share of min(out, in), from 0 to 1; the rank is its integer part, never padded"""
    bits: AdapterBits
    group_size: int
    """inputs (or outputs) of one component that share a scale, at 4 and 8 bits"""
    refit: bool
    """alternate rounding and least squares after the first rounding, at 4 and 8 bits"""

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= 1:
            raise RecipeError(f"rank = {self.rank}: give a share of min(out, in), from 0 to 1")
        if self.bits not in (4, 8, 16):
            raise RecipeError(f"bits = {self.bits}: adapters are stored at 4, 8 or 16 bits")
        grid.check_group_size(self.group_size)

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The true rank for a weight of this shape."""
        return rank_of(self.rank, shape)


def rank_of(share: float, shape: tuple[int, int]) -> int:
    """The rank that a share of min(out, in) comes to, rounded down (1e-9 keeps 0.3 x 10 from becoming 2)."""
    return int(share * min(shape) + 1e-9)


def low_rank_part(
    error: Tensor,
    energy: Tensor,
    form: AdapterFormat,
    *,
    start: Tensor | None = None,
    inverse: Inverse | None = None,
) -> LowRank | None:
    """The part that best stands for error `[out, in]` in the norm of `energy` (see `linalg`); None at rank 0.

    The rounded factors are improved by alternation: with one factor rounded the other is solved by least squares and
    rounded in turn (the inner loop of CALDERA, arXiv 2405.18886), and the best iterate in the energy norm is kept. Under a
    covariance the rounding itself is a sweep, so that what a rounded input or component loses the later ones repair;
    `inverse` saves inverting the covariance once more, `start` is a basis `[out, any]` of a nearby error's left factor.
    """
    rank = form.rank_of((error.shape[0], error.shape[1]))
    if rank == 0:
        return None
    left, right = linalg.best_low_rank(error, energy, rank, start=start)
    left, right = linalg.balanced(left, right, energy)
    if form.bits == 16:
        return LowRank(half(left.T), half(right))
    if energy.ndim == 1:
        return _rounded(error, energy, left, right, form)
    return _swept(error, energy, right, form, inverse or inverse_of(energy, damp=_DAMP))


_DAMP = 0.01


def _swept(error: Tensor, gram: Tensor, right: Tensor, form: AdapterFormat, inverse: Inverse) -> LowRank:
    """Round the right factor under H, the left one (refitted to it) under R H R^T, and again from a refitted right one."""
    levels = grid.Levels.of_bits(form.bits)
    best: LowRank | None = None
    most = -float("inf")
    for last in [False] * (_REFITS if form.refit else 0) + [True]:
        right_part = _swept_right(right, inverse, levels, form)
        answer = linalg.answer_to(error, right_part.dense(), gram)
        left = answer.best()
        across = Across(left, levels, form.group_size)
        sweep(left, inverse_of(answer.inner, damp=_DAMP), rounding=across)
        left_part = _uniform(across.index, across.scale, levels, form)
        gain = answer.gain(left_part.dense())
        if best is None or gain > most:
            best, most = LowRank(left_part, right_part), gain
        if not last:
            right = linalg.refit_right(error, left_part.dense().T)
    assert best is not None
    return best


def _swept_right(right: Tensor, inverse: Inverse, levels: grid.Levels, form: AdapterFormat) -> Uniform:
    sizes = [len(own) for own in torch.arange(right.shape[1]).split(form.group_size)]
    along = Along(levels, sizes, len(right), one=False, start=None, device=right.device)
    sweep(right, inverse, rounding=along)
    return _uniform(along.index.T.contiguous(), along.scale.T.contiguous(), levels, form)


def _uniform(index: Tensor, scale: Tensor, levels: grid.Levels, form: AdapterFormat) -> Uniform:
    return as_uniform(coded(index, scale, levels, form.group_size))


def _rounded(error: Tensor, energy: Tensor, left: Tensor, right: Tensor, form: AdapterFormat) -> LowRank:
    even = torch.ones_like(error[:, 0])
    best = LowRank(_round(left.T, even, form), _round(right, energy, form))
    if not form.refit:
        return best
    answer = linalg.answer_to(error, best.right.dense(), energy)
    most = answer.gain(best.left.dense())
    for _ in range(_REFITS):
        left_part = _round(answer.best().T, even, form)
        right_part = _round(linalg.refit_right(error, left_part.dense().T), energy, form)
        answer = linalg.answer_to(error, right_part.dense(), energy)
        gain = answer.gain(left_part.dense())
        if gain > most:
            best, most = LowRank(left_part, right_part), gain
    return best


def _round(factor: Tensor, mass: Tensor, form: AdapterFormat) -> Uniform:
    """A factor `[rank, n]` on a grid with a scale per group along n, of least squared error under masses `[n]`."""
    shape = (factor.shape[0], factor.shape[1])
    sets = grid.rows_of(factor, form.group_size)
    masses = grid.rows_of(mass.expand_as(factor), form.group_size)
    scale = grid.storable(
        grid.best_scale(sets, masses, grid.Levels.of_bits(form.bits)).view(grid.scale_shape(shape, form.group_size))
    )
    codes = grid.encode(factor, scale, bits=form.bits, group_size=form.group_size)
    return Uniform(codes, scale, form.bits, form.group_size)


def half(values: Tensor) -> Plain:
    """16-bit values: float16 where they fit its range, else bfloat16."""
    fits = bool(values.abs().amax() <= grid.FP16_LARGEST) if values.numel() else True
    return Plain(values.to(torch.float16 if fits else torch.bfloat16).contiguous())
