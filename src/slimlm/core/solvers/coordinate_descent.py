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

from slimlm.core import grid
from slimlm.core.grid import GroupSize
from slimlm.core.mask import Pattern
from slimlm.core.solvers.sweep import LEAF, Swept, as_stored, divided, end_of

_MOST_CHOICES = 70
"""Ways to keep n of m that are all tried; 4 of 8 has this many."""


def polish(target: Tensor, gram: Tensor, base: Swept, *, group_size: GroupSize, pattern: Pattern | None) -> Swept:
    """One pass of coordinate descent on tr((W - B) H (W - B)^T) from a rounded base; never raises it.

    target W `[out, in]`, gram H `[in, in]`. Under an n:m `pattern` with at most 70 ways to keep n of m, each group of m is
    decided anew: for every way the least-squares values given all other inputs, rounded one after another with the rest of
    the group answering, and the best of all ways and the present one is taken. Else the mask stays and the codes are
    decided one input at a time. At the start of each scale group the scale takes its own best step.
    """
    choices = None
    if pattern is not None and pattern.of and len(_ways(pattern)) <= _MOST_CHOICES:
        choices = pattern
    state = _Polish(target, gram, base, group_size, choices)
    state.walk(0, target.shape[1])
    keep = None if state.keep is None else state.keep.T.contiguous()
    index, scale = state.index.T.contiguous(), state.scale.T.contiguous()
    return replace(base, value=state.value.T.contiguous(), keep=keep, index=index, scale=scale)


def _ways(pattern: Pattern) -> list[tuple[int, ...]]:
    return list(combinations(range(pattern.of), pattern.kept))


class _Polish:
    """The working state of one pass; everything is `[in, out]`."""

    def __init__(self, target: Tensor, gram: Tensor, base: Swept, group_size: GroupSize, choices: Pattern | None) -> None:
        assert base.index is not None and base.scale is not None and base.levels is not None
        self.gram, self.levels = gram, base.levels
        self.value, self.index = base.value.T.contiguous().clone(), base.index.T.contiguous().clone()
        self.scale = base.scale.T.contiguous().clone()
        self.keep = None if base.keep is None else base.keep.T.contiguous().clone()
        self.pull = gram @ (target.T - self.value)
        """H (W - B)^T `[in, out]`: half the slope of the objective, exact for the inputs whose turn it is"""
        self.change = torch.zeros_like(self.value)
        self.silent = (gram.diagonal() <= 0).tolist()
        """whether an input never fires"""
        width = len(self.value)
        self.groups = list(range(0, width, width if isinstance(group_size, str) else group_size))
        self.leaves = divided(self.groups, width, LEAF if choices is None else choices.of)
        self.ways = None if choices is None else torch.tensor(_ways(choices), device=gram.device)
        self.inverse = grid.reciprocal(self.scale)
        if self.ways is not None:
            self.solvers = self._solvers(self.ways, choices.of)  # type: ignore[union-attr]

    def _solvers(self, ways: Tensor, size: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """For each group of inputs, over the ways to keep some: their covariance, its inverse, and the upper factor of that."""
        width = len(self.gram)
        at = torch.arange(width, device=ways.device).view(-1, 1, size).expand(-1, len(ways), -1)
        kept = at.gather(2, ways[None].expand(len(at), -1, -1))
        among = self.gram[kept[..., :, None], kept[..., None, :]]
        own = among.double()
        own = own + 1e-6 * own.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[..., None, None] * torch.eye(
            ways.shape[1]
        ).to(own)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(own))
        upper = torch.linalg.cholesky(inverse, upper=True).float()
        return tuple(zip(among.unbind(), inverse.float().unbind(), upper.unbind(), strict=True))

    def walk(self, low: int, high: int) -> None:
        """Decide the inputs from low up to high, their pull being exact."""
        for borders in (self.groups, self.leaves):
            inside = borders[bisect_right(borders, low) : bisect_left(borders, high)]
            if inside:
                middle = min(inside, key=lambda border: abs(2 * border - low - high))
                self.walk(low, middle)
                self.pull[middle:high].addmm_(self.gram[middle:high, low:middle], self.change[low:middle], alpha=-1)
                self.walk(middle, high)
                return
        group = bisect_right(self.groups, low) - 1
        if self.groups[group] == low:
            self._rescale(group)
        if self.ways is None:
            self._recode(low, high, group)
        else:
            self._choose(low, high, group)

    def _rescale(self, group: int) -> None:
        """The best step of one group's scales (of the only scale, where one serves all rows), as far as storage can tell."""
        low = self.groups[group]
        high = end_of(self.groups, low, len(self.value))
        value = self.value[low:high]
        along = (value * self.pull[low:high]).sum(dim=0)
        bend = (value * (self.gram[low:high, low:high] @ value)).sum(dim=0)
        if self.scale.shape[1] == 1:
            along, bend = along.sum(dim=0, keepdim=True), bend.sum(dim=0, keepdim=True)
        old = self.scale[group]
        new = old * (1 + along / bend.clamp_min(1e-30))
        new = as_stored(new, self.scale.numel())
        step = torch.where(old == 0, torch.zeros_like(old), new / torch.where(old == 0, 1.0, old) - 1)
        better = (step.square() * bend < 2 * step * along) & (new != 0)
        step = torch.where(better, step, torch.zeros_like(step))
        self.scale[group] = torch.where(better, new, old)
        self.inverse[group] = grid.reciprocal(self.scale[group])
        moved = value * step
        value += moved
        self.pull[low:].addmm_(self.gram[low:, low:high], moved, alpha=-1)

    def _change(self, low: int, high: int, change: Tensor) -> None:
        """Move these inputs' weights; the pull on themselves is made exact at once, that on later ones by `walk`."""
        self.value[low:high] += change
        self.change[low:high] += change
        self.pull[low:high] -= self.gram[low:high, low:high] @ change

    def _recode(self, low: int, high: int, group: int) -> None:
        own = self.scale[group], self.inverse[group]
        for place in range(low, high):
            if self.silent[place]:
                continue
            bend = self.gram[place, place]
            old = self.value[place]
            index, new = self.levels.rounded_by(old + self.pull[place] / bend, *own)
            if self.keep is not None:
                new = new * self.keep[place]
            gain = 2 * (new - old) * self.pull[place] - (new - old).square() * bend
            better = gain > 0
            self.index[place] = torch.where(better, index, self.index[place].long())
            self._change_one(place, high, torch.where(better, new - old, torch.zeros_like(old)))

    def _change_one(self, place: int, high: int, change: Tensor) -> None:
        self.value[place] += change
        self.change[place] += change
        self.pull[place:high].addr_(self.gram[place:high, place], change, alpha=-1)

    def _choose(self, low: int, high: int, group: int) -> None:
        assert self.ways is not None and self.keep is not None
        own, old = self.gram[low:high, low:high], self.value[low:high]
        wanted = self.pull[low:high] + own @ old
        """what the group's weights b should solve, H b = this `[m, out]`; their cost is b H b - 2 b this"""
        kept, inverse, upper = self.solvers[low // (high - low)]
        aims = wanted[self.ways]
        goal = inverse @ aims
        scale, reciprocal = self.scale[group], self.inverse[group]
        values, indices = [], []
        for i in range(self.ways.shape[1]):
            index, value = self.levels.rounded_by(goal[:, i], scale, reciprocal)
            values.append(value)
            indices.append(index)
            if i + 1 < self.ways.shape[1]:
                missed = (goal[:, i] - value) / upper[:, i, i, None]
                goal[:, i + 1 :] -= upper[:, i, i + 1 :, None] * missed[:, None]
        value = torch.stack(values, dim=1)
        cost = (value * (kept @ value - 2 * aims)).sum(dim=1)
        least, way = cost.min(dim=0)
        now = (old * (own @ old - 2 * wanted)).sum(dim=0)
        # A margin of float32's rounding, so that no pass ever raises the objective by noise.
        better = least < now - 1e-6 * now.abs()
        places = self.ways[way].T
        those = way[None, None].expand(1, value.shape[1], -1)
        chosen = torch.zeros_like(old).scatter_(0, places, value.gather(0, those)[0])
        codes = torch.stack(indices, dim=1).gather(0, those)[0].to(torch.uint8)
        index = torch.zeros_like(self.index[low:high]).scatter_(0, places, codes)
        keep = torch.zeros_like(self.keep[low:high]).scatter_(0, places, True)
        self.index[low:high] = torch.where(better, index, self.index[low:high])
        self.keep[low:high] = torch.where(better, keep, self.keep[low:high])
        self._change(low, high, torch.where(better, chosen - old, 0.0))
