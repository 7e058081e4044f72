"""The mean magnitude of each input: the saliency of SLiM's text (arXiv 2410.09615)."""

import torch
from torch import Tensor

from slimlm.core.statistics.base import Batch, Mean, Sizes


class MeanAbs(Mean):
    """`[in]`: mean of |x_j|."""

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.inputs,)

    def of(self, batch: Batch) -> Tensor:
        return batch.inputs.abs().sum(dim=0, dtype=torch.float64)
