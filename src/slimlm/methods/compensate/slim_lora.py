"""SLiM-LoRA: the closed-form low-rank adapter under activation saliency.

Mozaffari, Yazdanbakhsh, Dehnavi: SLiM, arXiv 2410.09615, section 3.2, equations 9 to 11, Algorithm 2.

    L R = argmin || diag(x) (W - W^C - L R) ||_F        x = saliency of the input channels, W^C the base

computed as the leading eigenvectors of E H E^T with H = diag(x^2) (slimlm.core.solvers.linalg): the same optimum as Algorithm
2's whitened SVD, without the division by x and so without its shift. Departures, by option:

saliency  "rms": sqrt(mean x^2), the least-squares choice and what the authors' program uses.
          "mean_abs": mean |x|, what the paper's text uses.
shift     add the statistic's smallest positive value to all channels, as the paper and the program do to avoid zeros
          (to mean |x| in the paper, to mean x^2 in the program). Not needed here; kept for reproduction.

At 16 bits `group_size` and `refit` have nothing to act on: they concern rounded factors.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from slimlm.core.layer import Layer, Need, Stats, measured
from slimlm.core.solvers.low_rank import AdapterBits, AdapterFormat, low_rank_part


@dataclass(frozen=True)
class SlimLora:
    """Low-rank repair of the joint error of pruning and rounding, weighted by activation saliency."""

    rank: float = 0.1
    bits: AdapterBits = 4
    group_size: int = 128
    refit: bool = True
    saliency: Literal["rms", "mean_abs"] = "rms"
    shift: bool = False

    def __post_init__(self) -> None:
        AdapterFormat(self.rank, self.bits, self.group_size, self.refit)

    @property
    def needs(self) -> Need:
        """The one statistic that the saliency is made of."""
        return Need.MEAN_SQUARE if self.saliency == "rms" else Need.MEAN_ABS

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        form = AdapterFormat(self.rank, self.bits, self.group_size, self.refit)
        part = low_rank_part(layer.residual, self.energy(stats).to(layer.original), form)
        return layer if part is None else layer.with_adapter(part)

    def energy(self, stats: Stats) -> Tensor:
        """The weights x^2 `[in]` of the norm."""
        if self.saliency == "rms":
            return _shifted(measured(stats.mean_square), self.shift)
        return _shifted(measured(stats.mean_abs), self.shift).square()


def _shifted(statistic: Tensor, shift: bool) -> Tensor:
    positive = statistic[statistic > 0]
    return statistic + positive.min() if shift and positive.numel() else statistic
