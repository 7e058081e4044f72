"""Run one block on its inputs; measure what the steps need and nothing more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.core.errors import ModelError, NumericsError
from slimlm.core.layer import Need, Stats

_TOKENS_AT_ONCE = 8192

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's positional and keyword arguments, the hidden states left out (None in their place)."""


@dataclass
class Flow:
    """The activations on their way through the blocks, and what each block is called with beside them."""

    hidden: list[Tensor]
    """one tensor `[windows, length, width]` per batch: the inputs of the next block"""
    arguments: dict[tuple[str, int], Arguments]
    """by block name and number of windows in the batch"""


class _StopHereError(Exception):
    """Raised by a hook once all it waited for is in hand, so that the rest of the model need not run."""


def enter(model: nn.Module, blocks: dict[str, nn.Module], windows: Tensor) -> Flow:
    """The inputs of the first block for all windows `[count, length]`, and every block's other arguments.

    The arguments are captured for each block by itself (masks and rotary tables may differ from block to block) in one
    plain forward pass per batch size. That pass also checks that each block's output is the next one's input; raises
    ModelError where a model does something in between.
    """
    batches = windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1]))
    arguments: dict[tuple[str, int], Arguments] = {}
    for batch in {len(b): b for b in batches}.values():
        arguments |= _arguments_of(model, blocks, batch)
    first = next(iter(blocks.values()))
    return Flow([_first_input(model, first, batch) for batch in batches], arguments)


def _arguments_of(model: nn.Module, blocks: dict[str, nn.Module], batch: Tensor) -> dict[tuple[str, int], Arguments]:
    final = next(reversed(blocks))
    seen: dict[tuple[str, int], Arguments] = {}
    last: list[tuple[str, Tensor]] = []
    hooks = []

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, rest = _split(args, kwargs)
            if last and not torch.equal(last[0][1], hidden):
                raise ModelError(
                    f"{type(model).__name__} changes the activations between {last[0][0]} and {name}; slimlm goes from "
                    "block to block and cannot follow that"
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
    finally:
        for handle in hooks:
            handle.remove()
    missed = [name for name in blocks if (name, len(batch)) not in seen]
    if missed:
        raise ModelError(f"{type(model).__name__} did not run its block {missed[0]} on plain text; slimlm cannot calibrate it")
    return seen


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
    if args:
        return args[0], ((None, *args[1:]), dict(kwargs))
    return kwargs["hidden_states"], ((), {**kwargs, "hidden_states": None})


def _hidden_of(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def run(block: nn.Module, name: str, flow: Flow, device: torch.device) -> Iterator[Tensor]:
    """The block's output for each batch, on the CPU."""
    with torch.no_grad():
        for hidden in flow.hidden:
            args, kwargs = flow.arguments[name, len(hidden)]
            moved = hidden.to(device)
            args = tuple(_to(a, device) for a in args)
            kwargs = {key: _to(value, device) for key, value in kwargs.items()}
            output = block(moved, *args[1:], **kwargs) if args else block(**{**kwargs, "hidden_states": moved})
            yield _hidden_of(output).to("cpu")


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_to(v, device) for v in value)
    if isinstance(value, dict):
        return {key: _to(v, device) for key, v in value.items()}
    return value


def measure(
    block: nn.Module, name: str, linears: dict[str, nn.Module], flow: Flow, needs: Need, device: torch.device
) -> dict[str, Stats]:
    """Statistics of the inputs of these linear layers of a block, by the layer's name within it.

    Layers that are given the same tensor (q, k and v; gate and up) share one measurement. Raises NumericsError where an
    input holds NaN or infinity.
    """
    sums: dict[str, _Sums] = {}
    owner: dict[str, str] = {}
    length = flow.hidden[0].shape[1]
    with _watching(linears, sums, owner, partial(_Sums, needs, length)) as forget:
        for _ in run(block, name, flow, device):
            forget()
    unused = [layer for layer in linears if layer not in owner]
    if unused:
        raise ModelError(f"{name}.{unused[0]} saw no input during calibration; leave it out of the recipe (leave = [...])")
    stats = {layer: s.stats(f"{name}.{layer}") for layer, s in sums.items()}
    return {layer: stats[owner[layer]] for layer in linears}


@contextmanager
def _watching(
    linears: dict[str, nn.Module], sums: dict[str, "_Sums"], owner: dict[str, str], new_sums: "Callable[[], _Sums]"
) -> Iterator[Callable[[], None]]:
    seen: list[tuple[Tensor, str]] = []

    def hook_for(layer: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            for tensor, first in seen:
                if tensor is x:
                    owner[layer] = first
                    return
            seen.append((x, layer))
            owner[layer] = layer
            sums.setdefault(layer, new_sums()).add(x)

        return hook

    handles = [module.register_forward_pre_hook(hook_for(layer)) for layer, module in linears.items()]
    try:
        yield seen.clear
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Running sums over tokens, in float64: one batch of N and many batches give the same."""

    def __init__(self, needs: Need, length: int) -> None:
        self.needs = needs
        self.length = length
        self.tokens = 0
        self.abs: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.peak: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count a batch in: `[windows, length, in]`, or `[windows x length, in]` as some models flatten it."""
        rows = x.flatten(0, -2)
        self.tokens += len(rows)
        if self.needs & Need.MEAN_SQUARE:
            self.square = self.square + rows.square().sum(dim=0, dtype=torch.float64)
        if self.needs & (Need.MEAN_ABS | Need.PEAK_MEAN_ABS):
            magnitude = rows.abs()
            self.abs = self.abs + magnitude.sum(dim=0, dtype=torch.float64)
            if self.needs & Need.PEAK_MEAN_ABS:
                peak = magnitude.view(-1, self.length, rows.shape[1]).mean(dim=1).amax(dim=0)
                self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)

    def stats(self, name: str) -> Stats:
        """The means, on the CPU in float32."""

        def mean(total: Tensor | float) -> Tensor | None:
            if not isinstance(total, Tensor):
                return None
            if not bool(total.isfinite().all()):
                raise NumericsError(f"the inputs of {name} hold NaN or infinity; the model overflows on the calibration text")
            return (total / self.tokens).float().cpu()

        return Stats(
            self.tokens,
            mean_abs=mean(self.abs) if self.needs & Need.MEAN_ABS else None,
            mean_square=mean(self.square),
            peak_mean_abs=None if self.peak is None else self.peak.float().cpu(),
        )
