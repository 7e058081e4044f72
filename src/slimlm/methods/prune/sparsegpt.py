"""SparseGPT: prune input by input, the later inputs compensating each pruned weight.

Frantar, Alistarh: SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot, arXiv 2301.00774, equations 3 and 4,
sections 3.3 and 3.4 (slimlm.core.solvers.sweep).

Of every m inputs (for a share of each row, of every 128 or so) the weights of least w^2 / [U]_jj^2 go, U the factor of the
inverse covariance, and the weights to come are updated. What stays is therefore not the original weight: later steps code the
updated weights. Departures: fours of inputs are taken by falling second moment (mean square) of the input, like GPTQ's
act-order (`order = "energy"`), and a share is dropped from each row of a block, not from the block as a whole, because rows are
stored with equally many weights; the covariance of few tokens is shrunk toward its diagonal.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from slimlm.core.layer import Layer
from slimlm.core.mask import Pattern
from slimlm.core.solvers.inverse import check_damp, inverse_in_order, shrunk
from slimlm.core.solvers.order import order_of
from slimlm.core.solvers.sweep import unrounded_sweep
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.step import StepDefaults


@dataclass(frozen=True)
class SparseGpt(StepDefaults):
    """Prune with error feedback under the covariance of the inputs."""

    pattern: str | float = "2:4"
    order: Literal["energy", "input"] = "energy"
    """of the inputs in the sweep: by falling second moment, or as they come"""
    damp: float = 0.01
    needs: ClassVar[Needs] = frozenset({Covariance})
    weight_copies: ClassVar[int] = 6
    moves_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _ = self.sparsity  # refuses what is no pattern
        check_damp(self.damp)

    @property
    def sparsity(self) -> Pattern:
        """The pattern of the mask."""
        return Pattern.parse(self.pattern)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        covariance, notes = shrunk(stats[Covariance].to(layer.original), stats.tokens)
        second_moment = covariance.diagonal() if self.order == "energy" else covariance.new_zeros(len(covariance))
        order = order_of(second_moment, group_size="per-channel", pattern=self.sparsity)
        inverse = inverse_in_order(covariance, order.inputs, damp=self.damp, cache=stats.cache)
        swept = unrounded_sweep(layer.base_weight, inverse, order, pattern=self.sparsity)
        assert swept.mask is not None
        pruned = layer.with_mask(swept.mask, str(self.pattern)).with_updated_weight(swept.value)
        return pruned.with_notes(*notes, *inverse.notes)
