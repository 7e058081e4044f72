"""How a layer lies in a GPU's memory: made at load from a checkpoint's parts, never written to disk.

Codes of up to 4 bits are nibbles of int32 words: in two's complement on the even grid, as indices under a codebook.

A 2:4 weight, `[blocks, 3, rows, 8]`: a block is 256 inputs and word c of a row stands for 32 of them, 8 groups of four.
Nibble g of the three planes is group g's first kept value, its second, and a bit for each of its places, two of which are set.
That is 3 bits a weight; scales come on top.

Any other weight, `[blocks, rows, 8]`: a block is 64 inputs, word c stands for 8 of them, and input 2 j + h lies at bits
16 h + 4 j, so that neighbours come apart into the halves of one register.

Scales: one `[1]`, one for each row `[rows]`, or `[blocks, rows, spans]` with one for as many inputs as divide both the group
and 256 (2:4) or 128 (others) inputs. One span a block scales sums; several, float32, scale the weights themselves.

Rows are filled up with zeros to multiples of 64, inputs to whole blocks, ranks to multiples of 64.

Layers that share their input (q, k and v; gate and up) can be one weight, their rows below each other (`join`). Each of them
then is a piece of it, and nothing lies in memory twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import CheckpointError
from slimlm.core.mask import Pattern
from slimlm.core.parts.kernel_layout import MatrixLayout, MatrixOperand, ProductLayout, ProductOperand, Refusal
from slimlm.core.parts.pack import PartEntries
from slimlm.runtime.backends import Stored

ROWS = 64
"""Rows are filled up to a multiple of this, and so are ranks."""
SPARSE_BLOCK, DENSE_BLOCK = 256, 128
"""Inputs of which scales lie together; a 2:4 weight's words come in blocks of 256, others' in blocks of 64."""
LARGEST_CODE = 4
"""Bits of the largest code that a nibble holds."""
_TWO_OF_FOUR = Pattern.parse("2:4")
MOST_TILES = 4
"""Tiles of tokens in the largest launch; tiles.py has the weight unpacked for more tokens than these hold."""

_SLICE = 2**22
"""Weights that are packed at a time; the work in between takes some tens of bytes for each."""


@dataclass(frozen=True)
class Packed:
    """A weight of codes in the kernels' layout."""

    words: Tensor
    """int32, `[blocks, 3, rows, 8]` or `[blocks, rows, 8]`"""
    scale: Tensor
    """`[1]`, `[rows]` or `[blocks, rows, spans]`, in its storage dtype; of a tail `[groups of rows, ranks]`"""
    levels: Tensor | None
    """float32 `[16]`; None: the even grid"""
    rows: int
    width: int

    @property
    def sparse(self) -> bool:
        """Whether two of four are stored."""
        return self.words.ndim == 4

    def bytes(self) -> int:
        """What lies in memory."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.scale, self.levels) if t is not None)


class Held:
    """Floats that lie on a card in the 16-bit dtypes of the activations that they have met, mostly one, and in no other.

    What is stored is often float16 and activations bfloat16: every product would convert it. What is converted once is kept for
    good, as a captured graph may read it; what is stored, where no product reads it as it is, goes to main memory.
    """

    def __init__(self, stored: Tensor) -> None:
        self.stored = stored
        self.device = stored.device
        self._used: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype) -> Tensor:
        """In a dtype. Its first product must not be one that is captured."""
        if (found := self._used.get(dtype)) is not None:
            return found
        if dtype.itemsize > 2 or torch.compiler.is_compiling():
            return self.stored.to(self.device, dtype)
        # What is made in inference mode could not be kept for gradients later.
        with torch.inference_mode(False):
            self._used[dtype] = made = self.stored.to(self.device, dtype)
            own = self._used.get(self.stored.dtype)
            self.stored = self.stored.cpu() if own is None else own
        return made

    def bytes_of_a_row(self) -> int:
        """What lies on the card for each row."""
        held = list(self._used.values()) or [self.stored]
        return sum(own.shape[1] * own.element_size() for own in held)


@dataclass(frozen=True)
class Values:
    """An adapter's first factor as floats `[ranks, in]`."""

    held: Held
    rows: slice
    """which ranks of what is held, where several layers hold it together"""

    @classmethod
    def made(cls, values: Tensor) -> "Values":
        """All rows of a tensor, which is kept."""
        return cls(Held(values), slice(0, len(values)))

    def part(self, first: int, height: int) -> "Values":
        """Some of the rows, held together with the others."""
        return Values(self.held, slice(self.rows.start + first, self.rows.start + first + height))

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def of(self, dtype: torch.dtype) -> Tensor:
        """The values in a dtype, as by `Held.of`."""
        return self.held.of(dtype)[self.rows]

    def stored(self) -> Tensor:
        """The values in the dtype that they are stored in, on the card."""
        return self.held.stored[self.rows].to(self.held.device)

    def bytes(self) -> int:
        """What lies in memory on the card."""
        return len(self) * self.held.bytes_of_a_row()


@dataclass(frozen=True)
class Tail:
    """An adapter's second factor, `[out, rank]`: packed, or as the 16 or 32 bits that it is."""

    packed: Packed | None
    group: int
    """rows that share the scales of a packed one's ranks"""
    values: Tensor | None
    """`[rows, ranks]`, filled up with zeros"""


@dataclass(frozen=True)
class Layer:
    """A layer ready to multiply."""

    base: Packed
    right: Packed | Values | None
    """an adapter's first factor: packed, with as many rows as the tail has ranks, or values"""
    tail: Tail | None
    channel_scale: Tensor | None
    """`[in]`"""
    counters: Tensor
    """int32 zeros, one for each tile of the largest launch; zeros again whenever a launch is over"""

    def bytes(self) -> int:
        """What lies in memory, the counters left out."""
        tail = self.tail
        values = None if tail is None else tail.values
        factors = (self.base, self.right, None if tail is None else tail.packed)
        sizes = sum(factor.bytes() for factor in factors if factor is not None)
        return sizes + (0 if values is None else values.numel() * values.element_size())


@dataclass(frozen=True)
class Joint:
    """Layers that share their input as one weight, each with its own adapter."""

    base: Packed
    """all rows below each other, those that fill up included"""
    right: Packed | Values | None
    """the adapters' first factors, likewise"""
    tail: Tail | None
    """the second factors below each other; as many ranks as the largest has, and its `group` means nothing"""
    members: Tensor
    """int32 `[rows / 64, 8]`: whose rows these are. Where its levels begin, and its ranks in t; how many blocks of 64 ranks it
    has; its first row, and its first group of rows in the tail's scales; where the tail's levels begin; rows of such a group"""
    right_members: Tensor | None
    """the same of the first factors, of which levels alone matter"""
    counters: Tensor
    step: int
    """128, or 64 where some layer has an odd number of 64 rows: no tile may have rows of two layers"""
    layers: tuple[Layer, ...]
    """the layers as pieces of the above"""
    rows: tuple[slice, ...]
    """where in the base's rows each layer's are, those that fill up left out"""


def unfit(entries: PartEntries, shape: tuple[int, int]) -> str | None:
    """Why the layout does not hold a layer `[out, in]` of parts that are so described, in words; None: it does."""
    base, added = entries.base.kernel_layout(), entries.added
    if len(added) > 1:
        return f"it has {len(added)} parts beside its base; the GPU kernels take one low-rank part"
    adapter = added[0].kernel_layout() if added else None
    for layout in (base, adapter):
        if isinstance(layout, Refusal):
            return layout.reason
    if isinstance(adapter, MatrixLayout):
        return f"the GPU kernels add a low-rank part to a base, not a {added[0].kind} part"
    if not isinstance(base, MatrixLayout) or base.elements == "floats":
        return f"its base is {entries.base.kind}; the GPU kernels take codes of up to {LARGEST_CODE} bits"
    sparse = base.mask == _TWO_OF_FOUR
    if base.mask is not None and not sparse and base.elements == "indices":
        return f"a codebook under the mask {base.mask}; the GPU kernels take codebooks under 2:4 or no mask"
    if sparse and shape[1] % 4:
        return f"2:4 of {shape[1]} inputs, which are no multiple of 4"
    if (reason := _unfit(base, 32 if sparse else 8, shape[1])) is not None:
        return reason
    if isinstance(adapter, ProductLayout) and (reason := _unfit_adapter(adapter, shape[1])) is not None:
        return reason
    words = _up(shape[1], SPARSE_BLOCK) * _up(shape[0], ROWS) * (3 if sparse else 4) // 32
    if words >= 2**31:
        return f"{shape[0]} x {shape[1]} weights are more than the kernels' 32-bit addresses reach"
    return None


def _unfit_adapter(adapter: ProductLayout, width: int) -> str | None:
    for factor, along in ((adapter.right, 8), (adapter.left, None)):
        if factor.channel_scale:
            return "a factor of its adapter has scales of inputs"
        if factor.elements == "floats":
            if factor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                return f"its adapter is {_name(factor.dtype)}; the GPU kernels take float16, bfloat16 and float32"
        elif (reason := _unfit(factor, along, width)) is not None:
            return f"its adapter: {reason}"
    return None


def _unfit(layout: MatrixLayout, multiple: int | None, width: int) -> str | None:
    if layout.bits > LARGEST_CODE:
        return f"codes of {layout.bits} bits; the GPU kernels take up to {LARGEST_CODE}"
    size = layout.group_size
    if multiple is not None and isinstance(size, int) and size < width and size % multiple:
        return f"groups of {size} inputs; the GPU kernels take multiples of {multiple} there"
    return None


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def lay_out(stored: Stored) -> Layer:
    """Pack a layer that `unfit` has no word against, where its tensors lie; raises CheckpointError for damaged ones."""
    base, *added = (part.kernel_operand() for part in stored.parts())
    assert isinstance(base, MatrixOperand), "the GPU kernels do not take this layer"
    packed = _sparse(base) if base.layout.mask == _TWO_OF_FOUR else _dense(base)
    right, tail = None, None
    if added and isinstance(adapter := added[0], ProductOperand) and len(adapter.left.elements):
        right, tail = _right(adapter.right), _tail(adapter.left)
    tallest = max(padded_rows(packed), padded_rows(right) if isinstance(right, Packed) else 0)
    counters = torch.zeros(MOST_TILES * tallest // ROWS, dtype=torch.int32, device=stored.device)
    return Layer(packed, right, tail, base.channel_scale, counters)


def padded_rows(packed: Packed) -> int:
    """Rows with those that fill up."""
    return packed.words.shape[-2]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _nibbles(operand: MatrixOperand) -> Tensor:
    """The codes `[rows, width]` as unsigned nibbles, uint8."""
    codes = operand.elements
    return codes if operand.layout.elements == "indices" else codes.view(torch.uint8) & 15


def _levels(operand: MatrixOperand) -> Tensor | None:
    if operand.codebook is None:
        return None
    return torch.nn.functional.pad(operand.codebook.float(), (0, 2**LARGEST_CODE - len(operand.codebook)))


def _scale_of(operand: MatrixOperand) -> Tensor:
    assert operand.scale is not None, "codes have scales"
    return operand.scale


def _words(nibbles: Tensor) -> Tensor:
    """int32 `[...]` of nibbles `[..., 8]`, the first lowest."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=nibbles.device)
    return (nibbles.int() << shifts).sum(dim=-1, dtype=torch.int32)


def _filled(values: Tensor, rows: int, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1], 0, rows - values.shape[0]))


def _sparse(operand: MatrixOperand) -> Packed:
    mask = operand.mask
    assert mask is not None
    rows, width = operand.elements.shape
    padded, wide = _up(rows, ROWS), _up(width, SPARSE_BLOCK)
    words = torch.zeros(wide // SPARSE_BLOCK, 3, padded, 8, dtype=torch.int32, device=mask.device)
    nibbles, places = _nibbles(operand), torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=mask.device)
    at_once = max(1, _SLICE // max(1, width))
    for begin in range(0, rows, at_once):
        stays = mask[begin : begin + at_once]
        groups = stays.view(len(stays), -1, 4)
        if not bool((groups.sum(dim=-1) == 2).all()):
            raise CheckpointError("a stored mask is called 2:4 and does not keep two of every four inputs")
        kept = nibbles[begin : begin + at_once][stays].view(len(stays), -1, 2)
        bits = (groups * places).sum(dim=-1, dtype=torch.uint8)
        for plane, values in enumerate((kept[..., 0], kept[..., 1], bits)):
            filled = _filled(values, len(stays), wide // 4).view(len(stays), -1, 8, 8)
            words[:, plane, begin : begin + len(stays)] = _words(filled).transpose(0, 1)
    return Packed(words, _scales(operand, padded, SPARSE_BLOCK), _levels(operand), rows, width)


def _dense(operand: MatrixOperand, *, rows: int | None = None) -> Packed:
    """`rows`: how many the packed weight has to give, where zeros are wanted after its own."""
    own, width = operand.elements.shape
    padded, wide = _up(own, ROWS), _up(width, DENSE_BLOCK)
    nibbles = _nibbles(operand)
    if operand.mask is not None:
        nibbles = nibbles * operand.mask
    words = _dense_words(nibbles, padded, wide)
    return Packed(words, _scales(operand, padded, DENSE_BLOCK), _levels(operand), rows or own, width)


def _dense_words(nibbles: Tensor, padded: int, wide: int) -> Tensor:
    rows, width = nibbles.shape
    words = torch.zeros(wide // 64, padded, 8, dtype=torch.int32, device=nibbles.device)
    at_once = max(1, _SLICE // max(1, width))
    for begin in range(0, rows, at_once):
        own = nibbles[begin : begin + at_once]
        eights = _filled(own, len(own), wide).view(len(own), -1, 8, 4, 2).transpose(-1, -2).flatten(-2)
        words[:, begin : begin + len(own)] = _words(eights).transpose(0, 1)
    return words


def _scales(operand: MatrixOperand, padded: int, block: int) -> Tensor:
    scale, size = _scale_of(operand), operand.layout.group_size
    if size == "per-tensor":
        return scale.reshape(1).clone()
    if scale.shape[1] == 1:
        return torch.nn.functional.pad(scale[:, 0], (0, padded - len(scale)))
    assert isinstance(size, int)
    span = gcd(size, block)
    wide = _up(operand.elements.shape[1], block) // span
    each = _filled(scale.repeat_interleave(size // span, dim=1)[:, :wide], padded, wide)
    if span < block:
        # Copied ahead element by element, which takes 4 bytes; otherwise they cross threads, at half as many instructions more.
        each = each.float()
    return each.view(padded, -1, block // span).transpose(0, 1).contiguous()


def _right(operand: MatrixOperand) -> Packed | Values:
    rank, width = operand.elements.shape
    if operand.layout.elements == "floats":
        return Values.made(_filled(operand.elements, _up(rank, ROWS), width))
    if operand.layout.group_size == "per-tensor":
        # Rows that fill up would have that scale, too, and a codebook's first value is not zero.
        layout = replace(operand.layout, group_size="per-channel")
        operand = replace(operand, layout=layout, scale=_scale_of(operand).expand(rank, 1))
    return _dense(operand, rows=_up(rank, ROWS))


def _tail(operand: MatrixOperand) -> Tail:
    """The factor `[rank, out]` turned round: its groups run along its rows then."""
    rank, out = operand.elements.shape
    ranks, padded = _up(rank, ROWS), _up(out, ROWS)
    if operand.layout.elements == "floats":
        return Tail(None, 1, _filled(operand.elements.T, padded, ranks).contiguous())
    size = operand.layout.group_size
    group = size if isinstance(size, int) else out
    scale = _scale_of(operand)
    scale = scale.expand(rank, scale.shape[1]).T
    # Rows that fill up read a group's scales, too.
    each = _filled(scale, grid.scale_shape((1, padded), group)[1], ranks).contiguous()
    words = _dense_words(_nibbles(operand).T, padded, ranks)
    return Tail(Packed(words, each, _levels(operand), out, ranks), group, None)


def apart(layers: Sequence[Layer]) -> str | None:
    """Why layers cannot be one weight, in words; None: they can."""
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
    """What has to agree."""
    if factor is None:
        return ()
    if isinstance(factor, Values):
        return (factor.held.stored.dtype,)
    if not isinstance(factor, Packed):
        return (factor.dtype,)
    # One scale for all can be given to every row.
    spans = factor.scale.shape[2:]
    inputs = factor.width if factor.scale.ndim != 2 else None
    return (inputs, factor.sparse, factor.levels is not None, factor.scale.ndim == 3, spans)


def join(layers: Sequence[Layer]) -> Joint:
    """One weight of layers that `apart` has no word against."""
    heights = [padded_rows(layer.base) for layer in layers]
    firsts = [sum(heights[:i]) for i in range(len(heights))]
    base = _joined([layer.base for layer in layers])
    right, right_members = _joined_right([layer.right for layer in layers])
    ranks = [0 if layer.right is None else _height(layer.right) for layer in layers]
    tails = [layer.tail for layer in layers if layer.tail is not None]
    tail = _joined_tails(tails) if tails else None
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
    pieces = []
    for i, (layer, first, height) in enumerate(zip(layers, firsts, heights, strict=True)):
        begin = sum(ranks[:i])
        own_right = None if right is None else _piece(right, begin, ranks[i], ranks[i], i)
        own_tail = None if tail is None else _tail_piece(tail, layer, (first, height), sum(groups[:i]), i)
        piece = _piece(base, first, height, layer.base.rows, i)
        assert isinstance(piece, Packed)
        pieces.append(Layer(piece, own_right, own_tail, None, counters))
    rows = tuple(slice(first, first + layer.base.rows) for layer, first in zip(layers, firsts, strict=True))
    step = 2 * ROWS if all(height % (2 * ROWS) == 0 for height in heights) else ROWS
    return Joint(base, right, tail, members, right_members, counters, step, tuple(pieces), rows)


def _height(factor: Packed | Values) -> int:
    return padded_rows(factor) if isinstance(factor, Packed) else len(factor)


def _joined(factors: Sequence[Packed]) -> Packed:
    words = torch.cat([factor.words for factor in factors], dim=-2)
    if factors[0].scale.ndim == 3:
        scale = _cat([factor.scale for factor in factors], dim=1)
    else:
        scale = _cat([factor.scale.expand(padded_rows(factor)) for factor in factors], dim=0)
    return Packed(words, scale, _joined_levels(factors), words.shape[-2], factors[0].width)


def _joined_levels(factors: Sequence[Packed]) -> Tensor | None:
    levels = [factor.levels for factor in factors if factor.levels is not None]
    return torch.cat(levels) if levels else None


def _cat(scales: Sequence[Tensor], dim: int) -> Tensor:
    """In the widest of their dtypes: where one is float32, float16 did not hold it."""
    wide = torch.float32 if any(scale.dtype == torch.float32 for scale in scales) else scales[0].dtype
    return torch.cat([scale.to(wide) for scale in scales], dim=dim)


def _joined_right(factors: Sequence[Packed | Values | None]) -> tuple[Packed | Values | None, Tensor | None]:
    values = [factor for factor in factors if isinstance(factor, Values)]
    if values:
        return Values.made(torch.cat([factor.stored() for factor in values])), None
    packed = [factor for factor in factors if isinstance(factor, Packed)]
    if not packed:
        return None, None
    right = _joined(packed)
    table = [[16 * i, 0, 0, 0, 0, 0, 1, 0] for i, own in enumerate(packed) for _ in range(padded_rows(own) // ROWS)]
    return right, torch.tensor(table, dtype=torch.int32).to(right.words.device)


def _joined_tails(tails: Sequence[Tail]) -> Tail:
    pad = torch.nn.functional.pad
    values = [tail.values for tail in tails if tail.values is not None]
    if values:
        ranks = max(own.shape[1] for own in values)
        return Tail(None, 1, torch.cat([pad(own, (0, ranks - own.shape[1])) for own in values]))
    packed = [tail.packed for tail in tails if tail.packed is not None]
    ranks = max(own.width for own in packed)
    words = torch.cat([pad(own.words, (0, 0, 0, 0, 0, ranks // ROWS - len(own.words))) for own in packed], dim=1)
    scale = _cat([pad(own.scale, (0, ranks - own.scale.shape[1])) for own in packed], dim=0)
    return Tail(Packed(words, scale, _joined_levels(packed), words.shape[1], ranks), 1, None)


def _piece(factor: Packed | Values, first: int, height: int, rows: int, number: int) -> Packed | Values:
    """Of a joint factor one layer's rows, as views."""
    if isinstance(factor, Values):
        return factor.part(first, height)
    own = slice(first, first + height)
    scale = factor.scale[:, own] if factor.scale.ndim == 3 else factor.scale[own]
    return Packed(factor.words[..., own, :], scale, _piece_of_levels(factor, number), rows, factor.width)


def _piece_of_levels(factor: Packed, number: int) -> Tensor | None:
    return None if factor.levels is None else factor.levels[16 * number : 16 * number + 16]


def _tail_piece(joint: Tail, layer: Layer, own: tuple[int, int], group: int, number: int) -> Tail:
    assert layer.tail is not None
    first, height = own
    if joint.values is not None:
        assert layer.tail.values is not None
        return Tail(None, 1, joint.values[first : first + height, : layer.tail.values.shape[1]])
    packed, before = joint.packed, layer.tail.packed
    assert packed is not None and before is not None
    words = packed.words[: len(before.words), first : first + height]
    scale = packed.scale[group : group + len(before.scale), : before.scale.shape[1]]
    levels = _piece_of_levels(packed, number)
    return Tail(Packed(words, scale, levels, before.rows, before.width), layer.tail.group, None)
