"""A stored model up to its first block, and what follows from running all its blocks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.calibration.backward import Chain, Hold
from slimlm.calibration.calls import BlockArguments, Calls, arguments_within, observe, shared_arguments
from slimlm.calibration.capture import BlockInputs, BlockRun, batches_of, first_inputs, run
from slimlm.evaluation.stored_model import StoredModel
from slimlm.models.structure import blocks_of


@dataclass(frozen=True)
class Entrance:
    """A model up to its first block, and the other arguments of all blocks."""

    stored: StoredModel
    """The model."""
    model: PreTrainedModel
    """The same, which makes each block when it is run."""
    calls: Calls
    """How it calls its blocks."""
    device: torch.device
    """Where blocks are run."""

    @classmethod
    def of(cls, stored: StoredModel, device: torch.device) -> "Entrance":
        """Run a model on a few tokens, and find out how it calls its blocks; raises ModelError where that does not work."""
        model, shown = stored.assembled(device), blocks_of(stored.meta_model)
        blocks = {name: model.get_submodule(name) for name in shown}
        return cls(stored, model, observe(model, blocks, shown=shown).calls, device)

    def inputs(self, tokens: Tensor, at_once: int) -> BlockInputs:
        """The inputs of the first block for tokens `[count, length]`, in batches of so many tokens or of one window."""
        blocks = {name: self.model.get_submodule(name) for name in self.calls.forms}
        batches = batches_of(tokens, at_once)
        shared = shared_arguments(self.model, blocks, self.calls, batches)
        capture = partial(arguments_within, self.model, self.calls.forms)
        arguments = BlockArguments(shared, batches, self.calls.text_dependent, capture)
        return BlockInputs(list(first_inputs(self.model, blocks, batches)), arguments)

    def chain(self, inputs: BlockInputs, make: Callable[[str], nn.Module]) -> Chain:
        """The blocks, each of which `make` gives when it is run."""
        return Chain(list(self.calls.forms), make, inputs.arguments, self.device)


def last_hidden(entrance: Entrance, tokens: Tensor, at_once: int, hold: Hold) -> Iterator[Tensor]:
    """The last block's outputs, each block made once and run on all tokens.

    Args:
        entrance: The model.
        tokens: Token ids `[count, length]`.
        at_once: Tokens of a batch.
        hold: Keeps the outputs of a block.

    Yields:
        `[windows, length, width]` for each batch.
    """
    inputs, stored = entrance.inputs(tokens, at_once), entrance.stored
    hidden: Sequence[Tensor] = inputs.hidden
    for name in entrance.calls.forms:
        here = BlockRun(stored.block(name, entrance.device), name, BlockInputs(hidden, inputs.arguments), entrance.device)
        hidden = hold(name, run(here))
        stored.release(tensor for full, tensor in stored.tensors.items() if full.startswith(f"{name}."))
    yield from hidden
