"""What a block's outputs lack of the original block's, against the inputs of a layer that is added to them."""

from torch import Tensor

from slimlm.core.statistics.base import Batch, Mean, Sizes, Source


class OutputResidualCovariance(Mean):
    """`[out, in]`: mean of d^T x, where d is what the block's output lacks of the original block's."""

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
