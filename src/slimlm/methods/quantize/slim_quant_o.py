"""SLiM-Quant^O: the activation-aware variant.

Mozaffari, Yazdanbakhsh, Mehri Dehnavi: SLiM: One-shot Quantization and Sparsity with Low-rank Approximation for LLM Weight
Compression, arXiv 2410.09615, section 3.1 (Table 6).

The share `salient` of input channels with the largest product of mean |x_j| and mean |w_.j| is multiplied by `boost`
before rounding and divided after it; the scale itself is that of the weights before the multiplication. Departure: the authors
emulate the division; here its factor is stored as one float16 per input channel, counted, and applied by the part itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from slimlm.core import grid
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers.scale_search import search_scales
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.mean_abs import MeanAbs
from slimlm.core.step import StepDefaults


@dataclass(frozen=True)
class SlimQuantO(StepDefaults):
    """SLiM-Quant with the most salient input channels rounded on a finer grid."""

    bits: int = 4
    salient: float = 0.01
    boost: float = 2.0
    needs: ClassVar[Needs] = frozenset({MeanAbs})

    def __post_init__(self) -> None:
        grid.check_bits(self.bits)
        if not 0 < self.salient < 1 or not 1 < self.boost <= 1 / grid.FP16_SMALLEST_NORMAL:
            raise RecipeError(
                f"salient = {self.salient}, boost = {self.boost}: salient is a share of the inputs between 0 and 1, "
                "boost a factor above 1 and up to 16384"
            )

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        reference = layer.masked_reference
        scale = grid.storable(search_scales(reference, bits=self.bits, group_size="per-tensor"))
        saliency = stats[MeanAbs].to(reference) * reference.abs().mean(dim=0)
        count = max(1, int(self.salient * reference.shape[1]))
        inverse = torch.ones_like(saliency, dtype=torch.float16)
        inverse[saliency.topk(count).indices] = 1 / self.boost
        # The stored inverse, not the boost itself, so that file and codes agree where 1 / boost is not exact in float16.
        codes = grid.encode(reference / inverse.float(), scale, bits=self.bits, group_size="per-tensor")
        return layer.with_base(Uniform(codes, scale, self.bits, "per-tensor", inverse))
