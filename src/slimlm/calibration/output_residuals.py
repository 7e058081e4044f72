"""Output residuals, the original block's outputs minus a block's own, for the statistics of a layer that use them."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from slimlm.calibration.capture import BlockRun, run
from slimlm.core.statistics.base import Batch

_SAME = 1e-2
"""The relative error that a change of a layer's output may have in the block's output: rounding of large sums."""


def residual_batches(block_run: BlockRun, linear: nn.Module, original: BlockRun) -> Iterable[Batch] | None:
    """For each batch the layer's inputs and the block's output residuals; the layer is still uncompressed.

    Args:
        block_run: The block and its inputs.
        linear: One of its layers.
        original: The original block and its inputs in the original model.

    Returns:
        The batches; None where the layer's output is not added unchanged to the block's output (an inner layer, a norm after
        it, an expert). One sample shows that: a small change of the layer's output must appear unchanged in the block's.
    """
    if not block_run.inputs.group.broadcast(lambda: _adds_to_output(block_run.of_one_sample(), linear)):
        return None
    return _batches(block_run, linear, original)


def _batches(block_run: BlockRun, linear: nn.Module, original: BlockRun) -> Iterator[Batch]:
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for ours, theirs in zip(run(block_run), run(original), strict=True):
            residuals = (theirs - ours).flatten(0, -2).to(block_run.device)
            yield Batch(seen.pop().flatten(0, -2), ours.shape[1], output_residuals=residuals)
    finally:
        handle.remove()


def _adds_to_output(block_run: BlockRun, linear: nn.Module) -> bool:
    added: list[Tensor] = []

    def change(_: nn.Module, __: object, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        added.append(noise * output.square().mean().sqrt())
        return output + added[-1]

    before = next(run(block_run))
    handle = linear.register_forward_hook(change)
    try:
        after = next(run(block_run))
    finally:
        handle.remove()
    if len(added) != 1 or added[0].numel() != before.numel():
        return False
    expected = added[0].cpu().view_as(before)
    return float((after - before - expected).norm()) <= _SAME * float(expected.norm())
