"""Coordinate descent on the codes of a low-rank part: each factor decided anew on its grid, the other as it is.

For an error E and the covariance H of the inputs a part L R of rounded factors is improved on the objective that they were
found for, tr((E - L R) H (E - L R)^T); no step raises it. Against a rounded factor the other's objective is quadratic:

    over L    with R H R^T between components; the outputs are independent of each other
    over R    with the Gram matrix L^T L between components and H between inputs

So an adapter follows a base that changes a little from where it is, where rounding it afresh would err afresh. Scales stay
(the right factor's, refitted too, brought nothing). Factors are held as they are stored, `[rank, n]`.
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

INPUTS_AT_ONCE = 64
"""Inputs whose changes reach the later ones in one product of matrices."""


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
    """The part with the left factor's codes decided anew, one component after another: each the nearest to its best value.

    Arguments and result as for `descend_adapter`.
    """
    factor, grid = _even(part.left)
    right = part.right.dense()
    weighted = linalg.weighted(right, covariance)
    inner = weighted @ right.T
    value, codes = factor.dense(), factor.codes.clone()
    scale = spread(factor.scale, value.shape[1], factor.group_size).expand_as(value)
    gradient = weighted @ error.T - inner @ value
    """minus half the objective's gradient, `[rank, out]`"""
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


def descend_right(error: Tensor, covariance: Tensor, part: LowRank, *, inputs_at_once: int = INPUTS_AT_ONCE) -> LowRank:
    """The part with the right factor's codes decided anew, one input after another.

    For each input the least-squares values of all its components, everything else as it is, are rounded and taken together
    where that lowers the objective. (The left factor's columns are nearly orthogonal, so that rounding them apart costs
    little; one component of one input at a time would cost rank times as many steps and was no better.)

    Arguments and result as for `descend_adapter`; the changes of `inputs_at_once` inputs reach the later ones together, which
    only the order of float32 sums depends on.
    """
    factor, grid = _even(part.right)
    left = part.left.dense()
    gram = left @ left.T
    inverse_gram = torch.linalg.pinv(gram.double(), rtol=1e-6, hermitian=True).to(gram)
    value, index = factor.dense().T.contiguous(), factor.codes.T.float() - grid.values[0]
    width = len(value)
    scale = spread(factor.scale, width, factor.group_size).expand_as(factor.codes).T.contiguous()
    inverse = reciprocal(scale)
    gradient = covariance @ ((left @ error).T - value @ gram)
    """minus half the objective's gradient, `[in, rank]`; exact for the inputs whose turn it is"""
    dead = (covariance.diagonal() <= 0).tolist()
    for low in range(0, width, inputs_at_once):
        high = min(low + inputs_at_once, width)
        changes = torch.zeros_like(value[low:high])
        """the changes of these inputs, times the Gram matrix"""
        for place in range(low, high):
            if dead[place]:
                continue
            curvature, slope, old = covariance[place, place], gradient[place], value[place]
            at, new = grid.round_with(old + inverse_gram @ slope / curvature, scale[place], inverse[place])
            change = new - old
            along = gram @ change
            # Not asked in Python, which would wait for a GPU at every input.
            better = change @ (2 * slope - curvature * along) > 0
            index[place] = torch.where(better & (change != 0), at, index[place])
            along = torch.where(better, along, 0.0)
            changes[place - low] = along
            gradient[place:high].addr_(covariance[place:high, place], along, alpha=-1)
        gradient[high:].addmm_(covariance[high:, low:high], changes, alpha=-1)
    return replace(part, right=replace(factor, codes=_codes(index.T.contiguous(), grid)))


def _even(factor: Elementwise) -> tuple[Uniform, Grid]:
    rounded = as_uniform(factor)  # a factor that is not rounded is refitted instead
    return rounded, Grid.of_bits(rounded.bits)


def _codes(index: Tensor, grid: Grid) -> Tensor:
    return (index + grid.values[0]).to(torch.int8)
