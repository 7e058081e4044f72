"""Wanda: prune by weight times activation norm.

Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models, arXiv 2306.11695, equation 1:

    score_ij = |W_ij| ||x_j||_2        compared within each row (or each n:m group of a row)

Departure: ||x_j||_2 is the root mean square over tokens, which differs by a factor that all inputs share. W, by `score`:

working   (default) the weight decided so far: after a quantizer the rounded one ("prune W^Q", SLiM section 3).
original  the model's own weight, even after a quantizer, as the authors of SLiM do in their program.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from slimlm.core.layer import Layer
from slimlm.core.mask import Pattern, choose
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.step import StepDefaults


@dataclass(frozen=True)
class Wanda(StepDefaults):
    """Keep the weights of largest |weight| x input norm."""

    pattern: str | float = "2:4"
    score: Literal["working", "original"] = "working"
    needs: ClassVar[Needs] = frozenset({MeanSquare})
    weight_copies: ClassVar[int] = 6

    def __post_init__(self) -> None:
        _ = self.sparsity  # refuses what is no pattern

    @property
    def sparsity(self) -> Pattern:
        """The pattern of the mask."""
        return Pattern.parse(self.pattern)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        norm = stats[MeanSquare].to(layer.original).sqrt()
        weight = layer.original if self.score == "original" else layer.base_weight
        return layer.with_mask(choose(weight.abs() * norm, self.sparsity), str(self.pattern))
