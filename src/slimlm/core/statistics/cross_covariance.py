"""The covariance of a layer's inputs with those it has in the original model, for asymmetric calibration (arXiv 2504.02692)."""

from torch import Tensor

from slimlm.core.statistics.base import Batch, Mean, Sizes, Source


class CrossCovariance(Mean):
    """`[in, in]`: mean of z^T x, where z are the inputs that the layer has in the original model."""

    source = Source.ORIGINAL_INPUTS

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return sizes.inputs, sizes.inputs

    @classmethod
    def operations(cls, sizes: Sizes) -> float:
        return 2.0 * sizes.inputs**2

    def of(self, batch: Batch) -> Tensor:
        assert batch.original_inputs is not None
        return batch.original_inputs.T @ batch.inputs
