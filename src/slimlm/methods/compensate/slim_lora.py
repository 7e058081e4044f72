"""SLiM-LoRA: the closed-form low-rank adapter under activation saliency.

Mozaffari, Yazdanbakhsh, Mehri Dehnavi: SLiM: One-shot Quantization and Sparsity with Low-rank Approximation for LLM Weight
Compression, arXiv 2410.09615, section 3.2, equations 9 to 11, Algorithm 2.

    L R = argmin || diag(x) (W - W^C - L R) ||_F        x = saliency of the input channels, W^C the base

computed as the leading eigenvectors of E H E^T with H = diag(x^2) (slimlm.core.solvers.linalg): the same optimum as Algorithm
2's whitened SVD, without the division by x and so without its shift. Departures, by option:

saliency  "rms": sqrt(mean x^2), the least-squares choice and what the authors' program uses.
          "mean_abs": mean |x|, what the paper's text uses.
shift     add the statistic's smallest positive value to all channels, as the paper and the program do to avoid zeros
          (to mean |x| in the paper, to mean x^2 in the program). Not needed here; kept for reproduction.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from slimlm.core.compensator import Compensator
from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.mean_abs import MeanAbs
from slimlm.core.statistics.mean_square import MeanSquare


@dataclass(frozen=True)
class SlimLora(Compensator):
    """A low-rank adapter for the joint error of pruning and rounding, weighted by activation saliency."""

    saliency: Literal["rms", "mean_abs"] = "rms"
    shift: bool = False

    @property
    def needs(self) -> Needs:
        """The one statistic that the saliency is made of."""
        return frozenset({MeanSquare if self.saliency == "rms" else MeanAbs})

    def second_moment(self, layer: Layer, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """x^2 `[in]`."""
        if self.saliency == "rms":
            moment = _shifted(stats[MeanSquare], self.shift)
        else:
            moment = _shifted(stats[MeanAbs], self.shift).square()
        return moment.to(layer.original), ()


def _shifted(statistic: Tensor, shift: bool) -> Tensor:
    positive = statistic[statistic > 0]
    return statistic + positive.min() if shift and positive.numel() else statistic
