"""L2QER: low-rank repair weighted by peak mean activation magnitudes.

Zhang, Cheng, Constantinides, Zhao: LQER, arXiv 2402.02446, section 3.2 (the variant with activation-induced scale).

    a_j = max over calibration windows of mean |x_j|;  s_j = max(a_j, 1e-4) / sqrt(min a x max a);  L R = SVD_r(diag(s) E)

`only_rounding` repairs the rounding of the weights that stay and not the pruning, which is how SLiM's tables apply it
after Wanda; without it the whole error is repaired. The authors store 16-bit factors.

At 16 bits `group_size` and `refit` have nothing to act on: they concern rounded factors.
"""

from dataclasses import dataclass
from typing import ClassVar

from slimlm.core.layer import Layer, Need, Stats, measured
from slimlm.core.solvers.low_rank import AdapterBits, AdapterFormat, low_rank_part


@dataclass(frozen=True)
class L2qer:
    """Low-rank repair weighted by each input's largest mean magnitude (L2QER)."""

    rank: float = 0.1
    bits: AdapterBits = 16
    group_size: int = 128
    refit: bool = True
    only_rounding: bool = False
    needs: ClassVar[Need] = Need.PEAK_MEAN_ABS

    def __post_init__(self) -> None:
        AdapterFormat(self.rank, self.bits, self.group_size, self.refit)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        form = AdapterFormat(self.rank, self.bits, self.group_size, self.refit)
        peak = measured(stats.peak_mean_abs).to(layer.original).clamp_min(1e-4)
        scale = peak / (peak.min() * peak.max()).sqrt()
        # The residual counts no adapter that is there already: it will be replaced.
        error = layer.residual * layer.mask if self.only_rounding and layer.mask is not None else layer.residual
        part = low_rank_part(error, scale.square(), form)
        return layer if part is None else layer.with_adapter(part)
