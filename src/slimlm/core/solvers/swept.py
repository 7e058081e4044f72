"""What a sweep gives: the base, its mask, codes and scales, and the part that these are stored as."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.grid import Grid, GroupSize, storable
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.uniform import Uniform


@dataclass(frozen=True)
class Swept:
    """The result of a sweep, in the order of the weight's inputs."""

    value: Tensor
    """float32 `[out, in]`: the base, zero where dropped"""
    updated: Tensor
    """float32 `[out, in]`: each weight as it was when it was decided, updated for the errors of earlier inputs"""
    mask: Tensor | None
    """bool `[out, in]`, True where the weight stays; None: all stay"""
    index: Tensor | None = None
    """uint8 `[out, in]`: indices of grid values, where rounded"""
    scale: Tensor | None = None
    """float32 `[out, groups]` or `[1, 1]`, where rounded"""
    grid: Grid | None = None
    """the values that indices stand for, where rounded"""
    zero: Tensor | None = None
    """of the shape of `scale`, where the grid has zeros: the indices that stand for zero"""

    def part(self, group_size: GroupSize) -> Uniform | Codebook:
        """The rounded base as a part, without its mask; `group_size` is what the sweep was given."""
        assert self.index is not None and self.scale is not None and self.grid is not None
        return part_of(self.index, self.scale, self.grid, group_size, self.zero)


def part_of(index: Tensor, scale: Tensor, grid: Grid, group_size: GroupSize, zero: Tensor | None = None) -> Uniform | Codebook:
    """The part of grid values under scales.

    Args:
        index: uint8 `[out, in]`, indices of grid values.
        scale: `[rows, groups]`.
        grid: even for a `Uniform`, any other for a `Codebook`.
        group_size: how many weights share a scale.
        zero: `[rows, groups]`, the indices that stand for zero, where an even grid has zeros.
    """
    # Torch calls a transposed column contiguous, and yet it cannot be viewed as bytes; this copy can.
    stored = storable(scale).flatten().view(scale.shape)
    if grid.even:
        lowest = int(grid.values[0])
        codes = (index.to(torch.int16) + lowest).to(torch.int8)
        return Uniform(codes, stored, grid.bits, group_size, None, None if zero is None else (zero + lowest).to(torch.int8))
    return Codebook(index, grid.values.half(), stored, grid.bits, group_size)
