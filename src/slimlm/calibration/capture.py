"""Run one block on its inputs; measure what the steps need and nothing more."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.core.errors import DataError, ModelError, NumericsError, first_line
from slimlm.core.layer import Need, Stats
from slimlm.core.profiling import profiled
from slimlm.distributed.group import ALONE, Group
from slimlm.models.structure import weight_of
from slimlm.runtime.memory import free_on_gpu

_TOKENS_AT_ONCE = 8192

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""A block's positional and keyword arguments, the hidden states left out (None in their place)."""


@dataclass
class Flow:
    """The activations on their way through the blocks, and what each block is called with beside them."""

    hidden: Sequence[Tensor]
    """one tensor `[windows, length, width]` per batch: the inputs of the next block, of this rank's windows"""
    arguments: dict[tuple[str, int], Arguments]
    """by block name and number of windows in the batch"""
    group: Group = ALONE
    """the ranks that have the other windows"""


class _StopHereError(Exception):
    """Raised by a hook once all it waited for is in hand, so that the rest of the model need not run."""


def enter(model: nn.Module, blocks: dict[str, nn.Module], windows: Tensor) -> Flow:
    """The inputs of the first block for all windows `[count, length]`, and every block's other arguments."""
    arguments = arguments_of(model, blocks, windows)
    return Flow(list(first_inputs(model, blocks, windows)), arguments)


def batches_of(windows: Tensor) -> tuple[Tensor, ...]:
    """The windows as they run together."""
    return windows.split(max(1, _TOKENS_AT_ONCE // windows.shape[1]))


def shares_of(windows: Tensor, ranks: int) -> tuple[int, ...]:
    """How many of the windows `[count, length]` each rank gets, consecutive ones.

    Whole batches where there are enough, because a batch runs to the same bits wherever it runs; else a batch is divided.
    Raises DataError where there are more ranks than windows.
    """
    if len(windows) < ranks:
        raise DataError(
            f"{ranks} processes share {len(windows)} calibration samples, and each needs one; give more text or `samples`, or "
            "start fewer processes"
        )
    sizes = [len(batch) for batch in batches_of(windows)]
    if len(sizes) < ranks:
        sizes = [1] * len(windows)
    ends = [rank * len(sizes) // ranks for rank in range(ranks + 1)]
    return tuple(sum(sizes[begin:end]) for begin, end in pairwise(ends))


def first_inputs(model: nn.Module, blocks: dict[str, nn.Module], windows: Tensor) -> Iterator[Tensor]:
    """The inputs `[windows, length, width]` of the first block for each batch."""
    first = next(iter(blocks.values()))
    for batch in batches_of(windows):
        yield _first_input(model, first, batch)


@profiled("calibration forward")
def arguments_of(model: nn.Module, blocks: dict[str, nn.Module], windows: Tensor) -> dict[tuple[str, int], Arguments]:
    """What each block is called with beside the hidden states, by block name and number of windows in the batch.

    The arguments are captured for each block by itself (masks and rotary tables may differ from block to block) in one
    plain forward pass per batch size. That pass also checks that each block's output is the next one's input; raises
    ModelError where a model does something in between.
    """
    arguments: dict[tuple[str, int], Arguments] = {}
    for batch in {len(b): b for b in batches_of(windows)}.values():
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
                    "tokens; slimlm follows blocks that are given [windows, length, width]"
                )
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
    raise ModelError("a block is not given its activations first or by the name hidden_states; slimlm cannot follow that")


def _hidden_of(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a block gives a {type(hidden).__name__} where activations were expected; slimlm cannot follow that")
    return hidden


def run(block: nn.Module, name: str, flow: Flow, device: torch.device) -> Iterator[Tensor]:
    """The block's output for each batch, on the CPU."""
    for hidden in flow.hidden:
        yield _hidden_of(_forward(block, name, flow, hidden, device)).to("cpu")


def run_through(block: nn.Module, name: str, flow: Flow, device: torch.device) -> Iterator[Tensor]:
    """As `run`; a batch that is in memory is dropped from the flow once it is through."""
    if not isinstance(flow.hidden, list):
        yield from run(block, name, flow, device)
        return
    while flow.hidden:
        yield _hidden_of(_forward(block, name, flow, flow.hidden.pop(0), device)).to("cpu")


@profiled("calibration forward")
def _forward(block: nn.Module, name: str, flow: Flow, hidden: Tensor, device: torch.device) -> Any:
    args, kwargs = flow.arguments[name, len(hidden)]
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


Original = tuple[nn.Module, Flow]
"""A block as it was, and its inputs in the original model."""


def stages_of(block: nn.Module, name: str, linears: dict[str, nn.Module], flow: Flow, device: torch.device) -> list[list[str]]:
    """The linear layers of a block in the order in which their inputs come about, those of one stage together.

    A stage shares an input (q, k and v; gate and up), or holds the same layer of every expert. When the stages are
    compressed one after another, each is measured on what the compressed ones before it hand over. Found by running one
    batch of the first rank's; layers that it leaves out come last.
    """
    return flow.group.broadcast(lambda: _stages_of(block, name, linears, flow, device))


def _stages_of(block: nn.Module, name: str, linears: dict[str, nn.Module], flow: Flow, device: torch.device) -> list[list[str]]:
    seen = next(_inputs(block, name, linears, Flow(flow.hidden[:1], flow.arguments), device))
    stages: list[list[str]] = []
    for layer, x in seen.items():
        for stage in stages:
            if any(seen[other] is x or _kind(block, other) == _kind(block, layer) for other in stage):
                stage.append(layer)
                break
        else:
            stages.append([layer])
    missed = [layer for layer in linears if layer not in seen]
    for layer in list(missed):
        for stage in stages:
            if any(_kind(block, other) == _kind(block, layer) for other in stage):
                stage.append(layer)
                missed.remove(layer)
                break
    return [*stages, missed] if missed else stages


def _kind(block: nn.Module, layer: str) -> str:
    """A layer's name without the number of its expert, which is its place in a list (nn.ModuleList)."""
    pieces = layer.split(".")
    for i, piece in enumerate(pieces):
        if piece.isdigit() and i > 0 and isinstance(block.get_submodule(".".join(layer.split(".")[:i])), nn.ModuleList):
            pieces[i] = "*"
    return ".".join(pieces)


def measure(
    block: nn.Module,
    name: str,
    linears: dict[str, nn.Module],
    flow: Flow,
    needs: Need,
    device: torch.device,
    original: Original | None = None,
) -> dict[str, Stats]:
    """Statistics of the inputs of these linear layers of a block, by the layer's name within it.

    Layers that are given the same tensor (q, k and v; gate and up) share one measurement. Every rank measures its windows, and
    all get the statistics of all windows. `original` is needed for `Need.CROSS`; a layer that is routed other tokens there than
    here (an expert) gets no cross statistic. An expert that is given fewer tokens than it has inputs gets the statistics of all
    experts of the block together, of the same layer, and a note of it. Raises NumericsError where an input holds NaN or
    infinity.
    """
    sums: dict[str, _Sums] = {}
    owner: dict[str, str] = {}
    length = flow.hidden[0].shape[1]
    before = None
    if needs & Need.CROSS:
        assert original is not None, "the cross statistic needs the original block"
        twin, twin_flow = original
        before = _inputs(twin, name, {layer: twin.get_submodule(layer) for layer in linears}, twin_flow, device)
    for hidden, seen in zip(flow.hidden, _inputs(block, name, linears, flow, device), strict=True):
        were = next(before) if before is not None else {}
        first: list[tuple[Tensor, str]] = []
        for layer, x in seen.items():
            same = [other for tensor, other in first if tensor is x]
            owner[layer] = same[0] if same else layer
            if not same:
                first.append((x, layer))
                sums.setdefault(layer, _Sums(needs, length, f"{name}.{layer}")).add(
                    x, were.get(layer), whole=len(hidden) * length
                )
    if flow.group.size > 1:
        owner, sums = _of_all_ranks(owner, sums, flow.group, device)
    whole = sum(flow.group.all_gather(sum(len(hidden) for hidden in flow.hidden))) * length
    place = _resting_place(sums.values(), device)
    pooled = _pooled(block, linears, {layer: sums[own] for layer, own in owner.items()}, whole, place)
    stats = {own: s.stats(place) for own, s in sums.items() if s.tokens}
    found = {}
    for layer in linears:
        if layer not in pooled and owner.get(layer) not in stats:
            raise ModelError(
                f"{name}.{layer} saw no input during calibration: the model reads its weight in another way, or has no use for "
                f'it on plain text. Leave it out of the recipe (leave = ["*.{layer}"])'
            )
        found[layer] = pooled[layer] if layer in pooled else stats[owner[layer]]
    return found


POOLED = "measured on the inputs of all experts together, because it was given fewer tokens than it has inputs"
"""The note of an expert that could not be measured by itself."""


def _pooled(
    block: nn.Module, linears: dict[str, nn.Module], sums: dict[str, "_Sums"], whole: int, place: torch.device
) -> dict[str, Stats]:
    """Statistics for the layers of experts with fewer tokens than inputs, of which there are `whole`: all experts' together.

    sums: those of each layer, which layers that share an input share; none for a layer that was given nothing.
    """
    kinds: dict[str, list[str]] = {}
    for layer in linears:
        kinds.setdefault(_kind(block, layer), []).append(layer)
    found: dict[str, Stats] = {}
    pools: dict[tuple[int, ...], Stats] = {}
    for kind, layers in kinds.items():
        given = {id(sums[layer]): sums[layer] for layer in layers if layer in sums and sums[layer].tokens}
        for layer in layers:
            own = sums.get(layer)
            tokens = 0 if own is None else own.tokens
            others = len(given) - (tokens > 0)
            if kind == layer or others == 0 or tokens == whole or tokens >= weight_of(linears[layer]).shape[1]:
                continue
            pool = tuple(given)
            if pool not in pools:
                pools[pool] = replace(_Sums.together(list(given.values())).stats(place), note=POOLED)
            found[layer] = pools[pool]
    return found


_SHARE_OF_CARD = 0.25


def _resting_place(sums: Iterable["_Sums"], device: torch.device) -> torch.device:
    """Where statistics lie until steps use them: on the device where all take at most a quarter of what is free there."""
    fits = device.type == "cpu" or sum(own.bytes() for own in sums) <= _SHARE_OF_CARD * free_on_gpu(device)
    return device if fits else torch.device("cpu")


def _of_all_ranks(
    owner: dict[str, str], sums: "dict[str, _Sums]", group: Group, device: torch.device
) -> "tuple[dict[str, str], dict[str, _Sums]]":
    """Who shares a measurement with whom, and the sums, over all ranks; a rank may not have met every layer (an expert)."""
    reports = group.all_gather([owner, {layer: own.report() for layer, own in sums.items()}])
    owners = {layer: first for owned, _ in reversed(reports) for layer, first in owned.items()}
    found = {}
    for layer in dict.fromkeys(layer for _, reported in reports for layer in reported):
        parts = [reported[layer] for _, reported in reports if layer in reported]
        found[layer] = sums[layer] if layer in sums else _Sums.like(parts[0])
        found[layer].of_all_ranks(parts, group, device)
    return owners, found


def _inputs(
    block: nn.Module, name: str, linears: dict[str, nn.Module], flow: Flow, device: torch.device
) -> Iterator[dict[str, Tensor]]:
    """For each batch the inputs of these layers, in the order of their calls; the block runs no further than it must."""
    for hidden in flow.hidden:
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
                _forward(block, name, flow, hidden, device)
        finally:
            for handle in handles:
                handle.remove()
        yield seen


@profiled("statistics")
def measure_drift(
    block: nn.Module, name: str, layer: str, linear: nn.Module, flow: Flow, device: torch.device, original: Original
) -> Tensor | None:
    """`Stats.drift` of a layer that is still uncompressed: mean of d^T x `[out, in]`, on the CPU in float32.

    None where the layer's output is not added to the block's output as it is (an inner layer, a norm after it, an expert),
    which one batch tells: a small change of the layer's output must appear unchanged in the block's.
    """
    if not flow.group.broadcast(lambda: _adds_to_output(block, name, linear, Flow(flow.hidden[:1], flow.arguments), device)):
        return None
    total: Tensor | float = 0.0
    tokens = 0
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        for ours, theirs in zip(run(block, name, flow, device), run(original[0], name, original[1], device), strict=True):
            rows = seen.pop().flatten(0, -2)
            total = total + ((theirs - ours).flatten(0, -2).to(device).T @ rows).double()
            tokens += len(rows)
    finally:
        handle.remove()
    assert isinstance(total, Tensor)
    total, tokens = flow.group.all_reduce_sum(total), sum(flow.group.all_gather(tokens))
    if not bool(total.isfinite().all()):
        raise NumericsError(f"the outputs of {name} hold NaN or infinity; the model overflows on the calibration text")
    return (total / tokens).float().cpu()


def _adds_to_output(block: nn.Module, name: str, linear: nn.Module, flow: Flow, device: torch.device) -> bool:
    added: list[Tensor] = []

    def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        added.append(noise * output.square().mean().sqrt())
        return output + added[-1]

    before = next(run(block, name, flow, device))
    handle = linear.register_forward_hook(change)
    try:
        after = next(run(block, name, flow, device))
    finally:
        handle.remove()
    if len(added) != 1 or added[0].numel() != before.numel():
        return False
    expected = added[0].cpu().view_as(before)
    return float((after - before - expected).norm()) <= _SAME * float(expected.norm())


_SAME = 1e-2
"""Share of a change that may be lost where a layer's output is added as it is: the rounding of large sums."""


def _added(total: Tensor | float, more: Tensor) -> Tensor:
    """The sum, in float64; a total that is a tensor already is changed in place."""
    return total.add_(more) if isinstance(total, Tensor) else more.double()


_COLUMNS_AT_ONCE = 512


def _square_of(rows: Tensor) -> Tensor:
    """X^T X for X `[tokens, in]`: a stripe at a time from its diagonal on, the rest by symmetry."""
    width = rows.shape[1]
    square = torch.empty(width, width, dtype=rows.dtype, device=rows.device)
    for low in range(0, width, _COLUMNS_AT_ONCE):
        high = min(low + _COLUMNS_AT_ONCE, width)
        torch.matmul(rows[:, low:high].T, rows[:, low:], out=square[low:high, low:])
        square[high:, low:high] = square[low:high, high:].T
    return square


class _Sums:
    """Running sums over tokens, in float64: one batch of N and many batches give the same."""

    _SUMMED = ("abs", "square", "window", "gram", "cross")
    _LARGEST = ("peak", "peak_abs")

    def __init__(self, needs: Need, length: int, name: str) -> None:
        self.needs = needs
        self.name = name
        self.length = length
        self.tokens = 0
        self.abs: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.peak: Tensor | None = None
        self.peak_abs: Tensor | None = None
        self.window: Tensor | float = 0.0
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float | None = 0.0

    @classmethod
    def like(cls, report: dict[str, Any]) -> "_Sums":
        """Sums of nothing yet, for what another rank has reported."""
        return cls(Need(report["needs"]), report["length"], report["name"])

    def report(self) -> dict[str, Any]:
        """What other ranks need to know before they add their sums, as plain data."""
        shapes = {key: list(getattr(self, key).shape) for key in self._SUMMED if isinstance(getattr(self, key), Tensor)}
        largest = {key: list(getattr(self, key).shape) for key in self._LARGEST if getattr(self, key) is not None}
        own = {"needs": self.needs.value, "length": self.length, "name": self.name, "tokens": self.tokens}
        return {**own, "paired": self.cross is not None, "shapes": {**shapes, **largest}}

    def of_all_ranks(self, reports: list[dict[str, Any]], group: Group, device: torch.device) -> None:
        """Add those of the other ranks, of which these are the reports of all that have any."""
        shapes = {key: shape for report in reports for key, shape in report["shapes"].items()}
        self.tokens = sum(report["tokens"] for report in reports)
        if not all(report["paired"] for report in reports):
            self.cross = None
            shapes.pop("cross", None)
        for key in self._SUMMED:
            if key in shapes:
                own = getattr(self, key)
                own = own if isinstance(own, Tensor) else torch.zeros(shapes[key], dtype=torch.float64, device=device)
                setattr(self, key, group.all_reduce_sum(own.contiguous()))
        for key in self._LARGEST:
            if key in shapes:
                own = getattr(self, key)
                # Magnitudes, so that zero says nothing.
                setattr(self, key, group.all_reduce_max(torch.zeros(shapes[key], device=device) if own is None else own))

    @profiled("statistics")
    def add(self, x: Tensor, original: Tensor | None = None, *, whole: int = 0) -> None:
        """Count a batch in: `[windows, length, in]`, or `[windows x length, in]` as some models flatten it.

        original: the same layer's input in the original model. whole: tokens of the batch; inputs that are not all of them
        (an expert's) cannot be paired, because the router may have picked others there.
        """
        rows = x.flatten(0, -2)
        self.tokens += len(rows)
        if self.needs & (Need.PEAK_MEAN_ABS | Need.MEAN_WINDOW) and len(rows) != whole:
            raise ModelError(
                f"{self.name} is given {len(rows)} of {whole} tokens (an expert); a step of the recipe (l2qer, jsq) needs "
                'whole windows. Leave such layers out (leave = ["*.experts.*"]) or use another recipe'
            )
        if self.needs & Need.GRAM:
            self.gram = _added(self.gram, _square_of(rows))
        if self.needs & Need.CROSS and self.cross is not None:
            before = None if original is None else original.flatten(0, -2)
            paired = before is not None and before.shape == rows.shape and len(rows) == whole
            self.cross = _added(self.cross, before.T @ rows) if paired and before is not None else None
        if self.needs & Need.MEAN_SQUARE:
            self.square = self.square + rows.square().sum(dim=0, dtype=torch.float64)
        if self.needs & (Need.MEAN_ABS | Need.PEAK_MEAN_ABS):
            magnitude = rows.abs()
            self.abs = self.abs + magnitude.sum(dim=0, dtype=torch.float64)
            if self.needs & Need.PEAK_MEAN_ABS:
                peak = magnitude.view(-1, self.length, rows.shape[1]).mean(dim=1).amax(dim=0)
                self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        if self.needs & Need.PEAK_ABS:
            peak_abs = rows.abs().amax(dim=0)
            self.peak_abs = peak_abs if self.peak_abs is None else torch.maximum(self.peak_abs, peak_abs)
        if self.needs & Need.MEAN_WINDOW:
            self.window = self.window + rows.view(-1, self.length, rows.shape[1]).sum(dim=0, dtype=torch.float64)

    @classmethod
    def together(cls, parts: list["_Sums"]) -> "_Sums":
        """The sums over the tokens of all of these; inputs in the original model are not paired."""
        total = cls(parts[0].needs, parts[0].length, parts[0].name)
        total.cross = None
        for part in parts:
            total.tokens += part.tokens
            total.abs = part.abs + total.abs
            total.square = part.square + total.square
            total.gram = part.gram + total.gram
            if part.peak_abs is not None:
                total.peak_abs = part.peak_abs if total.peak_abs is None else torch.maximum(total.peak_abs, part.peak_abs)
        return total

    def bytes(self) -> int:
        """What the means will take, in float32."""
        held = (self.abs, self.square, self.peak, self.peak_abs, self.window, self.gram, self.cross)
        return sum(4 * own.numel() for own in held if isinstance(own, Tensor))

    @profiled("statistics")
    def stats(self, device: torch.device) -> Stats:
        """The means, on a device in float32."""

        def mean(total: Tensor | float | None, count: int = self.tokens) -> Tensor | None:
            if not isinstance(total, Tensor):
                return None
            if not bool(total.isfinite().all()):
                raise NumericsError(
                    f"the inputs of {self.name} hold NaN or infinity; the model overflows on the calibration text"
                )
            return (total / count).float().to(device)

        return Stats(
            self.tokens,
            mean_abs=mean(self.abs) if self.needs & Need.MEAN_ABS else None,
            mean_square=mean(self.square),
            peak_mean_abs=None if self.peak is None else self.peak.float().to(device),
            peak_abs=mean(self.peak_abs, count=1),
            mean_window=mean(self.window, count=self.tokens // self.length),
            gram=mean(self.gram),
            cross=mean(self.cross),
        )
