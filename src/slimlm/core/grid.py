"""Grids: weight = level x scale. The even grid has the levels -2^(bits-1) to 2^(bits-1) - 1, zero exact; a table has any.

One scale serves the whole matrix, a row, or a group of consecutive inputs of a row; the last group of a row is shorter
where the width does not divide. A search for a scale and the quantizer that it serves use the same `nearest`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slimlm.core.chunks import at_once
from slimlm.core.errors import RecipeError

GroupSize = int | Literal["per-tensor", "per-channel"]
"""How many weights share a scale: a number of consecutive inputs, a whole row, or the whole tensor."""

LARGEST_TABLE = 4
"""Bits of the largest table of levels that is used: sixteen entries, which a kernel looks up in one register."""

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_LARGEST = 65504.0


def check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise RecipeError(f"bits = {bits}: an even grid has 2 to 8 bits")


def check_group_size(group_size: GroupSize) -> None:
    if isinstance(group_size, int) and group_size < 1:
        raise RecipeError(f'group_size = {group_size}: give a number of inputs of at least 1, "per-channel" or "per-tensor"')


def top_code(bits: int) -> int:
    """The largest code; the smallest is `-top_code - 1`."""
    return 2 ** (bits - 1) - 1


def nearest(ratio: Tensor, bits: int) -> Tensor:
    """The grid code (as float) nearest to weight / scale, ties to even."""
    top = top_code(bits)
    return ratio.round().clamp_(-top - 1, top)


@dataclass(frozen=True, eq=False)
class Levels:
    """The values that codes stand for, in units of the scale, ascending: the even grid or a table."""

    values: Tensor
    """float32 `[2^bits]`"""
    even: bool
    _elsewhere: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

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
        if self.even:
            return nearest(ratio, self.bits)
        return self._on(ratio.device)[0].index_select(0, self._above(ratio).flatten()).view(ratio.shape)

    def index(self, ratio: Tensor) -> Tensor:
        """The place (0 and on) of the nearest level in `values`."""
        if self.even:
            return (nearest(ratio, self.bits) - self.values[0]).long()
        return self._above(ratio).long()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The values there, and the borders between them; copied once, since a sweep asks at every input."""
        if device not in self._elsewhere:
            values = self.values.to(device)
            self._elsewhere[device] = values, (values[1:] + values[:-1]) / 2
        return self._elsewhere[device]

    def _above(self, ratio: Tensor) -> Tensor:
        """How many borders between the levels of a table each ratio is above, int32."""
        _, borders = self._on(ratio.device)
        if ratio.numel() < _COMPARED or ratio.device.type != "cpu":
            return torch.bucketize(ratio.contiguous(), borders, out_int32=True)
        # A search per element mispredicts its branches: a comparison with each border takes a fifth of its time.
        found = torch.empty(ratio.numel(), dtype=torch.int32)
        for piece, into in zip(ratio.flatten().split(_POINTS_AT_ONCE), found.split(_POINTS_AT_ONCE), strict=True):
            place, above = torch.zeros_like(piece), torch.empty_like(piece)
            for border in borders.tolist():
                place += torch.gt(piece, border, out=above)
            into.copy_(place)
        return found.view(ratio.shape)

    def rounded(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The index of the nearest level and the value it stands for; a scale of zero gives the value zero."""
        return self.rounded_by(weight, scale, reciprocal(scale))

    def rounded_by(self, weight: Tensor, scale: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
        """The same, given `reciprocal(scale)` too, for scales that are used again and again."""
        if self.even:
            level = nearest(weight * inverse, self.bits)
            value = level * scale
            return level.sub_(self.values[0]), value
        index = self._above(weight * inverse)
        values = self._on(weight.device)[0].to(weight.dtype)
        return index, values.index_select(0, index.flatten()).view(index.shape) * scale


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, zero for a scale of zero."""
    return torch.where(scale == 0, 0.0, 1 / scale)


_COMPARED = 4096
"""Elements from which on each is compared with every border rather than searched."""


def fitted(ratio: Tensor, mass: Tensor, levels: Levels) -> Levels:
    """A table of as many levels that errs less on these ratios `[points]` with masses `[points]`: Lloyd's iteration.

    Each level moves to the mean of the points nearest to it, ten times; a level without points stays. The levels are
    rounded to float16, as they are stored.
    """
    values = levels.values.to(ratio)
    ordered, order = ratio.sort()
    masses = mass[order].double()
    below = torch.nn.functional.pad(torch.stack([masses, masses * ordered]).cumsum(dim=1), (1, 0))
    """mass and moment of the points below each"""
    first, last = torch.tensor([[0], [len(ratio)]], device=ratio.device)
    for _ in range(_LLOYD):
        ends = torch.cat([first, torch.searchsorted(ordered, (values[1:] + values[:-1]) / 2), last])
        total, moment = below[:, ends].diff(dim=1)
        values = torch.where(total > 0, moment / total.clamp_min(1e-30), values).to(ratio).sort().values
    return Levels(values.half().float(), False)


_LLOYD = 10


def rows_of(weight: Tensor, group_size: GroupSize) -> Tensor:
    """The weights that share a scale, one set a row: `[sets, size]`, zeros filling a short last group.

    A zero costs nothing on a grid that holds zero, so the filling changes no search.
    """
    out, width = weight.shape
    if group_size == "per-tensor":
        return weight.reshape(1, -1)
    if group_size == "per-channel" or group_size >= width:
        return weight
    groups = -(-width // group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - width))
    return padded.reshape(out * groups, group_size)


def scale_shape(shape: tuple[int, int], group_size: GroupSize) -> tuple[int, int]:
    """The shape `[rows, groups]` of the scales of a `[out, in]` weight."""
    out, width = shape
    if group_size == "per-tensor":
        return 1, 1
    return out, 1 if group_size == "per-channel" else -(-width // group_size)


def spread(scale: Tensor, width: int, group_size: GroupSize) -> Tensor:
    """Scales `[rows, groups]` as a tensor that multiplies a `[out, width]` weight."""
    if scale.shape[1] == 1:
        return scale.float()
    assert isinstance(group_size, int)
    return scale.float().repeat_interleave(group_size, dim=1)[:, :width]


def dense(codes: Tensor, scale: Tensor, group_size: GroupSize) -> Tensor:
    """The float32 matrix that codes `[out, in]` stand for under scales `[rows, groups]`."""
    values = codes.float() if codes.dtype != torch.float32 else codes.clone()
    out, width = values.shape
    if scale.shape[1] > 1 and isinstance(group_size, int) and width % group_size == 0:
        return values.view(out, -1, group_size).mul_(scale.float()[..., None]).view(out, width)
    return values.mul_(spread(scale, width, group_size))


def encode(weight: Tensor, scale: Tensor, *, bits: int, group_size: GroupSize) -> Tensor:
    """Codes int8 `[out, in]` of a weight on the grid with these scales `[rows, groups]`; a zero scale gives code 0."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    rows = max(1, at_once(_POINTS_AT_ONCE, weight.device) // max(1, weight.shape[1]))
    for i, (piece, into) in enumerate(zip(weight.split(rows), codes.split(rows), strict=True)):
        own = scale if len(scale) == 1 else scale[i * rows : (i + 1) * rows]
        wide = spread(own, weight.shape[1], group_size)
        into.copy_(nearest(piece / torch.where(wide == 0, torch.inf, wide), bits))
    return codes


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
    return _cost_of(points.T.contiguous(), mass.T.contiguous(), levels)(scale.T).T


Cost = Callable[[Tensor], Tensor]
"""Sum over a set's points of mass x (grid value - point)^2, for scales `[candidates, sets]`, none zero: of that shape."""


def _cost_of(points: Tensor, mass: Tensor, levels: Levels) -> Cost:
    """The cost of points `[size, sets]` with masses `[size, sets]`."""
    if len(points) > _MANY:
        return _cost_of_many(points, mass, levels)
    least, most = float(levels.values[0]), float(levels.values[-1])
    some_of_them = max(1, at_once(_POINTS_OF_CANDIDATES, points.device) // max(1, points.numel()))

    def cost(scales: Tensor) -> Tensor:
        # A few candidates at a time, in place: the passes over the points then stay in the processor's cache.
        found = torch.empty_like(scales)
        for some, total in zip(scales.split(some_of_them), found.split(some_of_them), strict=True):
            ratio = points / some[:, None]
            miss = torch.round(ratio).clamp_(least, most) if levels.even else levels.nearest(ratio)
            torch.sum(miss.sub_(ratio).square_().mul_(mass), dim=1, out=total)
        return found.mul_(scales.square())

    return cost


_MANY = 2048
"""Points of a set from which on they are sorted rather than each rounded for every candidate."""


def _cost_of_many(points: Tensor, mass: Tensor, levels: Levels) -> Cost:
    """The same from the masses' moments below every point: a scale asks for them at the borders between its levels only."""
    ordered, order = points.T.contiguous().sort(dim=1)
    masses = mass.T.gather(1, order).double()
    wide = ordered.double()
    moments = torch.stack([masses, masses * wide, masses * wide.square()]).cumsum(dim=2)
    moments = torch.nn.functional.pad(moments, (1, 0))
    values = levels.values.to(points.device)
    borders = (values[1:] + values[:-1]) / 2

    def cost(scales: Tensor) -> Tensor:
        turned = scales.T[..., None]
        below = torch.searchsorted(ordered, (turned * borders).flatten(1).contiguous())
        first, last = below.new_zeros(*turned.shape), below.new_full(turned.shape, len(points))
        below = below.view(*turned.shape[:2], -1)
        # Under a negative scale the levels, and so the borders, descend.
        ends = torch.cat([torch.where(turned > 0, first, last), below, torch.where(turned > 0, last, first)], dim=2)
        at = moments.gather(2, ends.flatten(1).expand(3, -1, -1)).view(3, *ends.shape)
        inside = at.diff(dim=3) * turned.sign().double()
        value = turned.double() * values.double()
        # Of a set that lies on the grid the terms cancel, and what is left may be a little below zero.
        return (inside[2] - 2 * value * inside[1] + value.square() * inside[0]).sum(dim=2).clamp_min_(0).T.to(scales)

    return cost


_COARSE = 48
_FINE = 9
_ROUNDS = 3
_POINTS_AT_ONCE = 2**17
"""Points worked on at a time: few enough for a processor's cache (core/pieces.py: for a card, more)."""
_POINTS_OF_CANDIDATES = 2**16
"""The same where candidates share the points, whose masses lie in the cache beside them."""


def best_scale(points: Tensor, mass: Tensor, levels: Levels, *, coarse: int = _COARSE) -> Tensor:
    """The scale `[sets]` of least squared grid error for each set of points `[sets, size]` with masses `[sets, size]`.

    A geometric scan, refined three times around its best candidate. The scan runs from the AbsMax scale, which is one
    of the candidates, down to a bound below which clipping the largest point alone costs more than AbsMax costs in
    all; so the result is never worse than AbsMax. Scales that put the largest magnitude on an inner code (from half the
    top on) are tried too: a weight that is on a grid already need not use all its codes. A set of zeros gets the scale 0.
    """
    return _searched_in_pieces(lambda own, masses, _: _best_scale(own, masses, levels, coarse), points, mass)


def _searched_in_pieces(
    search: Callable[[Tensor, Tensor, Tensor], Tensor], points: Tensor, mass: Tensor, *others: Tensor
) -> Tensor:
    """What a search of points and masses `[size, sets]` gives, with other `[sets]`, a few sets at a time: `[sets]`."""
    sets = max(1, at_once(_POINTS_AT_ONCE, points.device) // max(1, points.shape[1]))
    pieces = zip(*(given.split(sets) for given in (points, mass, *(others or (points[:, 0],)))), strict=True)
    return torch.cat([search(own.T.contiguous(), masses.T.contiguous(), other) for own, masses, other in pieces])


def signed_scale(points: Tensor, mass: Tensor, levels: Levels, *, coarse: int = 24) -> Tensor:
    """As `best_scale` over both signs: a negative scale puts the longer side of the grid on the other side of zero."""
    plain = best_scale(points, mass, levels, coarse=coarse)
    if float(levels.values[0]) == -levels.top:
        return plain
    turned = -best_scale(-points, mass, levels, coarse=coarse)
    return _searched_in_pieces(
        lambda own, masses, both: _better(own, masses, both.T, levels), points, mass, torch.stack([plain, turned], dim=1)
    )


def _better(points: Tensor, mass: Tensor, scales: Tensor, levels: Levels) -> Tensor:
    """The second of two scales `[2, sets]` where it costs less, else the first."""
    cost = _cost_of(points, mass, levels)(torch.where(scales == 0, 1.0, scales))
    return torch.where(cost[1] < cost[0], scales[1], scales[0])


def nearby_scale(points: Tensor, mass: Tensor, levels: Levels, start: Tensor) -> Tensor:
    """A scale `[sets]` no worse than `start` `[sets]`: seven within 12 % of it, then least squares for the best one's codes."""
    return _searched_in_pieces(lambda own, masses, old: _nearby_scale(own, masses, old, levels), points, mass, start)


def _nearby_scale(points: Tensor, mass: Tensor, start: Tensor, levels: Levels) -> Tensor:
    cost = _cost_of(points, mass, levels)
    safe = torch.where(start == 0, torch.ones_like(start), start)
    steps = 1.12 ** torch.linspace(-1, 1, 7, device=points.device)
    best, at = _pick(cost, safe * steps[:, None])
    value = levels.nearest(points / best)
    fitted_scale = (points * value * mass).sum(dim=0) / (value.square() * mass).sum(dim=0)
    usable = fitted_scale.isfinite() & (fitted_scale != 0)
    fitted_scale = torch.where(usable, fitted_scale, best)
    best = torch.where(cost(fitted_scale[None])[0] < at, fitted_scale, best)
    return torch.where(start == 0, start, best)


def _best_scale(points: Tensor, mass: Tensor, levels: Levels, coarse: int) -> Tensor:
    top, reach = levels.top, levels.reach
    where = (points.abs() * (mass > 0)).argmax(dim=0, keepdim=True)
    largest = points.abs().gather(0, where)[0]
    upper = largest / top
    empty = largest == 0
    upper = torch.where(empty, torch.ones_like(upper), upper)
    cost = _cost_of(points, mass, levels)
    worst = cost(upper[None])[0]
    clipped = largest - (worst / mass.gather(0, where)[0].clamp_min(1e-30)).sqrt()
    lower = torch.maximum(clipped / reach, upper / 4096)
    lower = torch.minimum(lower, upper * (top / reach) * 0.999)

    steps = torch.linspace(0, 1, coarse, device=points.device)[:, None]
    inner = top / torch.arange(top // 2 + 1, max(top, top // 2 + 1), device=points.device)[:, None]
    best, at = _pick(cost, torch.cat([upper * (lower / upper) ** steps, upper * inner]))
    ratio = (upper / lower) ** (1 / (coarse - 1))
    around = torch.linspace(-1, 1, _FINE, device=points.device)
    around = around[around != 0, None]
    for _ in range(_ROUNDS):
        found, least = _pick(cost, best * ratio**around)
        best = torch.where(least < at, found, best)
        at = torch.minimum(least, at)
        ratio = ratio ** (2 / (_FINE - 1))
    return torch.where(empty, torch.zeros_like(best), best)


def _pick(cost: Cost, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Of candidates `[candidates, sets]` each set's best, and what it costs."""
    least, index = cost(candidates).min(dim=0, keepdim=True)
    return candidates.gather(0, index)[0], least[0]


def polished(sets: Tensor, scale: Tensor, bits: int, mass: Tensor | None = None) -> Tensor:
    """Each set's scale `[sets]` replaced by the least-squares one for its codes, where that errs less.

    A weight that lies on a grid already gets that grid's scale back. `mass` `[sets, size]` weighs the errors.
    """
    rows = max(1, at_once(_POINTS_AT_ONCE, sets.device) // max(1, sets.shape[1]))
    masses = [None] * len(sets.split(rows)) if mass is None else mass.split(rows)
    pieces = zip(sets.split(rows), scale.split(rows), masses, strict=True)
    return torch.cat([_polished(own, old, bits, weights) for own, old, weights in pieces])


def _polished(sets: Tensor, scale: Tensor, bits: int, mass: Tensor | None) -> Tensor:
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)[:, None]
    size = at_once(_POINTS_AT_ONCE, sets.device)
    pieces = sets.split(size, dim=1)
    masses = [None] * len(pieces) if mass is None else mass.split(size, dim=1)
    along, square = torch.zeros_like(scale), torch.zeros_like(scale)
    for own, weights in zip(pieces, masses, strict=True):
        codes = nearest(own / safe, bits)
        weighed = codes if weights is None else codes * weights
        square += (weighed * codes).sum(dim=1)
        along += (own * weighed).sum(dim=1)
    fitted = along / (square.clamp_min(1) if mass is None else square)
    fitted = torch.where(fitted > 0, fitted, safe[:, 0])[:, None]

    def error(step: Tensor) -> Tensor:
        total = torch.zeros_like(scale)
        for own, weights in zip(pieces, masses, strict=True):
            missed = nearest(own / step, bits).mul_(step).sub_(own).square_()
            total += (missed if weights is None else missed.mul_(weights)).sum(dim=1)
        return total

    return torch.where((error(fitted) < error(safe)) & (scale != 0), fitted[:, 0], scale)


def searched(weight: Tensor, *, bits: int, group_size: GroupSize, energy: Tensor | None = None) -> Tensor:
    """Scales `[rows, groups]` of least squared error for a weight `[out, in]` under its own distribution.

    With `energy` `[in]`, the mean squared inputs, a weight's error counts by its input's: the error of the output then, as
    far as inputs do not correlate. Inputs that never fire count next to nothing.
    """
    sets = rows_of(weight, group_size)
    own = None
    if energy is not None and bool((energy > 0).any()):
        own = rows_of((energy / energy.mean()).clamp_min(1e-6).expand_as(weight), group_size)
    points, mass = distribution(sets, own)
    scale = polished(sets, best_scale(points, mass, Levels.of_bits(bits)), bits, own)
    return scale.view(scale_shape((weight.shape[0], weight.shape[1]), group_size))


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
    largest = max(map(abs, map(float, values.aminmax())))
    if largest == 0:
        return values.new_zeros(_BINS), values.new_ones(_BINS)
    width = 2 * largest / _BINS
    if weights is None:
        mass = torch.histc(values, _BINS, -largest, largest)
    else:
        bins = ((values + largest) / width).long().clamp(0, _BINS - 1)
        mass = _mass_of_bins(bins, weights).to(values)
    points = (torch.arange(_BINS, device=values.device) + 0.5) * width - largest
    points[0], points[-1] = -largest, largest
    return points, mass


def _mass_of_bins(bins: Tensor, weights: Tensor) -> Tensor:
    """The sum of the weights in each bin, float64 `[bins]`.

    A card adds floats in no fixed order, so there they are added as whole multiples of so small a unit that all together
    fill 62 bits: the order changes nothing then.
    """
    if bins.device.type == "cpu":
        return torch.bincount(bins, weights, minlength=_BINS).double()
    unit = weights.amax().double().clamp_min(1e-30) * 2.0 ** (len(bins).bit_length() - 62)
    whole = (weights.double() / unit).round_().long()
    return torch.zeros(_BINS, dtype=torch.long, device=bins.device).index_add_(0, bins, whole).double() * unit
