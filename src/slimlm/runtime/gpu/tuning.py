"""Measure which tiles are fastest for a model's layers on the card at hand.

For each kind of layer (tiles.Kind) and class of batches one product after another is timed: the tile in use, then, coordinate
by coordinate (rows, tokens, warps, stages, waves), the values beside it, of which the fastest stays. Layers of one kind are
gone through in turn, so that a large model's come from memory and not from a cache. Last, the product with the packed weight is
timed beside unpacking it and cuBLAS, batch after batch: that is where `fused_up_to` comes from.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlm.core.errors import KernelError
from slimlm.runtime.gpu import products, tiles
from slimlm.runtime.gpu.layout import Packed, padded_rows
from slimlm.runtime.gpu.tiles import BATCHES, Kind, Table, Tile

Call = Callable[[], Tensor]
Timer = Callable[[Sequence[Call]], float]
"""Seconds of one of these calls, each of which is made as often as another."""
Report = Callable[[str, int, int], None]
Product = tuple[Packed, Tensor]
"""A packed weight and the counters of its layer."""

TRIED: dict[str, tuple[int, ...]] = {
    "rows": (64, 128),
    "tokens": (8, 16, 32, 64, 128),
    "warps": (2, 4, 8),
    "stages": (2, 3, 4),
    "waves": (1, 2, 4, 8),
}
_MOST_LAYERS = 32
_WORTH = 0.99
"""Share of the best time so far that a tile must stay under to be taken: noise is no reason to change."""
_AGREE = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""By how much the outputs of two tiles may differ, relative to the largest: sums are added in another order."""


@dataclass(frozen=True)
class Row:
    """What was found for one kind and class of batches."""

    kind: str
    batch: int
    before: Tile
    after: Tile
    seconds_before: float
    seconds_after: float
    left_out: tuple[str, ...]
    """tiles that could not run, and why"""


def tune(
    weights: Sequence[Product], device: torch.device, dtype: torch.dtype, timer: Timer, report: Report
) -> tuple[Table, list[Row]]:
    """Measure the layers' kinds at all classes of batches; changes nothing that is in use.

    dtype: float16 or bfloat16, of the activations. Raises KernelError where the tile in use gives no result.
    """
    kinds: dict[Kind, list[Product]] = {}
    for packed, counters in weights:
        kinds.setdefault(Kind.of(packed, dtype), []).append((packed, counters))
    table, rows = Table(), list[Row]()
    total = len(kinds) * len(BATCHES)
    # The timer measures on whatever card is the current one.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for kind, own in kinds.items():
            most = own[:_MOST_LAYERS]
            for batch in BATCHES:
                report("tune", len(rows), total)
                found = _best_tile(kind, most, batch, device, dtype, timer)
                table.tiles[tiles.key(kind, batch)] = found.after
                rows.append(found)
            table.fused_up_to[str(kind)] = _crossing(most, table, device, dtype, timer)
    report("tune", total, total)
    return table, rows


def _best_tile(
    kind: Kind, weights: Sequence[Product], batch: int, device: torch.device, dtype: torch.dtype, timer: Timer
) -> Row:
    x = _inputs(weights[0][0], batch, device, dtype)
    step = min(padded_rows(packed) & -padded_rows(packed) for packed, _ in weights)
    key = tiles.key(kind, batch)
    first = tiles.tile_of(weights[0][0], batch, step, device, dtype)
    least, expected = _seconds(weights, x, key, first, device, timer)
    best, before, left_out = [first], least, list[str]()
    for tile in _neighbours(best, step, batch):
        try:
            taken, y = _seconds(weights, x, key, tile, device, timer)
        except _refusals() as error:
            left_out.append(f"{tile}: {str(error).splitlines()[0]}")
            continue
        if not float((y - expected).abs().max()) <= _AGREE[dtype] * float(expected.abs().max()):
            left_out.append(f"{tile}: gives another result")
        elif taken < _WORTH * least:
            best[:], least = [tile], taken
    return Row(str(kind), batch, first, best[0], before, least, tuple(left_out))


def _neighbours(best: Sequence[Tile], step: int, batch: int) -> Iterator[Tile]:
    """The tiles to try, each beside the one that is best (and alone in this list) by then; none twice."""
    seen = {best[0]}
    for name, values in TRIED.items():
        for value in values:
            tile = replace(best[0], **{name: value})
            # More tokens than the batch has, rounded up, are work for nothing.
            wasteful = name == "tokens" and value > max(8, 2 * batch - 1)
            if tile not in seen and not wasteful and tiles.usable(tile, step, batch):
                seen.add(tile)
                yield tile


def _seconds(
    weights: Sequence[Product], x: Tensor, key: str, tile: Tile, device: torch.device, timer: Timer
) -> tuple[float, Tensor]:
    """The time of a product with this tile, and the first weight's output."""
    table = Table({key: tile}, {str(Kind.of(weights[0][0], x.dtype)): tiles.FUSED_UP_TO})
    with tiles.using(device, table, trial=True), torch.no_grad():
        y = products.product(x, *weights[0]).float()
        return timer([partial(products.product, x, *own) for own in weights]), y


def _crossing(weights: Sequence[Product], table: Table, device: torch.device, dtype: torch.dtype, timer: Timer) -> int:
    """Tokens up to which multiplying the packed weight is no slower than unpacking it: the largest such class of batches."""
    longest = 0
    for batch in BATCHES:
        x = _inputs(weights[0][0], batch, device, dtype)
        with tiles.using(device, table, trial=True), torch.no_grad():
            fused = timer([partial(products.product, x, *own) for own in weights])
            unpacked = timer([partial(_unpacked, x, own[0]) for own in weights])
        if fused > unpacked:
            break
        longest = batch
    return longest


def _unpacked(x: Tensor, packed: Packed) -> Tensor:
    return F.linear(x, products.matrix(packed, x.dtype))


def _inputs(packed: Packed, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, packed.width, generator=generator).to(device, dtype)


def _refusals() -> tuple[type[Exception], ...]:
    """What Triton and the driver raise where a tile needs more than a card has."""
    from triton.runtime.errors import TritonError

    return TritonError, RuntimeError


def replayed_seconds(calls: Sequence[Call], *, least: int = 32, rounds: int = 15) -> float:
    """The median time of one call on the current card, replayed from a CUDA graph that goes through all of them."""
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


def products_of(layers: Sequence[Any]) -> list[Product]:
    """The packed weights of layers in the GPU layout (layout.Layer), adapters' first factors among them."""
    found: list[Product] = []
    for layer in layers:
        found.append((layer.base, layer.counters))
        if isinstance(layer.right, Packed):
            found.append((layer.right, layer.counters))
    if not found:
        raise KernelError("there is nothing to tune: the GPU kernels take none of the model's layers")
    return found
