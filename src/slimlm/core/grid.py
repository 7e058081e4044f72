"""Grids: weight = level x scale. The even grid has the levels -2^(bits-1) to 2^(bits-1) - 1, zero exact; a table has any.

One scale serves the whole matrix, a row, or a group of consecutive inputs of a row; the last group of a row is shorter
where the width does not divide. A search for a scale and the quantizer that it serves use the same `nearest`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimlm.core.errors import RecipeError

Group = int | Literal["tensor", "row"]
"""How many weights share a scale: a number of consecutive inputs, a whole row, or the whole tensor."""

LARGEST_TABLE = 4
"""Bits of the largest table of levels that is used: sixteen entries, which a kernel looks up in one register."""

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_LARGEST = 65504.0


def check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise RecipeError(f"bits = {bits}: an even grid has 2 to 8 bits")


def check_group(group: Group) -> None:
    if isinstance(group, int) and group < 1:
        raise RecipeError(f'group = {group}: give a number of inputs of at least 1, "row" or "tensor"')


def top_code(bits: int) -> int:
    """The largest code; the smallest is `-top_code - 1`."""
    return 2 ** (bits - 1) - 1


def nearest(ratio: Tensor, bits: int) -> Tensor:
    """The grid code (as float) nearest to weight / scale, ties to even."""
    top = top_code(bits)
    return ratio.round().clamp(-top - 1, top)


@dataclass(frozen=True, eq=False)
class Levels:
    """The values that codes stand for, in units of the scale, ascending: the even grid or a table."""

    values: Tensor
    """float32 `[2^bits]`"""
    even: bool

    @classmethod
    def of_bits(cls, bits: int) -> "Levels":
        """The even grid of this many bits."""
        return cls(torch.arange(-top_code(bits) - 1, top_code(bits) + 1).float(), True)

    @property
    def bits(self) -> int:
        return len(self.values).bit_length() - 1

    @property
    def top(self) -> float:
        """The largest level."""
        return float(self.values[-1])

    @property
    def reach(self) -> float:
        """The largest magnitude of a level; on the even grid it is a negative one's."""
        return float(self.values.abs().max())

    def nearest(self, ratio: Tensor) -> Tensor:
        """The level nearest to weight / scale, as float."""
        return nearest(ratio, self.bits) if self.even else self.values.to(ratio.device)[self.index(ratio)]

    def index(self, ratio: Tensor) -> Tensor:
        """The place (0 and on) of the nearest level in `values`."""
        if self.even:
            return (nearest(ratio, self.bits) - self.values[0]).long()
        values = self.values.to(ratio.device)
        return torch.bucketize(ratio.contiguous(), (values[1:] + values[:-1]) / 2)

    def rounded(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The index of the nearest level and the value it stands for; a scale of zero gives the value zero."""
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        if self.even:
            level = nearest(weight * inverse, self.bits)
            return level - self.values[0], level * scale
        index = self.index(weight * inverse)
        return index, self.values.to(weight)[index] * scale


def fitted(ratio: Tensor, mass: Tensor, levels: Levels) -> Levels:
    """A table of as many levels that errs less on these ratios `[points]` with masses `[points]`: Lloyd's iteration.

    Each level moves to the mean of the points nearest to it, ten times; a level without points stays. The levels are
    rounded to float16, as they are stored.
    """
    values = levels.values.to(ratio)
    for _ in range(_LLOYD):
        index = torch.bucketize(ratio, (values[1:] + values[:-1]) / 2)
        total = torch.zeros_like(values).scatter_add_(0, index, mass)
        moment = torch.zeros_like(values).scatter_add_(0, index, mass * ratio)
        values = torch.where(total > 0, moment / total.clamp_min(1e-30), values).sort().values
    return Levels(values.half().float(), False)


_LLOYD = 10


def rows_of(weight: Tensor, group: Group) -> Tensor:
    """The weights that share a scale, one set a row: `[sets, size]`, zeros filling a short last group.

    A zero costs nothing on a grid that holds zero, so the filling changes no search.
    """
    out, width = weight.shape
    if group == "tensor":
        return weight.reshape(1, -1)
    if group == "row" or group >= width:
        return weight
    groups = -(-width // group)
    padded = torch.nn.functional.pad(weight, (0, groups * group - width))
    return padded.reshape(out * groups, group)


def scale_shape(shape: tuple[int, int], group: Group) -> tuple[int, int]:
    """The shape `[rows, groups]` of the scales of a `[out, in]` weight."""
    out, width = shape
    if group == "tensor":
        return 1, 1
    return out, 1 if group == "row" else -(-width // group)


def spread(scale: Tensor, width: int, group: Group) -> Tensor:
    """Scales `[rows, groups]` as a tensor that multiplies a `[out, width]` weight."""
    if scale.shape[1] == 1:
        return scale.float()
    assert isinstance(group, int)
    return scale.float().repeat_interleave(group, dim=1)[:, :width]


def encode(weight: Tensor, scale: Tensor, *, bits: int, group: Group) -> Tensor:
    """Codes int8 `[out, in]` of a weight on the grid with these scales `[rows, groups]`; a zero scale gives code 0."""
    wide = spread(scale, weight.shape[1], group)
    ratio = torch.where(wide == 0, torch.zeros_like(weight), weight / torch.where(wide == 0, 1.0, wide))
    return nearest(ratio, bits).to(torch.int8)


def storable(scale: Tensor) -> Tensor:
    """The scales in the dtype they are stored in; encode with this tensor, so that file and codes agree.

    float16 where there are many and all fit its normal range (relative error 2^-11), float32 otherwise: a single
    scale costs nothing, and a tiny one must not lose its bits in the subnormal range.
    """
    nonzero = scale[scale != 0].abs()
    few = scale.numel() == 1
    fits = nonzero.numel() == 0 or (nonzero.min() >= FP16_SMALLEST_NORMAL and nonzero.max() <= FP16_LARGEST)
    return scale.float() if few or not fits else scale.to(torch.float16)


def absmax_scale(sets: Tensor, bits: int) -> Tensor:
    """The scale `[sets]` that puts the largest magnitude of each set `[sets, size]` on the top code."""
    return sets.abs().amax(dim=1) / top_code(bits)


def grid_error(points: Tensor, mass: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Sum over a set's points of mass x (grid value - point)^2: `[sets, candidates]`.

    points and mass `[sets, size]`; scale `[sets, candidates]`, none zero.
    """
    ratio = points[:, None, :] / scale[..., None]
    miss = levels.nearest(ratio).sub_(ratio).square_()
    return torch.einsum("scp,sp->sc", miss, mass) * scale.square()


_COARSE = 48
_FINE = 9
_ROUNDS = 3
_ELEMENTS_AT_ONCE = 2**19
"""Candidates x points worked on at a time: small enough for the processor's cache."""


def best_scale(points: Tensor, mass: Tensor, levels: Levels, *, coarse: int = _COARSE) -> Tensor:
    """The scale `[sets]` of least `grid_error` for each set of points `[sets, size]` with masses `[sets, size]`.

    A geometric scan, refined three times around its best candidate. The scan runs from the AbsMax scale, which is one
    of the candidates, down to a bound below which clipping the largest point alone costs more than AbsMax costs in
    all; so the result is never worse than AbsMax. Scales that put the largest magnitude on an inner code (from half the
    top on) are tried too: a weight that is on a grid already need not use all its codes. A set of zeros gets the scale 0.
    """
    at_once = max(1, _ELEMENTS_AT_ONCE // (points.shape[1] * coarse))
    pieces = zip(points.split(at_once), mass.split(at_once), strict=True)
    return torch.cat([_best_scale(piece, own, levels, coarse) for piece, own in pieces])


def signed_scale(points: Tensor, mass: Tensor, levels: Levels, *, coarse: int = 24) -> Tensor:
    """As `best_scale` over both signs: a negative scale puts the longer side of the grid on the other side of zero."""
    plain = best_scale(points, mass, levels, coarse=coarse)
    if float(levels.values[0]) == -levels.top:
        return plain
    turned = -best_scale(-points, mass, levels, coarse=coarse)
    return torch.where(_error_of(points, mass, turned, levels) < _error_of(points, mass, plain, levels), turned, plain)


def _error_of(points: Tensor, mass: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    return grid_error(points, mass, torch.where(scale == 0, 1.0, scale)[:, None], levels)[:, 0]


def nearby_scale(points: Tensor, mass: Tensor, levels: Levels, start: Tensor) -> Tensor:
    """A scale `[sets]` no worse than `start` `[sets]`: seven within 12 % of it, then least squares for the best one's codes."""
    at_once = max(1, _ELEMENTS_AT_ONCE // (points.shape[1] * 7))
    pieces = zip(points.split(at_once), mass.split(at_once), start.split(at_once), strict=True)
    return torch.cat([_nearby_scale(*piece, levels) for piece in pieces])


def _nearby_scale(points: Tensor, mass: Tensor, start: Tensor, levels: Levels) -> Tensor:
    safe = torch.where(start == 0, torch.ones_like(start), start)[:, None]
    steps = 1.12 ** torch.linspace(-1, 1, 7, device=points.device)
    best, at = _pick(points, mass, safe * steps, levels)
    value = levels.nearest(points / best)
    fitted_scale = (points * value * mass).sum(dim=1, keepdim=True) / (value.square() * mass).sum(dim=1, keepdim=True)
    usable = fitted_scale.isfinite() & (fitted_scale != 0)
    fitted_scale = torch.where(usable, fitted_scale, best)
    best = torch.where(grid_error(points, mass, fitted_scale, levels) < at, fitted_scale, best)
    return torch.where(start == 0, start, best[:, 0])


def _best_scale(points: Tensor, mass: Tensor, levels: Levels, coarse: int) -> Tensor:
    top, reach = levels.top, levels.reach
    where = (points.abs() * (mass > 0)).argmax(dim=1, keepdim=True)
    largest = points.abs().gather(1, where)
    upper = largest / top
    empty = largest == 0
    upper = torch.where(empty, torch.ones_like(upper), upper)
    worst = grid_error(points, mass, upper, levels)
    clipped = largest - (worst / mass.gather(1, where).clamp_min(1e-30)).sqrt()
    lower = torch.maximum(clipped / reach, upper / 4096)
    lower = torch.minimum(lower, upper * (top / reach) * 0.999)

    steps = torch.linspace(0, 1, coarse, device=points.device)
    inner = top / torch.arange(top // 2 + 1, max(top, top // 2 + 1), device=points.device)
    candidates = torch.cat([upper * (lower / upper) ** steps, upper * inner], dim=1)
    best, at = _pick(points, mass, candidates, levels)
    ratio = (upper / lower) ** (1 / (coarse - 1))
    steps = torch.linspace(-1, 1, _FINE, device=points.device)
    for _ in range(_ROUNDS):
        found, cost = _pick(points, mass, best * ratio**steps, levels)
        best = torch.where(cost < at, found, best)
        at = torch.minimum(cost, at)
        ratio = ratio ** (2 / (_FINE - 1))
    return torch.where(empty, torch.zeros_like(best), best)[:, 0]


def _pick(points: Tensor, mass: Tensor, candidates: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    cost, index = grid_error(points, mass, candidates, levels).min(dim=1, keepdim=True)
    return candidates.gather(1, index), cost


def polished(sets: Tensor, scale: Tensor, bits: int, mass: Tensor | None = None) -> Tensor:
    """Each set's scale `[sets]` replaced by the least-squares one for its codes, where that errs less.

    A weight that lies on a grid already gets that grid's scale back. `mass` `[sets, size]` weighs the errors.
    """
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)[:, None]
    codes = nearest(sets / safe, bits)
    weighed = codes if mass is None else codes * mass
    square = (weighed * codes).sum(dim=1)
    fitted = (sets * weighed).sum(dim=1) / (square.clamp_min(1) if mass is None else square)
    fitted = torch.where(fitted > 0, fitted, safe[:, 0])[:, None]

    def error(step: Tensor) -> Tensor:
        missed = (nearest(sets / step, bits) * step - sets).square()
        return (missed if mass is None else missed * mass).sum(dim=1)

    return torch.where((error(fitted) < error(safe)) & (scale != 0), fitted[:, 0], scale)


def searched(weight: Tensor, *, bits: int, group: Group, energy: Tensor | None = None) -> Tensor:
    """Scales `[rows, groups]` of least squared error for a weight `[out, in]` under its own distribution.

    With `energy` `[in]`, the mean squared inputs, a weight's error counts by its input's: the error of the output then, as
    far as inputs do not correlate. Inputs that never fire count next to nothing.
    """
    sets = rows_of(weight, group)
    own = None
    if energy is not None and bool((energy > 0).any()):
        own = rows_of((energy / energy.mean()).clamp_min(1e-6).expand_as(weight), group)
    points, mass = distribution(sets, own)
    scale = polished(sets, best_scale(points, mass, Levels.of_bits(bits)), bits, own)
    return scale.view(scale_shape((weight.shape[0], weight.shape[1]), group))


_FEW = 2**15
_BINS = 2**15


def distribution(sets: Tensor, mass: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Points and masses `[sets, points]` that stand for sets of weights `[sets, size]` and their masses (ones if left out).

    A set of more than 32768 weights becomes a histogram; its outermost point is the exact extreme.
    """
    if sets.shape[1] <= _FEW:
        return sets, torch.ones_like(sets) if mass is None else mass
    rows = [_histogram(row, None if mass is None else mass[i]) for i, row in enumerate(sets)]
    return torch.stack([points for points, _ in rows]), torch.stack([masses for _, masses in rows])


def _histogram(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    largest = float(values.abs().max())
    if largest == 0:
        return values.new_zeros(_BINS), values.new_ones(_BINS)
    width = 2 * largest / _BINS
    if weights is None:
        mass = torch.histc(values, _BINS, -largest, largest)
    else:
        bins = ((values + largest) / width).long().clamp(0, _BINS - 1)
        mass = torch.bincount(bins, weights, minlength=_BINS).to(values)
    points = (torch.arange(_BINS, device=values.device) + 0.5) * width - largest
    points[0], points[-1] = -largest, largest
    return points, mass
