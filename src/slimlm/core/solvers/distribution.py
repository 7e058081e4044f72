"""Fewer numbers in place of very many: a histogram, for a search that looks at each number for every candidate."""

import math

import torch
from torch import Tensor

from slimlm.core.errors import NumericsError
from slimlm.core.profiling import profiled
from slimlm.kernels import compression

_FEW = 2**15
"""Points of a set up to which `distribution` returns them unchanged."""
_BINS = 2**15


@profiled("scale search")
def distribution(sets: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fewer points and weights in place of large sets: a histogram of 32768 bins for each set of more numbers than that.

    The outermost points of a histogram are the exact extreme, with either sign.

    Args:
        sets: `[sets, size]`.
        weights: `[sets, size]`, by which the squared error of each number is multiplied; ones if left out.

    Returns:
        Points and weights, both `[sets, points]`.
    """
    if sets.shape[1] <= _FEW:
        return sets, torch.ones_like(sets) if weights is None else weights
    rows = [_histogram(row, None if weights is None else weights[i]) for i, row in enumerate(sets)]
    return torch.stack([points for points, _ in rows]), torch.stack([w for _, w in rows])


def _histogram(values: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    largest = max(map(abs, map(float, values.aminmax())))
    if not math.isfinite(largest):
        raise NumericsError("weights or what is made of them hold NaN or infinity")
    if largest == 0:
        return values.new_zeros(_BINS), values.new_ones(_BINS)
    width = 2 * largest / _BINS
    if compression.takes(values, *([] if weights is None else [weights])):
        total = compression.histogram(values, weights, low=-largest, width=width, bins=_BINS).to(values)
    elif weights is None:
        total = torch.histc(values, _BINS, -largest, largest)
    else:
        bins = ((values + largest) / width).long().clamp(0, _BINS - 1)
        total = _weights_of_bins(bins, weights).to(values)
    points = (torch.arange(_BINS, device=values.device) + 0.5) * width - largest
    points[0], points[-1] = -largest, largest
    return points, total


def _weights_of_bins(bins: Tensor, weights: Tensor) -> Tensor:
    """The sum of the weights in each bin, float64 `[bins]`.

    A GPU adds floats in no fixed order, so there they are added as integers, multiples of a unit so small that their sum takes
    62 bits: the order then changes nothing.
    """
    if bins.device.type == "cpu":
        return torch.bincount(bins, weights, minlength=_BINS).double()
    unit = weights.amax().double().clamp_min(1e-30) * 2.0 ** (len(bins).bit_length() - 62)
    integers = (weights.double() / unit).round_().long()
    return torch.zeros(_BINS, dtype=torch.long, device=bins.device).index_add_(0, bins, integers).double() * unit
