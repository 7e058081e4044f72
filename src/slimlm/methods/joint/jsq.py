"""JSQ: prune by weight, input norm and the range of the output without the weight; then round smoothed weights.

Guo, Wu, Wang, Liu, Yang, Ding, Gong, Qin, Liu: Compressing Large Language Models by Joint Sparsification and Quantization,
ICML 2024 (PMLR 235, pages 16945 to 16957; no arXiv number). A baseline of SLiM's tables, which extend it from 8 to 4 bits. The
formulas are those of the two programs; the paper's equation numbers were not at hand.

    score_oi = |W_oi| ||x_i||_2 + rho ss_oi           ss_oi = max_t r_t - min_t r_t,   r_t = sum over j != i of W_oj a_tj
    s_i = max|x_i|^alpha / max_o|W_oi|^(1 - alpha)    of the weights that stay (SmoothQuant, 2211.10438, equation 4)

a `[length, in]` is the mean over the calibration samples of the inputs at each position t; ||x_i||_2 is that of one sample
(root mean square over samples), which sets the balance with rho. W s is rounded by AbsMax, and 1 / s is stored per input.

alpha = 0 still evens out the weights' columns, and alpha = 1 the inputs; no value turns smoothing off. Departures:

- clip  The programs cap each sample's inputs at their top 1 % in magnitude before anything is measured. Here the measured
        statistics are capped instead, each at its own top share `clip`: a over positions and inputs, ||x_i|| and max|x_i|
        over inputs (the least of that share is the cap: of fewer than 2 / clip inputs none changes).
- Activations are not rounded. Smoothing then only moves precision to the inputs that are large.
- The programs fold s into the norm before q, k, v and before the first linear layers of the MLP, one s for those that share an
  input. Here every layer has its own, stored with it and undone by the part itself.
- A factor that all of s share changes nothing: its geometric mean is 1 here, and 1 / s stays in float16's normal range (the
  programs: s >= 1e-5). Inputs that are always zero, or of which no weight stays, have s = 1.
- The maxima are over all samples (the programs keep the last sample's, by a misspelled key), and the next block is measured
  on the outputs of the finished one (the programs: pruned, not yet smoothed and rounded).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.chunks import at_once
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.uniform import Uniform
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.mean_sample import MeanSample
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.statistics.peak_abs import PeakAbs
from slimlm.core.step import StepDefaults


@dataclass(frozen=True)
class Jsq(StepDefaults):
    """Prune by input norm and output range; round the weights that stay, smoothed (SmoothQuant)."""

    bits: int = 4
    group_size: grid.GroupSize = 128
    pattern: str | float = "2:4"
    rho: float = 2.1
    alpha: float = 0.5
    clip: float = 0.01
    needs: ClassVar[Needs] = frozenset({MeanSquare, PeakAbs, MeanSample})
    weight_copies: ClassVar[int] = 14
    covariance_copies: ClassVar[int] = 14

    def __post_init__(self) -> None:
        grid.check_bits(self.bits)
        grid.check_group_size(self.group_size)
        _ = self.sparsity  # refuses what is no pattern
        if not 0 <= self.rho < math.inf:
            raise RecipeError(f"rho = {self.rho}: give the weight of the output's range in the score, 0 or more")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"alpha = {self.alpha}: give an exponent from 0 (even weights) to 1 (even inputs)")
        if not 0 <= self.clip < 1:
            raise RecipeError(f"clip = {self.clip}: give the share of a statistic to cap, from 0 up to but not including 1")

    @property
    def sparsity(self) -> Pattern:
        """The pattern of the mask."""
        return Pattern.parse(self.pattern)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        reference = layer.masked_reference
        mask = choose(self.score(reference, stats), self.sparsity)
        masked = reference * mask
        peak = capped(stats[PeakAbs].to(reference), self.clip)
        inverse = inverse_smoothing(masked, peak, alpha=self.alpha)
        # The stored inverse, not s itself, so that file and codes agree.
        smooth = masked / inverse.float()
        largest = grid.absmax_scale(grid.scale_sets(smooth, self.group_size), self.bits)
        scale = grid.storable(largest.view(grid.scale_shape(layer.shape, self.group_size)))
        codes = grid.encode(smooth, scale, bits=self.bits, group_size=self.group_size)
        base = Uniform(codes, scale, self.bits, self.group_size, inverse)
        return layer.with_mask(mask, str(self.pattern)).with_base(base)

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        """The score `[out, in]` of each weight `[out, in]`; the larger stays."""
        sample = stats[MeanSample].to(weight)
        norm = capped((len(sample) * stats[MeanSquare].to(weight)).sqrt(), self.clip)
        return weight.abs() * norm + self.rho * ranges_without(weight, capped(sample, self.clip))


def capped(statistic: Tensor, share: float) -> Tensor:
    """The statistic with its largest magnitudes cut down to the least of them.

    Args:
        statistic: any shape.
        share: how many of its entries are the largest, as a share.

    Returns:
        Of the shape of `statistic`, e.g. `[in]`.
    """
    count = int(share * statistic.numel())
    if count == 0:
        return statistic
    limit = float(statistic.abs().flatten().topk(count).values[-1])
    return statistic.clamp(-limit, limit)


def inverse_smoothing(weight: Tensor, peak: Tensor, *, alpha: float) -> Tensor:
    """1 / s of SmoothQuant (arXiv 2211.10438, equation 4).

    Args:
        weight: `[out, in]`, zero where the mask drops a weight.
        peak: `[in]`, max |x|.
        alpha: 0 evens out the weights' columns, 1 the inputs.

    Returns:
        float16 `[in]`, of geometric mean 1.
    """
    largest = weight.abs().amax(dim=0)
    live = (peak > 0) & (largest > 0)
    # float64, so that the constant factor below is taken out to the last bit of float16.
    exponent = (1 - alpha) * largest.double().log2() - alpha * peak.double().log2()
    exponent = torch.where(live, exponent, 0.0)
    exponent = torch.where(live, exponent - exponent.sum() / live.sum().clamp_min(1), 0.0)
    # 2^-14 is the smallest normal number of float16, 2^15 the largest power of two.
    return exponent.clamp(-14, 15).exp2().to(torch.float16)


_ELEMENTS_AT_ONCE = 2**17
"""512 KiB in float32, about what a CPU core's cache holds."""


def ranges_without(weight: Tensor, sample: Tensor) -> Tensor:
    """The largest less the smallest value of output o over a sample's positions, input i left out.

    Cost: length x out x in operations, taken in pieces, so that only one piece takes memory.

    Args:
        weight: `[out, in]`.
        sample: `[length, in]`.

    Returns:
        `[out, in]`.
    """
    length, width = sample.shape
    most = at_once(_ELEMENTS_AT_ONCE, weight.device)
    columns = max(1, min(width, most // length))
    rows = max(1, most // (length * columns))
    inputs = sample.T.contiguous()
    output = weight @ inputs
    pieces = zip(weight.split(rows), output.split(rows), strict=True)
    return torch.cat([_ranges_of_rows(w, y, inputs, columns) for w, y in pieces])


def _ranges_of_rows(weight: Tensor, output: Tensor, inputs: Tensor, columns: int) -> Tensor:
    pieces = []
    for w, x in zip(weight.split(columns, dim=1), inputs.split(columns), strict=True):
        rest = torch.addcmul(output[:, None], w[..., None], x, value=-1)  # [rows, columns, length]
        pieces.append(rest.amax(dim=-1) - rest.amin(dim=-1))
    return torch.cat(pieces, dim=1)
