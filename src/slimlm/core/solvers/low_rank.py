"""From an error to a stored low-rank part: rank, best product, balance, rounding, refit.

All compensators use this; they differ in the norm (weights of the inputs, or their covariance) and in the error.
The norm's H is given as `input_weights`, as in slimlm.core.solvers.linalg.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimlm.core.errors import RecipeError
from slimlm.core.grid import FP16_LARGEST, Grid, check_group_size, encode, scale_sets, scale_shape, storable
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.uniform import Uniform, as_uniform
from slimlm.core.profiling import profiled
from slimlm.core.solvers import linalg
from slimlm.core.solvers.inverse import Inverse, inverse_of
from slimlm.core.solvers.rounding import InputGroups, OutputGroups
from slimlm.core.solvers.scale_search import best_scale
from slimlm.core.solvers.sweep import sweep
from slimlm.core.solvers.swept import part_of

REFITS = 2
"""Rounds of refitting; the first brings most of the gain, a third next to nothing."""
_DAMP = 0.01

AdapterBits = Literal[4, 8, 16]


@dataclass(frozen=True)
class AdapterFormat:
    """How large an adapter may be and how its factors are stored."""

    rank: float
    """a share of min(out, in), from 0 to 1; the rank is that share, rounded down"""
    bits: AdapterBits
    group_size: int
    """inputs (or outputs) of one component that share a scale, at 4 and 8 bits"""
    refit: bool
    """whether rounding and least squares alternate after the first rounding, at 4 and 8 bits"""

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= 1:
            raise RecipeError(f"rank = {self.rank}: give a share of min(out, in), from 0 to 1")
        if self.bits not in (4, 8, 16):
            raise RecipeError(f"bits = {self.bits}: adapters are stored at 4, 8 or 16 bits")
        check_group_size(self.group_size)

    def rank_of(self, shape: tuple[int, int]) -> int:
        """The rank, a number of components, for a weight `[out, in]` of this shape."""
        return rank_of(self.rank, shape)


def rank_of(share: float, shape: tuple[int, int]) -> int:
    """A share of min(out, in) as a rank, rounded down (1e-9 prevents that 0.3 x 10 becomes 2)."""
    return int(share * min(shape) + 1e-9)


def low_rank_part(
    error: Tensor,
    input_weights: Tensor,
    form: AdapterFormat,
    *,
    start: Tensor | None = None,
    inverse: Inverse | None = None,
    refits: int = REFITS,
) -> LowRank | None:
    """The low-rank part that best approximates an error in the norm of H.

    The rounded factors are improved by alternation: with one factor rounded the other is solved by least squares and
    rounded in turn (the inner loop of CALDERA, Saha et al., arXiv 2405.18886), and the result is the best iterate in the norm.
    Under a covariance the factors are rounded by a sweep, so that later inputs or components compensate the rounding errors of
    earlier ones.

    Args:
        error: E `[out, in]`.
        input_weights: H, `[in]` or `[in, in]`.
        form: rank and storage of the factors.
        start: a basis `[out, any]` of a nearby error's left factor.
        inverse: of the covariance, its inputs in their natural order; by default it is computed.
        refits: rounds of refitting, where `form` asks for any.

    Returns:
        The part, or None at rank 0.
    """
    rank = form.rank_of((error.shape[0], error.shape[1]))
    if rank == 0:
        return None
    left, right = linalg.best_low_rank(error, input_weights, rank, start=start)
    left, right = linalg.balanced(left, right, input_weights)
    if form.bits == 16:
        return LowRank(half(left.T), half(right))
    refits = refits if form.refit else 0
    if input_weights.ndim == 1:
        return _rounded(error, input_weights, (left, right), form, refits=refits)
    inverse = inverse or inverse_of(input_weights, damp=_DAMP)
    return _swept(error, input_weights, right, form, inverse=inverse, refits=refits)


@profiled("adapter rounding")
def _swept(error: Tensor, covariance: Tensor, right: Tensor, form: AdapterFormat, *, inverse: Inverse, refits: int) -> LowRank:
    """Round the right factor under H, the left one (refitted to it) under R H R^T, and again from a refitted right one."""
    grid = Grid.of_bits(form.bits)
    best: LowRank | None = None
    largest_gain = -float("inf")
    for last in [False] * refits + [True]:
        right_part = _swept_right(right, inverse, grid, form)
        equations = linalg.normal_equations(error, right_part.dense(), covariance)
        left = equations.solve()
        rounding = OutputGroups(left, grid, form.group_size)
        sweep(left, inverse_of(equations.inner, damp=_DAMP), rounding=rounding)
        left_part = _uniform(rounding.index, rounding.scale, grid, form)
        gain = equations.gain(left_part.dense())
        if best is None or gain > largest_gain:
            best, largest_gain = LowRank(left_part, right_part), gain
        if not last:
            right = linalg.refit_right(error, left_part.dense().T)
    assert best is not None
    return best


def _swept_right(right: Tensor, inverse: Inverse, grid: Grid, form: AdapterFormat) -> Uniform:
    sizes = [len(group) for group in torch.arange(right.shape[1]).split(form.group_size)]
    rounding = InputGroups(grid, sizes, len(right), one=False, start=None, device=right.device)
    sweep(right, inverse, rounding=rounding)
    return _uniform(rounding.index.T.contiguous(), rounding.scale.T.contiguous(), grid, form)


def _uniform(index: Tensor, scale: Tensor, grid: Grid, form: AdapterFormat) -> Uniform:
    return as_uniform(part_of(index, scale, grid, form.group_size))


@profiled("adapter rounding")
def _rounded(
    error: Tensor, input_weights: Tensor, factors: tuple[Tensor, Tensor], form: AdapterFormat, *, refits: int
) -> LowRank:
    """Round the factors `[out, rank]` and `[rank, in]` number by number, and again from refitted ones."""
    left, right = factors
    even = torch.ones_like(error[:, 0])
    best = LowRank(_round(left.T, even, form), _round(right, input_weights, form))
    if not refits:
        return best
    equations = linalg.normal_equations(error, best.right.dense(), input_weights)
    largest_gain = equations.gain(best.left.dense())
    for _ in range(refits):
        left_part = _round(equations.solve().T, even, form)
        right_part = _round(linalg.refit_right(error, left_part.dense().T), input_weights, form)
        equations = linalg.normal_equations(error, right_part.dense(), input_weights)
        gain = equations.gain(left_part.dense())
        if gain > largest_gain:
            best, largest_gain = LowRank(left_part, right_part), gain
    return best


def _round(factor: Tensor, weights: Tensor, form: AdapterFormat) -> Uniform:
    """A factor `[rank, n]` on a grid with a scale per group along n, of least squared error under weights `[n]`."""
    shape = (factor.shape[0], factor.shape[1])
    sets = scale_sets(factor, form.group_size)
    weights = scale_sets(weights.expand_as(factor), form.group_size)
    scale = storable(best_scale(sets, weights, Grid.of_bits(form.bits)).view(scale_shape(shape, form.group_size)))
    codes = encode(factor, scale, bits=form.bits, group_size=form.group_size)
    return Uniform(codes, scale, form.bits, form.group_size)


def half(values: Tensor) -> Plain:
    """16-bit values `[rows, n]`: float16 where they fit its range, else bfloat16."""
    fits = bool(values.abs().amax() <= FP16_LARGEST) if values.numel() else True
    return Plain(values.to(torch.float16 if fits else torch.bfloat16).contiguous())
