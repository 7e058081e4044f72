"""Coordinate descent on a rounded base: one group of inputs is decided again while all others are fixed.

For a weight W and the covariance H of its inputs, a base B that a sweep (slimlm.core.solvers.sweep) has found is improved on
the same objective, tr((W - B) H (W - B)^T): the mask of an n:m group and its codes, and each scale; no step raises it. (Cyclic
coordinate descent on codes alone is QuantEase, Behdin et al., arXiv 2309.01885.)
"""

from bisect import bisect_right
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from slimlm.core.grid import GroupSize, reciprocal
from slimlm.core.mask import Pattern
from slimlm.core.profiling import profiled
from slimlm.core.solvers.recursion import LEAF, divided, end_of, middle_of
from slimlm.core.solvers.rounding import as_stored, in_library, kernel_rounding
from slimlm.core.solvers.swept import Swept
from slimlm.kernels import sweep as kernel

_MOST_MASKS = 70
"""Masks of an n:m group up to which all are tried; 4 of 8 has this many."""


@profiled("objective")
def gradient_of(error: Tensor, covariance: Tensor) -> tuple[Tensor, float]:
    """What a descent on the base starts from, and the objective.

    Args:
        error: E = W - B `[out, in]`.
        covariance: H `[in, in]`.

    Returns:
        H E^T `[in, out]`, which is minus half the gradient of the objective in B, and the objective tr(E H E^T).
    """
    gradient = (covariance @ error.T).contiguous()
    # Each input's sum, in which little cancels, in the caller's dtype; the sum over inputs in float64.
    return gradient, float(torch.linalg.vecdot(gradient, error.T).double().sum())


@profiled("base descent")
def descend_base(
    weight: Tensor,
    covariance: Tensor,
    base: Swept,
    *,
    group_size: GroupSize,
    pattern: Pattern | None,
    gradient: Tensor | None = None,
) -> Swept:
    """One pass of coordinate descent on tr((W - B) H (W - B)^T) from a rounded base; it never raises it.

    Under an n:m pattern with at most 70 possible masks of a group, each group of m inputs is decided again: for every mask
    the least-squares values given all other inputs are rounded one after another, the rest of the group compensating, and the
    best of all these and the present values is taken. Otherwise the mask does not change and the codes are decided one input
    at a time. At the start of each group that shares a scale, the scale is set to its least-squares value.

    Args:
        weight: W `[out, in]`.
        covariance: H `[in, in]`.
        base: B, from `rounded_sweep` or an earlier pass.
        group_size: how many weights share a scale, as in that sweep.
        pattern: of the mask, where the mask may change; None where it may not or there is none.
        gradient: of this base, see `gradient_of`, where it is known; it is overwritten.

    Returns:
        The base after the pass; its grid is that of `base`.
    """
    searched = None
    if pattern is not None and pattern.of and len(_masks(pattern)) <= _MOST_MASKS:
        searched = pattern
    if gradient is None:
        gradient, _ = gradient_of(weight - base.value, covariance)
    state = _Descent(gradient, covariance, base, group_size, searched)
    state.walk(0, len(covariance))
    mask = None if state.mask is None else state.mask.T.contiguous()
    index, scale = state.index.T.contiguous(), state.scale.T.contiguous()
    return replace(base, value=state.value.T.contiguous(), mask=mask, index=index, scale=scale)


def _masks(pattern: Pattern) -> list[tuple[int, ...]]:
    """All masks of an n:m group, as the places in the group that stay."""
    return list(combinations(range(pattern.of), pattern.kept))


class _Descent:
    """The state of one pass; matrices are `[in, out]`."""

    def __init__(
        self, gradient: Tensor, covariance: Tensor, base: Swept, group_size: GroupSize, searched: Pattern | None
    ) -> None:
        assert base.index is not None and base.scale is not None and base.grid is not None
        self.covariance, self.grid = covariance, base.grid
        self.value, self.index = base.value.T.contiguous().clone(), base.index.T.contiguous().clone()
        self.scale = base.scale.T.contiguous().clone()
        self.mask = None if base.mask is None else base.mask.T.contiguous().clone()
        self.gradient = gradient
        """H (W - B)^T `[in, out]`: minus half the gradient, exact for the inputs that are being decided"""
        self.change = torch.zeros_like(self.value)
        """of the inputs that are decided, which the gradient of later ones has not had yet"""
        self.dead = (covariance.diagonal() <= 0).tolist()
        """whether an input is always zero"""
        width = len(self.value)
        self.groups = list(range(0, width, width if isinstance(group_size, str) else group_size))
        of = 0 if searched is None else searched.of
        library = in_library(self.grid, searched, self.value, covariance)
        self.leaves = divided(self.groups, width, kernel.piece_of(of) if library else of or LEAF)
        self.masks = None if searched is None else torch.tensor(_masks(searched), device=covariance.device)
        self.inverse = reciprocal(self.scale)
        self.zero = [None] * len(self.scale) if base.zero is None else list(base.zero.T.contiguous().unbind())
        self.solvers = None if self.masks is None else self._solvers(self.masks, of)
        self.kernel = self._kernel() if library else None

    def _kernel(self) -> kernel.Descent:
        matrices = self.gradient, self.value, self.change, self.index, self.mask
        return kernel.Descent(*matrices, self.covariance.contiguous(), self.solvers)

    def _solvers(self, masks: Tensor, size: int) -> kernel.UnitSolvers:
        """For each group of m inputs, over its masks: the covariance of those that stay, its inverse, its upper factor."""
        width = len(self.covariance)
        at = torch.arange(width, device=masks.device).view(-1, 1, size).expand(-1, len(masks), -1)
        stay = at.gather(2, masks[None].expand(len(at), -1, -1))
        among = self.covariance[stay[..., :, None], stay[..., None, :]]
        damped = among.double()
        damped = damped + 1e-6 * damped.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None, None] * torch.eye(
            masks.shape[1]
        ).to(damped)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper = torch.linalg.cholesky(inverse, upper=True).float()
        return kernel.UnitSolvers(masks.int(), among.contiguous(), inverse.float().contiguous(), upper.contiguous(), size)

    def walk(self, low: int, high: int) -> None:
        """Decide the inputs from low up to high; their gradient is exact."""
        middle = middle_of(low, high, (self.groups, self.leaves))
        if middle is None:
            self._leaf(low, high)
            return
        self.walk(low, middle)
        self.gradient[middle:high].addmm_(self.covariance[middle:high, low:middle], self.change[low:middle], alpha=-1)
        self.walk(middle, high)

    def _leaf(self, low: int, high: int) -> None:
        """Decide the inputs of a leaf, after the scales of their group where it begins."""
        number = bisect_right(self.groups, low) - 1
        first, last = self.groups[number], end_of(self.groups, self.groups[number], len(self.value))
        if first == low:
            self._rescale(number)
        if self.kernel is not None:
            self.kernel.decide(low, high, kernel_rounding(self.grid, self.scale[number], self.zero[number]))
        elif self.masks is None:
            self._recode(low, high, number)
        else:
            self._choose(low, high, number)
        if last == high:
            # The gradient of the group's own inputs has had this change already.
            self.change[first:last] += self.rescaled

    def _rescale(self, number: int) -> None:
        """The best step of one group's scales (or of the only scale), rounded as it will be stored."""
        low = self.groups[number]
        high = end_of(self.groups, low, len(self.value))
        value = self.value[low:high]
        along = (value * self.gradient[low:high]).sum(dim=0)
        curvature = (value * (self.covariance[low:high, low:high] @ value)).sum(dim=0)
        if self.scale.shape[1] == 1:
            along, curvature = along.sum(dim=0, keepdim=True), curvature.sum(dim=0, keepdim=True)
        old = self.scale[number]
        new = old * (1 + along / curvature.clamp_min(1e-30))
        new = as_stored(new, self.scale.numel())
        step = torch.where(old == 0, torch.zeros_like(old), new / torch.where(old == 0, 1.0, old) - 1)
        better = (step.square() * curvature < 2 * step * along) & (new != 0)
        step = torch.where(better, step, torch.zeros_like(step))
        self.scale[number] = torch.where(better, new, old)
        self.inverse[number] = reciprocal(self.scale[number])
        self.rescaled = value * step
        value += self.rescaled
        self.gradient[low:high].addmm_(self.covariance[low:high, low:high], self.rescaled, alpha=-1)

    def _recode(self, low: int, high: int, number: int) -> None:
        """New codes for these inputs one after another, under the same mask."""
        scale = self.scale[number], self.inverse[number], self.zero[number]
        for place in range(low, high):
            if self.dead[place]:
                continue
            curvature = self.covariance[place, place]
            old = self.value[place]
            index, new = self.grid.round_with(old + self.gradient[place] / curvature, *scale)
            if self.mask is not None:
                new = new * self.mask[place]
            gain = 2 * (new - old) * self.gradient[place] - (new - old).square() * curvature
            better = gain > 0
            self.index[place] = torch.where(better, index, self.index[place].long())
            self._change_one(place, high, torch.where(better, new - old, torch.zeros_like(old)))

    def _change_one(self, place: int, high: int, change: Tensor) -> None:
        self.value[place] += change
        self.change[place] += change
        self.gradient[place:high].addr_(self.covariance[place:high, place], change, alpha=-1)

    def _choose(self, low: int, high: int, number: int) -> None:
        """New masks and codes for the m inputs of an n:m group together."""
        assert self.masks is not None and self.mask is not None and self.solvers is not None
        covariance, old = self.covariance[low:high, low:high], self.value[low:high]
        # The group's best weights b solve H b = right_side `[m, out]`; their cost is b H b - 2 b right_side.
        right_side = self.gradient[low:high] + covariance @ old
        unit = low // (high - low)
        among, inverse, upper = (of[unit] for of in (self.solvers.among, self.solvers.inverse, self.solvers.upper))
        right_sides = right_side[self.masks]
        best = inverse @ right_sides
        scale = self.scale[number], self.inverse[number], self.zero[number]
        values, indices = [], []
        for i in range(self.masks.shape[1]):
            index, value = self.grid.round_with(best[:, i], *scale)
            values.append(value)
            indices.append(index)
            if i + 1 < self.masks.shape[1]:
                error = (best[:, i] - value) / upper[:, i, i, None]
                best[:, i + 1 :] -= upper[:, i, i + 1 :, None] * error[:, None]
        value = torch.stack(values, dim=1)
        cost = (value * (among @ value - 2 * right_sides)).sum(dim=1)
        least, best_mask = cost.min(dim=0)
        present = (old * (covariance @ old - 2 * right_side)).sum(dim=0)
        # A margin for the rounding of float32, so that rounding errors cannot make a pass raise the objective.
        better = least < present - 1e-6 * present.abs()
        places = self.masks[best_mask].T
        choice = best_mask[None, None].expand(1, value.shape[1], -1)
        chosen = torch.zeros_like(old).scatter_(0, places, value.gather(0, choice)[0])
        codes = torch.stack(indices, dim=1).gather(0, choice)[0].to(torch.uint8)
        index = torch.zeros_like(self.index[low:high]).scatter_(0, places, codes)
        mask = torch.zeros_like(self.mask[low:high]).scatter_(0, places, True)
        self.index[low:high] = torch.where(better, index, self.index[low:high])
        self.mask[low:high] = torch.where(better, mask, self.mask[low:high])
        self._change(low, high, torch.where(better, chosen - old, 0.0))

    def _change(self, low: int, high: int, change: Tensor) -> None:
        """Change these inputs' weights; their gradient is updated at once, that of later ones by `walk`."""
        self.value[low:high] += change
        self.change[low:high] += change
        self.gradient[low:high] -= self.covariance[low:high, low:high] @ change
