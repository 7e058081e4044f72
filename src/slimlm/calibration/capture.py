"""The inputs of a model's blocks, and one block run on its inputs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.core.errors import DataError, ModelError, first_line
from slimlm.core.profiling import profiled
from slimlm.distributed.group import ALONE, Group

TOKENS_AT_ONCE = 8192
"""The most tokens of a batch, unless one sample has more."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's positional and keyword arguments, the hidden states left out (None in their place)."""


@dataclass
class BlockInputs:
    """The activations that the next block is run on, and the other arguments of every block."""

    hidden: Sequence[Tensor]
    """One tensor `[samples, length, width]` per batch: the inputs of the next block, of this rank's samples."""
    arguments: dict[tuple[str, int], Arguments]
    """The other arguments, by block name and number of samples in the batch."""
    group: Group = ALONE
    """The ranks that have the other samples."""


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

    def of_first_batch(self) -> "BlockRun":
        """The same block on its first batch only, in this process only."""
        return replace(self, inputs=BlockInputs(self.inputs.hidden[:1], self.inputs.arguments))


class _StopHereError(Exception):
    """Raised by a hook that has captured everything, so that the rest of the model is not run."""


def enter(model: nn.Module, blocks: dict[str, nn.Module], samples: Tensor, *, tokens_at_once: int | None = None) -> BlockInputs:
    """The inputs of the first block for all samples `[count, length]`, and every block's other arguments."""
    arguments = arguments_of(model, blocks, samples, tokens_at_once=tokens_at_once)
    return BlockInputs(list(first_inputs(model, blocks, samples, tokens_at_once=tokens_at_once)), arguments)


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


def first_inputs(
    model: nn.Module, blocks: dict[str, nn.Module], samples: Tensor, *, tokens_at_once: int | None = None
) -> Iterator[Tensor]:
    """The inputs `[samples, length, width]` of the first block for each batch."""
    first = next(iter(blocks.values()))
    for batch in batches_of(samples, tokens_at_once):
        yield _first_input(model, first, batch)


@profiled("calibration forward")
def arguments_of(
    model: nn.Module, blocks: dict[str, nn.Module], samples: Tensor, *, tokens_at_once: int | None = None
) -> dict[tuple[str, int], Arguments]:
    """The arguments of each block other than its hidden states.

    They are captured separately for each block (masks and rotary embeddings may differ from block to block) in one plain
    forward pass per batch size. That pass also checks that each block's output is the next one's input.

    Args:
        model: The model.
        blocks: Its blocks by full name, in order.
        samples: Token ids `[count, length]`.
        tokens_at_once: Tokens of a batch; None: 8192.

    Returns:
        The arguments by block name and number of samples in the batch.

    Raises:
        ModelError: The model fails on plain text, or computes something between two blocks.
    """
    arguments: dict[tuple[str, int], Arguments] = {}
    for batch in {len(b): b for b in batches_of(samples, tokens_at_once)}.values():
        arguments |= _arguments_of(model, blocks, batch)
    return arguments


def _arguments_of(model: nn.Module, blocks: dict[str, nn.Module], batch: Tensor) -> dict[tuple[str, int], Arguments]:
    final = next(reversed(blocks))
    seen: dict[tuple[str, int], Arguments] = {}
    last: list[tuple[str, Tensor]] = []
    hooks = []

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest = _split(args, kwargs)
            if hidden.ndim != 3 or hidden.shape[:2] != batch.shape:
                raise ModelError(
                    f"{name} of {type(model).__name__} is given activations {list(hidden.shape)} for {list(batch.shape)} "
                    "tokens; slimlm supports blocks that are given [samples, length, width]"
                )
            if last and not torch.equal(last[0][1], hidden):
                raise ModelError(
                    f"{type(model).__name__} changes the activations between {last[0][0]} and {name}; slimlm passes them "
                    "from block to block unchanged and cannot calibrate it"
                )
            seen[name, len(batch)] = rest

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            last[:] = [(name, _hidden_of(output))]
            if name == final:
                raise _StopHereError

        return hook

    for name, block in blocks.items():
        hooks.append(block.register_forward_pre_hook(before(name), with_kwargs=True))
        hooks.append(block.register_forward_hook(after(name)))
    try:
        with suppress(_StopHereError), torch.no_grad():
            model(batch, use_cache=False)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelError(
            f"{type(model).__name__} fails where its blocks are read one at a time, on plain text: {first_line(error)}"
        ) from error
    finally:
        for handle in hooks:
            handle.remove()
    missed = [name for name in blocks if (name, len(batch)) not in seen]
    if missed:
        raise ModelError(f"{type(model).__name__} did not run its block {missed[0]} on plain text; slimlm cannot calibrate it")
    return seen


@profiled("calibration forward")
def _first_input(model: nn.Module, block: nn.Module, batch: Tensor) -> Tensor:
    caught: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_split(args, kwargs)[0])
        raise _StopHereError

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            model(batch, use_cache=False)
    except _StopHereError:
        return caught[0]
    finally:
        handle.remove()
    raise ModelError(f"{type(model).__name__} did not call its first block")


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    if args and isinstance(args[0], Tensor):
        return args[0], ((None, *args[1:]), dict(kwargs))
    if not args and isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"], ((), {**kwargs, "hidden_states": None})
    raise ModelError("a block's first argument is not its activations, nor is one named hidden_states; slimlm cannot run it")


def _hidden_of(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a block gives a {type(hidden).__name__} where activations were expected; slimlm cannot run it")
    return hidden


def run(block_run: BlockRun) -> Iterator[Tensor]:
    """The block's output for each batch, on the CPU."""
    for hidden in block_run.inputs.hidden:
        yield _hidden_of(_forward(block_run, hidden)).to("cpu")


def run_through(block_run: BlockRun) -> Iterator[Tensor]:
    """As `run`; a batch in memory is dropped from the inputs when its output is computed."""
    hidden = block_run.inputs.hidden
    if not isinstance(hidden, list):
        yield from run(block_run)
        return
    while hidden:
        yield _hidden_of(_forward(block_run, hidden.pop(0))).to("cpu")


def layer_inputs(block_run: BlockRun, linears: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """For each batch the inputs of these layers, in the order of their calls; the block is run until all are captured."""
    for hidden in block_run.inputs.hidden:
        seen: dict[str, Tensor] = {}

        def hook_for(layer: str, seen: dict[str, Tensor] = seen) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                seen[layer] = args[0]
                if len(seen) == len(linears):
                    raise _StopHereError

            return hook

        handles = [module.register_forward_pre_hook(hook_for(layer)) for layer, module in linears.items()]
        try:
            with suppress(_StopHereError):
                _forward(block_run, hidden)
        finally:
            for handle in handles:
                handle.remove()
        yield seen


@profiled("calibration forward")
def _forward(block_run: BlockRun, hidden: Tensor) -> Any:
    block, device = block_run.block, block_run.device
    args, kwargs = block_run.inputs.arguments[block_run.name, len(hidden)]
    moved = hidden.to(device)
    args = tuple(sent_to(a, device) for a in args)
    kwargs = {key: sent_to(value, device) for key, value in kwargs.items()}
    with torch.no_grad():
        return block(moved, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": moved})


def sent_to(value: Any, device: torch.device) -> Any:
    """Arguments or outputs with every tensor in them on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(sent_to(v, device) for v in value)
    if isinstance(value, dict):
        return {key: sent_to(v, device) for key, v in value.items()}
    return value
