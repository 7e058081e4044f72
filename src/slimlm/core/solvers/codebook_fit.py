"""Codebooks fitted to numbers: Lloyd's iteration (Lloyd: Least squares quantization in PCM, 1982; k-means of scalars)."""

import torch
from torch import Tensor

from slimlm.core.grid import Grid
from slimlm.core.profiling import profiled

_LLOYD_STEPS = 10


@profiled("codebook")
def fitted_codebook(ratio: Tensor, weights: Tensor, grid: Grid) -> Grid:
    """A codebook for these ratios, with as many values as a grid and less error: Lloyd's iteration (k-means of scalars).

    Each value moves to the weighted mean of the points nearest to it, ten times; a value without points does not move. The
    values are rounded to float16, as they are stored.

    Args:
        ratio: `[points]`, weight / scale.
        weights: `[points]`, by which the squared error of each is multiplied.
        grid: where the iteration starts.

    Returns:
        A grid that is not even, of the bits of `grid`.
    """
    values = grid.values.to(ratio)
    ordered, order = ratio.sort()
    sorted_weights = weights[order].double()
    # Sums of the weights, and of weight x ratio, over the points below each.
    below = torch.nn.functional.pad(torch.stack([sorted_weights, sorted_weights * ordered]).cumsum(dim=1), (1, 0))
    first, last = torch.tensor([[0], [len(ratio)]], device=ratio.device)
    for _ in range(_LLOYD_STEPS):
        cuts = torch.cat([first, torch.searchsorted(ordered, (values[1:] + values[:-1]) / 2), last])
        total, moment = below[:, cuts].diff(dim=1)
        values = torch.where(total > 0, moment / total.clamp_min(1e-30), values).to(ratio).sort().values
    return Grid(values.half().float(), False)
