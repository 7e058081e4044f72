"""The diagonal of the empirical Fisher information: how much the loss feels each weight, to second order.

SqueezeLLM (Kim et al.: SqueezeLLM: Dense-and-Sparse Quantization, arXiv 2306.07629, equation 3) weighs the errors of weights by
it.
"""

from torch import Tensor

from slimlm.core.errors import StatisticError
from slimlm.core.statistics.base import Batch, Mean, Sizes, Source


class Fisher(Mean):
    """`[out, in]`: mean over samples of the squared gradient of a sample's loss."""

    source = Source.GRADIENTS

    @classmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        return sizes.outputs, sizes.inputs

    @classmethod
    def operations(cls, sizes: Sizes) -> float:
        return 2.0 * sizes.outputs * sizes.inputs

    def count(self, tokens: int, length: int) -> int:
        return max(1, tokens // length)

    def of(self, batch: Batch) -> Tensor:
        """The squares of g^T x for each sample's gradients g `[length, out]` and inputs x `[length, in]`, summed."""
        assert batch.output_gradients is not None and batch.samples is not None
        if batch.samples > 1 and len(batch.inputs) != batch.samples * batch.length:
            raise StatisticError(
                f"a layer was given {len(batch.inputs)} of the {batch.samples * batch.length} tokens of {batch.samples} "
                "samples, so that their gradients cannot be told apart; give batches of one sample"
            )
        pieces = [1, len(batch.inputs)] if batch.samples == 1 else [batch.samples, batch.length]
        inputs, gradients = (rows.view(*pieces, -1) for rows in (batch.inputs, batch.output_gradients))
        total = (gradients[0].T @ inputs[0]).square_()
        for x, g in zip(inputs[1:], gradients[1:], strict=True):
            total += (g.T @ x).square_()
        return total
