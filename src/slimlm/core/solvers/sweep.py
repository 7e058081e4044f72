"""The column sweep: prune and round weights input by input, while the later inputs compensate the error.

For a weight W `[out, in]` and the covariance H `[in, in]` of its inputs, a base B is sought whose tr((W - B) H (W - B)^T)
is small. Input j is decided (kept or dropped, rounded) with all later ones free to compensate; with H^-1 = U^T U, U upper
triangular, deciding costs (w_j - b_j)^2 / U_jj^2, and the best update of the later inputs is w_k -= (w_j - b_j) U_jk / U_jj.

    GPTQ       (Frantar et al., arXiv 2210.17323, equations 2 and 3, section 3.3)     rounding, nothing dropped
    SparseGPT  (Frantar, Alistarh, arXiv 2301.00774, equations 3 and 4, section 3.4)  dropping by w^2 / U_jj^2, no rounding
    both       (SparseGPT, section 3.5)                                               each column is dropped or rounded

The sweep is recursive: the left half of the inputs is swept, its errors are applied to the right half in one matrix product,
the right half is swept. So nearly all arithmetic is in products of matrices, and Python does a few operations per input on
vectors `[out]`; on a CPU a loop in C++ (slimlm.kernels.sweep) decides the inputs of a leaf of this recursion instead. Weights
are held `[in, out]` here, so that one input's weights are contiguous.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from slimlm.core.errors import RecipeError
from slimlm.core.grid import Grid, GroupSize, reciprocal, scale_sets, scale_shape, spread, storable
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.elementwise import Elementwise
from slimlm.core.parts.uniform import Uniform
from slimlm.core.profiling import profiled
from slimlm.core.solvers.inverse import Inverse
from slimlm.core.solvers.scale_search import distribution, nearby_scale_and_zero, scale_and_zero, signed_scale
from slimlm.kernels import sweep as kernel

_SHARE_AT_ONCE = 128
"""Inputs among which a share of each row is dropped at a time."""
_LEAST_WEIGHT = 1e-6
"""What an input counts at least in a search of scales before the sweep, as a share of the mean: a dead one is rounded, too."""
LEAF = 4
"""Inputs that are decided one after another without a product of matrices in between; under n:m there are m of them."""


# How the weights of one input are rounded


class Rounding(Protocol):
    """How a sweep rounds the weights of one input after another. A group is the inputs whose scales are found together."""

    starts: list[int]
    """where along the inputs, in the order of the sweep, groups begin"""

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Prepare for a group, whose inputs are rounded next.

        Args:
            number: of the group, from 0.
            rows: `[inputs, out]`, its weights, updated for the errors of earlier inputs.
            weights: `[inputs, out]`, by which the squared error of each is multiplied; 0 where it is dropped.
        """

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """Round the weights of one input.

        Args:
            place: of the input in the order of the sweep.
            number: of its group.
            column: `[out]`, its weights.

        Returns:
            `[out]`.
        """

    @property
    def grid(self) -> Grid | None:
        """The values that codes stand for; None: nothing is rounded."""

    @property
    def indices(self) -> Tensor | None:
        """uint8 `[in, out]`, which a sweep fills with the indices of grid values; None: nothing is rounded."""

    def in_kernel(self, number: int) -> kernel.Rounding:
        """How the library rounds the weights of a group, which `begin` has prepared."""


class Unrounded:
    """No rounding: SparseGPT alone."""

    def __init__(self) -> None:
        self.starts = [0]
        self.grid: None = None

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Nothing to prepare for `rows` and `weights` `[inputs, out]`."""

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """The weights `[out]` themselves."""
        return column

    @property
    def indices(self) -> None:
        """Nothing is rounded."""
        return None

    def in_kernel(self, number: int) -> kernel.Rounding:
        """Not at all."""
        return kernel.Rounding()


class InputGroups:
    """Groups of consecutive inputs of a row share a scale, searched when the sweep reaches the group.

    The search multiplies each squared error by what it costs at that point of the sweep, and starts from an earlier scale
    where there is one. The sweep fills `scale` `[groups, out]` (`[1, 1]` where there is one), `zero` of the same shape where
    the grid has zeros, and `index` `[in, out]`.

    Args:
        grid: the values that codes stand for.
        sizes: inputs of each group, in the order of the sweep.
        out: outputs of the weight.
        one: whether all rows share one scale (and there is one group).
        start: earlier scales `[groups, out]` in the order of the sweep, and their zeros where the grid has zeros; or None.
        device: of the weight.
    """

    def __init__(
        self,
        grid: Grid,
        sizes: list[int],
        out: int,
        *,
        one: bool,
        start: tuple[Tensor, Tensor | None] | None,
        device: torch.device,
    ) -> None:
        self.grid, self.one, self.start = grid, one, start
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.scale = torch.zeros(len(sizes), 1 if one else out, device=device)
        self.zero = torch.zeros_like(self.scale) if grid.zeros else None
        self.index = torch.zeros(sum(sizes), out, dtype=torch.uint8, device=device)
        self.rows = self.index.unbind()

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Search the scales and zeros of a group with these `rows` and `weights` `[inputs, out]`."""
        if self.one:
            points, weights = distribution((rows * (weights > 0)).reshape(1, -1))
        else:
            points, weights = rows.T, weights.T
        if self.start is None:
            scale, zero = scale_and_zero(points, weights, self.grid)
        else:
            scales, zeros = self.start
            old = None if zeros is None else zeros[number]
            scale, zero = nearby_scale_and_zero(points, weights, self.grid, scales[number], old)
        self.scale[number] = as_stored(scale, self.scale.numel())
        if self.zero is not None and zero is not None:
            self.zero[number] = zero
        self.current = self.scale[number], reciprocal(self.scale[number]), zero

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """The nearest values `[out]` under the group's scales; `index` takes their indices."""
        index, value = self.grid.round_with(column, *self.current)
        self.rows[place].copy_(index)
        return value

    @property
    def indices(self) -> Tensor:
        """`index`."""
        return self.index

    def in_kernel(self, number: int) -> kernel.Rounding:
        """With the scales and zeros of the group."""
        return kernel_rounding(self.grid, self.scale[number], None if self.zero is None else self.zero[number])


class FixedGroups:
    """Groups whose scales were found beforehand, so that their inputs need not be next to each other in the sweep.

    The sweep fills `index` `[in, out]`.

    Args:
        grid: the values that codes stand for.
        groups: int64 `[in]`, the group of each input in the order of the sweep.
        out: outputs of the weight.
        scale: `[groups, out]`, or `[1, 1]`.
        zero: of the same shape where the grid has zeros; else None.
    """

    def __init__(self, grid: Grid, groups: Tensor, out: int, scale: Tensor, zero: Tensor | None) -> None:
        self.grid = grid
        self.starts = [0]
        self.wide = scale[groups].expand(-1, out)
        self.inverse = reciprocal(self.wide)
        self.zero = None if zero is None else zero[groups].expand(-1, out)
        self.index = torch.zeros(self.wide.shape, dtype=torch.uint8, device=scale.device)

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Nothing to prepare for `rows` and `weights` `[inputs, out]`: the scales were found beforehand."""

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """The nearest values `[out]` under the input's scales; `index` takes their indices."""
        zero = None if self.zero is None else self.zero[place]
        index, value = self.grid.round_with(column, self.wide[place], self.inverse[place], zero)
        self.index[place] = index
        return value

    @property
    def indices(self) -> Tensor:
        """`index`."""
        return self.index

    def in_kernel(self, number: int) -> kernel.Rounding:
        """With the scales and zeros of every input."""
        return kernel_rounding(self.grid, self.wide, self.zero)


class OutputGroups:
    """Groups of consecutive outputs of one input share a scale, searched beforehand: the left factor of an adapter.

    `scale` is `[in, groups]`; the sweep fills `index` `[in, out]`.

    Args:
        weight: `[out, in]`.
        grid: the values that codes stand for.
        group_size: how many outputs of an input share a scale.
    """

    def __init__(self, weight: Tensor, grid: Grid, group_size: int) -> None:
        columns = weight.T.contiguous()
        sets = scale_sets(columns, group_size)
        scale = signed_scale(sets, torch.ones_like(sets), grid)
        self.grid = grid
        self.starts = [0]
        self.scale = storable(scale.view(scale_shape((len(columns), len(weight)), group_size))).float()
        self.wide = spread(self.scale, len(weight), group_size).expand_as(columns)
        self.inverse = reciprocal(self.wide)
        self.index = torch.zeros_like(columns, dtype=torch.uint8)

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Nothing to prepare for `rows` and `weights` `[inputs, out]`: the scales were found beforehand."""

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """The nearest values `[out]` under the input's scales; `index` takes their indices."""
        index, value = self.grid.round_with(column, self.wide[place], self.inverse[place])
        self.index[place] = index
        return value

    @property
    def indices(self) -> Tensor:
        """`index`."""
        return self.index

    def in_kernel(self, number: int) -> kernel.Rounding:
        """With the scales of every input."""
        return kernel_rounding(self.grid, self.wide)


def kernel_rounding(grid: Grid, scale: Tensor, zero: Tensor | None = None) -> kernel.Rounding:
    """How the library rounds to a grid under float32 scales `[out]`, `[1]` or `[in, out]`, and zeros of the same shape."""
    return kernel.Rounding(scale, grid.bits, None if grid.even else grid.values, zero)


def in_library(grid: Grid | None, pattern: Pattern | None, *tensors: Tensor) -> bool:
    """Whether the library decides leaves; `pattern` is of a mask that is chosen, `tensors` are float matrices `[...]`."""
    codebook = None if grid is None or grid.even else len(grid.values)
    return kernel.takes(codebook, pattern.of if pattern is not None else 0, *tensors)


def as_stored(scale: Tensor, count: int) -> Tensor:
    """Some scales `[n]` of a part with `count` of them, float32, as they will be stored: a single one is not rounded."""
    return storable(scale.repeat(2) if count > 1 else scale)[: len(scale)].float()


# The result of a sweep


@dataclass(frozen=True)
class Swept:
    """The result of a sweep, in the order of the weight's inputs."""

    value: Tensor
    """float32 `[out, in]`: the base, zero where dropped"""
    updated: Tensor
    """float32 `[out, in]`: each weight as it was when it was decided, updated for the errors of earlier inputs"""
    mask: Tensor | None
    """bool `[out, in]`, True where the weight stays; None: all stay"""
    index: Tensor | None = None
    """uint8 `[out, in]`: indices of grid values, where rounded"""
    scale: Tensor | None = None
    """float32 `[out, groups]` or `[1, 1]`"""
    grid: Grid | None = None
    zero: Tensor | None = None
    """of the shape of `scale`, where the grid has zeros: the indices that stand for zero"""

    def part(self, group_size: GroupSize) -> Elementwise:
        """The rounded base as a part, without its mask; `group_size` is what the sweep was given."""
        assert self.index is not None and self.scale is not None and self.grid is not None
        return part_of(self.index, self.scale, self.grid, group_size, self.zero)


def part_of(index: Tensor, scale: Tensor, grid: Grid, group_size: GroupSize, zero: Tensor | None = None) -> Uniform | Codebook:
    """The part of grid values under scales.

    Args:
        index: uint8 `[out, in]`, indices of grid values.
        scale: `[rows, groups]`.
        grid: even for a `Uniform`, any other for a `Codebook`.
        group_size: how many weights share a scale.
        zero: `[rows, groups]`, the indices that stand for zero, where an even grid has zeros.
    """
    # Torch calls a transposed column contiguous, and yet it cannot be viewed as bytes; this copy can.
    stored = storable(scale).flatten().view(scale.shape)
    if grid.even:
        lowest = int(grid.values[0])
        codes = (index.to(torch.int16) + lowest).to(torch.int8)
        return Uniform(codes, stored, grid.bits, group_size, None, None if zero is None else (zero + lowest).to(torch.int8))
    return Codebook(index, grid.values.half(), stored, grid.bits, group_size)


# The order of the inputs


def check_grouping(group_size: GroupSize, pattern: Pattern | None) -> None:
    """Raise RecipeError where a group would cut through the n:m groups of a mask."""
    if pattern is not None and pattern.of and isinstance(group_size, int) and group_size % pattern.of:
        raise RecipeError(f"group_size = {group_size}: under the pattern {pattern} give a multiple of {pattern.of}")


@dataclass(frozen=True)
class Order:
    """The order in which a sweep takes the inputs."""

    inputs: Tensor
    """int64 `[in]`, the inputs in that order"""
    sizes: list[int]
    """inputs in each group, in that order"""
    group_size: GroupSize
    """how many weights share a scale"""
    second_moment: Tensor | None = None
    """float32 `[in]`, of the inputs, where those of a group are not next to each other in the order: scales are then searched
    before the sweep, squared errors multiplied by these; None: they are searched when the sweep reaches their group"""

    @property
    def positions(self) -> Tensor:
        """Where in the order each input is, int64 `[in]`."""
        return self.inputs.argsort()


@profiled("order")
def order_of(second_moment: Tensor, *, group_size: GroupSize, pattern: Pattern | None) -> Order:
    """The inputs in order of falling second moment, without dividing groups that share a scale or those of n:m.

    Groups are sorted by their mean second moment, and inside a group fours (or the m of n:m) by theirs. So the inputs of a
    scale remain contiguous, scales can be searched when their group is reached, and no index of groups has to be stored, which
    GPTQ's act-order needs.

    Args:
        second_moment: `[in]`, the inputs' mean squares; zeros give the order of the inputs.
        group_size: how many weights share a scale.
        pattern: what is dropped, or None.
    """
    width = len(second_moment)
    size = width if isinstance(group_size, str) else min(group_size, width)
    device, second_moment = second_moment.device, second_moment.cpu()
    chunk = pattern.of if pattern is not None and pattern.of else LEAF
    groups = sorted(torch.arange(width).split(size), key=lambda group: -float(second_moment[group].mean()))
    chunks = [sorted(group.split(chunk), key=lambda few: -float(second_moment[few].mean())) for group in groups]
    return Order(torch.cat([few for group in chunks for few in group]).to(device), [len(group) for group in groups], group_size)


@profiled("order")
def activation_order(second_moment: Tensor, *, group_size: GroupSize) -> Order:
    """The inputs in order of falling second moment `[in]`, each by itself: GPTQ's act-order with its static groups.

    Groups are those of consecutive inputs as ever, so no index of groups has to be stored; their scales are found before the
    sweep, since it comes to the inputs of a group at different times.
    """
    mean = second_moment.mean()
    weights = (second_moment / mean).clamp_min(_LEAST_WEIGHT) if float(mean) > 0 else torch.ones_like(second_moment)
    inputs = second_moment.argsort(descending=True, stable=True)
    return Order(inputs, [len(second_moment)], group_size, weights)


# Sweeps


@profiled("sweep")
def rounded_sweep(
    weight: Tensor,
    inverse: Inverse,
    order: Order,
    *,
    grid: Grid,
    pattern: Pattern | None = None,
    mask: Tensor | None = None,
    start: Swept | None = None,
) -> Swept:
    """A sweep that rounds, and drops where a pattern or a mask says so (GPTQ, and SparseGPT with rounding).

    Args:
        weight: W `[out, in]`, the reference of the base.
        inverse: of the covariance with its inputs in the order (see `inverse_in_order`).
        order: see `order_of` and `activation_order`; it also determines which weights share a scale.
        grid: the values that codes stand for.
        pattern: of the mask, which the sweep chooses; None under an `activation_order`.
        mask: bool `[out, in]`, True stays; in place of a pattern.
        start: an earlier sweep; only scales and zeros near its own are tried.

    Returns:
        The base, its codes, scales and zeros, in the order of the weight's inputs.
    """
    if order.second_moment is not None:
        assert pattern is None, "the mask of a pattern is chosen among neighbouring inputs"
        return _fixed_sweep(weight, inverse, order, order.second_moment, grid, mask)
    first = torch.tensor([0, *order.sizes[:-1]]).cumsum(0)
    group_size = order.group_size
    place = torch.zeros(1, dtype=torch.int64) if isinstance(group_size, str) else order.inputs.cpu()[first] // group_size
    rounding = InputGroups(
        grid,
        order.sizes,
        len(weight),
        one=group_size == "per-tensor",
        start=None if start is None else _start_of(start, place),
        device=weight.device,
    )
    swept = _swept_in(order, weight, inverse, rounding, pattern, mask)
    index, scale = _ordered(rounding.index.T, order.positions), _placed(rounding.scale, place)
    zero = None if rounding.zero is None else _placed(rounding.zero, place)
    return replace(swept, index=index, scale=scale, grid=grid, zero=zero)


def _start_of(earlier: Swept, place: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scales and zeros `[groups, out]` of an earlier sweep, its groups in the order `place` `[groups]`."""
    assert earlier.scale is not None
    zero = None if earlier.zero is None else earlier.zero.T[place.to(earlier.zero.device)]
    return earlier.scale.T[place.to(earlier.scale.device)], zero


def _placed(found: Tensor, place: Tensor) -> Tensor:
    """Scales or zeros `[groups, out]` as `[out, groups]`, the groups at their places `[groups]`."""
    placed = torch.empty_like(found)
    placed[place.to(found.device)] = found
    return placed.T.contiguous()


def _fixed_sweep(
    weight: Tensor, inverse: Inverse, order: Order, second_moment: Tensor, grid: Grid, mask: Tensor | None
) -> Swept:
    """`rounded_sweep` with scales and zeros that are found before it, their squared errors multiplied by `[in]` numbers."""
    group_size = order.group_size
    masked = weight if mask is None else weight * mask
    weights = second_moment.expand_as(masked) if mask is None else second_moment * mask
    points, weights = distribution(scale_sets(masked, group_size), scale_sets(weights, group_size))
    found, zero = scale_and_zero(points, weights, grid)
    shape = scale_shape((weight.shape[0], weight.shape[1]), group_size)
    scale = as_stored(found, found.numel()).view(shape)
    zero = None if zero is None else zero.view(shape)
    size = group_size if isinstance(group_size, int) else weight.shape[1]
    by_group = None if zero is None else zero.T.contiguous()
    rounding = FixedGroups(grid, order.inputs // size, len(weight), scale.T.contiguous(), by_group)
    swept = _swept_in(order, weight, inverse, rounding, None, mask)
    return replace(swept, index=_ordered(rounding.index.T, order.positions), scale=scale, grid=grid, zero=zero)


def unrounded_sweep(
    weight: Tensor, inverse: Inverse, order: Order, *, pattern: Pattern | None = None, mask: Tensor | None = None
) -> Swept:
    """A sweep that drops and does not round (SparseGPT).

    Args:
        weight: W `[out, in]`, the reference of the base.
        inverse: of the covariance with its inputs in the order (see `inverse_in_order`).
        order: see `order_of`.
        pattern: of the mask, which the sweep chooses.
        mask: bool `[out, in]`, True stays; in place of a pattern.

    Returns:
        The base and its mask, in the order of the weight's inputs.
    """
    return _swept_in(order, weight, inverse, Unrounded(), pattern, mask)


def _swept_in(
    order: Order, weight: Tensor, inverse: Inverse, rounding: Rounding, pattern: Pattern | None, mask: Tensor | None
) -> Swept:
    ordered = None if mask is None else _ordered(mask, order.inputs)
    swept = sweep(_ordered(weight, order.inputs), inverse, rounding=rounding, pattern=pattern, mask=ordered)
    positions = order.positions
    swept_mask = None if swept.mask is None else _ordered(swept.mask, positions)
    return Swept(_ordered(swept.value, positions), _ordered(swept.updated, positions), swept_mask)


def _ordered(matrix: Tensor, inputs: Tensor) -> Tensor:
    """The columns of a matrix `[out, in]` in this order: its rows are copied where those are contiguous."""
    if matrix.is_contiguous():
        return matrix.index_select(1, inputs)
    return matrix.T.index_select(0, inputs).T.contiguous()


@profiled("sweep")
def sweep(
    weight: Tensor,
    inverse: Inverse,
    *,
    rounding: Rounding,
    pattern: Pattern | None = None,
    mask: Tensor | None = None,
) -> Swept:
    """One pass over the inputs of a weight as they come (`rounded_sweep` orders them).

    Cost: out x in^2 multiplications and about fifteen vector operations per input.

    Args:
        weight: W `[out, in]`.
        inverse: of the covariance.
        rounding: rounds, and holds scales and indices.
        pattern: of the mask, which the sweep chooses.
        mask: bool `[out, in]`, True stays; in place of a pattern.

    Returns:
        The base, each weight as it was when it was decided, and the mask.
    """
    state = _Sweep(weight, inverse, rounding, pattern, mask)
    state.walk(0, weight.shape[1])
    return Swept(state.value.T, state.remaining.T, None if state.mask is None else state.mask.T)


class _Sweep:
    """The state of one sweep; matrices are `[in, out]`."""

    def __init__(
        self, weight: Tensor, inverse: Inverse, rounding: Rounding, pattern: Pattern | None, mask: Tensor | None
    ) -> None:
        self.upper, self.conditional_variance = inverse.upper, inverse.conditional_variance
        self.pivots = self.upper.diagonal().tolist()
        self.rounding, self.pattern = rounding, None if mask is not None else pattern
        self.remaining = weight.T.contiguous().clone()
        """the weights that are not decided yet, updated; the others as they were when they were decided"""
        self.value = torch.zeros_like(self.remaining)
        self.error = torch.zeros_like(self.remaining)
        """(w_j - b_j) / U_jj of the inputs that are decided"""
        self.mask = mask.T.contiguous() if mask is not None else None
        if self.pattern is not None:
            self.mask = torch.zeros_like(self.remaining, dtype=torch.bool)
        self.rows = tuple(zip(self.remaining.unbind(), self.value.unbind(), self.error.unbind(), strict=True))
        """the three rows of each input, in the order of the sweep"""
        width = len(self.remaining)
        self.groups = rounding.starts
        self.units = [] if self.pattern is None else _units(self.groups, width, self.pattern)
        self.kernel = self._kernel() if in_library(rounding.grid, self.pattern, weight, self.upper) else None
        of = 0 if self.pattern is None else self.pattern.of
        if self.kernel is None:
            leaf, borders = of or LEAF, {*self.groups, *self.units}
        else:
            leaf, borders = kernel.piece_of(of), {*self.groups, *([] if of else self.units)}
        self.leaves = divided(sorted(borders), width, leaf)
        self.coarse = sorted((self.groups, [] if self.kernel is not None and of else self.units), key=len)

    def _kernel(self) -> kernel.Sweep:
        pattern, index = self.pattern, self.rounding.indices
        unit = (pattern.of, pattern.kept) if pattern is not None and pattern.of else None
        return kernel.Sweep(self.remaining, self.value, self.error, self.upper.contiguous(), self.mask, index, unit)

    def walk(self, low: int, high: int) -> None:
        """Sweep the inputs from low up to high, whose weights are updated for all earlier errors."""
        middle = self._cut(low, high)
        if middle is None:
            self._leaf(low, high)
            return
        self.walk(low, middle)
        self.remaining[middle:high].addmm_(self.upper[low:middle, middle:high].T, self.error[low:middle], alpha=-1)
        self.walk(middle, high)

    def _cut(self, low: int, high: int) -> int | None:
        """The border nearest the middle, of the coarsest kind that lies inside, so that no group or unit is divided early."""
        for borders in (*self.coarse, self.leaves):
            inside = borders[bisect_right(borders, low) : bisect_left(borders, high)]
            if inside:
                return min(inside, key=lambda border: abs(2 * border - low - high))
        return None

    def _leaf(self, low: int, high: int) -> None:
        if low in self.units[bisect_left(self.units, low) :][:1]:
            self._choose(low, end_of(self.units, low, len(self.remaining)))
        number = bisect_right(self.groups, low) - 1
        if self.groups[number] == low:
            self._begin(number)
        if self.kernel is not None:
            self.kernel.decide(low, high, self.rounding.in_kernel(number))
            return
        for place in range(low, high):
            column, value, error = self.rows[place]
            rounded = self.rounding.round(place, number, column)
            if self.mask is None:
                value.copy_(rounded)
            else:
                torch.mul(rounded, self.mask[place], out=value)
            torch.sub(column, value, out=error).div_(self.pivots[place])
            if place + 1 < high:
                self.remaining[place + 1 : high].addr_(self.upper[place, place + 1 : high], error, alpha=-1)

    def _begin(self, number: int) -> None:
        low = self.groups[number]
        high = end_of(self.groups, low, len(self.remaining))
        weights = self.conditional_variance[low:high, None].expand_as(self.remaining[low:high])
        if self.mask is not None:
            first = end_of(self.units, low, len(self.remaining)) if self.units else high
            if first < high:
                # The scale is searched for the weights that will stay, so the mask of the later units is chosen now, and again
                # when each unit is reached.
                self._choose(first, high)
            weights = weights * self.mask[low:high]
        self.rounding.begin(number, self.remaining[low:high], weights)

    def _choose(self, low: int, high: int) -> None:
        """Choose the mask of these inputs by what dropping each would cost now."""
        assert self.mask is not None and self.pattern is not None
        if self.kernel is not None and self.pattern.of:
            self.kernel.choose(low, high)
            return
        score = (self.remaining[low:high].square() * self.conditional_variance[low:high, None]).T
        pattern = self.pattern
        if not pattern.of:
            # Rounded so that the units of a row together drop the row's number of weights.
            count = int(high * pattern.dropped + 1e-9) - int(low * pattern.dropped + 1e-9)
            pattern = replace(pattern, dropped=count / (high - low))
        self.mask[low:high] = choose(score, pattern).T


def end_of(borders: list[int], low: int, width: int) -> int:
    """The end of the piece that begins at `low`."""
    after = bisect_right(borders, low)
    return borders[after] if after < len(borders) else width


def divided(borders: list[int], width: int, size: int) -> list[int]:
    """The starts of pieces when those between borders are cut further into pieces of this size."""
    stops = [*borders[1:], width]
    return [place for low, high in zip(borders, stops, strict=True) for place in range(low, high, size)]


def _units(groups: list[int], width: int, pattern: Pattern) -> list[int]:
    """The starts of units, the inputs among which a mask is chosen at a time: m for n:m, about 128 for a share of each row."""
    if pattern.of:
        return divided(groups, width, pattern.of)
    size = end_of(groups, 0, width)
    return divided(groups, width, _SHARE_AT_ONCE) if size > _SHARE_AT_ONCE else groups[:: -(-_SHARE_AT_ONCE // size)]
