"""The mean square of each input: the diagonal of the covariance, as Wanda needs it (arXiv 2306.11695)."""

import torch
from torch import Tensor

from slimlm.core.statistics.base import Batch, Mean, Sizes


class MeanSquare(Mean):
    """`[in]`: mean of x_j^2."""

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.inputs,)

    def of(self, batch: Batch) -> Tensor:
        return batch.inputs.square().sum(dim=0, dtype=torch.float64)
