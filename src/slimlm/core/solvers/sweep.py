"""The column sweep: prune and round weights input by input, while the later inputs compensate the error.

For a weight W `[out, in]` and the covariance H `[in, in]` of its inputs, a base B is sought whose tr((W - B) H (W - B)^T)
is small. Input j is decided (kept or dropped, rounded) with all later ones free to compensate; with H^-1 = U^T U, U upper
triangular, deciding costs (w_j - b_j)^2 / U_jj^2, and the best update of the later inputs is w_k -= (w_j - b_j) U_jk / U_jj.

    GPTQ       (Frantar et al., arXiv 2210.17323, equations 2 and 3, section 3.3)     rounding, nothing dropped
    SparseGPT  (Frantar, Alistarh, arXiv 2301.00774, equations 3 and 4, section 3.4)  dropping by w^2 / U_jj^2, no rounding
    both       (SparseGPT, section 3.5)                                               each column is dropped or rounded

The sweep is recursive (slimlm.core.solvers.recursion): the left half of the inputs is swept, its errors are applied to the
right half in one matrix product, the right half is swept. So nearly all arithmetic is in products of matrices, and Python does
a few operations per input on vectors `[out]`; on a CPU a loop in C++ (slimlm.kernels.sweep) decides the inputs of a leaf of
this recursion instead. Weights are held `[in, out]` here, so that one input's weights are contiguous.
"""

from bisect import bisect_left, bisect_right
from dataclasses import replace

import torch
from torch import Tensor

from slimlm.core.grid import Grid, scale_sets, scale_shape
from slimlm.core.mask import Pattern, choose
from slimlm.core.profiling import profiled
from slimlm.core.solvers.affine_search import scale_and_zero
from slimlm.core.solvers.distribution import distribution
from slimlm.core.solvers.inverse import Inverse
from slimlm.core.solvers.order import Order
from slimlm.core.solvers.recursion import LEAF, divided, end_of, middle_of
from slimlm.core.solvers.rounding import FixedScales, InputGroups, Rounding, Unrounded, as_stored, in_library
from slimlm.core.solvers.swept import Swept
from slimlm.kernels import sweep as kernel

_SHARE_AT_ONCE = 128
"""Inputs among which a share of each row is dropped at a time."""


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
    groups, out = order.inputs // size, len(weight)
    rounding = FixedScales(grid, _widened(scale, groups, out), None if zero is None else _widened(zero, groups, out))
    swept = _swept_in(order, weight, inverse, rounding, None, mask)
    return replace(swept, index=_ordered(rounding.index.T, order.positions), scale=scale, grid=grid, zero=zero)


def _widened(found: Tensor, groups: Tensor, out: int) -> Tensor:
    """Scales or zeros `[out, groups]` or `[1, 1]` as `[in, out]`, given the group of each input, int64 `[in]`."""
    return found.T.contiguous()[groups].expand(-1, out)


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
        self.borders = self._borders(width)

    def _borders(self, width: int) -> tuple[list[int], list[int], list[int]]:
        """Where the recursion divides the inputs, see `middle_of`: two kinds of pieces, the larger ones first, and leaves."""
        of = 0 if self.pattern is None else self.pattern.of
        # In the library a leaf has many n:m units.
        units = [] if self.kernel is not None and of else self.units
        leaf = (of or LEAF) if self.kernel is None else kernel.piece_of(of)
        coarse, fine = sorted((self.groups, units), key=len)
        return coarse, fine, divided(sorted({*self.groups, *units}), width, leaf)

    def _kernel(self) -> kernel.Sweep:
        pattern, index = self.pattern, self.rounding.index
        unit = (pattern.of, pattern.kept) if pattern is not None and pattern.of else None
        return kernel.Sweep(self.remaining, self.value, self.error, self.upper.contiguous(), self.mask, index, unit)

    def walk(self, low: int, high: int) -> None:
        """Sweep the inputs from low up to high, whose weights are updated for all earlier errors."""
        middle = middle_of(low, high, self.borders)
        if middle is None:
            self._leaf(low, high)
            return
        self.walk(low, middle)
        self.remaining[middle:high].addmm_(self.upper[low:middle, middle:high].T, self.error[low:middle], alpha=-1)
        self.walk(middle, high)

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


def _units(groups: list[int], width: int, pattern: Pattern) -> list[int]:
    """The starts of units, the inputs among which a mask is chosen at a time: m for n:m, about 128 for a share of each row."""
    if pattern.of:
        return divided(groups, width, pattern.of)
    size = end_of(groups, 0, width)
    return divided(groups, width, _SHARE_AT_ONCE) if size > _SHARE_AT_ONCE else groups[:: -(-_SHARE_AT_ONCE // size)]
