"""Quantization grids: weight = grid value x scale.

The even grid of b bits has the values -2^(b-1) to 2^(b-1) - 1, so that zero is exact; a codebook has any 2^b values. On an even
grid a scale may come with a zero, the code that stands for zero: weight = (code - zero) x scale.

One scale is shared by the whole matrix, a row, or a group of consecutive inputs of a row; the last group of a row is shorter
where the width does not divide. The search for a scale (slimlm.core.solvers.scale_search) and the quantizers that use it
round by the same `nearest_code`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from slimlm.core.chunks import at_once
from slimlm.core.errors import RecipeError
from slimlm.core.profiling import profiled
from slimlm.kernels import compression

GroupSize = int | Literal["per-tensor", "per-channel"]
"""How many weights share a scale: a number of consecutive inputs, a whole row, or the whole tensor."""

LARGEST_CODEBOOK_BITS = 4
"""Bits of the largest codebook that is used: sixteen entries, which a kernel looks up in one register."""

FP16_SMALLEST_NORMAL = 2.0**-14
FP16_LARGEST = 65504.0

_ELEMENTS_AT_ONCE = 2**17
"""Elements worked on at a time: few enough for a CPU's cache."""
_COMPARED = 4096
"""From this many elements on, each is compared with every border between values instead of searched."""


def check_bits(bits: int) -> None:
    """Raise RecipeError where an even grid of this many bits is not supported (2 to 8 are)."""
    if not 2 <= bits <= 8:
        raise RecipeError(f"bits = {bits}: an even grid has 2 to 8 bits")


def check_group_size(group_size: GroupSize) -> None:
    """Raise RecipeError where a group would have no inputs."""
    if isinstance(group_size, int) and group_size < 1:
        raise RecipeError(f'group_size = {group_size}: give a number of inputs of at least 1, "per-channel" or "per-tensor"')


def top_code(bits: int) -> int:
    """The largest code of the even grid, 2^(bits-1) - 1; the smallest is `-top_code - 1`."""
    return 2 ** (bits - 1) - 1


def nearest_code(ratio: Tensor, bits: int) -> Tensor:
    """The code of the even grid that is nearest to weight / scale, ties to even.

    Args:
        ratio: weight / scale, of any shape, such as `[out, in]`.
        bits: of the even grid.

    Returns:
        The codes as floats, of the shape and dtype of `ratio`.
    """
    top = top_code(bits)
    return ratio.round().clamp_(-top - 1, top)


def reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, zero for a scale of zero; `[rows, groups]` or any other shape, as `scale`."""
    return torch.where(scale == 0, 0.0, 1 / scale)


@dataclass(frozen=True, eq=False)
class Grid:
    """The values that codes stand for, in units of the scale: those of the even grid, or those of a codebook.

    An index is a value's place in `values`, from 0; a code of the even grid is the value itself.
    """

    values: Tensor
    """float32 `[2^bits]`, ascending"""
    even: bool
    """whether the values are the codes of the even grid"""
    zeros: bool = False
    """whether each scale comes with a zero, on an even grid"""
    _copies: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of_bits(cls, bits: int, *, zeros: bool = False) -> "Grid":
        """The even grid of this many bits; `zeros`: whether each scale comes with a zero."""
        return cls(torch.arange(-top_code(bits) - 1, top_code(bits) + 1).float(), True, zeros)

    @classmethod
    def centred(cls, bits: int) -> "Grid":
        """A codebook of evenly spaced values on both sides of zero, such as -1.5, -0.5, 0.5 and 1.5."""
        return cls(torch.arange(2**bits) - (2**bits - 1) / 2, False)

    @property
    def bits(self) -> int:
        """Bits of an index."""
        return len(self.values).bit_length() - 1

    @property
    def largest(self) -> float:
        """The largest value."""
        return float(self.values[-1])

    @property
    def largest_magnitude(self) -> float:
        """The largest magnitude of a value; on the even grid it is that of the smallest one."""
        return float(self.values.abs().max())

    def nearest(self, ratio: Tensor) -> Tensor:
        """The grid value nearest to weight / scale, as float, for a `ratio` `[out, in]` or of any other shape."""
        if self.even:
            return nearest_code(ratio, self.bits)
        return self._on(ratio.device)[0].index_select(0, self._borders_below(ratio).flatten()).view(ratio.shape)

    def index(self, ratio: Tensor) -> Tensor:
        """The index, int64, of the grid value nearest to weight / scale, for a `ratio` `[out, in]` or of any other shape."""
        if self.even:
            return (nearest_code(ratio, self.bits) - self.values[0]).long()
        return self._borders_below(ratio).long()

    def round(self, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Round weights to the nearest multiples grid value x scale, or with zeros (index - zero) x scale.

        Args:
            weight: `[out, in]`, or of any other shape.
            scale: of a shape that broadcasts to that of `weight`; where it is zero the value is zero.
            zero: likewise, the indices that stand for zero on an even grid with zeros; None: the grid has none.

        Returns:
            The index of the nearest grid value (an integer, or a float without a fraction) and the value that it stands for,
            float, both of the shape of `weight`.
        """
        return self.round_with(weight, scale, reciprocal(scale), zero)

    def round_with(self, weight: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `round` (e.g. of `[out]`), given `inverse = reciprocal(scale)`, too, for scales that are used often."""
        if zero is not None:
            index = (weight * inverse).round_().add_(zero).clamp_(0, len(self.values) - 1)
            return index, (index - zero) * scale
        if self.even:
            code = nearest_code(weight * inverse, self.bits)
            value = code * scale
            return code.sub_(self.values[0]), value
        index = self._borders_below(weight * inverse)
        values = self._on(weight.device)[0].to(weight.dtype)
        return index, values.index_select(0, index.flatten()).view(index.shape) * scale

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The values on a device, and the borders between them; copied once, since a sweep reads them at every input."""
        if device not in self._copies:
            values = self.values.to(device)
            self._copies[device] = values, (values[1:] + values[:-1]) / 2
        return self._copies[device]

    def _borders_below(self, ratio: Tensor) -> Tensor:
        """How many borders between the values of a codebook lie below each ratio, int32: the index of the nearest value."""
        _, borders = self._on(ratio.device)
        if ratio.numel() < _COMPARED or ratio.device.type != "cpu":
            return torch.bucketize(ratio.contiguous(), borders, out_int32=True)
        # A search per element mispredicts its branches: a comparison with each border takes a fifth of its time.
        index = torch.empty(ratio.numel(), dtype=torch.int32)
        size = at_once(_ELEMENTS_AT_ONCE, ratio.device)
        for piece, into in zip(ratio.flatten().split(size), index.split(size), strict=True):
            count, above = torch.zeros_like(piece), torch.empty_like(piece)
            for border in borders.tolist():
                count += torch.gt(piece, border, out=above)
            into.copy_(count)
        return index.view(ratio.shape)


def scale_sets(weight: Tensor, group_size: GroupSize) -> Tensor:
    """The weights that share a scale, one set a row.

    Args:
        weight: `[out, in]`.
        group_size: how many weights share a scale.

    Returns:
        `[sets, size]`: one set for the tensor, for each row, or for each group of each row in turn. Zeros fill a short last
        group; a zero costs nothing on a grid that holds zero, so the filling changes no search.
    """
    out, width = weight.shape
    if group_size == "per-tensor":
        return weight.reshape(1, -1)
    if group_size == "per-channel" or group_size >= width:
        return weight
    groups = -(-width // group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - width))
    return padded.reshape(out * groups, group_size)


def scale_shape(shape: tuple[int, int], group_size: GroupSize) -> tuple[int, int]:
    """The shape `[rows, groups]` of the scales of a `[out, in]` weight."""
    out, width = shape
    if group_size == "per-tensor":
        return 1, 1
    return out, 1 if group_size == "per-channel" else -(-width // group_size)


def spread(scale: Tensor, width: int, group_size: GroupSize) -> Tensor:
    """Scales as a tensor that multiplies a weight.

    Args:
        scale: `[rows, groups]`, numbers of any dtype.
        width: inputs of the weight.
        group_size: how many weights share a scale.

    Returns:
        float32 `[rows, width]`, or `[rows, 1]` where a row or the tensor has one scale; it broadcasts to `[out, width]`.
    """
    if scale.shape[1] == 1:
        return scale.float()
    assert isinstance(group_size, int)
    return scale.float().repeat_interleave(group_size, dim=1)[:, :width]


def dense(codes: Tensor, scale: Tensor, group_size: GroupSize, zero: Tensor | None = None) -> Tensor:
    """The matrix (codes - zero) x scale that codes (or grid values) stand for.

    Args:
        codes: `[out, in]`, integers or float32.
        scale: `[rows, groups]`, see `scale_shape`.
        group_size: how many weights share a scale.
        zero: of the shape of `scale`, the code that stands for zero; None: 0 everywhere.

    Returns:
        float32 `[out, in]`.
    """
    values = codes.float() if codes.dtype != torch.float32 else codes.clone()
    out, width = values.shape
    if zero is not None:
        values -= spread(zero, width, group_size)
    if scale.shape[1] > 1 and isinstance(group_size, int) and width % group_size == 0:
        return values.view(out, -1, group_size).mul_(scale.float()[..., None]).view(out, width)
    return values.mul_(spread(scale, width, group_size))


@profiled("encode")
def encode(weight: Tensor, scale: Tensor, *, bits: int, group_size: GroupSize) -> Tensor:
    """The codes of a weight on the even grid.

    Args:
        weight: `[out, in]`.
        scale: `[rows, groups]`, as it will be stored (see `storable`); a scale of zero gives code 0.
        bits: of the even grid.
        group_size: how many weights share a scale.

    Returns:
        int8 `[out, in]`, from -2^(bits-1) to 2^(bits-1) - 1.
    """
    if compression.takes(weight):
        group = group_size if isinstance(group_size, int) and scale.shape[1] > 1 else max(1, weight.shape[1])
        return compression.encode(weight, scale.float(), bits=bits, group=group)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    rows = max(1, at_once(_ELEMENTS_AT_ONCE, weight.device) // max(1, weight.shape[1]))
    for i, (piece, into) in enumerate(zip(weight.split(rows), codes.split(rows), strict=True)):
        piece_scale = scale if len(scale) == 1 else scale[i * rows : (i + 1) * rows]
        wide = spread(piece_scale, weight.shape[1], group_size)
        into.copy_(nearest_code(piece / torch.where(wide == 0, torch.inf, wide), bits))
    return codes


def storable(scale: Tensor) -> Tensor:
    """The scales in the dtype they are stored in; encode with this tensor, so that file and codes agree.

    float16 where there are many and all fit its normal range (relative error 2^-11), float32 otherwise: a single
    scale costs nothing, and a tiny one must not lose its bits in the subnormal range.

    Args:
        scale: `[rows, groups]`, or of any other shape.

    Returns:
        float16 or float32, of the shape of `scale`.
    """
    nonzero = scale[scale != 0].abs()
    few = scale.numel() == 1
    fits = nonzero.numel() == 0 or (nonzero.min() >= FP16_SMALLEST_NORMAL and nonzero.max() <= FP16_LARGEST)
    return scale.float() if few or not fits else scale.to(torch.float16)


def absmax_scale(sets: Tensor, bits: int) -> Tensor:
    """The scale `[sets]` that puts the largest magnitude of each set `[sets, size]` on the largest code."""
    return sets.abs().amax(dim=1) / top_code(bits)
