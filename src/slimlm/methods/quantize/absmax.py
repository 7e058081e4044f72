"""AbsMax: the largest magnitude of each tensor, row or group goes on the largest code.

The round-to-nearest baseline, which is older than any paper on language models.

    scale = max|w| / (2^(bits-1) - 1);    code = round(w / scale), from -2^(bits-1)+1 to 2^(bits-1)-1

Groups run along the inputs, as in GPTQ's and Marlin's kernels. (The official program of SLiM, arXiv 2410.09615, groups along
the outputs by default, which no kernel implements.)
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
        reference = layer.masked_reference
        sets = grid.scale_sets(reference, self.group_size)
        scale = grid.storable(grid.absmax_scale(sets, self.bits).view(grid.scale_shape(layer.shape, self.group_size)))
        codes = grid.encode(reference, scale, bits=self.bits, group_size=self.group_size)
        return layer.with_base(Uniform(codes, scale, self.bits, self.group_size))
