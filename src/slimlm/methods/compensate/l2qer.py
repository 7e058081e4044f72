"""L2QER: low-rank repair weighted by peak mean activation magnitudes.

Zhang, Cheng, Constantinides, Zhao: LQER, arXiv 2402.02446, section 3.2 (the variant with activation-induced scale).

    a_j = max over calibration windows of mean |x_j|;  s_j = max(a_j, 1e-4) / sqrt(min a x max a);  L R = SVD_r(diag(s) E)

`only_rounding` repairs the rounding of the weights that stay and not the pruning, which is how SLiM's tables apply it
after Wanda; without it the whole error is repaired. The authors store 16-bit factors.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slimlm.core.compensator import Compensator
from slimlm.core.layer import Layer
from slimlm.core.solvers.low_rank import AdapterBits
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.peak_mean_abs import PeakMeanAbs


@dataclass(frozen=True)
class L2qer(Compensator):
    """Low-rank repair weighted by each input's largest mean magnitude (L2QER)."""

    bits: AdapterBits = 16
    only_rounding: bool = False
    needs: ClassVar[Needs] = frozenset({PeakMeanAbs})

    def second_moment(self, layer: Layer, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """s_j^2 `[in]`."""
        peak = stats[PeakMeanAbs].to(layer.original).clamp_min(1e-4)
        return (peak / (peak.min() * peak.max()).sqrt()).square(), ()

    def residual(self, layer: Layer) -> Tensor:
        """The error `[out, in]`, or only that of the weights that stay."""
        # Against the original, not the target: a repair that is there already will be replaced, so it does not count.
        return layer.residual * layer.mask if self.only_rounding and layer.mask is not None else layer.residual
