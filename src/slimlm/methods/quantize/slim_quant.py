"""SLiM-Quant: one symmetric scale from the distribution of the weights.

Mozaffari, Yazdanbakhsh, Mehri Dehnavi: SLiM: One-shot Quantization and Sparsity with Low-rank Approximation for LLM Weight
Compression, arXiv 2410.09615, section 3.1, equations 3 to 7, Algorithm 1, appendix T.

    scale* = argmin  sum over x of  f(x) (grid(x) - x)^2

f is the distribution of the weights: a histogram for a whole tensor, the weights themselves (one bin each) for a row,
a group or a small tensor; so the probabilistic scale exists at every granularity. Departures, by `search`:

grid    (default) the sum is taken over the very grid that is applied, codes -2^(bits-1) .. 2^(bits-1)-1 with both signs
        of x, and the scan is geometric, so that a single far outlier does not hide the optimum; the
        scale found is then set to the least-squares one for its codes, where that is better.
paper   Algorithm 1 to the letter: cap alpha, step alpha / 2^(bits-1), f of |x| in max(512, min(n/1000, 20000)) bins, ten
        uniform coarse samples over (0, max|x|], ten fine ones around the best. The largest value +alpha, a 17th one at 4
        bits, does not fit in the bits: the largest code is 2^(bits-1)-1.
code    what the authors' program does: alpha estimated with floor at step alpha / 2^bits, every bin of the bracket tried,
        then applied with step alpha / (2^(bits-1)-1). Its empty bracket (when the bins divide by ten and the coarse
        minimum is the last sample), which sends alpha to zero, is not reproduced.

`weigh = "energy"` (with search = "grid", at every granularity) multiplies a weight's squared error by the second moment (mean
square) of its input, so that the error of the layer's output is minimised, as far as inputs do not correlate; the paper
minimises that of the weight ("even", the default).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers.scale_search import search_scales
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.step import StepDefaults


@dataclass(frozen=True)
class SlimQuant(StepDefaults):
    """The scale of least expected squared error under the weights' own distribution."""

    bits: int = 4
    group_size: grid.GroupSize = "per-tensor"
    search: Literal["grid", "paper", "code"] = "grid"
    weigh: Literal["even", "energy"] = "even"
    """what multiplies a weight's squared error: one, or the second moment of its input"""

    def __post_init__(self) -> None:
        grid.check_bits(self.bits)
        grid.check_group_size(self.group_size)
        if self.search != "grid" and self.group_size != "per-tensor":
            raise RecipeError(
                f'search = "{self.search}" is defined for one scale per tensor; '
                f'use group_size = "per-tensor", or search = "grid" with group_size = {self.group_size!r}'
            )
        if self.search != "grid" and self.weigh != "even":
            raise RecipeError(f'search = "{self.search}" does not weigh errors; use weigh = "even", or search = "grid"')

    @property
    def needs(self) -> Needs:
        """Nothing, or the second moments of the inputs."""
        return frozenset({MeanSquare}) if self.weigh == "energy" else frozenset()

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        reference = layer.masked_reference
        second_moment = stats[MeanSquare].to(reference) if self.weigh == "energy" else None
        scale = grid.storable(self.scale_of(reference, second_moment))
        codes = grid.encode(reference, scale, bits=self.bits, group_size=self.group_size)
        return layer.with_base(Uniform(codes, scale, self.bits, self.group_size))

    def scale_of(self, weight: Tensor, second_moment: Tensor | None = None) -> Tensor:
        """The scales that `search` finds.

        Args:
            weight: `[out, in]`.
            second_moment: `[in]`, the mean squares of the inputs, by which squared errors are multiplied; None: by one.

        Returns:
            float32 `[rows, groups]`.
        """
        if self.search == "paper":
            return alpha_of_paper(weight, self.bits).view(1, 1) / 2 ** (self.bits - 1)
        if self.search == "code":
            return alpha_of_code(weight, self.bits).view(1, 1) / grid.top_code(self.bits)
        return search_scales(weight, bits=self.bits, group_size=self.group_size, second_moment=second_moment)


def absolute_histogram(weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """Bin centres and counts `[bins]` of |weight|, and max|weight|; the number of bins is that of appendix T."""
    bins = max(512, min(weight.numel() // 1000, 20000))
    largest = float(weight.abs().max())
    counts = torch.histc(weight.abs(), bins, 0, largest or 1.0)
    centres = (torch.arange(bins, device=weight.device) + 0.5) * ((largest or 1.0) / bins)
    return centres, counts, largest


def alpha_of_paper(weight: Tensor, bits: int) -> Tensor:
    """The cap alpha of Algorithm 1: ten coarse, then ten fine samples of E_quant + E_clip (equations 5 to 7).

    Args:
        weight: `[out, in]`.
        bits: of a code.

    Returns:
        A scalar, `[]`: 2^(bits-1) times the scale.
    """
    centres, counts, largest = absolute_histogram(weight)
    if largest == 0:
        return weight.new_zeros(())
    steps = 2 ** (bits - 1)

    def best(alphas: Tensor) -> Tensor:
        rounded = (centres / alphas[:, None] * steps).round() * alphas[:, None] / steps
        error = torch.where(centres <= alphas[:, None], rounded - centres, alphas[:, None] - centres)
        return alphas[(counts * error.square()).sum(dim=1).argmin()]

    coarse = largest / 10
    low = best(torch.arange(1, 11, device=weight.device) * coarse)
    fine = torch.linspace(-1, 1, 10, device=weight.device) * coarse
    return best((low + fine).clamp_min(largest * 1e-6))


def alpha_of_code(weight: Tensor, bits: int) -> Tensor:
    """The cap alpha as the authors' program estimates it: floor, step alpha / 2^bits, every bin of the best bracket.

    Args:
        weight: `[out, in]`.
        bits: of a code.

    Returns:
        A scalar, `[]`: 2^(bits-1) - 1 times the scale.
    """
    centres, counts, largest = absolute_histogram(weight)
    if largest == 0:
        return weight.new_zeros(())
    bins = len(centres)

    def costs(indices: Tensor) -> Tensor:
        alpha = centres[indices][:, None]
        step = alpha / 2**bits
        floor = (centres / step).floor() * step
        error = torch.where(torch.arange(bins, device=weight.device) < indices[:, None], floor - centres, alpha - centres)
        return (counts * error.square()).sum(dim=1)

    stride = bins // 10
    coarse = torch.arange(stride, bins, stride, device=weight.device)
    low = int(coarse[costs(coarse).argmin()])
    bracket = torch.arange(max(1, low - stride), min(bins, low + stride), device=weight.device)
    cost = torch.cat([costs(piece) for piece in bracket.split(256)])
    return centres[bracket[cost.argmin()]]
