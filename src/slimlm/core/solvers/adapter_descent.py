"""Coordinate descent on the codes of a low-rank part: one factor's codes change on its grid while the other is fixed.

For an error E and the covariance H of the inputs a part L R of rounded factors is improved on the objective that they were
found for, tr((E - L R) H (E - L R)^T); no step raises it. With one factor fixed the objective is quadratic in the other:

    in L    with R H R^T between components; the outputs are independent of each other
    in R    with L^T L between components and H between inputs

So an adapter adapts to small changes of the base, where rounding it afresh would add a fresh rounding error. Scales do not
change (refitting those of the right factor brought nothing). Factors are held as they are stored, `[rank, n]`. (Cyclic
coordinate descent on codes is QuantEase, Behdin et al., arXiv 2309.01885, there for a weight.)
"""

from dataclasses import replace

import torch
from torch import Tensor

from slimlm.core.grid import Grid, reciprocal, spread
from slimlm.core.parts.elementwise import Elementwise
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.uniform import Uniform, as_uniform
from slimlm.core.profiling import profiled
from slimlm.core.solvers import linalg
from slimlm.core.solvers.rounding import in_library, kernel_rounding
from slimlm.kernels import sweep as kernel

INPUTS_AT_ONCE = 64
"""Inputs whose changes are applied to the gradient of the later ones in one product of matrices."""


@profiled("adapter descent")
def descend_adapter(error: Tensor, covariance: Tensor, part: LowRank) -> LowRank:
    """One pass over the left factor's codes, then one over the right one's.

    Args:
        error: E `[out, in]`.
        covariance: H `[in, in]`.
        part: L R, both factors `Uniform`.

    Returns:
        A part of the same scales, whose objective is no larger.
    """
    return descend_right(error, covariance, descend_left(error, covariance, part))


def descend_left(error: Tensor, covariance: Tensor, part: LowRank) -> LowRank:
    """The part with new codes of the left factor, one component after another: each rounded from its best value.

    Args:
        error: E `[out, in]`.
        covariance: H `[in, in]`.
        part: L R, both factors `Uniform`.

    Returns:
        A part of the same scales and right factor, whose objective is no larger.
    """
    factor, grid = _even(part.left)
    right = part.right.dense()
    weighted = linalg.weighted(right, covariance)
    inner = weighted @ right.T
    value, codes = factor.dense(), factor.codes.clone()
    scale = spread(factor.scale, value.shape[1], factor.group_size).expand_as(value)
    gradient = weighted @ error.T - inner @ value
    """minus half the objective's gradient, `[rank, out]`"""
    if in_library(grid, None, value, inner, gradient):
        return replace(part, left=replace(factor, codes=_descended_left(factor, value, scale, inner, gradient)))
    dead = (inner.diagonal() <= 0).tolist()
    inverse = reciprocal(scale)
    for i in range(len(inner)):
        if dead[i]:
            continue
        curvature = inner[i, i]
        index, new = grid.round_with(value[i] + gradient[i] / curvature, scale[i], inverse[i])
        change = new - value[i]
        better = change.square() * curvature < 2 * change * gradient[i]
        codes[i] = torch.where(better, _codes(index, grid), codes[i])
        gradient[i:].addr_(inner[i:, i], torch.where(better, change, torch.zeros_like(change)), alpha=-1)
    return replace(part, left=replace(factor, codes=codes))


def _descended_left(factor: Uniform, value: Tensor, scale: Tensor, inner: Tensor, gradient: Tensor) -> Tensor:
    """New codes `[rank, out]`, decided in the library; all matrices but `inner` `[rank, rank]` are `[rank, out]`."""
    grid = Grid.of_bits(factor.bits)
    index = (factor.codes - int(grid.values[0])).to(torch.uint8).contiguous()
    descent = kernel.Descent(gradient.contiguous(), value, torch.zeros_like(value), index, None, inner.contiguous())
    for low in range(0, len(inner), kernel.MOST_INPUTS):
        high = min(low + kernel.MOST_INPUTS, len(inner))
        descent.decide(low, high, kernel_rounding(grid, scale))
        descent.gradient[high:].addmm_(inner[high:, low:high], descent.change[low:high], alpha=-1)
    return _codes(index.float(), grid)


def descend_right(error: Tensor, covariance: Tensor, part: LowRank, *, inputs_at_once: int = INPUTS_AT_ONCE) -> LowRank:
    """The part with new codes of the right factor, one input after another.

    For each input the least-squares values of all its components, everything else fixed, are rounded and accepted together
    where that lowers the objective. (The left factor's columns are nearly orthogonal, so that rounding the components
    independently costs little; one component of one input at a time would take rank times as many steps and was no better.)

    Args:
        error: E `[out, in]`.
        covariance: H `[in, in]`.
        part: L R, both factors `Uniform`.
        inputs_at_once: inputs whose changes are applied to the later ones together; it changes only the order of float32 sums.

    Returns:
        A part of the same scales and left factor, whose objective is no larger.
    """
    factor, grid = _even(part.right)
    left = part.left.dense()
    inner = left @ left.T
    inner_inverse = torch.linalg.pinv(inner.double(), rtol=1e-6, hermitian=True).to(inner)
    value, index = factor.dense().T.contiguous(), factor.codes.T.float() - grid.values[0]
    width = len(value)
    scale = spread(factor.scale, width, factor.group_size).expand_as(factor.codes).T.contiguous()
    inverse = reciprocal(scale)
    gradient = covariance @ ((left @ error).T - value @ inner)
    """minus half the objective's gradient, `[in, rank]`; exact for the inputs that are being decided"""
    dead = (covariance.diagonal() <= 0).tolist()
    if in_library(grid, None, value, covariance, gradient):
        codes = index.to(torch.uint8).contiguous()
        matrices = gradient.contiguous(), value, scale, codes, covariance.contiguous(), inner, inner_inverse.contiguous()
        descent = kernel.RightDescent(*matrices, factor.bits)
        for low in range(0, width, inputs_at_once):
            high = min(low + inputs_at_once, width)
            along = descent.decide(low, high)
            descent.gradient[high:].addmm_(covariance[high:, low:high], along, alpha=-1)
        return replace(part, right=replace(factor, codes=_codes(codes.T.float().contiguous(), grid)))
    for low in range(0, width, inputs_at_once):
        high = min(low + inputs_at_once, width)
        changes = torch.zeros_like(value[low:high])
        """the changes of these inputs, times L^T L"""
        for i in range(low, high):
            if dead[i]:
                continue
            curvature, slope, old = covariance[i, i], gradient[i], value[i]
            rounded, new = grid.round_with(old + inner_inverse @ slope / curvature, scale[i], inverse[i])
            change = new - old
            along = inner @ change
            # A tensor and not a branch in Python, which would wait for a GPU at every input.
            better = change @ (2 * slope - curvature * along) > 0
            index[i] = torch.where(better & (change != 0), rounded, index[i])
            along = torch.where(better, along, 0.0)
            changes[i - low] = along
            gradient[i:high].addr_(covariance[i:high, i], along, alpha=-1)
        gradient[high:].addmm_(covariance[high:, low:high], changes, alpha=-1)
    return replace(part, right=replace(factor, codes=_codes(index.T.contiguous(), grid)))


def _even(factor: Elementwise) -> tuple[Uniform, Grid]:
    rounded = as_uniform(factor)  # factors that are not rounded are refitted instead
    return rounded, Grid.of_bits(rounded.bits)


def _codes(index: Tensor, grid: Grid) -> Tensor:
    return (index + grid.values[0]).to(torch.int8)
