"""The layout of a layer in a GPU's memory, made at load from a checkpoint's parts and never written to disk.

Codes of up to 4 bits are nibbles of int32 words: numbers in two's complement on an even grid, indices into a codebook.

A 2:4 weight, `[blocks, 3, rows, 8]`: a block is 256 inputs and word c of a row stands for 32 of them, 8 groups of four.
Nibble g of the three planes is group g's first kept value, its second, and a bit for each of its places, two of which are set.
That is 3 bits a weight; scales come on top.

Any other weight, `[blocks, rows, 8]`: a block is 64 inputs, word c stands for 8 of them, and input 2 j + h lies at bits
16 h + 4 j, so that neighbours come apart into the halves of one register.

Scales: one `[1]`, one for each row `[rows]`, or `[blocks, rows, spans]` with one for as many inputs as divide both the group
and 256 (2:4) or 128 (others) inputs. One span a block scales sums; several, float32, scale the weights themselves.

Rows are padded with zeros to multiples of 64, inputs to whole blocks, ranks to multiples of 64.

Layers that share their input can be stacked into one weight (stacking.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import CheckpointError
from slimlm.core.parts import Codebook, Description, Elementwise, LowRank, Plain, Pruned, Uniform
from slimlm.runtime.backends import Stored

ROWS = 64
"""Rows are padded to a multiple of this, and so are ranks."""
SPARSE_BLOCK, DENSE_BLOCK = 256, 128
"""Inputs of which scales lie together; a 2:4 weight's words come in blocks of 256, others' in blocks of 64."""
LARGEST_CODE = 4
"""Bits of the largest code that a nibble holds."""
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

    @property
    def sparse(self) -> bool:
        """Whether the weight is stored as 2:4."""
        return self.words.ndim == 4

    def bytes(self) -> int:
        """Bytes in the GPU's memory."""
        return sum(t.numel() * t.element_size() for t in (self.words, self.scale, self.codebook) if t is not None)


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
    input_scale: Tensor | None
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


def unfit(descriptions: Sequence[Description], shape: tuple[int, int]) -> str | None:
    """Why the layout does not hold parts that are so described, in words; None: it does."""
    base, *extras = descriptions
    if len(extras) > 1:
        return f"it has {len(extras)} parts beside its base; the GPU kernels take one low-rank part"
    if extras and extras[0]["kind"] != "low_rank":
        return f"the GPU kernels add a low-rank part to a base, not a {extras[0]['kind']} part"
    own = base["inner"] if base["kind"] == "pruned" else base
    if own["kind"] not in ("uniform", "codebook"):
        return f"its base is {own['kind']}; the GPU kernels take codes of up to {LARGEST_CODE} bits"
    if base["kind"] == "pruned" and base["pattern"] != "2:4" and own["kind"] == "codebook":
        return f"a table of levels under the mask {base['pattern']}; the GPU kernels take tables under 2:4 or no mask"
    sparse = _two_of_four(base)
    if sparse and shape[1] % 4:
        return f"2:4 of {shape[1]} inputs, which are no multiple of 4"
    if (reason := _unfit(own, 32 if sparse else 8, shape[1])) is not None:
        return reason
    for about in extras:
        for side, along in (("right", 8), ("left", None)):
            factor = about[side]
            if factor.get("input_scale"):
                return "a factor of its adapter has scales of inputs"
            if factor["kind"] == "plain":
                if factor["dtype"] not in ("float16", "bfloat16", "float32"):
                    return f"its adapter is {factor['dtype']}; the GPU kernels take float16, bfloat16 and float32"
            elif (reason := _unfit(factor, along, shape[1])) is not None:
                return f"its adapter: {reason}"
    words = _up(shape[1], SPARSE_BLOCK) * _up(shape[0], ROWS) * (3 if sparse else 4) // 32
    if words >= 2**31:
        return f"{shape[0]} x {shape[1]} weights are more than the kernels' 32-bit addresses reach"
    return None


def _unfit(about: Description, multiple: int | None, width: int) -> str | None:
    if about["kind"] not in ("uniform", "codebook"):
        return f"the GPU kernels do not know {about['kind']} parts"
    if about["bits"] > LARGEST_CODE:
        return f"codes of {about['bits']} bits; the GPU kernels take up to {LARGEST_CODE}"
    group = about["group_size"]
    if multiple is not None and isinstance(group, int) and group < width and group % multiple:
        return f"groups of {group} inputs; the GPU kernels take multiples of {multiple} there"
    return None


def lay_out(stored: Stored) -> GpuLayer:
    """Pack a layer that `unfit` has no word against, where its tensors lie; raises CheckpointError for damaged ones."""
    base, *extras = stored.parts()
    input_scale = None
    inner = base.inner if isinstance(base, Pruned) else base
    if isinstance(inner, Uniform):
        input_scale = inner.input_scale
    if isinstance(base, Pruned) and base.pattern == "2:4":
        packed = _sparse(base)
    else:
        packed = _dense(_coded(inner), base.keep if isinstance(base, Pruned) else None)
    right, tail = None, None
    if extras and isinstance(extra := extras[0], LowRank) and extra.rank:
        right, tail = _right(extra.right), _tail(extra.left)
    tallest = max(padded_rows(packed), padded_rows(right) if isinstance(right, Packed) else 0)
    counters = torch.zeros(MOST_TILES * tallest // ROWS, dtype=torch.int32, device=stored.device)
    return GpuLayer(packed, right, tail, input_scale, counters)


def padded_rows(packed: Packed) -> int:
    """The number of rows, padding included."""
    return packed.words.shape[-2]


def _two_of_four(about: Description) -> bool:
    return about["kind"] == "pruned" and about["pattern"] == "2:4"


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _coded(part: object) -> Uniform | Codebook:
    assert isinstance(part, Uniform | Codebook)
    return part


def _nibbles(part: Uniform | Codebook) -> Tensor:
    """The codes `[rows, width]` as unsigned nibbles, uint8."""
    return part.index if isinstance(part, Codebook) else part.codes.view(torch.uint8) & 15


def _levels(part: Uniform | Codebook) -> Tensor | None:
    if isinstance(part, Uniform):
        return None
    return torch.nn.functional.pad(part.levels.float(), (0, 2**LARGEST_CODE - len(part.levels)))


def _words(nibbles: Tensor) -> Tensor:
    """int32 `[...]` of nibbles `[..., 8]`, the first lowest."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=nibbles.device)
    return (nibbles.int() << shifts).sum(dim=-1, dtype=torch.int32)


def _filled(values: Tensor, rows: int, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1], 0, rows - values.shape[0]))


def _sparse(part: Pruned) -> Packed:
    inner = _coded(part.inner)
    rows, width = part.shape
    padded, wide = _up(rows, ROWS), _up(width, SPARSE_BLOCK)
    words = torch.zeros(wide // SPARSE_BLOCK, 3, padded, 8, dtype=torch.int32, device=part.keep.device)
    nibbles, places = _nibbles(inner), torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=part.keep.device)
    at_once = max(1, _SLICE // max(1, width))
    for begin in range(0, rows, at_once):
        keep = part.keep[begin : begin + at_once]
        groups = keep.view(len(keep), -1, 4)
        if not bool((groups.sum(dim=-1) == 2).all()):
            raise CheckpointError("a stored mask is called 2:4 and does not keep two of every four inputs")
        kept = nibbles[begin : begin + at_once][keep].view(len(keep), -1, 2)
        bits = (groups * places).sum(dim=-1, dtype=torch.uint8)
        for plane, values in enumerate((kept[..., 0], kept[..., 1], bits)):
            filled = _filled(values, len(keep), wide // 4).view(len(keep), -1, 8, 8)
            words[:, plane, begin : begin + len(keep)] = _words(filled).transpose(0, 1)
    return Packed(words, _scales(inner, padded, SPARSE_BLOCK), _levels(inner), rows, width)


def _dense(part: Uniform | Codebook, keep: Tensor | None = None, *, rows: int | None = None) -> Packed:
    """`rows`: how many the packed weight has to give, where zeros are wanted after its own."""
    own, width = part.shape
    padded, wide = _up(own, ROWS), _up(width, DENSE_BLOCK)
    nibbles = _nibbles(part)
    if keep is not None:
        nibbles = nibbles * keep
    words = _dense_words(nibbles, padded, wide)
    return Packed(words, _scales(part, padded, DENSE_BLOCK), _levels(part), rows or own, width)


def _dense_words(nibbles: Tensor, padded: int, wide: int) -> Tensor:
    rows, width = nibbles.shape
    words = torch.zeros(wide // 64, padded, 8, dtype=torch.int32, device=nibbles.device)
    at_once = max(1, _SLICE // max(1, width))
    for begin in range(0, rows, at_once):
        own = nibbles[begin : begin + at_once]
        eights = _filled(own, len(own), wide).view(len(own), -1, 8, 4, 2).transpose(-1, -2).flatten(-2)
        words[:, begin : begin + len(own)] = _words(eights).transpose(0, 1)
    return words


def _scales(part: Uniform | Codebook, padded: int, block: int) -> Tensor:
    scale = part.scale
    if part.group_size == "per-tensor":
        return scale.reshape(1).clone()
    if scale.shape[1] == 1:
        return torch.nn.functional.pad(scale[:, 0], (0, padded - len(scale)))
    assert isinstance(part.group_size, int)
    span = gcd(part.group_size, block)
    wide = _up(part.shape[1], block) // span
    each = _filled(scale.repeat_interleave(part.group_size // span, dim=1)[:, :wide], padded, wide)
    if span < block:
        # Copied ahead element by element, which takes 4 bytes; otherwise they cross threads, at half as many instructions more.
        each = each.float()
    return each.view(padded, -1, block // span).transpose(0, 1).contiguous()


def _right(part: Elementwise) -> Packed | Values:
    rank = _up(part.shape[0], ROWS)
    if isinstance(part, Plain):
        return Values.made(_filled(part.values, rank, part.shape[1]))
    if part.group_size == "per-tensor":
        # Rows that fill up would have that scale, too, and a table's first level is not zero.
        part = replace(part, scale=part.scale.expand(part.shape[0], 1), group_size="per-channel")
    return _dense(part, rows=rank)


def _tail(part: Elementwise) -> Tail:
    """The factor `[rank, out]` turned round: its groups run along its rows then."""
    rank, out = part.shape
    ranks, padded = _up(rank, ROWS), _up(out, ROWS)
    if isinstance(part, Plain):
        return Tail(None, 1, _filled(part.values.T, padded, ranks).contiguous())
    group = part.group_size if isinstance(part.group_size, int) else out
    scale = part.scale.expand(rank, part.scale.shape[1]).T
    # Rows that fill up read a group's scales, too.
    each = _filled(scale, grid.scale_shape((1, padded), group)[1], ranks).contiguous()
    words = _dense_words(_nibbles(part).T, padded, ranks)
    return Tail(Packed(words, each, _levels(part), out, ranks), group, None)
