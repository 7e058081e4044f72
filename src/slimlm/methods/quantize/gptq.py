"""GPTQ: round input by input, the later inputs compensating what each rounding loses.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, arXiv
2210.17323, equations 2 and 3, sections 3.2 and 3.3 (slimlm.core.solvers.sweep).

Groups are true groups along the input, their scales searched on the weights as they are when the sweep reaches the group.
Departures: the scale has least squared error under the sweep's own costs (the authors take the extremes), which loses less; the
covariance of few tokens is shrunk toward its diagonal. After a pruner the mask stays, and the weights that stay also compensate
the pruning.

zero     False: the grid is symmetric, and the scale may be negative, so that the longer side of the grid is used for the
         largest weight. True: as GPTQ is mostly used, each scale comes with a zero, a whole number of `bits` bits; the two are
         searched together, several zeros for each of many scales (Lin, Hu, Wan: NeUQI: Near-Optimal Uniform Quantization
         Parameter Initialization for Low-Bit LLMs, arXiv 2505.17595, has the same aim, with zeros that need not be whole).
centred  True: the grid has no zero but lies evenly on both sides of it: -1.5, -0.5, 0.5, 1.5 with 2 bits. It is stored as a
         codebook, of up to 4 bits.
order    of the inputs in the sweep. "energy": groups, and fours within them, by falling second moment (mean square) of their
         inputs, so that a group's scale is searched when the sweep reaches it. "activation": each input by its own, the
         authors' act-order, with scales that are searched before the sweep. "input": as they come. None needs a stored
         permutation.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.objective import Objective
from slimlm.core.solvers.inverse import check_damp, inverse_in_order, shrunk
from slimlm.core.solvers.order import Order, activation_order, order_of
from slimlm.core.solvers.sweep import rounded_sweep
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
    order: Literal["energy", "activation", "input"] = "energy"
    """of the inputs in the sweep: groups or single inputs by falling second moment, or as they come"""
    damp: float = 0.01
    zero: bool = False
    """whether each scale comes with a zero"""
    centred: bool = False
    """whether the grid lies evenly on both sides of zero"""
    needs: ClassVar[Needs] = frozenset({Covariance})

    def __post_init__(self) -> None:
        grid.check_bits(self.bits)
        grid.check_group_size(self.group_size)
        check_damp(self.damp)
        if self.centred and (self.zero or self.bits > grid.LARGEST_CODEBOOK_BITS):
            raise RecipeError(
                f"centred = true, bits = {self.bits}, zero = {str(self.zero).lower()}: a centred grid has up to "
                f"{grid.LARGEST_CODEBOOK_BITS} bits and no zeros"
            )

    @property
    def _grid(self) -> grid.Grid:
        """The values that codes stand for."""
        return grid.Grid.centred(self.bits) if self.centred else grid.Grid.of_bits(self.bits, zeros=self.zero)

    def options(self, bits: float | None, objective: Objective) -> tuple[Self, ...]:
        """Widths around the budget, each in long and in short groups."""
        widths = [] if bits is None else widths_around(bits)
        if self.centred:
            widths = [width for width in widths if width <= grid.LARGEST_CODEBOOK_BITS]
        return tuple(replace(self, bits=width, group_size=size) for width in widths for size in _GROUP_SIZES)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        covariance, notes = shrunk(stats[Covariance].to(layer.original), stats.tokens)
        order = self._order_of(covariance.diagonal())
        inverse = inverse_in_order(covariance, order.inputs, damp=self.damp, cache=stats.cache)
        swept = rounded_sweep(layer.base_reference, inverse, order, grid=self._grid, mask=layer.mask)
        return layer.with_base(swept.part(self.group_size)).with_notes(*notes, *inverse.notes)

    def _order_of(self, second_moment: Tensor) -> Order:
        if self.order == "activation":
            return activation_order(second_moment, group_size=self.group_size)
        if self.order == "input":
            second_moment = torch.zeros_like(second_moment)
        return order_of(second_moment, group_size=self.group_size, pattern=None)
