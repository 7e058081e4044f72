"""Layers that share their input as one weight: their rows below each other, multiplied in one launch.

Queries, keys and values are such layers, and gate and up. Each layer then is a view of its rows, so that nothing lies in memory
twice, and can still be multiplied by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.runtime.gpu.layout import MOST_TILES, ROWS, GpuLayer, Packed, Tail, Values, padded_rows


@dataclass(frozen=True)
class Stack:
    """Layers that share their input as one weight, each with its own adapter."""

    base: Packed
    """The rows of all layers below each other, padding included."""
    right: Packed | Values | None
    """The adapters' first factors, stacked in the same way."""
    tail: Tail | None
    """The second factors below each other; it has as many ranks as the largest adapter, and its `group` is not used."""
    members: Tensor
    """int32 `[rows / 64, 8]`, of the layer to which these 64 rows belong: where its codebook begins, and its ranks in t; how
    many blocks of 64 ranks it has; its first row, and its first group of rows in the tail's scales; where the tail's codebook
    begins; rows of such a group; 0"""
    right_members: Tensor | None
    """The same for the first factors, of which only codebooks differ."""
    counters: Tensor
    """int32 zeros, one for each tile of the largest launch"""
    step: int
    """128, or 64 where some layer has an odd number of 64 rows: no tile may have rows of two layers"""
    layers: tuple[GpuLayer, ...]
    """The layers as views of the stacked tensors."""
    rows: tuple[slice, ...]
    """Each layer's rows in the base, without padding."""


def refuses(layers: Sequence[GpuLayer]) -> str | None:
    """Why layers cannot be stacked; None: they can."""
    if any(layer.channel_scale is not None for layer in layers):
        return "inputs of one of them are scaled"
    for what, kinds in (
        ("bases", [_kind(layer.base) for layer in layers]),
        ("first factors", [_kind(layer.right) for layer in layers]),
        ("second factors", [None if layer.tail is None else _kind(layer.tail.packed or layer.tail.values) for layer in layers]),
    ):
        if len(set(kinds)) > 1:
            return f"their {what} are of different kinds"
    return None


def _kind(factor: Packed | Values | Tensor | None) -> tuple[object, ...]:
    """What has to be the same in all layers."""
    if factor is None:
        return ()
    if isinstance(factor, Values):
        return (factor.casts.stored.dtype,)
    if not isinstance(factor, Packed):
        return (factor.dtype,)
    # One scale for all can be given to every row.
    spans = factor.scale.shape[2:]
    inputs = factor.width if factor.scale.ndim != 2 else None
    return (inputs, factor.sparse, factor.codebook is not None, factor.zero is not None, factor.scale.ndim == 3, spans)


def stack(layers: Sequence[GpuLayer]) -> Stack:
    """One weight of layers that `refuses` accepts."""
    heights = [padded_rows(layer.base) for layer in layers]
    firsts = [sum(heights[:i]) for i in range(len(heights))]
    base = _stacked([layer.base for layer in layers])
    right, right_members = _stacked_right([layer.right for layer in layers])
    ranks = [0 if layer.right is None else _height(layer.right) for layer in layers]
    tails = [layer.tail for layer in layers if layer.tail is not None]
    tail = _stacked_tails(tails) if tails else None
    groups = [0 if own.packed is None else len(own.packed.scale) for own in tails] or [0] * len(layers)
    own_groups = [own.group for own in tails] or [1] * len(layers)
    table = [
        [16 * i, sum(ranks[:i]), ranks[i] // ROWS, firsts[i], sum(groups[:i]), 16 * i, own_groups[i], 0]
        for i, height in enumerate(heights)
        for _ in range(height // ROWS)
    ]
    where = base.words.device
    counters = torch.zeros(MOST_TILES * max(sum(heights), sum(ranks)) // ROWS, dtype=torch.int32, device=where)
    members = torch.tensor(table, dtype=torch.int32).to(where)
    views = []
    for i, (layer, first, height) in enumerate(zip(layers, firsts, heights, strict=True)):
        begin = sum(ranks[:i])
        own_right = None if right is None else _view(right, begin, ranks[i], ranks[i], i)
        own_tail = None if tail is None else _tail_view(tail, layer, (first, height), sum(groups[:i]), i)
        view = _view(base, first, height, layer.base.rows, i)
        assert isinstance(view, Packed)
        views.append(GpuLayer(view, own_right, own_tail, None, counters))
    rows = tuple(slice(first, first + layer.base.rows) for layer, first in zip(layers, firsts, strict=True))
    step = 2 * ROWS if all(height % (2 * ROWS) == 0 for height in heights) else ROWS
    return Stack(base, right, tail, members, right_members, counters, step, tuple(views), rows)


def _height(factor: Packed | Values) -> int:
    return padded_rows(factor) if isinstance(factor, Packed) else len(factor)


def _stacked(factors: Sequence[Packed]) -> Packed:
    words = torch.cat([factor.words for factor in factors], dim=-2)
    heights = [padded_rows(factor) for factor in factors]
    scale = _stacked_scales([factor.scale for factor in factors], heights)
    zeros = [factor.zero for factor in factors if factor.zero is not None]
    zero = _stacked_scales(zeros, heights) if zeros else None
    return Packed(words, scale, _stacked_codebooks(factors), words.shape[-2], factors[0].width, zero)


def _stacked_scales(scales: Sequence[Tensor], heights: Sequence[int]) -> Tensor:
    """Scales, or zeros, of weights with so many rows below each other."""
    if scales[0].ndim == 3:
        return _cat(scales, dim=1)
    return _cat([scale.expand(height) for scale, height in zip(scales, heights, strict=True)], dim=0)


def _stacked_codebooks(factors: Sequence[Packed]) -> Tensor | None:
    codebooks = [factor.codebook for factor in factors if factor.codebook is not None]
    return torch.cat(codebooks) if codebooks else None


def _cat(scales: Sequence[Tensor], dim: int) -> Tensor:
    """In the widest of their dtypes: where one is float32, float16 did not hold it."""
    wide = torch.float32 if any(scale.dtype == torch.float32 for scale in scales) else scales[0].dtype
    return torch.cat([scale.to(wide) for scale in scales], dim=dim)


def _stacked_right(factors: Sequence[Packed | Values | None]) -> tuple[Packed | Values | None, Tensor | None]:
    values = [factor for factor in factors if isinstance(factor, Values)]
    if values:
        return Values.made(torch.cat([factor.stored() for factor in values])), None
    packed = [factor for factor in factors if isinstance(factor, Packed)]
    if not packed:
        return None, None
    right = _stacked(packed)
    table = [[16 * i, 0, 0, 0, 0, 0, 1, 0] for i, own in enumerate(packed) for _ in range(padded_rows(own) // ROWS)]
    return right, torch.tensor(table, dtype=torch.int32).to(right.words.device)


def _stacked_tails(tails: Sequence[Tail]) -> Tail:
    pad = torch.nn.functional.pad
    values = [tail.values for tail in tails if tail.values is not None]
    if values:
        ranks = max(own.shape[1] for own in values)
        return Tail(None, 1, torch.cat([pad(own, (0, ranks - own.shape[1])) for own in values]))
    packed = [tail.packed for tail in tails if tail.packed is not None]
    ranks = max(own.width for own in packed)
    words = torch.cat([pad(own.words, (0, 0, 0, 0, 0, ranks // ROWS - len(own.words))) for own in packed], dim=1)
    scale = _cat([pad(own.scale, (0, ranks - own.scale.shape[1])) for own in packed], dim=0)
    return Tail(Packed(words, scale, _stacked_codebooks(packed), words.shape[1], ranks), 1, None)


def _view(factor: Packed | Values, first: int, height: int, rows: int, number: int) -> Packed | Values:
    """The rows of one layer in a stacked factor."""
    if isinstance(factor, Values):
        return factor.part(first, height)
    own = slice(first, first + height)

    def of_rows(scale: Tensor) -> Tensor:
        return scale[:, own] if scale.ndim == 3 else scale[own]

    zero = None if factor.zero is None else of_rows(factor.zero)
    words, codebook = factor.words[..., own, :], _codebook_view(factor, number)
    return Packed(words, of_rows(factor.scale), codebook, rows, factor.width, zero)


def _codebook_view(factor: Packed, number: int) -> Tensor | None:
    return None if factor.codebook is None else factor.codebook[16 * number : 16 * number + 16]


def _tail_view(stacked: Tail, layer: GpuLayer, own: tuple[int, int], group: int, number: int) -> Tail:
    """The rows of one layer in the stacked second factors; `own` are its first row and their number."""
    assert layer.tail is not None
    first, height = own
    if stacked.values is not None:
        assert layer.tail.values is not None
        return Tail(None, 1, stacked.values[first : first + height, : layer.tail.values.shape[1]])
    packed, before = stacked.packed, layer.tail.packed
    assert packed is not None and before is not None
    words = packed.words[: len(before.words), first : first + height]
    scale = packed.scale[group : group + len(before.scale), : before.scale.shape[1]]
    codebook = _codebook_view(packed, number)
    return Tail(Packed(words, scale, codebook, before.rows, before.width), layer.tail.group, None)
