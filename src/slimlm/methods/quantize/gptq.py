"""GPTQ: round input by input, the later inputs repairing what each rounding loses.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, arXiv 2210.17323, equations 2 and 3, sections 3.2 and 3.3
(slimlm.core.solvers.sweep).

Groups are true groups along the input, their scales searched on the weights as they are when the sweep reaches the group.
Departures: the scale has least squared error under the sweep's own costs (the authors take the extremes); the grid is
symmetric and the scale may be negative, so that the longer side of the grid serves the largest weight; `order = "energy"`
takes groups, and fours within them, by falling energy, which needs no stored permutation (the authors' act-order does).
After a pruner the mask stays, and the weights that stay also repair the pruning.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from slimlm.core import grid
from slimlm.core.layer import Layer, Need, Stats, measured
from slimlm.core.solvers.inverse import check_damp, inverse_in_order, shrunk
from slimlm.core.solvers.sweep import order_of, rounded_sweep


@dataclass(frozen=True)
class Gptq:
    """Round with error feedback under the covariance of the inputs."""

    bits: int = 4
    group_size: grid.GroupSize = 128
    order: Literal["energy", "input"] = "energy"
    damp: float = 0.01
    needs: ClassVar[Need] = Need.GRAM

    def __post_init__(self) -> None:
        grid.check_bits(self.bits)
        grid.check_group_size(self.group_size)
        check_damp(self.damp)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        gram, notes = shrunk(measured(stats.gram).to(layer.original), stats.tokens)
        order = order_of(
            gram.diagonal() if self.order == "energy" else gram.new_zeros(len(gram)), group_size=self.group_size, pattern=None
        )
        inverse = inverse_in_order(gram, order.inputs, damp=self.damp, known=stats.known)
        swept = rounded_sweep(layer.base_reference, inverse, order, grid=grid.Grid.of_bits(self.bits), mask=layer.mask)
        return layer.with_base(swept.part(self.group_size)).with_notes(*notes, *inverse.notes)
