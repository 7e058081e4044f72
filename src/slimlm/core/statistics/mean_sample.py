"""The mean over the samples at each position, as JSQ needs it for the range of a layer's outputs."""

import torch
from torch import Tensor

from slimlm.core.statistics.base import Batch, Mean, Sizes, Source


class MeanSample(Mean):
    """`[length, in]`: mean of x over the calibration samples at each of their positions."""

    source = Source.SAMPLES

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return sizes.length, sizes.inputs

    def of(self, batch: Batch) -> Tensor:
        return batch.inputs.view(-1, batch.length, batch.inputs.shape[1]).sum(dim=0, dtype=torch.float64)

    def count(self, tokens: int, length: int) -> int:
        return tokens // length
