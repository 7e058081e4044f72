"""GPTQ: round input by input, the later inputs compensating what each rounding loses.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv
2210.17323, equations 2 and 3, sections 3.2 and 3.3 (slimlm.core.solvers.sweep).

Groups are true groups along the input, their scales searched on the weights as they are when the sweep reaches the group.
Departures: the scale has least squared error under the sweep's own costs (the authors take the extremes), which loses less; the
grid is symmetric and the scale may be negative, so that the longer side of the grid is used for the largest weight;
`order = "energy"` takes groups, and fours within them, by falling second moment (mean square) of their inputs, which needs no
stored permutation (the authors' act-order does); the covariance of few tokens is shrunk toward its diagonal. After a pruner the
mask stays, and the weights that stay also compensate the pruning.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from slimlm.core import grid
from slimlm.core.layer import Layer
from slimlm.core.objective import Objective
from slimlm.core.solvers.inverse import check_damp, inverse_in_order, shrunk
from slimlm.core.solvers.sweep import order_of, rounded_sweep
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.step import StepDefaults, widths_around

_GROUP_SIZES = (128, 32)
"""Group sizes that a plan may choose from: scales take an eighth or half a bit per weight."""


@dataclass(frozen=True)
class Gptq(StepDefaults):
    """Round with error feedback under the covariance of the inputs."""

    bits: int = 4
    group_size: grid.GroupSize = 128
    order: Literal["energy", "input"] = "energy"
    """of the inputs in the sweep: by falling second moment, or as they come"""
    damp: float = 0.01
    needs: ClassVar[Needs] = frozenset({Covariance})

    def __post_init__(self) -> None:
        grid.check_bits(self.bits)
        grid.check_group_size(self.group_size)
        check_damp(self.damp)

    def options(self, bits: float | None, objective: Objective) -> tuple[Self, ...]:
        """Widths around the budget, each in long and in short groups."""
        widths = [] if bits is None else widths_around(bits)
        return tuple(replace(self, bits=width, group_size=size) for width in widths for size in _GROUP_SIZES)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        covariance, notes = shrunk(stats[Covariance].to(layer.original), stats.tokens)
        second_moment = covariance.diagonal() if self.order == "energy" else covariance.new_zeros(len(covariance))
        order = order_of(second_moment, group_size=self.group_size, pattern=None)
        inverse = inverse_in_order(covariance, order.inputs, damp=self.damp, cache=stats.cache)
        swept = rounded_sweep(layer.base_reference, inverse, order, grid=grid.Grid.of_bits(self.bits), mask=layer.mask)
        return layer.with_base(swept.part(self.group_size)).with_notes(*notes, *inverse.notes)
