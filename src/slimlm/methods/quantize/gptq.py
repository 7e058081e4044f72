"""GPTQ: round input by input, the later inputs repairing what each rounding loses.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, arXiv 2210.17323, equations 2 and 3, sections 3.2 and 3.3
(slimlm.core.solvers.sweep).

Groups are true groups along the input, their scales searched on the weights as they are when the sweep reaches the group.
Departures: the scale has least squared error under the sweep's own costs (the authors take the extremes); the grid is
symmetric and the scale may be negative, so that the longer side of the grid serves the largest weight; `order = "energy"`
takes groups, and fours within them, by falling energy, which needs no stored permutation (the authors' act-order does).
After a pruner the mask stays, and the weights that stay also repair the pruning.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from slimlm.core import grid
from slimlm.core.layer import Layer
from slimlm.core.solvers.sweep import check_damp, conditioned, inverse_in_order, order_of, rounded_sweep
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.step import Objective, StepDefaults, widths_around

_GROUPS = (128, 32)
"""Group sizes that a plan may choose from: scales take an eighth or half a bit per weight."""


@dataclass(frozen=True)
class Gptq(StepDefaults):
    """Round with error feedback under the covariance of the inputs."""

    bits: int = 4
    group: grid.Group = 128
    order: Literal["energy", "input"] = "energy"
    damp: float = 0.01
    needs: ClassVar[Needs] = frozenset({Covariance})

    def __post_init__(self) -> None:
        grid.check_bits(self.bits)
        grid.check_group(self.group)
        check_damp(self.damp)

    def options(self, bits: float | None, objective: Objective) -> tuple[Self, ...]:
        """Widths around the budget, each in long and in short groups."""
        widths = [] if bits is None else widths_around(bits)
        return tuple(replace(self, bits=width, group=group) for width in widths for group in _GROUPS)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        covariance, notes = conditioned(stats[Covariance].to(layer.original), stats.tokens)
        energy = covariance.diagonal() if self.order == "energy" else covariance.new_zeros(len(covariance))
        order = order_of(energy, group=self.group, pattern=None)
        inverse = inverse_in_order(covariance, order.inputs, damp=self.damp, cache=stats.cache)
        levels = grid.Levels.of_bits(self.bits)
        swept = rounded_sweep(layer.whole, inverse, order, levels=levels, group=self.group, keep=layer.keep)
        return layer.encode(swept.code(self.group)).note(*notes, *inverse.notes)
