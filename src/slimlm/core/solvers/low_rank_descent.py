"""Coordinate descent on the codes of a low-rank part: each factor decided anew on its grid, the other as it is.

For an error E and the covariance H of the inputs a part L R of rounded factors is improved on the objective that they were
found for, tr((E - L R) H (E - L R)^T); no step raises it. Against a rounded factor the other's objective is quadratic:

    over L    with the inner Gram R H R^T between components; the outputs are independent of each other
    over R    with the inner Gram L^T L between components and H between inputs

So an adapter follows a base that changes a little from where it is, where rounding it afresh would err afresh. Scales stay
(the right factor's, refitted too, brought nothing). Factors are held as they are stored, `[rank, n]`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.grid import Levels
from slimlm.core.parts.elementwise import Elementwise
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.uniform import Uniform, as_uniform
from slimlm.core.solvers import linalg

_INPUTS_AT_ONCE = 64
"""Inputs whose changes reach the later ones in one product of matrices."""


def descend(error: Tensor, gram: Tensor, part: LowRank) -> LowRank:
    """One pass over the left factor's codes, then one over the right one's; error `[out, in]`, gram H `[in, in]`."""
    return descend_right(error, gram, descend_left(error, gram, part))


def descend_left(error: Tensor, gram: Tensor, part: LowRank) -> LowRank:
    """The part with the left factor's codes decided anew, one component after another: each the nearest to its best value."""
    factor, levels = _even(part.left)
    right = part.right.dense()
    weighted = linalg.weighed(right, gram)
    inner = weighted @ right.T
    value, codes = factor.dense(), factor.codes.clone()
    scale = grid.spread(factor.scale, value.shape[1], factor.group_size).expand_as(value)
    pull = weighted @ error.T - inner @ value
    """half the slope of the objective, falling, `[rank, out]`"""
    silent = (inner.diagonal() <= 0).tolist()
    inverse = grid.reciprocal(scale)
    for i in range(len(inner)):
        if silent[i]:
            continue
        bend = inner[i, i]
        index, new = levels.rounded_by(value[i] + pull[i] / bend, scale[i], inverse[i])
        change = new - value[i]
        better = change.square() * bend < 2 * change * pull[i]
        codes[i] = torch.where(better, _codes(index, levels), codes[i])
        pull[i:].addr_(inner[i:, i], torch.where(better, change, torch.zeros_like(change)), alpha=-1)
    return replace(part, left=replace(factor, codes=codes))


def descend_right(error: Tensor, gram: Tensor, part: LowRank) -> LowRank:
    """The part with the right factor's codes decided anew, one input after another.

    For each input the least-squares values of all its components, everything else as it is, are rounded and taken together
    where that lowers the objective. (The left factor's columns are nearly orthogonal, so that rounding them apart costs
    little; one component of one input at a time would cost rank times as many steps and was no better.)
    """
    factor, levels = _even(part.right)
    left = part.left.dense()
    inner = left @ left.T
    answer = torch.linalg.pinv(inner.double(), rtol=1e-6, hermitian=True).to(inner)
    value, index = factor.dense().T.contiguous(), factor.codes.T.float() - levels.values[0]
    width = len(value)
    scale = grid.spread(factor.scale, width, factor.group_size).expand_as(factor.codes).T.contiguous()
    inverse = grid.reciprocal(scale)
    pull = gram @ ((left @ error).T - value @ inner)
    """half the slope of the objective, falling, `[in, rank]`; exact for the inputs whose turn it is"""
    silent = (gram.diagonal() <= 0).tolist()
    for low in range(0, width, _INPUTS_AT_ONCE):
        high = min(low + _INPUTS_AT_ONCE, width)
        moved = torch.zeros_like(value[low:high])
        """the changes of these inputs, times the inner Gram"""
        for place in range(low, high):
            if silent[place]:
                continue
            bend, slope, old = gram[place, place], pull[place], value[place]
            at, new = levels.rounded_by(old + answer @ slope / bend, scale[place], inverse[place])
            change = new - old
            along = inner @ change
            # Not asked in Python, which would wait for a GPU at every input.
            better = change @ (2 * slope - bend * along) > 0
            index[place] = torch.where(better & (change != 0), at, index[place])
            along = torch.where(better, along, 0.0)
            moved[place - low] = along
            pull[place:high].addr_(gram[place:high, place], along, alpha=-1)
        pull[high:].addmm_(gram[high:, low:high], moved, alpha=-1)
    return replace(part, right=replace(factor, codes=_codes(index.T.contiguous(), levels)))


def _even(factor: Elementwise) -> tuple[Uniform, Levels]:
    # A factor that is not rounded is refitted instead.
    part = as_uniform(factor)
    return part, Levels.of_bits(part.bits)


def _codes(index: Tensor, levels: Levels) -> Tensor:
    return (index + levels.values[0]).to(torch.int8)
