"""The covariance of the residuals of a block's outputs with the inputs of a layer whose output is added to them.

Asymmetric calibration needs it (arXiv 2504.02692, there for the layer's own outputs).
"""

from torch import Tensor

from slimlm.core.statistics.base import Batch, Mean, Sizes, Source


class OutputResidualCovariance(Mean):
    """`[out, in]`: mean of d^T x, where d is the original block's output less the block's."""

    source = Source.OUTPUT_RESIDUALS

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return sizes.outputs, sizes.inputs

    @classmethod
    def operations(cls, sizes: Sizes) -> float:
        return 2.0 * sizes.outputs * sizes.inputs

    def of(self, batch: Batch) -> Tensor:
        assert batch.output_residuals is not None
        return batch.output_residuals.T @ batch.inputs
