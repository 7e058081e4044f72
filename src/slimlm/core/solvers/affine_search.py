"""The search for scales with zeros: for each set of numbers the scale and the zero of least weighted squared error, together.

A zero is the index that stands for zero, a whole number from 0 to 2^bits - 1:

    minimise over s and z   sum over points of  weight x ((clamp(round(point / s) + z, 0, 2^bits - 1) - z) s - point)^2

Points and weights are given as `[sets, size]`; inside they are held `[size, sets]`. `scale_and_zero` and
`nearby_scale_and_zero` search for any grid: where it has no zeros, for scales alone (slimlm.core.solvers.scale_search).

On a CPU the same candidates are tried by loops in C++ (slimlm.kernels.compression), except near earlier scales and zeros.
"""

import torch
from torch import Tensor

from slimlm.core.grid import Grid
from slimlm.core.profiling import profiled
from slimlm.core.solvers.scale_search import (
    FINE,
    REFINEMENTS,
    nearby_factors,
    nearby_scale,
    searched_in_pieces,
    signed_scale,
)
from slimlm.kernels import compression

_COARSE = 24
"""Scales of the first scan."""


@profiled("scale search")
def affine_scale(points: Tensor, weights: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """The scale and the zero of least weighted squared error for each set, searched together.

    A number x stands for (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero) x scale. For each scale of a geometric scan the
    grid begins at the smallest point, ends at the largest one, or lies midway between the two; then scales around the best
    with its zero, and the zeros next to it, are tried three times. The scan runs from the scale that covers all points and zero
    down to a bound below which clipping the largest magnitude alone costs more.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`, by which the squared error of each point is multiplied; none negative.
        bits: of a code.

    Returns:
        Scales and zeros, whole numbers from 0 to 2^bits - 1, both float32 `[sets]`; both 0 for a set whose points are zero
        where their weights are not.
    """
    if compression.takes(points, weights):
        return compression.affine_scale(points, weights, bits=bits, coarse=_COARSE)
    found = searched_in_pieces(lambda piece, w: _affine_scale(piece, w, bits), points, weights)
    return found[:, 0].contiguous(), found[:, 1].contiguous()


@profiled("scale search")
def nearby_affine_scale(points: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, *, bits: int) -> tuple[Tensor, Tensor]:
    """A scale and a zero no worse than earlier ones: the best near them, then least squares for that one's codes.

    Seven scales within 12 % of the earlier one are tried, each with the earlier zero and those next to it.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`, by which the squared error of each point is multiplied.
        scale: `[sets]`, the earlier scales; 0 stays 0.
        zero: `[sets]`, the earlier zeros, whole numbers from 0 to 2^bits - 1.
        bits: of a code.

    Returns:
        Scales and zeros, both `[sets]`.
    """
    found = searched_in_pieces(
        lambda piece, w, start: _nearby_affine_scale(piece, w, start, bits), points, weights, torch.stack([scale, zero], dim=1)
    )
    return found[:, 0].contiguous(), found[:, 1].contiguous()


@profiled("scale search")
def scale_and_zero(points: Tensor, weights: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The scale of least weighted squared error for each set, and its zero where a grid has zeros.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`, by which the squared error of each point is multiplied; none negative.
        grid: the values that codes stand for.

    Returns:
        `[sets]` each: scales, of either sign where there are no zeros; the indices that stand for zero, or None.
    """
    if not grid.zeros:
        return signed_scale(points, weights, grid), None
    return affine_scale(points, weights, bits=grid.bits)


@profiled("scale search")
def nearby_scale_and_zero(
    points: Tensor, weights: Tensor, grid: Grid, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """As `scale_and_zero` for points and weights `[sets, size]`, no worse than earlier scales and zeros `[sets]`, near them."""
    if zero is None:
        return nearby_scale(points, weights, grid, scale), None
    return nearby_affine_scale(points, weights, scale, zero, bits=grid.bits)


def _affine_scale(points: Tensor, weights: Tensor, bits: int) -> Tensor:
    """Scales and zeros `[sets, 2]`."""
    top = 2**bits - 1
    counted = points * (weights > 0)
    low, high = counted.amin(dim=0).clamp_max(0), counted.amax(dim=0).clamp_min(0)
    at = counted.abs().argmax(dim=0, keepdim=True)
    largest, its_weight = counted.abs().gather(0, at)[0], weights.gather(0, at)[0]
    upper = torch.where(high > low, (high - low) / top, torch.ones_like(high))

    def best_of(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """The best of scales and zeros `[candidates, sets]`."""
        costs = torch.stack([_affine_cost(points, weights, s, z, top) for s, z in zip(scales, zeros, strict=True)])
        index = costs.argmin(dim=0, keepdim=True)
        return scales.gather(0, index)[0], zeros.gather(0, index)[0]

    worst = _affine_cost(points, weights, upper, (-low / upper).clamp(0, top).round(), top)
    lower = torch.maximum((largest - (worst / its_weight.clamp_min(1e-30)).sqrt()) / top, upper / 4096)
    lower = torch.minimum(lower, upper * 0.999)
    scales = upper * (lower / upper) ** torch.linspace(0, 1, _COARSE, device=points.device)[:, None]
    begins, ends = -low / scales, top - high / scales
    zeros = torch.cat([begins, ends, (begins + ends) / 2]).clamp_(0, top).round_()
    scale, zero = best_of(scales.repeat(3, 1), zeros)
    ratio = (upper / lower) ** (1 / (_COARSE - 1))
    around = torch.linspace(-1, 1, FINE, device=points.device)[:, None]
    for _ in range(REFINEMENTS):
        near = scale * ratio**around
        scale, zero = best_of(near, zero.expand_as(near))
        beside = torch.stack([zero, (zero - 1).clamp_min(0), (zero + 1).clamp_max(top)])
        scale, zero = best_of(scale.expand_as(beside), beside)
        ratio = ratio ** (2 / (FINE - 1))
    return torch.stack([scale, zero], dim=1) * (high > low)[:, None]


def _nearby_affine_scale(points: Tensor, weights: Tensor, start: Tensor, bits: int) -> Tensor:
    """Scales and zeros `[sets, 2]` near those of `start` `[sets, 2]`."""
    top = 2**bits - 1
    old, middle = start.T
    safe = torch.where(old == 0, torch.ones_like(old), old)
    scale, zero, least = safe, middle, _affine_cost(points, weights, safe, middle, top)

    def keep_better(scales: Tensor, zeros: Tensor) -> None:
        nonlocal scale, zero, least
        cost = _affine_cost(points, weights, scales, zeros, top)
        better = cost < least
        scale, zero = torch.where(better, scales, scale), torch.where(better, zeros, zero)
        least = torch.where(better, cost, least)

    for beside in (middle, (middle - 1).clamp_min(0), (middle + 1).clamp_max(top)):
        for factor in nearby_factors(points.device):
            keep_better(safe * factor, beside)
    code = torch.minimum(torch.maximum((points / scale).round_(), -zero), top - zero)
    fitted = (points * code * weights).sum(dim=0) / (code.square() * weights).sum(dim=0)
    keep_better(torch.where(fitted.isfinite() & (fitted > 0), fitted, scale), zero)
    return torch.stack([torch.where(old == 0, old, scale), torch.where(old == 0, middle, zero)], dim=1)


def _affine_cost(points: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Sum over a set's points `[size, sets]` of weight x squared error under scales and zeros `[sets]`."""
    value = torch.minimum(torch.maximum((points / scale).round_(), -zero), top - zero).mul_(scale)
    return value.sub_(points).square_().mul_(weights).sum(dim=0)
