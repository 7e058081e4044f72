"""Magnitude pruning: the smallest weights of each group or row go.

Han, Pool, Tran, Dally: Learning both Weights and Connections for Efficient Neural Networks, arXiv 1506.02626, section 3. The
oldest baseline. Departures: weights are compared within each n:m group or each row, because every row is stored with equally
many weights (the paper: one threshold per layer), and nothing is trained again. The score is the magnitude of the weight as
decided so far: the rounded one after a quantizer, else the original.
"""

from dataclasses import dataclass
from typing import ClassVar

from slimlm.core.layer import Layer
from slimlm.core.mask import Pattern, choose
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.step import StepDefaults


@dataclass(frozen=True)
class Magnitude(StepDefaults):
    """Keep the weights of largest magnitude."""

    pattern: str | float = "2:4"
    needs: ClassVar[Needs] = frozenset()
    weight_copies: ClassVar[int] = 6

    def __post_init__(self) -> None:
        _ = self.sparsity  # refuses what is no pattern

    @property
    def sparsity(self) -> Pattern:
        """The pattern of the mask."""
        return Pattern.parse(self.pattern)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        del stats
        return layer.with_mask(choose(layer.base_weight.abs(), self.sparsity), str(self.pattern))
