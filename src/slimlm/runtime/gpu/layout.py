"""The layout of a layer in a GPU's memory, made at load from a checkpoint's parts and never written to disk.

Codes of up to 4 bits are nibbles of int32 words: numbers in two's complement on an even grid, indices into a codebook.

A 2:4 weight, `[blocks, 3, rows, 8]`: a block is 256 inputs and word c of a row stands for 32 of them, 8 groups of four.
Nibble g of the three planes is group g's first kept value, its second, and a bit for each of its places, two of which are set.
That is 3 bits a weight; scales come on top.

Any other weight, `[blocks, rows, 8]`: a block is 64 inputs, word c stands for 8 of them, and input 2 j + h lies at bits
16 h + 4 j, so that neighbours come apart into the halves of one register.

Scales: one `[1]`, one for each row `[rows]`, or `[blocks, rows, spans]` with one for as many inputs as divide both the group
and 256 (2:4) or 128 (others) inputs. One span a block scales sums; several, float32, scale the weights themselves. Zeros, the
numbers that stand for zero, lie as their scales do. Under a mask a grid with zeros is laid out with all its weights.

Rows are padded with zeros to multiples of 64, inputs to whole blocks, ranks to multiples of 64.

Layers that share their input can be stacked into one weight (stacking.py).
"""

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
"""Rows are padded to a multiple of this, and so are ranks."""
SPARSE_BLOCK, DENSE_BLOCK = 256, 128
"""Inputs of which scales lie together; a 2:4 weight's words come in blocks of 256, others' in blocks of 64."""
LARGEST_CODE = 4
"""Bits of the largest code that a nibble holds."""
_TWO_OF_FOUR = Pattern.parse("2:4")
MOST_TILES = 4
"""Tiles of tokens in the largest launch; for more tokens than these hold the weight is unpacked (tiles.py)."""

_SLICE = 2**22
"""Weights that are packed at a time; the intermediate tensors take some tens of bytes for each."""


@dataclass(frozen=True)
class Packed:
    """A weight of codes in the kernels' layout."""

    words: Tensor
    """int32, `[blocks, 3, rows, 8]` or `[blocks, rows, 8]`"""
    scale: Tensor
    """`[1]`, `[rows]` or `[blocks, rows, spans]`, in its storage dtype; of a tail `[groups of rows, ranks]`"""
    codebook: Tensor | None
    """float32 `[16]`; None: the codes are numbers"""
    rows: int
    width: int
    zero: Tensor | None = None
    """of the shape of `scale`, whole numbers in float16 or float32; None: 0"""

    @property
    def sparse(self) -> bool:
        """Whether the weight is stored as 2:4."""
        return self.words.ndim == 4

    def bytes(self) -> int:
        """Bytes in the GPU's memory."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.scale, self.codebook, self.zero) if t is not None)


class CachedCasts:
    """A float tensor that lies on a GPU in the 16-bit dtypes of activations that it was multiplied with, mostly one.

    What is stored is often float16 where activations are bfloat16, so that every product would cast it. A cast is kept for
    good, as a captured graph may read it; the stored tensor, where no product reads it as it is, moves to the CPU.
    """

    def __init__(self, stored: Tensor) -> None:
        self.stored = stored
        self.device = stored.device
        self._used: dict[torch.dtype, Tensor] = {}

    def of(self, dtype: torch.dtype) -> Tensor:
        """The tensor, of its shape, in a dtype; the first call for a dtype must not be captured in a CUDA graph."""
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
        """Bytes in the GPU's memory for each row."""
        present = list(self._used.values()) or [self.stored]
        return sum(own.shape[1] * own.element_size() for own in present)


@dataclass(frozen=True)
class Values:
    """An adapter's first factor as floats `[ranks, in]`."""

    casts: CachedCasts
    rows: slice
    """the ranks of this layer, where several layers share a tensor"""

    @classmethod
    def made(cls, values: Tensor) -> "Values":
        """All rows of a tensor `[ranks, in]`."""
        return cls(CachedCasts(values), slice(0, len(values)))

    def part(self, first: int, height: int) -> "Values":
        """Some of the rows, in the same tensor."""
        return Values(self.casts, slice(self.rows.start + first, self.rows.start + first + height))

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def of(self, dtype: torch.dtype) -> Tensor:
        """The values `[ranks, in]` in a dtype, as by `CachedCasts.of`."""
        return self.casts.of(dtype)[self.rows]

    def stored(self) -> Tensor:
        """The values `[ranks, in]` in the dtype that they are stored in, on the GPU."""
        return self.casts.stored[self.rows].to(self.casts.device)

    def bytes(self) -> int:
        """Bytes in the GPU's memory."""
        return len(self) * self.casts.bytes_of_a_row()


@dataclass(frozen=True)
class Tail:
    """An adapter's second factor `[out, rank]`: packed, or floats of 16 or 32 bits."""

    packed: Packed | None
    group: int
    """rows of a packed factor that share the scales of its ranks"""
    values: Tensor | None
    """`[rows, ranks]`, padded with zeros"""


@dataclass(frozen=True)
class GpuLayer:
    """A layer in the kernels' layout."""

    base: Packed
    right: Packed | Values | None
    """an adapter's first factor: packed, with as many rows as the tail has ranks, or values"""
    tail: Tail | None
    channel_scale: Tensor | None
    """`[in]`"""
    counters: Tensor
    """int32 zeros, one for each tile of the largest launch; they are zero again after every launch"""

    def bytes(self) -> int:
        """Bytes in the GPU's memory, without the counters."""
        tail = self.tail
        values = None if tail is None else tail.values
        factors = (self.base, self.right, None if tail is None else tail.packed)
        sizes = sum(factor.bytes() for factor in factors if factor is not None)
        return sizes + (0 if values is None else values.numel() * values.element_size())


def unfit(entries: PartEntries, shape: tuple[int, int]) -> str | None:
    """Why the layout does not hold a layer `[out, in]` of parts with these entries; None: it does."""
    base, added = entries.base.kernel_layout(), entries.added
    if len(added) > 1:
        return f"it has {len(added)} parts besides its base; the GPU kernels take one low-rank part"
    adapter = added[0].kernel_layout() if added else None
    for layout in (base, adapter):
        if isinstance(layout, Refusal):
            return layout.reason
    if isinstance(adapter, MatrixLayout):
        return f"the GPU kernels add a low-rank part to a base, not a {added[0].kind} part"
    if not isinstance(base, MatrixLayout) or base.elements == "floats":
        return f"its base is {entries.base.kind}; the GPU kernels take codes of up to {LARGEST_CODE} bits"
    sparse = _is_sparse(base)
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
        if factor.zero:
            return "a factor of its adapter has zeros beside its scales"
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


def _is_sparse(layout: MatrixLayout) -> bool:
    """Whether a weight is laid out as 2:4."""
    return layout.mask == _TWO_OF_FOUR and not layout.zero


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def lay_out(stored: Stored) -> GpuLayer:
    """Pack a layer that `unfit` has no word against, where its tensors lie; raises CheckpointError for damaged ones."""
    base, *added = (part.kernel_operand() for part in stored.parts())
    assert isinstance(base, MatrixOperand), "the GPU kernels do not take this layer"
    packed = _sparse(base) if _is_sparse(base.layout) else _dense(base)
    right, tail = None, None
    if added and isinstance(adapter := added[0], ProductOperand) and len(adapter.left.elements):
        right, tail = _right(adapter.right), _tail(adapter.left)
    tallest = max(padded_rows(packed), padded_rows(right) if isinstance(right, Packed) else 0)
    counters = torch.zeros(MOST_TILES * tallest // ROWS, dtype=torch.int32, device=stored.device)
    return GpuLayer(packed, right, tail, base.channel_scale, counters)


def padded_rows(packed: Packed) -> int:
    """The number of rows, padding included."""
    return packed.words.shape[-2]


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _nibbles(operand: MatrixOperand) -> Tensor:
    """The codes `[rows, width]` as unsigned nibbles, uint8."""
    codes = operand.elements
    return codes if operand.layout.elements == "indices" else codes.view(torch.uint8) & 15


def _nibbles_of_zero(operand: MatrixOperand) -> Tensor:
    """The nibbles that stand for zero, uint8, of a shape that broadcasts to that of the codes."""
    if operand.zero is None:
        return torch.zeros(1, 1, dtype=torch.uint8, device=operand.elements.device)
    wide = grid.spread(operand.zero, operand.elements.shape[1], operand.layout.group_size)
    return wide.to(torch.int8).view(torch.uint8) & 15


def _codebook(operand: MatrixOperand) -> Tensor | None:
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
    scale = _in_blocks(_scale_of(operand), operand, padded, SPARSE_BLOCK)
    return Packed(words, scale, _codebook(operand), rows, width)


def _dense(operand: MatrixOperand, *, rows: int | None = None) -> Packed:
    """`rows`: how many the packed weight has to give, where zeros are wanted after its own."""
    own, width = operand.elements.shape
    padded, wide = _up(own, ROWS), _up(width, DENSE_BLOCK)
    nibbles = _nibbles(operand)
    if operand.mask is not None:
        nibbles = torch.where(operand.mask, nibbles, _nibbles_of_zero(operand))
    words = _dense_words(nibbles, padded, wide)
    scale = _in_blocks(_scale_of(operand), operand, padded, DENSE_BLOCK)
    zero = None if operand.zero is None else _in_blocks(operand.zero.half(), operand, padded, DENSE_BLOCK)
    return Packed(words, scale, _codebook(operand), rows or own, width, zero)


def _dense_words(nibbles: Tensor, padded: int, wide: int) -> Tensor:
    rows, width = nibbles.shape
    words = torch.zeros(wide // 64, padded, 8, dtype=torch.int32, device=nibbles.device)
    at_once = max(1, _SLICE // max(1, width))
    for begin in range(0, rows, at_once):
        own = nibbles[begin : begin + at_once]
        eights = _filled(own, len(own), wide).view(len(own), -1, 8, 4, 2).transpose(-1, -2).flatten(-2)
        words[:, begin : begin + len(own)] = _words(eights).transpose(0, 1)
    return words


def _in_blocks(scale: Tensor, operand: MatrixOperand, padded: int, block: int) -> Tensor:
    """Scales (or zeros) of an operand as they lie in memory."""
    size = operand.layout.group_size
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
    return Tail(Packed(words, each, _codebook(operand), out, ranks), group, None)
