"""The one column sweep: choose and round weights input by input, and let those to come repair what was lost.

For a weight W `[out, in]` and the covariance H `[in, in]` of its inputs, base B is sought with little tr((W - B) H (W - B)^T).
Input j is decided (kept or dropped, rounded) with all later ones free to answer; with H^-1 = U^T U, U upper triangular, the
deciding costs (w_j - b_j)^2 / U_jj^2 and the best answer of the later inputs is w_k -= (w_j - b_j) U_jk / U_jj.

    GPTQ       (Frantar et al., arXiv 2210.17323, equations 2 and 3, section 3.3)     rounding, nothing dropped
    SparseGPT  (Frantar, Alistarh, arXiv 2301.00774, equations 3 and 4, section 3.4)  dropping by w^2 / U_jj^2, no rounding
    both       (SparseGPT, section 3.5)                                               each column is dropped or rounded

The sweep halves the inputs again and again: the left half is swept, its errors go to the right half in one matrix product,
the right half is swept. So nearly all arithmetic is products of matrices at every size, and Python does a few steps per
input on vectors `[out]`. Weights are held `[in, out]` here, one input's weights side by side.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.cache import Cache
from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.grid import Group, Levels
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts import Codebook, Elementwise, Uniform

_SHARE_AT_ONCE = 128
"""Inputs among which a share of each row is dropped at a time."""
LEAF = 4


@dataclass(frozen=True)
class Inverse:
    """The factor of the inverse covariance that a sweep needs, and how it was come by."""

    upper: Tensor
    """U `[in, in]`, upper triangular, float32, (H + damping)^-1 = U^T U"""
    damped: float
    """what was added to the diagonal of H, as a share of its mean"""
    notes: tuple[str, ...] = ()

    @property
    def conditional(self) -> Tensor:
        """`[in]`: mean square of each input that the later inputs do not explain, 1 / U_jj^2."""
        return self.upper.diagonal().square().reciprocal()


def inverse_of(gram: Tensor, *, damp: float) -> Inverse:
    """Damp and invert a covariance `[in, in]`; in float64.

    `damp` x the mean of the diagonal is added to the diagonal, ten times more as long as the factorization fails, which is
    noted. Inputs that never fire are left with the damping alone, so their weights are rounded and repair nothing. Raises
    NumericsError for a covariance with NaN or infinity, or one that cannot be factored with as much damping as itself.
    """
    width = len(gram)
    if not bool(gram.isfinite().all()):
        raise NumericsError("the covariance of the inputs holds NaN or infinity; the model overflows on the calibration text")
    diagonal = gram.diagonal().double()
    mean = float(diagonal.mean())
    if mean == 0:
        return Inverse(torch.eye(width, device=gram.device), 0.0, ("no input ever fires; weights rounded to nearest",))
    # From the last input to the first: the factor of H then is upper triangular in the order of the inputs, and U its inverse.
    square = gram.flip(0, 1).double()
    used = damp
    while used <= 1:
        square.diagonal().copy_(diagonal.flip(0) + used * mean)
        lower, failed = torch.linalg.cholesky_ex(square)
        if not int(failed):
            upper = inverse_of_lower(lower).flip(0, 1).float()
            if bool(upper.isfinite().all()):
                notes = (
                    () if used == damp else (f"covariance could be inverted only with damping {used:g} instead of {damp:g}",)
                )
                return Inverse(upper, used, notes)
        used = max(10 * used, 1e-6)
    raise NumericsError("the covariance of the inputs cannot be inverted even with damping as large as its mean diagonal")


def inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix `[n, n]`, half by half: nearly all of it products of matrices."""
    inverse = lower.clone()
    _invert(inverse)
    return inverse


_INVERTED_AT_ONCE = 128


def _invert(lower: Tensor) -> None:
    """Put the inverse of a lower triangular matrix `[n, n]` in its place."""
    width = len(lower)
    if width <= _INVERTED_AT_ONCE:
        identity = torch.eye(width, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = width // 2
    first, corner, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert(first)
    _invert(last)
    corner.copy_(_times_lower(-_lower_times(last, corner), first))


def _lower_times(lower: Tensor, other: Tensor) -> Tensor:
    """A lower triangular matrix times another, without the half that is zero."""
    half = len(lower) // 2
    if half < _INVERTED_AT_ONCE:
        return lower @ other
    below = lower[half:, :half] @ other[:half]
    return torch.cat(
        [_lower_times(lower[:half, :half], other[:half]), below.add_(_lower_times(lower[half:, half:], other[half:]))]
    )


def _times_lower(other: Tensor, lower: Tensor) -> Tensor:
    """A matrix times a lower triangular one, without the half that is zero."""
    half = len(lower) // 2
    if half < _INVERTED_AT_ONCE:
        return other @ lower
    left = (other[:, half:] @ lower[half:, :half]).add_(_times_lower(other[:, :half], lower[:half, :half]))
    return torch.cat([left, _times_lower(other[:, half:], lower[half:, half:])], dim=1)


def check_damp(damp: float) -> None:
    if not 0 <= damp <= 1:
        raise RecipeError(f"damp = {damp}: give a share of the mean diagonal of the covariance, from 0 to 1")


def tokens_needed(width: int) -> int:
    """Tokens from which on a covariance of this many inputs is taken as it is."""
    return 2 * width


def conditioned(gram: Tensor, tokens: int) -> tuple[Tensor, tuple[str, ...]]:
    """The covariance `[in, in]` of that many tokens, and a note where they are too few to know it.

    Under two tokens per input what is measured between two inputs is shrunk toward zero, by in / (in + tokens): the share of
    noise in it, roughly. The energies themselves stay.
    """
    width = len(gram)
    if tokens >= tokens_needed(width):
        return gram, ()
    share = width / (width + tokens)
    note = (
        f"{tokens} calibration tokens for the covariance of {width} inputs, which needs {tokens_needed(width)}: "
        f"what lies off its diagonal was shrunk by {share:.0%}"
    )
    return gram * (1 - share) + torch.diag(gram.diagonal() * share), (note,)


class Rounding(Protocol):
    """How a sweep rounds one input's weights after another."""

    starts: list[int]
    """where along the inputs, in the order of the sweep, groups begin"""

    def begin(self, group: int, rows: Tensor, mass: Tensor) -> None:
        """A group begins: its weights `[inputs, out]` as they are now, and what an error in each counts (none: dropped)."""

    def round(self, place: int, group: int, column: Tensor) -> Tensor:
        """The rounded weights `[out]` of the input at this place."""


class Unrounded:
    """Leaves every weight as it is: SparseGPT alone."""

    def __init__(self) -> None:
        self.starts = [0]

    def begin(self, group: int, rows: Tensor, mass: Tensor) -> None:
        """There is nothing to search."""

    def round(self, place: int, group: int, column: Tensor) -> Tensor:
        return column


class Along:
    """Groups of consecutive inputs of a row share a scale, searched when the sweep reaches the group.

    The search weighs each weight with what an error in it costs at that point, and starts from an earlier scale where
    there is one. `scale` `[groups, out]` (`[1, 1]` where one serves all) and `index` `[in, out]` fill up as the sweep goes.
    """

    def __init__(self, levels: Levels, sizes: list[int], out: int, *, one: bool, start: Tensor | None, device: torch.device):
        self.levels, self.one, self.start = levels, one, start
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.scale = torch.zeros(len(sizes), 1 if one else out, device=device)
        self.index = torch.zeros(sum(sizes), out, dtype=torch.uint8, device=device)
        self.rows = self.index.unbind()

    def begin(self, group: int, rows: Tensor, mass: Tensor) -> None:
        if self.one:
            points, masses = grid.distribution((rows * (mass > 0)).reshape(1, -1))
        else:
            points, masses = rows.T, mass.T
        if self.start is None:
            scale = grid.signed_scale(points, masses, self.levels)
        else:
            scale = grid.nearby_scale(points, masses, self.levels, self.start[group])
        self.scale[group] = as_stored(scale, self.scale.numel())
        self.own = self.scale[group], grid.reciprocal(self.scale[group])

    def round(self, place: int, group: int, column: Tensor) -> Tensor:
        index, value = self.levels.rounded_by(column, *self.own)
        self.rows[place].copy_(index)
        return value


class Across:
    """Groups of consecutive outputs of one input share a scale, searched beforehand: the left factor of an adapter.

    `scale` is `[in, groups]`, and `index` `[in, out]` fills up as the sweep goes.
    """

    def __init__(self, weight: Tensor, levels: Levels, group: int) -> None:
        columns = weight.T.contiguous()
        sets = grid.rows_of(columns, group)
        found = grid.signed_scale(sets, torch.ones_like(sets), levels)
        self.levels = levels
        self.starts = list(range(len(columns)))
        self.scale = grid.storable(found.view(grid.scale_shape((len(columns), len(weight)), group))).float()
        self.wide = grid.spread(self.scale, len(weight), group).expand_as(columns)
        self.inverse = grid.reciprocal(self.wide)
        self.index = torch.zeros_like(columns, dtype=torch.uint8)

    def begin(self, group: int, rows: Tensor, mass: Tensor) -> None:
        """The scales are there."""

    def round(self, place: int, group: int, column: Tensor) -> Tensor:
        index, value = self.levels.rounded_by(column, self.wide[place], self.inverse[place])
        self.index[place] = index
        return value


def as_stored(scale: Tensor, count: int) -> Tensor:
    """These scales `[n]` of a part's `count`, float32, as storage will give them back: an only one is not rounded."""
    return grid.storable(scale.repeat(2) if count > 1 else scale)[: len(scale)].float()


@dataclass(frozen=True)
class Swept:
    """What a sweep decided, in the order of the weight's own inputs."""

    value: Tensor
    """float32 `[out, in]`: the base, zero where dropped"""
    moved: Tensor
    """float32 `[out, in]`: each weight as it was when its turn came"""
    keep: Tensor | None
    """bool `[out, in]`, None where nothing is dropped"""
    index: Tensor | None = None
    """uint8 `[out, in]`: places in the levels, where rounded"""
    scale: Tensor | None = None
    """float32 `[out, groups]` or `[1, 1]`"""
    levels: Levels | None = None

    def code(self, group: Group) -> Elementwise:
        """The rounded base as a part (without its mask)."""
        assert self.index is not None and self.scale is not None and self.levels is not None
        return coded(self.index, self.scale, self.levels, group)


def coded(index: Tensor, scale: Tensor, levels: Levels, group: Group) -> Uniform | Codebook:
    """The part of these places in the levels `[out, in]` and scales `[out, groups]`."""
    # A transposed column counts as contiguous to torch and yet cannot be viewed as bytes; this one can.
    stored = grid.storable(scale).flatten().view(scale.shape)
    if levels.even:
        codes = (index.to(torch.int16) + int(levels.values[0])).to(torch.int8)
        return Uniform(codes, stored, levels.bits, group)
    return Codebook(index, levels.values.half(), stored, levels.bits, group)


def check_grouping(group: Group, pattern: Pattern | None) -> None:
    """Raise RecipeError where a group would cut through the n:m groups of a mask."""
    if pattern is not None and pattern.of and isinstance(group, int) and group % pattern.of:
        raise RecipeError(f"group = {group}: under the pattern {pattern} give a multiple of {pattern.of}")


def inverse_in_order(gram: Tensor, inputs: Tensor, *, damp: float, cache: Cache) -> Inverse:
    """`inverse_of` a covariance with its inputs `[in]` in that order; from the cache where an earlier layer put it there."""
    key = damp, tuple(inputs.tolist())
    return cache.get(Inverse, key, lambda: inverse_of(gram.index_select(0, inputs).index_select(1, inputs), damp=damp))


@dataclass(frozen=True)
class Order:
    """The order in which a sweep takes the inputs."""

    inputs: Tensor
    """int64 `[in]`"""
    sizes: list[int]
    """inputs in each group, in that order"""

    @property
    def back(self) -> Tensor:
        """Where in the order each input is, int64 `[in]`."""
        return self.inputs.argsort()


def order_of(energy: Tensor, *, group: Group, pattern: Pattern | None) -> Order:
    """The inputs `[in]` in order of falling energy, no group of a scale or of n:m torn apart.

    Groups go by their mean energy, and inside a group fours (or the m of n:m) by theirs. So scales stay contiguous, can be
    searched when their group is reached, and no index of groups has to be stored, which GPTQ's act-order needs.
    """
    width = len(energy)
    size = width if isinstance(group, str) else min(group, width)
    device, energy = energy.device, energy.cpu()
    chunk = pattern.of if pattern is not None and pattern.of else LEAF
    groups = sorted(torch.arange(width).split(size), key=lambda own: -float(energy[own].mean()))
    chunks = [sorted(own.split(chunk), key=lambda few: -float(energy[few].mean())) for own in groups]
    return Order(torch.cat([few for own in chunks for few in own]).to(device), [len(own) for own in groups])


def rounded_sweep(
    target: Tensor,
    inverse: Inverse,
    order: Order,
    *,
    levels: Levels,
    group: Group,
    pattern: Pattern | None = None,
    keep: Tensor | None = None,
    start: Tensor | None = None,
) -> Swept:
    """A sweep in this order with scales per group; `inverse` is that of the covariance in the order, `start` earlier scales."""
    first = torch.tensor([0, *order.sizes[:-1]]).cumsum(0)
    place = torch.zeros(1, dtype=torch.int64) if isinstance(group, str) else order.inputs.cpu()[first] // group
    along = Along(
        levels,
        order.sizes,
        len(target),
        one=group == "tensor",
        start=None if start is None else start.T[place.to(start.device)],
        device=target.device,
    )
    found = _swept_in(order, target, inverse, along, pattern, keep)
    back = order.back
    scale = torch.empty_like(along.scale)
    scale[place.to(scale.device)] = along.scale
    return replace(found, index=_ordered(along.index.T, back), scale=scale.T.contiguous(), levels=levels)


def unrounded_sweep(
    target: Tensor, inverse: Inverse, order: Order, *, pattern: Pattern | None = None, keep: Tensor | None = None
) -> Swept:
    """A sweep in this order that drops and does not round."""
    return _swept_in(order, target, inverse, Unrounded(), pattern, keep)


def _swept_in(
    order: Order, target: Tensor, inverse: Inverse, rounding: Rounding, pattern: Pattern | None, keep: Tensor | None
) -> Swept:
    ordered = None if keep is None else _ordered(keep, order.inputs)
    found = sweep(_ordered(target, order.inputs), inverse, rounding=rounding, pattern=pattern, keep=ordered)
    back = order.back
    kept = None if found.keep is None else _ordered(found.keep, back)
    return Swept(_ordered(found.value, back), _ordered(found.moved, back), kept)


def _ordered(matrix: Tensor, inputs: Tensor) -> Tensor:
    """The columns of a matrix `[out, in]` in this order: its rows are copied where they are what lies side by side."""
    if matrix.is_contiguous():
        return matrix.index_select(1, inputs)
    return matrix.T.index_select(0, inputs).T.contiguous()


def sweep(
    target: Tensor,
    inverse: Inverse,
    *,
    rounding: Rounding,
    pattern: Pattern | None = None,
    keep: Tensor | None = None,
) -> Swept:
    """One pass over the inputs of target `[out, in]`; `pattern` chooses what is dropped, `keep` `[out, in]` says it.

    The inputs are taken as they come (`rounded_sweep` orders them). Scales and codes stay with the rounding. Cost: out x in^2
    multiplications and about fifteen vector operations per input.
    """
    state = _Sweep(target, inverse, rounding, pattern, keep)
    state.walk(0, target.shape[1])
    return Swept(state.value.T, state.rest.T, None if state.keep is None else state.keep.T)


class _Sweep:
    """The working state of one sweep; everything is `[in, out]`."""

    def __init__(
        self, target: Tensor, inverse: Inverse, rounding: Rounding, pattern: Pattern | None, keep: Tensor | None
    ) -> None:
        self.upper, self.conditional = inverse.upper, inverse.conditional
        self.pivots = self.upper.diagonal().tolist()
        self.rounding, self.pattern = rounding, None if keep is not None else pattern
        self.rest = target.T.contiguous().clone()
        self.value = torch.zeros_like(self.rest)
        self.missed = torch.zeros_like(self.rest)
        self.keep = keep.T.contiguous() if keep is not None else None
        if self.pattern is not None:
            self.keep = torch.zeros_like(self.rest, dtype=torch.bool)
        self.rows = tuple(zip(self.rest.unbind(), self.value.unbind(), self.missed.unbind(), strict=True))
        """each input's, as the sweep takes them"""
        width = len(self.rest)
        self.groups = rounding.starts
        self.units = [] if self.pattern is None else _units(self.groups, width, self.pattern)
        leaf = self.pattern.of if self.pattern is not None and self.pattern.of else LEAF
        self.leaves = divided(sorted({*self.groups, *self.units}), width, leaf)

    def walk(self, low: int, high: int) -> None:
        """Sweep the inputs from low up to high, all earlier errors having reached them."""
        middle = self._cut(low, high)
        if middle is None:
            self._leaf(low, high)
            return
        self.walk(low, middle)
        self.rest[middle:high].addmm_(self.upper[low:middle, middle:high].T, self.missed[low:middle], alpha=-1)
        self.walk(middle, high)

    def _cut(self, low: int, high: int) -> int | None:
        """The border nearest the middle, of the coarsest kind that lies inside: a group or a unit is never torn."""
        for borders in (*sorted((self.groups, self.units), key=len), self.leaves):
            inside = borders[bisect_right(borders, low) : bisect_left(borders, high)]
            if inside:
                return min(inside, key=lambda border: abs(2 * border - low - high))
        return None

    def _leaf(self, low: int, high: int) -> None:
        if low in self.units[bisect_left(self.units, low) :][:1]:
            self._choose(low, end_of(self.units, low, len(self.rest)))
        group = bisect_right(self.groups, low) - 1
        if self.groups[group] == low:
            self._begin(group)
        for place in range(low, high):
            column, value, missed = self.rows[place]
            rounded = self.rounding.round(place, group, column)
            if self.keep is None:
                value.copy_(rounded)
            else:
                torch.mul(rounded, self.keep[place], out=value)
            torch.sub(column, value, out=missed).div_(self.pivots[place])
            if place + 1 < high:
                self.rest[place + 1 : high].addr_(self.upper[place, place + 1 : high], missed, alpha=-1)

    def _begin(self, group: int) -> None:
        low = self.groups[group]
        high = end_of(self.groups, low, len(self.rest))
        mass = self.conditional[low:high, None].expand_as(self.rest[low:high])
        if self.keep is not None:
            first = end_of(self.units, low, len(self.rest)) if self.units else high
            if first < high:
                # The scale must suit those that will stay: a first choice after the first unit, made again unit by unit.
                self._choose(first, high)
            mass = mass * self.keep[low:high]
        self.rounding.begin(group, self.rest[low:high], mass)

    def _choose(self, low: int, high: int) -> None:
        """The mask of these inputs by what dropping each would cost now."""
        assert self.keep is not None and self.pattern is not None
        score = (self.rest[low:high].square() * self.conditional[low:high, None]).T
        pattern = self.pattern
        if not pattern.of:
            # So that the units of a row together drop what the row should.
            count = int(high * pattern.dropped + 1e-9) - int(low * pattern.dropped + 1e-9)
            pattern = replace(pattern, dropped=count / (high - low))
        self.keep[low:high] = choose(score, pattern).T


def end_of(borders: list[int], low: int, width: int) -> int:
    """Where the piece that begins at `low` ends."""
    after = bisect_right(borders, low)
    return borders[after] if after < len(borders) else width


def divided(borders: list[int], width: int, size: int) -> list[int]:
    """The pieces between borders cut further, each from its own beginning."""
    ends = [*borders[1:], width]
    return [place for low, high in zip(borders, ends, strict=True) for place in range(low, high, size)]


def _units(groups: list[int], width: int, pattern: Pattern) -> list[int]:
    """Where the inputs begin among which a mask is chosen at a time: m for n:m, about 128 for a share of each row."""
    if pattern.of:
        return divided(groups, width, pattern.of)
    size = end_of(groups, 0, width)
    return divided(groups, width, _SHARE_AT_ONCE) if size > _SHARE_AT_ONCE else groups[:: -(-_SHARE_AT_ONCE // size)]
