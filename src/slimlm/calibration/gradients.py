"""Statistics that are made of a loss's gradients at the outputs of layers, measured in one backward pass."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from slimlm.calibration.backward import BlockBackward, KeptInputs
from slimlm.calibration.measurement import LayerTotals
from slimlm.core.errors import ModelError
from slimlm.core.statistics.base import Batch, Needs, Source, Stats
from slimlm.models.structure import linears_of


def gradient_statistics(
    kept: KeptInputs, gradients: Sequence[Tensor], needs: Needs, ignores: Callable[[str], bool]
) -> Iterator[tuple[str, dict[str, Stats]]]:
    """The statistics of each block's layers, by the layer's name within it, from the last block to the first.

    A layer that no token was given, as an expert may be, has none.

    Args:
        kept: The inputs of all blocks.
        gradients: The gradient, at the last block's outputs, of the sum of the samples' losses, `[samples, length, width]` per
            batch.
        needs: The statistics; their source is the gradients.
        ignores: The layers that are left out, by full name.

    Raises:
        ModelError: A layer is used twice in a block.
        StatisticError: A statistic of whole samples, for an expert, with several samples in a batch.
        NumericsError: A gradient is not finite.
    """
    assert all(own.source is Source.GRADIENTS for own in needs), "other statistics are measured in a forward pass"
    for here in kept.reverse(gradients):
        length = here.inputs[0].shape[1]
        names = [layer for layer in linears_of(here.block) if not ignores(f"{here.name}.{layer}")]
        totals = {layer: LayerTotals(needs, length, f"{here.name}.{layer}") for layer in names}
        with _watched(here, names) as seen:
            for number in here.batches:
                for layer, (x, gradient) in seen.items():
                    rows = x.flatten(0, -2), gradient.flatten(0, -2)
                    totals[layer].include(Batch(rows[0], length, output_gradients=rows[1], samples=len(here.inputs[number])))
                seen.clear()
        yield here.name, {layer: own.stats(here.chain.device) for layer, own in totals.items() if own.tokens}


@contextmanager
def _watched(here: BlockBackward, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Within this context every backward pass of the block notes the inputs and output gradients of these layers."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(layer: str, x: Tensor, gradient: Tensor) -> None:
        if layer in seen:
            raise ModelError(
                f"{here.name}.{layer} is used twice in its block, so that its gradients cannot be measured; exclude it "
                f'(`ignore="*.{layer}"`)'
            )
        seen[layer] = x, gradient

    def noting(layer: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x = args[0].detach()
            output.register_hook(lambda gradient: note(layer, x, gradient))

        return hook

    handles = [here.block.get_submodule(layer).register_forward_hook(noting(layer)) for layer in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
