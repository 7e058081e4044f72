"""How a sweep rounds the weights of one input after another: not at all, or to the values of a grid under scales.

The scales are searched when the sweep reaches the inputs that share one (`InputGroups`), or were found before it.
"""

from typing import Protocol

import torch
from torch import Tensor

from slimlm.core.grid import Grid, reciprocal, scale_sets, scale_shape, spread, storable
from slimlm.core.mask import Pattern
from slimlm.core.solvers.affine_search import nearby_scale_and_zero, scale_and_zero
from slimlm.core.solvers.distribution import distribution
from slimlm.core.solvers.scale_search import signed_scale
from slimlm.kernels import sweep as kernel


class Rounding(Protocol):
    """How a sweep rounds the weights of one input after another. A group is the inputs whose scales are found together."""

    starts: list[int]
    """where along the inputs, in the order of the sweep, groups begin"""

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Prepare for a group, whose inputs are rounded next.

        Args:
            number: of the group, from 0.
            rows: `[inputs, out]`, its weights, updated for the errors of earlier inputs.
            weights: `[inputs, out]`, by which the squared error of each is multiplied; 0 where it is dropped.
        """

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """Round the weights of one input.

        Args:
            place: of the input in the order of the sweep.
            number: of its group.
            column: `[out]`, its weights.

        Returns:
            `[out]`.
        """

    @property
    def grid(self) -> Grid | None:
        """The values that codes stand for; None: nothing is rounded."""

    @property
    def index(self) -> Tensor | None:
        """uint8 `[in, out]`, which a sweep fills with the indices of grid values; None: nothing is rounded."""

    def in_kernel(self, number: int) -> kernel.Rounding:
        """How the library rounds the weights of a group, which `begin` has prepared."""


class Unrounded:
    """No rounding: SparseGPT alone."""

    def __init__(self) -> None:
        self.starts = [0]
        self.grid: None = None
        self.index: None = None

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Nothing to prepare for `rows` and `weights` `[inputs, out]`."""

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """The weights `[out]` themselves."""
        return column

    def in_kernel(self, number: int) -> kernel.Rounding:
        """Not at all."""
        return kernel.Rounding()


class InputGroups:
    """Groups of consecutive inputs of a row share a scale, searched when the sweep reaches the group.

    The search multiplies each squared error by what it costs at that point of the sweep, and starts from an earlier scale
    where there is one. The sweep fills `scale` `[groups, out]` (`[1, 1]` where there is one), `zero` of the same shape where
    the grid has zeros, and `index` `[in, out]`.

    Args:
        grid: the values that codes stand for.
        sizes: inputs of each group, in the order of the sweep.
        out: outputs of the weight.
        one: whether all rows share one scale (and there is one group).
        start: earlier scales `[groups, out]` in the order of the sweep, and their zeros where the grid has zeros; or None.
        device: of the weight.
    """

    def __init__(
        self,
        grid: Grid,
        sizes: list[int],
        out: int,
        *,
        one: bool,
        start: tuple[Tensor, Tensor | None] | None,
        device: torch.device,
    ) -> None:
        self.grid, self.one, self.start = grid, one, start
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.scale = torch.zeros(len(sizes), 1 if one else out, device=device)
        self.zero = torch.zeros_like(self.scale) if grid.zeros else None
        self.index = torch.zeros(sum(sizes), out, dtype=torch.uint8, device=device)
        self.rows = self.index.unbind()

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Search the scales and zeros of a group with these `rows` and `weights` `[inputs, out]`."""
        if self.one:
            points, weights = distribution((rows * (weights > 0)).reshape(1, -1))
        else:
            points, weights = rows.T, weights.T
        if self.start is None:
            scale, zero = scale_and_zero(points, weights, self.grid)
        else:
            scales, zeros = self.start
            old = None if zeros is None else zeros[number]
            scale, zero = nearby_scale_and_zero(points, weights, self.grid, scales[number], old)
        self.scale[number] = as_stored(scale, self.scale.numel())
        if self.zero is not None and zero is not None:
            self.zero[number] = zero
        self.current = self.scale[number], reciprocal(self.scale[number]), zero

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """The nearest values `[out]` under the group's scales; `index` takes their indices."""
        index, value = self.grid.round_with(column, *self.current)
        self.rows[place].copy_(index)
        return value

    def in_kernel(self, number: int) -> kernel.Rounding:
        """With the scales and zeros of the group."""
        return kernel_rounding(self.grid, self.scale[number], None if self.zero is None else self.zero[number])


class FixedScales:
    """Scales that were found beforehand, so that the inputs of a group need not be next to each other in the sweep.

    The sweep fills `index` `[in, out]`.

    Args:
        grid: the values that codes stand for.
        wide: float32 `[in, out]`, the scale of each weight, inputs in the order of the sweep.
        wide_zero: of the same shape and strides where the grid has zeros; else None.
    """

    def __init__(self, grid: Grid, wide: Tensor, wide_zero: Tensor | None = None) -> None:
        self.grid, self.wide, self.wide_zero = grid, wide, wide_zero
        self.starts = [0]
        self.inverse = reciprocal(wide)
        self.index = torch.zeros(wide.shape, dtype=torch.uint8, device=wide.device)

    def begin(self, number: int, rows: Tensor, weights: Tensor) -> None:
        """Nothing to prepare for `rows` and `weights` `[inputs, out]`: the scales were found beforehand."""

    def round(self, place: int, number: int, column: Tensor) -> Tensor:
        """The nearest values `[out]` under the input's scales; `index` takes their indices."""
        zero = None if self.wide_zero is None else self.wide_zero[place]
        index, value = self.grid.round_with(column, self.wide[place], self.inverse[place], zero)
        self.index[place] = index
        return value

    def in_kernel(self, number: int) -> kernel.Rounding:
        """With the scales and zeros of every input."""
        return kernel_rounding(self.grid, self.wide, self.wide_zero)


class OutputGroups(FixedScales):
    """Groups of consecutive outputs of one input share a scale, searched beforehand: the left factor of an adapter.

    `scale` is `[in, groups]`; the sweep fills `index` `[in, out]`.

    Args:
        weight: `[out, in]`.
        grid: the values that codes stand for.
        group_size: how many outputs of an input share a scale.
    """

    def __init__(self, weight: Tensor, grid: Grid, group_size: int) -> None:
        out, width = weight.shape
        sets = scale_sets(weight.T.contiguous(), group_size)
        scale = signed_scale(sets, torch.ones_like(sets), grid)
        self.scale = storable(scale.view(scale_shape((width, out), group_size))).float()
        super().__init__(grid, spread(self.scale, out, group_size).expand(width, out))


def as_stored(scale: Tensor, count: int) -> Tensor:
    """Some scales `[n]` of a part with `count` of them, float32, as they will be stored: a single one is not rounded."""
    return storable(scale.repeat(2) if count > 1 else scale)[: len(scale)].float()


def kernel_rounding(grid: Grid, scale: Tensor, zero: Tensor | None = None) -> kernel.Rounding:
    """How the library rounds to a grid under float32 scales `[out]`, `[1]` or `[in, out]`, and zeros of the same shape."""
    return kernel.Rounding(scale, grid.bits, None if grid.even else grid.values, zero)


def in_library(grid: Grid | None, pattern: Pattern | None, *tensors: Tensor) -> bool:
    """Whether the library decides leaves.

    Args:
        grid: the values that codes stand for; None: nothing is rounded.
        pattern: of a mask that is chosen; None: none is.
        tensors: float matrices of any shape `[...]` that it would be given.
    """
    codebook = None if grid is None or grid.even else len(grid.values)
    return kernel.takes(codebook, pattern.of if pattern is not None else 0, *tensors)
