"""The search for scales and codebooks: the grid of least weighted squared error for given numbers.

A set is the numbers that share a scale. Each number ("point") has a weight, by which its squared error is multiplied:

    minimise over s   sum over points of  weight x (grid(point / s) s - point)^2

Points and weights are given as `[sets, size]`; inside they are held `[size, sets]`, and candidate scales `[candidates, sets]`.

On a CPU the same candidates are tried by loops in C++ (slimlm.kernels.compression), which find the same scale, or one whose
error is equal up to rounding in float32. What is written with torch here is their law, and runs on a GPU or without that.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from slimlm.core.chunks import at_once
from slimlm.core.errors import NumericsError
from slimlm.core.grid import Grid, GroupSize, nearest_code, scale_sets, scale_shape
from slimlm.core.profiling import profiled
from slimlm.kernels import compression

_COARSE = 48
_FINE = 9
_REFINEMENTS = 3
_LLOYD_STEPS = 10
_POINTS_AT_ONCE = 2**17
"""Points worked on at a time: few enough for a CPU's cache."""
_CANDIDATE_POINTS_AT_ONCE = 2**16
"""The same where candidates share the points, whose weights take room in the cache, too."""
_MANY = 2048
"""From this many points of a set on they are sorted, instead of each rounded for every candidate."""
_FEW = 2**15
"""Points of a set up to which `distribution` returns them unchanged."""
_BINS = 2**15


# Scales


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
    return _searched_in_pieces(lambda piece, w, _: _best_scale(piece, w, grid, coarse), points, weights)


@profiled("scale search")
def signed_scale(points: Tensor, weights: Tensor, grid: Grid, *, coarse: int = 24) -> Tensor:
    """The scale of least weighted squared error of either sign: a negative one reverses the grid, whose sides differ in length.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`, as for `best_scale`.
        grid: the values that codes stand for.
        coarse: candidates of the first scan, for each sign.

    Returns:
        `[sets]`; 0 for a set of zeros.
    """
    symmetric = float(grid.values[0]) == -grid.largest
    if _taken(grid, points, weights):
        values, even = grid.values, grid.even
        return compression.best_scale(points, weights, values, even=even, coarse=coarse, either_sign=not symmetric)
    positive = best_scale(points, weights, grid, coarse=coarse)
    if symmetric:
        return positive
    negative = -best_scale(-points, weights, grid, coarse=coarse)
    return _searched_in_pieces(
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
    return _searched_in_pieces(lambda piece, w, old: _nearby_scale(piece, w, old, grid), points, weights, start)


@profiled("scale search")
def affine_scale(points: Tensor, weights: Tensor, *, bits: int, coarse: int = 24) -> tuple[Tensor, Tensor]:
    """The scale and the zero of least weighted squared error for each set, searched together.

    A number x stands for (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero) x scale. For each scale of a geometric scan the
    grid begins at the smallest point, ends at the largest one, or lies midway between the two; then scales around the best
    with its zero, and the zeros next to it, are tried three times. The scan runs from the scale that covers all points and zero
    down to a bound below which clipping the largest magnitude alone costs more.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`, by which the squared error of each point is multiplied; none negative.
        bits: of a code.
        coarse: scales of the first scan.

    Returns:
        Scales and zeros, whole numbers from 0 to 2^bits - 1, both float32 `[sets]`; both 0 for a set whose points are zero
        where their weights are not.
    """
    if compression.takes(points, weights):
        return compression.affine_scale(points, weights, bits=bits, coarse=coarse)
    found = _searched_in_pieces(lambda piece, w, _: _affine_scale(piece, w, bits, coarse), points, weights)
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
    found = _searched_in_pieces(
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


def grid_error(points: Tensor, weights: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """The sum over a set's points of weight x (rounded point - point)^2, for each candidate scale.

    Args:
        points: `[sets, size]`.
        weights: `[sets, size]`.
        scale: `[sets, candidates]`, none of them zero.
        grid: the values that codes stand for.

    Returns:
        `[sets, candidates]`.
    """
    return _cost_of(points.T.contiguous(), weights.T.contiguous(), grid)(scale.T).T


# Codebooks


@profiled("codebook")
def fitted_codebook(ratio: Tensor, weights: Tensor, grid: Grid) -> Grid:
    """A codebook for these ratios, with as many values as a grid and less error: Lloyd's iteration (k-means of scalars).

    Each value moves to the weighted mean of the points nearest to it, ten times; a value without points does not move. The
    values are rounded to float16, as they are stored.

    Args:
        ratio: `[points]`, weight / scale.
        weights: `[points]`, by which the squared error of each is multiplied.
        grid: where the iteration starts.

    Returns:
        A grid that is not even, of the bits of `grid`.
    """
    values = grid.values.to(ratio)
    ordered, order = ratio.sort()
    sorted_weights = weights[order].double()
    # Sums of the weights, and of weight x ratio, over the points below each.
    below = torch.nn.functional.pad(torch.stack([sorted_weights, sorted_weights * ordered]).cumsum(dim=1), (1, 0))
    first, last = torch.tensor([[0], [len(ratio)]], device=ratio.device)
    for _ in range(_LLOYD_STEPS):
        cuts = torch.cat([first, torch.searchsorted(ordered, (values[1:] + values[:-1]) / 2), last])
        total, moment = below[:, cuts].diff(dim=1)
        values = torch.where(total > 0, moment / total.clamp_min(1e-30), values).to(ratio).sort().values
    return Grid(values.half().float(), False)


# Histograms


@profiled("scale search")
def distribution(sets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fewer points and weights in place of large sets: a histogram of 32768 bins for each set of more numbers than that.

    The outermost points of a histogram are the exact extreme, with either sign.

    Args:
        sets: `[sets, size]`.
        weights: `[sets, size]`, by which the squared error of each number is multiplied; ones if left out.

    Returns:
        Points and weights, both `[sets, points]`.
    """
    if sets.shape[1] <= _FEW:
        return sets, torch.ones_like(sets) if weights is None else weights
    rows = [_histogram(row, None if weights is None else weights[i]) for i, row in enumerate(sets)]
    return torch.stack([points for points, _ in rows]), torch.stack([w for _, w in rows])


def _histogram(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    largest = max(map(abs, map(float, values.aminmax())))
    if not math.isfinite(largest):
        raise NumericsError("weights or what is made of them hold NaN or infinity")
    if largest == 0:
        return values.new_zeros(_BINS), values.new_ones(_BINS)
    width = 2 * largest / _BINS
    if compression.takes(values, *([] if weights is None else [weights])):
        total = compression.histogram(values, weights, low=-largest, width=width, bins=_BINS).to(values)
    elif weights is None:
        total = torch.histc(values, _BINS, -largest, largest)
    else:
        bins = ((values + largest) / width).long().clamp(0, _BINS - 1)
        total = _weights_of_bins(bins, weights).to(values)
    points = (torch.arange(_BINS, device=values.device) + 0.5) * width - largest
    points[0], points[-1] = -largest, largest
    return points, total


def _weights_of_bins(bins: Tensor, weights: Tensor) -> Tensor:
    """The sum of the weights in each bin, float64 `[bins]`.

    A GPU adds floats in no fixed order, so there they are added as integers, multiples of a unit so small that their sum takes
    62 bits: the order then changes nothing.
    """
    if bins.device.type == "cpu":
        return torch.bincount(bins, weights, minlength=_BINS).double()
    unit = weights.amax().double().clamp_min(1e-30) * 2.0 ** (len(bins).bit_length() - 62)
    integers = (weights.double() / unit).round_().long()
    return torch.zeros(_BINS, dtype=torch.long, device=bins.device).index_add_(0, bins, integers).double() * unit


# The searches, on points and weights `[size, sets]`


def _taken(grid: Grid, *tensors: Tensor) -> bool:
    """Whether the loops in C++ search scales for this grid and these tensors `[...]`."""
    few = grid.even or len(grid.values) <= compression.LARGEST_CODEBOOK
    return few and grid.largest > 0 and compression.takes(grid.values, *tensors)


Cost = Callable[[Tensor], Tensor]
"""Sum over a set's points of weight x (rounded point - point)^2, for scales `[candidates, sets]`, none zero: of that shape."""


def _searched_in_pieces(
    search: Callable[[Tensor, Tensor, Tensor], Tensor], points: Tensor, weights: Tensor, *others: Tensor
) -> Tensor:
    """The result `[sets]` of a search on points and weights `[size, sets]` and other `[sets]`, a few sets at a time."""
    sets = max(1, at_once(_POINTS_AT_ONCE, points.device) // max(1, points.shape[1]))
    pieces = zip(*(given.split(sets) for given in (points, weights, *(others or (points[:, 0],)))), strict=True)
    return torch.cat([search(piece.T.contiguous(), w.T.contiguous(), other) for piece, w, other in pieces])


def _cost_of(points: Tensor, weights: Tensor, grid: Grid) -> Cost:
    """The cost of points `[size, sets]` with weights `[size, sets]`."""
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
    """As `_cost_of`, from running sums over sorted points, which are needed only at the borders between grid values."""
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


def _best_scale(points: Tensor, weights: Tensor, grid: Grid, coarse: int) -> Tensor:
    top, reach = grid.largest, grid.largest_magnitude
    where = (points.abs() * (weights > 0)).argmax(dim=0, keepdim=True)
    largest = points.abs().gather(0, where)[0]
    upper = largest / top
    empty = largest == 0
    upper = torch.where(empty, torch.ones_like(upper), upper)
    cost = _cost_of(points, weights, grid)
    worst = cost(upper[None])[0]
    clipped = largest - (worst / weights.gather(0, where)[0].clamp_min(1e-30)).sqrt()
    lower = torch.maximum(clipped / reach, upper / 4096)
    lower = torch.minimum(lower, upper * (top / reach) * 0.999)

    steps = torch.linspace(0, 1, coarse, device=points.device)[:, None]
    inner = top / torch.arange(top // 2 + 1, max(top, top // 2 + 1), device=points.device)[:, None]
    best, at = _pick(cost, torch.cat([upper * (lower / upper) ** steps, upper * inner]))
    ratio = (upper / lower) ** (1 / (coarse - 1))
    around = torch.linspace(-1, 1, _FINE, device=points.device)
    around = around[around != 0, None]
    for _ in range(_REFINEMENTS):
        candidate, least = _pick(cost, best * ratio**around)
        best = torch.where(least < at, candidate, best)
        at = torch.minimum(least, at)
        ratio = ratio ** (2 / (_FINE - 1))
    return torch.where(empty, torch.zeros_like(best), best)


def _affine_scale(points: Tensor, weights: Tensor, bits: int, coarse: int) -> Tensor:
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
    scales = upper * (lower / upper) ** torch.linspace(0, 1, coarse, device=points.device)[:, None]
    begins, ends = -low / scales, top - high / scales
    zeros = torch.cat([begins, ends, (begins + ends) / 2]).clamp_(0, top).round_()
    scale, zero = best_of(scales.repeat(3, 1), zeros)
    ratio = (upper / lower) ** (1 / (coarse - 1))
    around = torch.linspace(-1, 1, _FINE, device=points.device)[:, None]
    for _ in range(_REFINEMENTS):
        near = scale * ratio**around
        scale, zero = best_of(near, zero.expand_as(near))
        beside = torch.stack([zero, (zero - 1).clamp_min(0), (zero + 1).clamp_max(top)])
        scale, zero = best_of(scale.expand_as(beside), beside)
        ratio = ratio ** (2 / (_FINE - 1))
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
        for step in 1.12 ** torch.linspace(-1, 1, 7, device=points.device):
            keep_better(safe * step, beside)
    code = torch.minimum(torch.maximum((points / scale).round_(), -zero), top - zero)
    fitted = (points * code * weights).sum(dim=0) / (code.square() * weights).sum(dim=0)
    keep_better(torch.where(fitted.isfinite() & (fitted > 0), fitted, scale), zero)
    return torch.stack([torch.where(old == 0, old, scale), torch.where(old == 0, middle, zero)], dim=1)


def _affine_cost(points: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Sum over a set's points `[size, sets]` of weight x squared error under scales and zeros `[sets]`."""
    value = torch.minimum(torch.maximum((points / scale).round_(), -zero), top - zero).mul_(scale)
    return value.sub_(points).square_().mul_(weights).sum(dim=0)


def _better(points: Tensor, weights: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """The second of two scales `[2, sets]` where it costs less, else the first."""
    cost = _cost_of(points, weights, grid)(torch.where(scales == 0, 1.0, scales))
    return torch.where(cost[1] < cost[0], scales[1], scales[0])


def _nearby_scale(points: Tensor, weights: Tensor, start: Tensor, grid: Grid) -> Tensor:
    cost = _cost_of(points, weights, grid)
    safe = torch.where(start == 0, torch.ones_like(start), start)
    steps = 1.12 ** torch.linspace(-1, 1, 7, device=points.device)
    best, at = _pick(cost, safe * steps[:, None])
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
