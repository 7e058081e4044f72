"""The largest mean magnitude of each input over the samples, as L2QER needs it (arXiv 2402.02446)."""

from torch import Tensor

from slimlm.core.statistics.base import Batch, Largest, Sizes, Source


class PeakMeanAbs(Largest):
    """`[in]`: the largest over the calibration samples of a sample's mean |x_j|."""

    source = Source.SAMPLES

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.inputs,)

    def of(self, batch: Batch) -> Tensor:
        return batch.inputs.abs().view(-1, batch.length, batch.inputs.shape[1]).mean(dim=1).amax(dim=0)
