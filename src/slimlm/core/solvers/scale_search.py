"""The search for scales: for each set of numbers the scale of a grid that errs least.

A set is the numbers that share a scale. Each number ("point") has a weight, by which its squared error is multiplied:

    minimise over s   sum over points of  weight x (grid(point / s) s - point)^2

Points and weights are given as `[sets, size]`; inside they are held `[size, sets]`, and candidate scales `[candidates, sets]`.
Scales that come with a zero are searched in slimlm.core.solvers.affine_search.

On a CPU the same candidates are tried by loops in C++ (slimlm.kernels.compression), which find the same scale, or one whose
error is equal up to rounding in float32. What is written with torch here is their law, and runs on a GPU or without that.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from slimlm.core.chunks import at_once
from slimlm.core.grid import Grid, GroupSize, nearest_code, scale_sets, scale_shape
from slimlm.core.profiling import profiled
from slimlm.core.solvers.distribution import distribution
from slimlm.core.solvers.scale_cost import Cost, cost_of
from slimlm.kernels import compression

FINE = 9
"""Candidates of a refinement, from one neighbour of the best candidate before to the other."""
REFINEMENTS = 3
"""How often a scan is refined around its best candidate."""
_COARSE = 48
"""Candidates of the first scan."""
_COARSE_OF_A_SIGN = 24
"""The same where scales of either sign are searched, for each sign."""
_POINTS_AT_ONCE = 2**17
"""Points worked on at a time: few enough for a CPU's cache."""


@profiled("scale search")
def best_scale(points: Tensor, weights: Tensor, grid: Grid, *, coarse: int = _COARSE) -> Tensor:
    """The positive scale of least weighted squared error for each set.

    A geometric scan, refined three times around its best candidate. The scan runs from the AbsMax scale, which is one
    of the candidates, down to a bound below which clipping the largest point alone costs more than AbsMax costs in
    total; so the result is never worse than AbsMax. Scales that put the largest magnitude on an inner code (from half the
    largest on) are tried, too: a weight that is on a grid already need not use all its codes.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`, by which the squared error of each point is multiplied; none negative.
        grid: the values that codes stand for.
        coarse: candidates of the first scan.

    Returns:
        `[sets]`; 0 for a set of zeros.
    """
    if _taken(grid, points, weights):
        return compression.best_scale(points, weights, grid.values, even=grid.even, coarse=coarse)
    return searched_in_pieces(lambda piece, w: _best_scale(piece, w, grid, coarse), points, weights)


@profiled("scale search")
def signed_scale(points: Tensor, weights: Tensor, grid: Grid) -> Tensor:
    """The scale of least weighted squared error of either sign: a negative one reverses the grid, whose sides differ in length.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`, as for `best_scale`.
        grid: the values that codes stand for.

    Returns:
        `[sets]`; 0 for a set of zeros.
    """
    symmetric = float(grid.values[0]) == -grid.largest
    if _taken(grid, points, weights):
        values, even, coarse = grid.values, grid.even, _COARSE_OF_A_SIGN
        return compression.best_scale(points, weights, values, even=even, coarse=coarse, either_sign=not symmetric)
    positive = best_scale(points, weights, grid, coarse=_COARSE_OF_A_SIGN)
    if symmetric:
        return positive
    negative = -best_scale(-points, weights, grid, coarse=_COARSE_OF_A_SIGN)
    return searched_in_pieces(
        lambda piece, w, both: _better(piece, w, both.T, grid), points, weights, torch.stack([positive, negative], dim=1)
    )


@profiled("scale search")
def nearby_scale(points: Tensor, weights: Tensor, grid: Grid, start: Tensor) -> Tensor:
    """A scale no worse than an earlier one: the best of seven within 12 % of it, then least squares for that one's codes.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`, by which the squared error of each point is multiplied.
        grid: the values that codes stand for.
        start: `[sets]`, the earlier scales, of either sign; 0 stays 0.

    Returns:
        `[sets]`.
    """
    if _taken(grid, points, weights, start):
        return compression.nearby_scale(points, weights, grid.values, start, even=grid.even)
    return searched_in_pieces(lambda piece, w, old: _nearby_scale(piece, w, old, grid), points, weights, start)


@profiled("scale search")
def search_scales(weight: Tensor, *, bits: int, group_size: GroupSize, second_moment: Tensor | None = None) -> Tensor:
    """Scales of least squared error for a weight under its own distribution, on the even grid.

    Args:
        weight: `[out, in]`.
        bits: of the even grid.
        group_size: how many weights share a scale.
        second_moment: `[in]`, the inputs' mean squares, by which squared errors are then multiplied: the sum is the squared
            error of the output, as far as inputs do not correlate. Dead inputs count as a millionth of the mean.

    Returns:
        float32 `[rows, groups]`, not yet in the dtype they are stored in (see `grid.storable`).
    """
    sets = scale_sets(weight, group_size)
    set_weights = None
    if second_moment is not None and bool((second_moment > 0).any()):
        set_weights = scale_sets((second_moment / second_moment.mean()).clamp_min(1e-6).expand_as(weight), group_size)
    points, weights = distribution(sets, set_weights)
    scale = least_squares_scale(sets, best_scale(points, weights, Grid.of_bits(bits)), bits, set_weights)
    return scale.view(scale_shape((weight.shape[0], weight.shape[1]), group_size))


def least_squares_scale(sets: Tensor, scale: Tensor, bits: int, weights: Tensor | None = None) -> Tensor:
    """Each set's scale replaced by the least-squares one for its codes, sum(w c x) / sum(w c^2), where that has less error.

    A weight that lies on a grid already gets that grid's scale back.

    Args:
        sets: `[sets, size]`.
        scale: `[sets]`, the scales that the codes c are found with.
        bits: of the even grid.
        weights: `[sets, size]`, by which the squared error of each number is multiplied; ones if left out.

    Returns:
        `[sets]`.
    """
    if compression.takes(sets, scale, *([] if weights is None else [weights])):
        return compression.least_squares_scale(sets, scale, bits=bits, weights=weights)
    rows = max(1, at_once(_POINTS_AT_ONCE, sets.device) // max(1, sets.shape[1]))
    weights_of = [None] * len(sets.split(rows)) if weights is None else weights.split(rows)
    pieces = zip(sets.split(rows), scale.split(rows), weights_of, strict=True)
    return torch.cat([_least_squares_scale(piece, old, bits, w) for piece, old, w in pieces])


def searched_in_pieces(search: Callable[..., Tensor], points: Tensor, weights: Tensor, *others: Tensor) -> Tensor:
    """The result of a search, a few sets at a time.

    Args:
        search: takes points and weights `[size, sets]` and the others; gives `[sets, ...]`.
        points: `[sets, size]`.
        weights: `[sets, size]`.
        others: `[sets, ...]` each, such as earlier scales.

    Returns:
        `[sets, ...]`.
    """
    sets = max(1, at_once(_POINTS_AT_ONCE, points.device) // max(1, points.shape[1]))
    pieces = zip(*(given.split(sets) for given in (points, weights, *others)), strict=True)
    return torch.cat([search(piece.T.contiguous(), w.T.contiguous(), *own) for piece, w, *own in pieces])


def nearby_factors(device: torch.device) -> Tensor:
    """What an earlier scale is multiplied by to find one near it: `[7]`, a geometric series from 1 / 1.12 to 1.12."""
    return 1.12 ** torch.linspace(-1, 1, 7, device=device)


def _taken(grid: Grid, *tensors: Tensor) -> bool:
    """Whether the loops in C++ search scales for this grid and these tensors `[...]`."""
    few = grid.even or len(grid.values) <= compression.LARGEST_CODEBOOK
    return few and grid.largest > 0 and compression.takes(grid.values, *tensors)


def _best_scale(points: Tensor, weights: Tensor, grid: Grid, coarse: int) -> Tensor:
    top, reach = grid.largest, grid.largest_magnitude
    where = (points.abs() * (weights > 0)).argmax(dim=0, keepdim=True)
    largest = points.abs().gather(0, where)[0]
    upper = largest / top
    empty = largest == 0
    upper = torch.where(empty, torch.ones_like(upper), upper)
    cost = cost_of(points, weights, grid)
    worst = cost(upper[None])[0]
    clipped = largest - (worst / weights.gather(0, where)[0].clamp_min(1e-30)).sqrt()
    lower = torch.maximum(clipped / reach, upper / 4096)
    lower = torch.minimum(lower, upper * (top / reach) * 0.999)

    steps = torch.linspace(0, 1, coarse, device=points.device)[:, None]
    inner = top / torch.arange(top // 2 + 1, max(top, top // 2 + 1), device=points.device)[:, None]
    best, at = _pick(cost, torch.cat([upper * (lower / upper) ** steps, upper * inner]))
    ratio = (upper / lower) ** (1 / (coarse - 1))
    around = torch.linspace(-1, 1, FINE, device=points.device)
    around = around[around != 0, None]
    for _ in range(REFINEMENTS):
        candidate, least = _pick(cost, best * ratio**around)
        best = torch.where(least < at, candidate, best)
        at = torch.minimum(least, at)
        ratio = ratio ** (2 / (FINE - 1))
    return torch.where(empty, torch.zeros_like(best), best)


def _better(points: Tensor, weights: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The second of two scales `[2, sets]` where it costs less, else the first."""
    cost = cost_of(points, weights, grid)(torch.where(scales == 0, 1.0, scales))
    return torch.where(cost[1] < cost[0], scales[1], scales[0])


def _nearby_scale(points: Tensor, weights: Tensor, start: Tensor, grid: Grid) -> Tensor:
    cost = cost_of(points, weights, grid)
    safe = torch.where(start == 0, torch.ones_like(start), start)
    best, at = _pick(cost, safe * nearby_factors(points.device)[:, None])
    value = grid.nearest(points / best)
    fitted = (points * value * weights).sum(dim=0) / (value.square() * weights).sum(dim=0)
    usable = fitted.isfinite() & (fitted != 0)
    fitted = torch.where(usable, fitted, best)
    best = torch.where(cost(fitted[None])[0] < at, fitted, best)
    return torch.where(start == 0, start, best)


def _pick(cost: Cost, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Each set's best of candidates `[candidates, sets]`, and its cost."""
    least, index = cost(candidates).min(dim=0, keepdim=True)
    return candidates.gather(0, index)[0], least[0]


def _least_squares_scale(sets: Tensor, scale: Tensor, bits: int, weights: Tensor | None) -> Tensor:
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)[:, None]
    size = at_once(_POINTS_AT_ONCE, sets.device)
    pieces = sets.split(size, dim=1)
    weights_of = [None] * len(pieces) if weights is None else weights.split(size, dim=1)
    along, square = torch.zeros_like(scale), torch.zeros_like(scale)
    for piece, w in zip(pieces, weights_of, strict=True):
        codes = nearest_code(piece / safe, bits)
        weighted = codes if w is None else codes * w
        square += (weighted * codes).sum(dim=1)
        along += (piece * weighted).sum(dim=1)
    fitted = along / (square.clamp_min(1) if weights is None else square)
    fitted = torch.where(fitted > 0, fitted, safe[:, 0])[:, None]

    def error(step: Tensor) -> Tensor:
        total = torch.zeros_like(scale)
        for piece, w in zip(pieces, weights_of, strict=True):
            squared = nearest_code(piece / step, bits).mul_(step).sub_(piece).square_()
            total += (squared if w is None else squared.mul_(w)).sum(dim=1)
        return total

    return torch.where((error(fitted) < error(safe)) & (scale != 0), fitted[:, 0], scale)
