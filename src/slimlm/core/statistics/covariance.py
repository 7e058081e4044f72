"""The covariance of the inputs (uncentred), which the papers on GPTQ and SparseGPT call the Hessian (arXiv 2210.17323)."""

import torch
from torch import Tensor

from slimlm.core.statistics.base import Batch, Mean, Sizes

_COLUMNS_AT_ONCE = 512


class Covariance(Mean):
    """`[in, in]`: mean of x^T x."""

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return sizes.inputs, sizes.inputs

    @classmethod
    def operations(cls, sizes: Sizes) -> float:
        # Of a symmetric product half is enough, in stripes somewhat more.
        return 1.5 * sizes.inputs**2

    def of(self, batch: Batch) -> Tensor:
        """X^T X for X `[tokens, in]`: a stripe at a time from its diagonal on, the rest by symmetry."""
        rows, width = batch.inputs, batch.inputs.shape[1]
        square = torch.empty(width, width, dtype=rows.dtype, device=rows.device)
        for low in range(0, width, _COLUMNS_AT_ONCE):
            high = min(low + _COLUMNS_AT_ONCE, width)
            torch.matmul(rows[:, low:high].T, rows[:, low:], out=square[low:high, low:])
            square[high:, low:high] = square[low:high, high:].T
        return square
