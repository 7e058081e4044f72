"""What scales cost: the weighted squared error of rounding a set of numbers to a grid, for many candidate scales at a time.

    cost(s) = sum over points of  weight x (grid(point / s) s - point)^2

Points and weights are given as `[size, sets]`, scales as `[candidates, sets]`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from slimlm.core.chunks import at_once
from slimlm.core.grid import Grid

_CANDIDATE_POINTS_AT_ONCE = 2**16
"""Points worked on at a time, counted for each candidate: few enough for a CPU's cache, together with their weights."""
_MANY = 2048
"""From this many points of a set on they are sorted, instead of each rounded for every candidate."""

Cost = Callable[[Tensor], Tensor]
"""The cost of scales `[candidates, sets]`, none of them zero: of that shape."""


def cost_of(points: Tensor, weights: Tensor, grid: Grid) -> Cost:
    """The function that gives the cost of scales for these sets.

    Args:
        points: `[size, sets]`.
        weights: `[size, sets]`, by which the squared error of each point is multiplied.
        grid: the values that codes stand for.

    Returns:
        A function of scales.
    """
    if len(points) > _MANY:
        return _cost_of_many(points, weights, grid)
    smallest, largest = float(grid.values[0]), float(grid.values[-1])
    candidates_at_once = max(1, at_once(_CANDIDATE_POINTS_AT_ONCE, points.device) // max(1, points.numel()))

    def cost(scales: Tensor) -> Tensor:
        # A few candidates at a time, in place: the passes over the points then stay in the CPU's cache.
        costs = torch.empty_like(scales)
        for some, total in zip(scales.split(candidates_at_once), costs.split(candidates_at_once), strict=True):
            ratio = points / some[:, None]
            error = torch.round(ratio).clamp_(smallest, largest) if grid.even else grid.nearest(ratio)
            torch.sum(error.sub_(ratio).square_().mul_(weights), dim=1, out=total)
        return costs.mul_(scales.square())

    return cost


def _cost_of_many(points: Tensor, weights: Tensor, grid: Grid) -> Cost:
    """As `cost_of`, from running sums over sorted points, which are needed only at the borders between grid values."""
    ordered, order = points.T.contiguous().sort(dim=1)
    sorted_weights = weights.T.gather(1, order).double()
    wide = ordered.double()
    moments = torch.stack([sorted_weights, sorted_weights * wide, sorted_weights * wide.square()]).cumsum(dim=2)
    moments = torch.nn.functional.pad(moments, (1, 0))
    values = grid.values.to(points.device)
    borders = (values[1:] + values[:-1]) / 2

    def cost(scales: Tensor) -> Tensor:
        by_set = scales.T[..., None]
        below = torch.searchsorted(ordered, (by_set * borders).flatten(1).contiguous())
        first, last = below.new_zeros(*by_set.shape), below.new_full(by_set.shape, len(points))
        below = below.view(*by_set.shape[:2], -1)
        # Under a negative scale the values, and so the borders, descend.
        cuts = torch.cat([torch.where(by_set > 0, first, last), below, torch.where(by_set > 0, last, first)], dim=2)
        at = moments.gather(2, cuts.flatten(1).expand(3, -1, -1)).view(3, *cuts.shape)
        inside = at.diff(dim=3) * by_set.sign().double()
        value = by_set.double() * values.double()
        # For a set that lies on the grid the terms cancel, and rounding may leave a sum slightly below zero.
        return (inside[2] - 2 * value * inside[1] + value.square() * inside[0]).sum(dim=2).clamp_min_(0).T.to(scales)

    return cost
