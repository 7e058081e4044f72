"""The logits of a model for a batch of windows, piece by piece: of one in memory, and of one that stays in its files.

Both are run up to the last block; then the modules after the blocks are applied to a piece of its outputs at a time, so that
the logits of a batch are never in memory as a whole. A model in its files is run a block at a time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.evaluation.perplexity import Piece
from slimlm.evaluation.stored_model import LastOutputs, Replacement, StoredModel, giving, last_outputs
from slimlm.models.outputs import plain_outputs
from slimlm.models.structure import blocks_of, swap


class Logits(Protocol):
    """Anything that gives logits."""

    def logits(self, tokens: Tensor, pieces: Sequence[Piece]) -> Iterator[Tensor]:
        """The logits `[windows, positions, vocabulary]` of each piece of the tokens `[count, length]`."""


@dataclass(frozen=True)
class InFiles:
    """A model that stays in its files."""

    stored: StoredModel
    """The model."""
    device: torch.device
    """The device that it is run on, a block at a time."""

    def logits(self, tokens: Tensor, pieces: Sequence[Piece]) -> Iterator[Tensor]:
        return self.stored.logits(self.stored.outputs(tokens, self.device), pieces, device=self.device)


@dataclass(frozen=True)
class InMemory:
    """A model in memory, on its device."""

    model: PreTrainedModel
    """The model; what its config asks for besides logits is switched off."""

    def __post_init__(self) -> None:
        plain_outputs(self.model)

    def logits(self, tokens: Tensor, pieces: Sequence[Piece]) -> Iterator[Tensor]:
        ids = tokens.to(self.model.device)
        outputs = last_outputs(self.model, tuple(blocks_of(self.model)), ids)
        for piece in pieces:
            with _giving(self.model, outputs, piece), torch.no_grad():
                found = self.model(ids[piece], use_cache=False).logits
            yield found


@contextmanager
def _giving(model: PreTrainedModel, outputs: LastOutputs, piece: Piece) -> Iterator[None]:
    """Within this context every block gives a piece of the last one's outputs."""
    blocks = {name: model.get_submodule(name) for name in outputs.forms}
    for name, block in blocks.items():
        swap(model, name, Replacement(block, giving(outputs.forms[name], outputs.hidden[piece])))
    try:
        yield
    finally:
        for name, block in blocks.items():
            swap(model, name, block)
