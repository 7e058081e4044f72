"""AbsMax: the largest magnitude of each tensor, row or group goes on the largest code.

The round-to-nearest baseline of the field. scale = max|w| / (2^(bits-1) - 1); codes -2^(bits-1)+1 .. 2^(bits-1)-1.
Groups run along the input direction, as in GPTQ's and Marlin's kernels (the official SLiM code groups along outputs
by default, which no kernel implements).
"""

from dataclasses import dataclass
from typing import ClassVar

from slimlm.core import grid
from slimlm.core.layer import Layer
from slimlm.core.parts.uniform import Uniform
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.step import StepDefaults


@dataclass(frozen=True)
class AbsMax(StepDefaults):
    """Round to nearest with the scale of the largest weight (tensor, row or group)."""

    bits: int = 4
    group_size: grid.GroupSize = 128
    needs: ClassVar[Needs] = frozenset()

    def __post_init__(self) -> None:
        grid.check_bits(self.bits)
        grid.check_group_size(self.group_size)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        del stats
        target = layer.masked_reference
        sets = grid.scale_sets(target, self.group_size)
        scale = grid.storable(grid.absmax_scale(sets, self.bits).view(grid.scale_shape(layer.shape, self.group_size)))
        codes = grid.encode(target, scale, bits=self.bits, group_size=self.group_size)
        return layer.with_base(Uniform(codes, scale, self.bits, self.group_size))
