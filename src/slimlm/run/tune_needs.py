"""What a run that tunes will need of memory and disk, before it."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from slimlm.core.errors import DoesNotFitError
from slimlm.evaluation.stored_model import StoredModel
from slimlm.models.structure import blocks_of, text_config
from slimlm.preflight.checks import existing, free_on_disk
from slimlm.preflight.needs import folder_bytes
from slimlm.runtime.memory import format_bytes, total_and_free
from slimlm.storage import checkpoint
from slimlm.storage.journal import journal_folder
from slimlm.tuning.tuner import Tuner
from slimlm.tuning.windows import HELD_BACK_TOKENS

BLOCK = 10
"""Bytes that a weight of a block takes while it is tuned, 2.5 times those of float32: its code, and in turn the matrices of a
layer and their gradients."""
_OF_A_PARAMETER = 4 * torch.float32.itemsize
"""Bytes of a trained value: itself, its gradient, and the optimizer's two moments."""
_FLOAT = torch.float32.itemsize


@dataclass(frozen=True)
class TuneNeeds:
    """The sizes that memory and disk follow from."""

    folder: Path
    """The compressed model's folder."""
    stored: StoredModel
    """The model."""
    tuner: Tuner
    """The method."""
    steps: int
    """The number of steps."""
    original: bool
    """Whether the original's hidden states are kept."""

    @property
    def width(self) -> int:
        """The width of hidden states."""
        return int(text_config(self.stored.meta_model).hidden_size)

    @property
    def block_weights(self) -> list[int]:
        """The weights of each block."""
        blocks = blocks_of(self.stored.meta_model).values()
        return [sum(own.numel() for own in block.parameters()) for block in blocks]

    @property
    def step_tokens(self) -> int:
        """The tokens of a step."""
        return self.tuner.batch * self.tuner.length

    @property
    def step_activations(self) -> int:
        """Bytes of the inputs of all blocks that a step keeps."""
        return self.step_tokens * (len(self.block_weights) + 1) * self.width * _FLOAT

    @property
    def hidden(self) -> int:
        """Bytes of the original's hidden states, at most."""
        tokens = self.steps * self.step_tokens + HELD_BACK_TOKENS
        return tokens * self.width * _FLOAT if self.original else 0

    def least_memory(self, parameters: int) -> int:
        """Bytes that the run holds at least, for so many trained values."""
        return BLOCK * max(self.block_weights) + _OF_A_PARAMETER * parameters

    def disk(self, parameters: int) -> int:
        """Bytes that the run writes at most: hidden states and those that follow from them, states, activations, the output."""
        state = 2 * math.ceil(_OF_A_PARAMETER * parameters)
        return 3 * self.hidden + state + self.step_activations + checkpoint.stored_bytes(self.folder)


def refuse_too_large(needs: TuneNeeds, parameters: int, out: Path, allowed: int | None) -> None:
    """Raise DoesNotFitError where the machine has less memory, or the disk less room, than the run needs.

    Args:
        needs: The sizes.
        parameters: The number of trained values.
        out: The output folder.
        allowed: The argument `memory`, in bytes; a larger value than the machine's memory counts (swap).
    """
    total, _ = total_and_free()
    least = needs.least_memory(parameters)
    if total is not None and least > max(total, allowed or 0):
        raise DoesNotFitError(
            f"the memory does not suffice: one block with its gradients and {parameters} trained values take at least "
            f"{format_bytes(least)}, and there are {format_bytes(max(total, allowed or 0))}; use a method that trains less "
            "(peqa), or a machine with more. If there is more than slimlm sees (swap), give its size as `memory`"
        )
    free = free_on_disk(existing(out)) + folder_bytes(journal_folder(out))
    if needs.disk(parameters) > free:
        raise DoesNotFitError(
            f"the disk does not suffice: tuning to {out} takes {format_bytes(needs.disk(parameters))} at most "
            f"({format_bytes(needs.hidden)} for the original's hidden states), and {format_bytes(free)} are free. Give an "
            "`out` on another disk, or fewer `tokens`"
        )
