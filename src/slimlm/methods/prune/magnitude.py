"""Magnitude pruning: the smallest weights of each group or row go.

The oldest baseline (Han et al., arXiv 1506.02626), here per n:m group or per row. It scores the weight as decided so
far: the rounded one after a quantizer, else the original.
"""

from dataclasses import dataclass
from typing import ClassVar

from slimlm.core.layer import Layer, Need, Stats
from slimlm.core.mask import Pattern, choose


@dataclass(frozen=True)
class Magnitude:
    """Keep the weights of largest magnitude."""

    pattern: str | float = "2:4"
    needs: ClassVar[Need] = Need.NOTHING

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        del stats
        return layer.with_mask(choose(layer.base_weight.abs(), Pattern.parse(self.pattern)), str(self.pattern))
