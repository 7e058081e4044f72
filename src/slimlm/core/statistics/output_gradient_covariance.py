"""The covariance of the gradients at a layer's outputs: which directions of its outputs the loss feels.

With the covariance of the inputs it makes the Kronecker-factored curvature of the loss (Martens, Grosse: Optimizing Neural
Networks with Kronecker-factored Approximate Curvature, arXiv 1503.05671).
"""

from torch import Tensor

from slimlm.core.statistics.base import Batch, Mean, Sizes, Source


class OutputGradientCovariance(Mean):
    """`[out, out]`: mean over tokens of g^T g, g being the gradient of a sample's loss at the layer's outputs."""

    source = Source.GRADIENTS

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return sizes.outputs, sizes.outputs

    @classmethod
    def operations(cls, sizes: Sizes) -> float:
        return 2.0 * sizes.outputs**2

    def of(self, batch: Batch) -> Tensor:
        assert batch.output_gradients is not None
        return batch.output_gradients.T @ batch.output_gradients
