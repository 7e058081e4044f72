"""What a run reports while it works: events to an observer, and messages for the user to a notify function.

    def observer(event: Event) -> None:
        for block in event.blocks:
            print(block.name, block.error)

    slimlm.compress(model, out, progress=observer, notify=print)

The displays (slimlm.display) and the log next to the output (slimlm.run.log) are observers.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from slimlm.record import HeldBackLoss, LayerRecord

Notify = Callable[[str], None]
"""A function that is given messages for the user, one at a time."""


def silent(message: str) -> None:
    """Ignore the message."""


def logged(message: str) -> None:
    """Log the message as a warning of the logger "slimlm", which Python prints to standard error where nobody configured it."""
    logging.getLogger("slimlm").warning(message)


Doing = Literal["read", "measure", "steps", "reconstruct", "propagate"]
"""What is done to a block, in this order: its weights are read, the inputs of layers measured, the recipe's steps applied to a
layer (the two alternate where a recipe is sequential), the block reconstructed where the recipe asks for it, and its outputs
computed and stored."""


@dataclass(frozen=True)
class LayerDone:
    """A layer to which all steps were applied."""

    record: LayerRecord
    """The layer's record before block reconstruction, which may change it."""
    tokens: int
    """The number of tokens that the layer's statistics were measured on."""
    seconds: float
    """The time that the steps took, without the measuring."""


@dataclass(frozen=True)
class BlockDone:
    """A block that is finished and stored in the journal."""

    number: int
    """The block's number, counted from 1."""
    name: str
    """The block's full name."""
    records: tuple[LayerRecord, ...]
    """The records of its compressed layers, as they are stored."""
    seconds: float | None
    """The time that the whole block took; None where an earlier run did it."""

    @property
    def error(self) -> float | None:
        """Mean of its layers' diagonal errors (`LayerRecord.error`); None where the recipe ignores all its layers."""
        return sum(record.error for record in self.records) / len(self.records) if self.records else None


@dataclass(frozen=True)
class TuningProgress:
    """What the steps of a run that tunes have found so far."""

    tokens: int
    """The number of tokens that the steps took."""
    loss: float | None
    """The loss of the last step, per token in nats; None: there was none in this run."""
    given: HeldBackLoss
    """The given model, on the windows that are held back."""
    best: HeldBackLoss
    """The best stored form, on the same windows."""
    last: HeldBackLoss
    """The stored form that was measured last."""


@dataclass(frozen=True)
class Event:
    """A step of a run's progress."""

    stage: str
    """The stage: "open the model", "sample text", "plan", "compress", "tune", "write" or "verify"; measurements have their
    own."""
    done: int
    """How many of the stage's blocks, samples, steps or models are done."""
    total: int
    """How many blocks, samples, steps or models the stage has."""
    doing: Doing | None = None
    """The work that begins on block number `done` + 1, while compressing."""
    name: str = ""
    """The full name of that block."""
    layers: tuple[str, ...] = ()
    """The layers that are worked on, by their names within the block."""
    layer: LayerDone | None = None
    """A layer that has just been finished."""
    blocks: tuple[BlockDone, ...] = ()
    """Blocks that have just been finished; when compressing begins, those that an earlier run finished."""
    tuning: TuningProgress | None = None
    """What the steps of a run that tunes have found."""


Observer = Callable[[Event], None]
"""A function that is given every event of a run."""


def quiet(event: Event) -> None:
    """Ignore the event."""


def both(first: Observer, second: Observer) -> Observer:
    """One observer that passes every event to two."""

    def observer(event: Event) -> None:
        first(event)
        second(event)

    return observer


@dataclass(frozen=True)
class BlockProgress:
    """Reports the progress of one block to an observer."""

    observer: Observer
    """Where the events go."""
    name: str
    """The block's full name."""
    done: int
    """How many blocks come before it."""
    total: int
    """How many blocks the model has."""
    began: float = field(default_factory=time.monotonic)
    """When the work on the block began, on this process's clock."""

    @property
    def elapsed(self) -> float:
        """Seconds since the work on the block began."""
        return time.monotonic() - self.began

    def doing(self, what: Doing, *layers: str) -> None:
        """Report that this begins, for these layers (names within the block) where it is not done to the whole block."""
        self.observer(Event("compress", self.done, self.total, what, self.name, layers))

    def finished_layer(self, layer: LayerDone) -> None:
        """Report that all steps were applied to a layer."""
        short = layer.record.name.removeprefix(f"{self.name}.")
        self.observer(Event("compress", self.done, self.total, "steps", self.name, (short,), layer))

    def finished(self, records: tuple[LayerRecord, ...], seconds: float) -> None:
        """Report that the block is in the journal."""
        block = BlockDone(self.done + 1, self.name, records, seconds)
        self.observer(Event("compress", self.done + 1, self.total, blocks=(block,)))


UNOBSERVED = BlockProgress(quiet, "", 0, 0)
"""The progress of a block without an observer."""
