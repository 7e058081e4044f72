"""The largest magnitude of each input, as SmoothQuant needs it (arXiv 2211.10438)."""

from torch import Tensor

from slimlm.core.statistics.base import Batch, Largest, Sizes


class PeakAbs(Largest):
    """`[in]`: the largest |x_j|."""

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.inputs,)

    def of(self, batch: Batch) -> Tensor:
        return batch.inputs.abs().amax(dim=0)
