"""Coordinate descent on a rounded base: each group of inputs decided anew, all others as they are.

For a weight W and the covariance H of its inputs, a base B that a sweep (slimlm.core.solvers.sweep) has found is improved on
the same objective, tr((W - B) H (W - B)^T): which inputs of an n:m group stay and their codes, and each scale; no step raises
it. (Cyclic coordinate descent on codes alone is QuantEase, Behdin et al., arXiv 2309.01885.)
"""

from bisect import bisect_left, bisect_right
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from slimlm.core.grid import GroupSize, reciprocal
from slimlm.core.mask import Pattern
from slimlm.core.profiling import profiled
from slimlm.core.solvers.sweep import LEAF, Swept, as_stored, divided, end_of

_MOST_CHOICES = 70
"""Ways to keep n of m that are all tried; 4 of 8 has this many."""


@profiled("base descent")
def descend_base(weight: Tensor, covariance: Tensor, base: Swept, *, group_size: GroupSize, pattern: Pattern | None) -> Swept:
    """One pass of coordinate descent on tr((W - B) H (W - B)^T) from a rounded base; it never raises it.

    Under an n:m pattern with at most 70 ways to keep n of m, each group of m is decided anew: for every way the
    least-squares values given all other inputs, rounded one after another with the rest of the group compensating, and the
    best of all ways and the present one is taken. Else the mask stays and the codes are decided one input at a time. At the
    start of each group that shares a scale the scale takes its own best step.

    Args:
        weight: W `[out, in]`.
        covariance: H `[in, in]`.
        base: B, from `rounded_sweep` or an earlier pass.
        group_size: how many weights share a scale, as in that sweep.
        pattern: of the mask, where it may change; None where it is given or there is none.

    Returns:
        The base after the pass; its grid is that of `base`.
    """
    choices = None
    if pattern is not None and pattern.of and len(_ways(pattern)) <= _MOST_CHOICES:
        choices = pattern
    state = _Descent(weight, covariance, base, group_size, choices)
    state.walk(0, weight.shape[1])
    mask = None if state.mask is None else state.mask.T.contiguous()
    index, scale = state.index.T.contiguous(), state.scale.T.contiguous()
    return replace(base, value=state.value.T.contiguous(), mask=mask, index=index, scale=scale)


def _ways(pattern: Pattern) -> list[tuple[int, ...]]:
    return list(combinations(range(pattern.of), pattern.kept))


class _Descent:
    """The working state of one pass; everything is `[in, out]`."""

    def __init__(self, weight: Tensor, covariance: Tensor, base: Swept, group_size: GroupSize, choices: Pattern | None) -> None:
        assert base.index is not None and base.scale is not None and base.grid is not None
        self.covariance, self.grid = covariance, base.grid
        self.value, self.index = base.value.T.contiguous().clone(), base.index.T.contiguous().clone()
        self.scale = base.scale.T.contiguous().clone()
        self.mask = None if base.mask is None else base.mask.T.contiguous().clone()
        self.gradient = covariance @ (weight.T - self.value)
        """H (W - B)^T `[in, out]`: minus half the objective's gradient, exact for the inputs whose turn it is"""
        self.change = torch.zeros_like(self.value)
        self.dead = (covariance.diagonal() <= 0).tolist()
        """whether an input is always zero"""
        width = len(self.value)
        self.groups = list(range(0, width, width if isinstance(group_size, str) else group_size))
        self.leaves = divided(self.groups, width, LEAF if choices is None else choices.of)
        self.ways = None if choices is None else torch.tensor(_ways(choices), device=covariance.device)
        self.inverse = reciprocal(self.scale)
        if self.ways is not None:
            self.solvers = self._solvers(self.ways, choices.of)  # type: ignore[union-attr]

    def _solvers(self, ways: Tensor, size: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """For each group of inputs, over the ways to keep some: their covariance, its inverse, and the upper factor of that."""
        width = len(self.covariance)
        at = torch.arange(width, device=ways.device).view(-1, 1, size).expand(-1, len(ways), -1)
        kept = at.gather(2, ways[None].expand(len(at), -1, -1))
        among = self.covariance[kept[..., :, None], kept[..., None, :]]
        own = among.double()
        own = own + 1e-6 * own.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None, None] * torch.eye(
            ways.shape[1]
        ).to(own)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(own))
        upper = torch.linalg.cholesky(inverse, upper=True).float()
        return tuple(zip(among.unbind(), inverse.float().unbind(), upper.unbind(), strict=True))

    def walk(self, low: int, high: int) -> None:
        """Decide the inputs from low up to high, their gradient being exact."""
        for borders in (self.groups, self.leaves):
            inside = borders[bisect_right(borders, low) : bisect_left(borders, high)]
            if inside:
                middle = min(inside, key=lambda border: abs(2 * border - low - high))
                self.walk(low, middle)
                self.gradient[middle:high].addmm_(self.covariance[middle:high, low:middle], self.change[low:middle], alpha=-1)
                self.walk(middle, high)
                return
        number = bisect_right(self.groups, low) - 1
        if self.groups[number] == low:
            self._rescale(number)
        if self.ways is None:
            self._recode(low, high, number)
        else:
            self._choose(low, high, number)

    def _rescale(self, number: int) -> None:
        """The best step of one group's scales (of the only scale, where one serves all rows), as far as storage can tell."""
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
        change = value * step
        value += change
        self.gradient[low:].addmm_(self.covariance[low:, low:high], change, alpha=-1)

    def _recode(self, low: int, high: int, number: int) -> None:
        """New codes for these inputs one after another, the mask as it is."""
        own = self.scale[number], self.inverse[number]
        for place in range(low, high):
            if self.dead[place]:
                continue
            curvature = self.covariance[place, place]
            old = self.value[place]
            index, new = self.grid.round_with(old + self.gradient[place] / curvature, *own)
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
        assert self.ways is not None and self.mask is not None
        own, old = self.covariance[low:high, low:high], self.value[low:high]
        # What the group's weights b should solve, H b = this `[m, out]`; their cost is b H b - 2 b this.
        right_side = self.gradient[low:high] + own @ old
        kept, inverse, upper = self.solvers[low // (high - low)]
        right_sides = right_side[self.ways]
        best = inverse @ right_sides
        scale, inverse_scale = self.scale[number], self.inverse[number]
        values, indices = [], []
        for i in range(self.ways.shape[1]):
            index, value = self.grid.round_with(best[:, i], scale, inverse_scale)
            values.append(value)
            indices.append(index)
            if i + 1 < self.ways.shape[1]:
                error = (best[:, i] - value) / upper[:, i, i, None]
                best[:, i + 1 :] -= upper[:, i, i + 1 :, None] * error[:, None]
        value = torch.stack(values, dim=1)
        cost = (value * (kept @ value - 2 * right_sides)).sum(dim=1)
        least, way = cost.min(dim=0)
        now = (old * (own @ old - 2 * right_side)).sum(dim=0)
        # A margin of float32's rounding, so that no pass ever raises the objective by noise.
        better = least < now - 1e-6 * now.abs()
        places = self.ways[way].T
        chosen_way = way[None, None].expand(1, value.shape[1], -1)
        chosen = torch.zeros_like(old).scatter_(0, places, value.gather(0, chosen_way)[0])
        codes = torch.stack(indices, dim=1).gather(0, chosen_way)[0].to(torch.uint8)
        index = torch.zeros_like(self.index[low:high]).scatter_(0, places, codes)
        mask = torch.zeros_like(self.mask[low:high]).scatter_(0, places, True)
        self.index[low:high] = torch.where(better, index, self.index[low:high])
        self.mask[low:high] = torch.where(better, mask, self.mask[low:high])
        self._change(low, high, torch.where(better, chosen - old, 0.0))

    def _change(self, low: int, high: int, change: Tensor) -> None:
        """Move these inputs' weights; their own gradient is made exact at once, that of later ones by `walk`."""
        self.value[low:high] += change
        self.change[low:high] += change
        self.gradient[low:high] -= self.covariance[low:high, low:high] @ change
