"""L2QER: a low-rank adapter weighted by peak mean activation magnitudes.

Zhang, Cheng, Constantinides, Zhao: LQER: Low-Rank Quantization Error Reconstruction for LLMs, arXiv 2402.02446,
section 3.2 (the variant with activation-induced scale; E is the error `[out, in]`, r the rank).

    a_j = max over calibration samples of mean |x_j|;    s_j = max(a_j, 1e-4) / sqrt(min a x max a)
    L R = SVD_r(E diag(s)) diag(s)^-1

Departure: `only_rounding` fits the adapter to the rounding error of the weights that stay and not to the pruning error, because
SLiM's tables apply L2QER after Wanda that way; without it the adapter is fitted to both. The authors store 16-bit factors, as
is the default here.
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
    """A low-rank adapter weighted by each input's largest mean magnitude (L2QER)."""

    bits: AdapterBits = 16
    only_rounding: bool = False
    """fit the rounding error of the weights that stay, and not the pruning error"""
    needs: ClassVar[Needs] = frozenset({PeakMeanAbs})

    def second_moment(self, layer: Layer, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """s_j^2 `[in]`."""
        peak = stats[PeakMeanAbs].to(layer.original).clamp_min(1e-4)
        return (peak / (peak.min() * peak.max()).sqrt()).square(), ()

    def residual(self, layer: Layer) -> Tensor:
        """The error `[out, in]`, or only that of the weights that stay."""
        # An adapter that is there already will be replaced, so it is not subtracted.
        return layer.residual * layer.mask if self.only_rounding and layer.mask is not None else layer.residual
