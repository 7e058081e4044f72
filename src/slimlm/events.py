"""What a run tells while it works: events of one kind, to one observer, which is any function that takes them.

    def observer(event: Event) -> None:
        for block in event.blocks:
            print(block.name, block.error)

    slimlm.compress(model, out, progress=observer)

The command line's displays (slimlm.report.live) and the log beside the output (slimlm.run.log) are such observers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from slimlm.record import LayerRecord

Notify = Callable[[str], None]
"""A function that is given messages for the user, one at a time."""


Doing = Literal["read", "measure", "steps", "match", "propagate"]
"""To a block, in this order: its weights are read, inputs of layers measured, the recipe's steps applied to a layer (the two
by turns where a recipe is sequential), the block matched where the recipe asks for it, and its outputs computed and kept."""


@dataclass(frozen=True)
class LayerDone:
    """A layer that the steps are through with."""

    record: LayerRecord
    """before matching, which may change it"""
    tokens: int
    """that its statistics were measured on"""
    seconds: float
    """that the steps took, without the measuring"""


@dataclass(frozen=True)
class BlockDone:
    """A block that is finished and kept in the journal."""

    number: int
    """from 1"""
    name: str
    records: tuple[LayerRecord, ...]
    """of its compressed layers, as they are stored"""
    seconds: float | None
    """all of it; None where an earlier run did it"""

    @property
    def error(self) -> float | None:
        """Mean of its layers' relative output errors; None where all its layers were left."""
        return sum(record.error for record in self.records) / len(self.records) if self.records else None


@dataclass(frozen=True)
class Event:
    """Something that a run has come to."""

    stage: str
    """"open the model", "sample text", "plan", "compress", "write", "verify"; measurements have their own"""
    done: int
    total: int
    """of the stage: blocks, windows, models"""
    doing: Doing | None = None
    """what begins to be done to block number `done` + 1, while compressing"""
    name: str = ""
    """that block's full name, where something is done to it"""
    layers: tuple[str, ...] = ()
    """the layers that it is done to, by their names within the block"""
    layer: LayerDone | None = None
    """a layer that has just been finished"""
    blocks: tuple[BlockDone, ...] = ()
    """blocks that have just been finished; as compressing begins, those of an earlier run that it goes on from"""


Observer = Callable[[Event], None]


def quiet(event: Event) -> None:
    """An observer that looks away."""


def both(first: Observer, second: Observer) -> Observer:
    """One observer that hands every event to two."""

    def observer(event: Event) -> None:
        first(event)
        second(event)

    return observer


@dataclass(frozen=True)
class BlockWatch:
    """Tells an observer how a block comes along."""

    observer: Observer
    name: str
    done: int
    """blocks before it"""
    total: int

    def doing(self, what: Doing, *layers: str) -> None:
        """This begins, for these layers (names within the block) where it is for some only."""
        self.observer(Event("compress", self.done, self.total, what, self.name, layers))

    def finished_layer(self, layer: LayerDone) -> None:
        """The steps are through with a layer."""
        short = layer.record.name.removeprefix(f"{self.name}.")
        self.observer(Event("compress", self.done, self.total, "steps", self.name, (short,), layer))

    def finished(self, records: tuple[LayerRecord, ...], seconds: float) -> None:
        """The block is in the journal."""
        block = BlockDone(self.done + 1, self.name, records, seconds)
        self.observer(Event("compress", self.done + 1, self.total, blocks=(block,)))


UNWATCHED = BlockWatch(quiet, "", 0, 0)
