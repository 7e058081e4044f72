"""The inputs of a model's blocks, and one block run on its inputs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slimlm.calibration.calls import (
    BlockArguments,
    StopHereError,
    arguments_within,
    call,
    call_of,
    copied,
    hidden_of,
    observe,
    shared_arguments,
)
from slimlm.core.errors import DataError
from slimlm.core.profiling import profiled
from slimlm.distributed.group import ALONE, Group

TOKENS_AT_ONCE = 8192
"""The most tokens of a batch, unless one sample has more."""


@dataclass
class BlockInputs:
    """The activations that the next block is run on, and the other arguments of every block."""

    hidden: Sequence[Tensor]
    """One tensor `[samples, length, width]` per batch: the inputs of the next block, of this rank's samples."""
    arguments: BlockArguments
    """The other arguments."""
    group: Group = ALONE
    """The ranks that have the other samples."""


class Passes(Protocol):
    """The forward passes of one block: how much of each is computed, and what is kept for later ones."""

    def inputs_of(self, block_run: "BlockRun", batch: int, hidden: Tensor, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
        """The inputs of these layers for the hidden states of a batch, of which the number is given, in the order of calls."""

    def output(self, block_run: "BlockRun", batch: int, hidden: Tensor) -> Tensor:
        """The block's output `[samples, length, width]` for the hidden states of a batch."""

    def finished(self, layers: Iterable[str]) -> None:
        """These layers have been compressed: they do not change any more, and nothing else is measured on their inputs."""

    def forget(self) -> None:
        """The block's values have changed, or it is not run again: drop everything that is kept."""


class EachPass(Passes):
    """Every pass is computed, and nothing is kept."""

    def inputs_of(self, block_run: "BlockRun", batch: int, hidden: Tensor, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
        return captured(block_run, batch, hidden, linears)

    def output(self, block_run: "BlockRun", batch: int, hidden: Tensor) -> Tensor:
        return hidden_of(forward(block_run, batch, hidden))

    def finished(self, layers: Iterable[str]) -> None:
        pass

    def forget(self) -> None:
        pass


@dataclass(frozen=True)
class BlockRun:
    """A block and its inputs."""

    block: nn.Module
    """The block, on the device."""
    name: str
    """The block's full name in the model."""
    inputs: BlockInputs
    """The block's inputs."""
    device: torch.device
    """Where the block is."""
    passes: Passes = field(default_factory=EachPass)
    """How its forward passes are made."""

    def of_one_sample(self) -> "BlockRun":
        """The same block on one sample only, or on its first batch where its arguments are not known for one sample.

        In this process only; nothing is kept of its passes.
        """
        first, arguments = self.inputs.hidden[0], self.inputs.arguments
        some = first[:1] if arguments.holds_one(self.name) else first
        return replace(self, inputs=BlockInputs([some], arguments), passes=EachPass())


def enter(model: nn.Module, blocks: dict[str, nn.Module], samples: Tensor, *, tokens_at_once: int | None = None) -> BlockInputs:
    """The inputs of the first block for all samples `[count, length]`, and every block's other arguments.

    Raises:
        ModelError: The model cannot be run block by block; see `observe`.
    """
    batches, calls = batches_of(samples, tokens_at_once), observe(model, blocks).calls
    shared = shared_arguments(model, blocks, calls, batches)
    capture = partial(arguments_within, model, calls.forms)
    arguments = BlockArguments(shared, batches, calls.text_dependent, capture)
    return BlockInputs(list(first_inputs(model, blocks, batches)), arguments)


def batches_of(samples: Tensor, tokens_at_once: int | None = None) -> tuple[Tensor, ...]:
    """The samples `[count, length]` in the batches that are run: of at most so many tokens (None: 8192), or of one sample."""
    return samples.split(max(1, (tokens_at_once or TOKENS_AT_ONCE) // samples.shape[1]))


def shares_of(samples: Tensor, ranks: int) -> tuple[int, ...]:
    """How many of the samples `[count, length]` each rank gets; a rank's samples are consecutive.

    Ranks get whole batches where there are enough, because a batch gives the same bits on every rank; else a batch is divided.
    Raises DataError where there are more ranks than samples.
    """
    if len(samples) < ranks:
        raise DataError(
            f"{ranks} processes share {len(samples)} calibration samples, and each needs one; give more text or `samples`, or "
            "start fewer processes"
        )
    sizes = [len(batch) for batch in batches_of(samples)]
    if len(sizes) < ranks:
        sizes = [1] * len(samples)
    bounds = [rank * len(sizes) // ranks for rank in range(ranks + 1)]
    return tuple(sum(sizes[begin:end]) for begin, end in pairwise(bounds))


def first_inputs(model: nn.Module, blocks: dict[str, nn.Module], batches: Sequence[Tensor]) -> Iterator[Tensor]:
    """The inputs `[samples, length, width]` of the first block for each batch of tokens `[samples, length]`."""
    first = next(iter(blocks.values()))
    for batch in batches:
        yield call_of(model, first, batch).hidden


def run(block_run: BlockRun) -> Iterator[Tensor]:
    """The block's output for each batch, on the CPU."""
    for batch, hidden in enumerate(block_run.inputs.hidden):
        yield block_run.passes.output(block_run, batch, hidden).to("cpu")


def run_through(block_run: BlockRun) -> Iterator[Tensor]:
    """As `run`; a batch in memory is dropped from the inputs when its output is computed."""
    hidden = block_run.inputs.hidden
    if not isinstance(hidden, list):
        yield from run(block_run)
        return
    for batch in range(len(hidden)):
        yield block_run.passes.output(block_run, batch, hidden.pop(0)).to("cpu")


def layer_inputs(block_run: BlockRun, linears: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """For each batch the inputs of these layers, in the order of their calls."""
    for batch, hidden in enumerate(block_run.inputs.hidden):
        yield block_run.passes.inputs_of(block_run, batch, hidden, linears)


def captured(block_run: BlockRun, batch: int, hidden: Tensor, linears: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The inputs of these layers for the hidden states of a batch; the block is run until all are captured."""
    seen: dict[str, Tensor] = {}

    def hook_for(layer: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[layer] = args[0]
            if len(seen) == len(linears):
                raise StopHereError

        return hook

    handles = [module.register_forward_pre_hook(hook_for(layer)) for layer, module in linears.items()]
    try:
        with suppress(StopHereError):
            forward(block_run, batch, hidden)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@profiled("calibration forward")
def forward(block_run: BlockRun, batch: int, hidden: Tensor) -> Any:
    """The block's output for the hidden states of a batch, of which the number is given."""
    arguments = block_run.inputs.arguments.of(block_run.name, batch, len(hidden))
    with torch.no_grad():
        return call(block_run.block, hidden.to(block_run.device), sent_to(arguments, block_run.device))


def sent_to(value: Any, device: torch.device) -> Any:
    """Arguments or outputs with every tensor in them on the device."""
    return copied(value, lambda tensor: tensor.to(device))
