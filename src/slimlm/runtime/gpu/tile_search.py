"""Measure which tiles are fastest for a model's layers on this machine's GPU.

For each kind of layer (tiles.Kind) and class of batches products are timed one after another: first with the tile in use,
then, coordinate by coordinate (rows, tokens, warps, stages, waves), with the values next to the best so far. The layers of one
kind are multiplied in turn, so that a large model's weights come from memory and not from a cache. Last, the product with the
packed weight is timed against unpacking it and cuBLAS, for one class of batches after another, which gives `fused_up_to`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlm.core.errors import KernelError
from slimlm.runtime.gpu import products, tiles
from slimlm.runtime.gpu.layout import GpuLayer, Packed, padded_rows
from slimlm.runtime.gpu.tiles import BATCHES, Kind, Table, Tile

Call = Callable[[], Tensor]
Timer = Callable[[Sequence[Call]], float]
"""Seconds of one of these calls, each of which is made as often as another."""
Report = Callable[[str, int, int], None]
"""Called with a stage, the number of its items that are done, and their total."""
CountedWeight = tuple[Packed, Tensor]
"""A packed weight and the counters of its layer."""

TRIED: dict[str, tuple[int, ...]] = {
    "rows": (64, 128),
    "tokens": (8, 16, 32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (2, 3, 4),
    "waves": (1, 2, 4, 8),
}
"""The values of each field of a tile that are tried."""
_MOST_LAYERS = 32
_GAIN = 0.99
"""A tile must take less than this share of the best time so far: smaller differences are noise."""
_AGREE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""By how much the outputs of two tiles may differ, relative to the largest: sums are added in another order."""


@dataclass(frozen=True)
class Search:
    """Where tiles are measured, how, and which ones."""

    device: torch.device
    dtype: torch.dtype
    """of the activations: float16 or bfloat16"""
    timer: Timer
    batches: tuple[int, ...] = BATCHES
    tried: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: TRIED)


@dataclass(frozen=True)
class Finding:
    """The result for one kind of layer and class of batches."""

    kind: str
    batch: int
    before: Tile
    after: Tile
    seconds_before: float
    seconds_after: float
    left_out: tuple[str, ...]
    """tiles that could not run, and why"""


def search_tiles(weights: Sequence[CountedWeight], search: Search, report: Report) -> tuple[Table, list[Finding]]:
    """Measure the kinds of these weights at all classes of batches; the tiles in use stay as they are.

    Args:
        weights: of a model's layers, from `weights_of`.
        search: where and how to measure.
        report: is called before every class of batches.

    Returns:
        The fastest tiles, and what was found one by one.

    Raises:
        KernelError: the tile in use gives no result.
    """
    kinds: dict[Kind, list[CountedWeight]] = {}
    for packed, counters in weights:
        kinds.setdefault(Kind.of(packed, search.dtype), []).append((packed, counters))
    table, findings = Table(), list[Finding]()
    total = len(kinds) * len(search.batches)
    # The timer measures on the current GPU.
    with torch.cuda.device(search.device) if search.device.type == "cuda" else nullcontext():
        for kind, alike in kinds.items():
            some = alike[:_MOST_LAYERS]
            for batch in search.batches:
                report("tune", len(findings), total)
                found = best_tile(kind, some, batch, search)
                table.tiles[tiles.key(kind, batch)] = found.after
                findings.append(found)
            table.fused_up_to[str(kind)] = crossing(some, table, search)
    report("tune", total, total)
    return table, findings


def best_tile(kind: Kind, weights: Sequence[CountedWeight], batch: int, search: Search) -> Finding:
    """The fastest tile for weights of one kind and a batch, which gives the result of the tile in use."""
    x = _inputs(weights[0][0], batch, search)
    step = min(padded_rows(packed) & -padded_rows(packed) for packed, _ in weights)
    key = tiles.key(kind, batch)
    first = tiles.tile_of(weights[0][0], batch, step, search.device, search.dtype)
    least, expected = _seconds(weights, x, key, first, search)
    best, before, left_out = [first], least, list[str]()
    for tile in neighbours(best, step, batch, search.tried):
        try:
            taken, y = _seconds(weights, x, key, tile, search)
        except _refusals() as error:
            left_out.append(f"{tile}: {str(error).splitlines()[0]}")
            continue
        if not float((y - expected).abs().max()) <= _AGREE[search.dtype] * float(expected.abs().max()):
            left_out.append(f"{tile}: gives another result")
        elif taken < _GAIN * least:
            best[:], least = [tile], taken
    return Finding(str(kind), batch, first, best[0], before, least, tuple(left_out))


def neighbours(best: Sequence[Tile], step: int, batch: int, tried: Mapping[str, tuple[int, ...]] = TRIED) -> Iterator[Tile]:
    """The tiles to try, none twice, each of which differs in one field from the best tile so far.

    Args:
        best: holds the best tile so far alone; the caller replaces it meanwhile.
        step: number of rows that divides the rows of every weight.
        batch: tokens.
        tried: values by field.
    """
    seen = {best[0]}
    for name, values in tried.items():
        for value in values:
            tile = replace(best[0], **{name: value})
            # More tokens than the batch has, rounded up, would be computed in vain.
            wasteful = name == "tokens" and value > max(8, 2 * batch - 1)
            if tile not in seen and not wasteful and tiles.usable(tile, step, batch):
                seen.add(tile)
                yield tile


def _seconds(weights: Sequence[CountedWeight], x: Tensor, key: str, tile: Tile, search: Search) -> tuple[float, Tensor]:
    """The time of a product with this tile, and the first weight's output in float32."""
    table = Table({key: tile}, {str(Kind.of(weights[0][0], x.dtype)): tiles.FUSED_UP_TO})
    with tiles.using(search.device, table, measuring=True), torch.no_grad():
        y = products.product(x, *weights[0]).float()
        return search.timer([partial(products.product, x, *own) for own in weights]), y


def crossing(weights: Sequence[CountedWeight], table: Table, search: Search) -> int:
    """The largest class of batches up to which multiplying by the packed weight is no slower than unpacking it; 0: none."""
    longest = 0
    for batch in search.batches:
        x = _inputs(weights[0][0], batch, search)
        with tiles.using(search.device, table, measuring=True), torch.no_grad():
            fused = search.timer([partial(products.product, x, *own) for own in weights])
            unpacked = search.timer([partial(_unpacked_product, x, own[0]) for own in weights])
        if fused > unpacked:
            break
        longest = batch
    return longest


def _unpacked_product(x: Tensor, packed: Packed) -> Tensor:
    return F.linear(x, products.matrix(packed, x.dtype))


def _inputs(packed: Packed, batch: int, search: Search) -> Tensor:
    """Random activations `[batch, in]`."""
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, packed.width, generator=generator).to(search.device, search.dtype)


def _refusals() -> tuple[type[Exception], ...]:
    """What Triton and the driver raise where a tile needs more than a GPU has."""
    from triton.runtime.errors import TritonError

    return TritonError, RuntimeError


def replayed_seconds(calls: Sequence[Call], *, least: int = 32, rounds: int = 15) -> float:
    """The median time in seconds of one call on the current GPU, replayed from a CUDA graph that makes all calls in turn.

    Args:
        calls: what is timed.
        least: calls in the graph, at least.
        rounds: replays that are timed.
    """
    count = -(-max(least, len(calls)) // len(calls)) * len(calls)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(count):
            calls[i % len(calls)]()
    times = []
    for _ in range(rounds + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / count)
    return sorted(times[1:])[rounds // 2]


def weights_of(layers: Sequence[GpuLayer]) -> list[CountedWeight]:
    """The packed weights of layers, first factors of adapters among them.

    Raises:
        KernelError: there are no layers.
    """
    found: list[CountedWeight] = []
    for layer in layers:
        found.append((layer.base, layer.counters))
        if isinstance(layer.right, Packed):
            found.append((layer.right, layer.counters))
    if not found:
        raise KernelError("there is nothing to tune: the GPU kernels take none of the model's layers")
    return found
