"""The exact gradient of a loss on a model's predictions, with one block in memory.

    forward    every block is run in turn, and its inputs are kept
    loss       its gradient at the last block's outputs, from the modules after the blocks alone
    reverse    from the last block to the first: each is run again on its kept inputs, with gradients, and hands the gradient of
               these to the block before

By the chain rule these are the gradients of one backward pass through the whole model; the price is one more forward pass. In
memory at one time are a block, its gradients, the graph of one batch, and what is kept where that is in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from slimlm.calibration.calls import BlockArguments, call, hidden_of
from slimlm.calibration.capture import BlockInputs, BlockRun, run, sent_to
from slimlm.core.errors import NumericsError

Hold = Callable[[str, Iterator[Tensor]], Sequence[Tensor]]
"""A function that keeps the outputs of the block of this name, `[samples, length, width]` per batch, in memory or in a file."""


def in_memory(_: str, batches: Iterator[Tensor]) -> Sequence[Tensor]:
    """Keep the outputs of a block in memory."""
    return list(batches)


@dataclass(frozen=True)
class Chain:
    """The blocks of a model, each made when it is run."""

    names: Sequence[str]
    """Their full names, in order."""
    make: Callable[[str], nn.Module]
    """Gives a block, on the device; what shall be tuned in it requires a gradient."""
    arguments: BlockArguments
    """The other arguments of every block."""
    device: torch.device
    """Where blocks are run."""

    def forward(self, hidden: Sequence[Tensor], hold: Hold = in_memory) -> "KeptInputs":
        """Run all blocks and keep their inputs; `hidden` are the first block's, `[samples, length, width]` per batch."""
        kept = []
        for name in self.names:
            kept.append(hidden)
            here = BlockRun(self.make(name), name, BlockInputs(hidden, self.arguments), self.device)
            hidden = hold(name, run(here))
        return KeptInputs(self, kept, hidden)


@dataclass(frozen=True)
class KeptInputs:
    """The inputs that all blocks of a model had."""

    chain: Chain
    """The blocks."""
    inputs: list[Sequence[Tensor]]
    """The inputs of each block, `[samples, length, width]` per batch; the reverse pass takes them off from the end."""
    outputs: Sequence[Tensor]
    """The last block's outputs."""

    def reverse(self, gradients: Sequence[Tensor]) -> Iterator["BlockBackward"]:
        """The backward pass of each block, from the last to the first; what the caller leaves of one is done before the next.

        Args:
            gradients: The gradient of the loss at the last block's outputs, `[samples, length, width]` per batch.
        """
        passed = list(gradients)
        for name in reversed(self.chain.names):
            here = BlockBackward(self.chain, name, self.chain.make(name), self.inputs.pop(), passed)
            yield here
            for _ in here.batches:
                pass
            passed = here.passed


@dataclass
class BlockBackward:
    """The backward pass of one block."""

    chain: Chain
    """The block and its neighbours."""
    name: str
    """The block's full name."""
    block: nn.Module
    """The block."""
    inputs: Sequence[Tensor]
    """Its inputs, `[samples, length, width]` per batch."""
    passed: list[Tensor]
    """The gradient at its outputs for batches to come, at its inputs for those that are done."""
    batches: Iterator[int] = field(init=False)
    """Does one batch after another and gives its number; gradients are added to those of parameters that require them."""

    def __post_init__(self) -> None:
        self.batches = self._run()

    def _run(self) -> Iterator[int]:
        for number, kept in enumerate(self.inputs):
            self.passed[number] = self._backward(number, kept, self.passed[number])
            yield number

    def _backward(self, number: int, kept: Tensor, gradient: Tensor) -> Tensor:
        """The gradient at the block's inputs for one batch, given that at its outputs.

        Raises:
            NumericsError: It holds NaN or infinity.
        """
        device = self.chain.device
        hidden = kept.to(device).detach().requires_grad_()
        arguments = sent_to(self.chain.arguments.of(self.name, number, len(kept)), device)
        with torch.enable_grad():
            # Cloned, because blocks may add to their hidden states in place.
            output = hidden_of(call(self.block, hidden.clone(), arguments))
        torch.autograd.backward(output, gradient.to(output))
        assert hidden.grad is not None
        if not bool(hidden.grad.isfinite().all()):
            raise NumericsError(f"the gradient at the inputs of {self.name} holds NaN or infinity; it overflows on this text")
        return hidden.grad.to("cpu")
