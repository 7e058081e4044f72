"""The library's pieces of the column sweep and of coordinate descent (csrc/compression.h): a few inputs, one after another.

Their laws are slimlm.core.solvers.sweep and slimlm.core.solvers.base_descent, which take these pieces where
`compression.takes` says yes. Matrices are `[in, out]`, float32 and contiguous where nothing else is said; they change in place.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.kernels import compression

MOST_INPUTS = 64
"""Inputs of a piece; the library takes twice as many, but then less of the work is in products of matrices."""
LARGEST_UNIT = 16
"""m of n:m up to which the library chooses masks."""


@dataclass(frozen=True, eq=False)
class Rounding:
    """How the weights of an input are rounded: to the nearest of a grid's values x scale."""

    scale: Tensor | None = None
    """`[out]` or `[1]` for all inputs of a piece, or `[in, out]` of the whole matrix with any strides; None: not rounded"""
    bits: int = 0
    """of an index"""
    codebook: Tensor | None = None
    """`[2^bits]`, ascending, at most 16 values; None: whole numbers"""
    zero: Tensor | None = None
    """of the shape of `scale`: the index that stands for zero, without a codebook; None: 2^(bits-1)"""

    def structure(self) -> "_Rounding":
        """As the library takes it; the tensors must live as long."""
        if self.scale is None:
            return _Rounding()
        assert self.scale.dtype == torch.float32 and (self.scale.ndim == 2 or self.scale.is_contiguous())
        per_input, per_output = self.scale.stride() if self.scale.ndim == 2 else (0, int(len(self.scale) > 1))
        assert self.zero is None or self.zero.stride() == self.scale.stride()
        codebook, zero = (None if tensor is None else tensor.data_ptr() for tensor in (self.codebook, self.zero))
        return _Rounding(self.scale.data_ptr(), zero, per_input, per_output, codebook, self.bits)


@dataclass(frozen=True, eq=False)
class Sweep:
    """The matrices of a column sweep."""

    remaining: Tensor
    """the weights, updated for the errors of earlier inputs"""
    value: Tensor
    """what was decided"""
    error: Tensor
    """(remaining - value) / the diagonal of `upper`"""
    upper: Tensor
    """`[in, in]`, the upper triangular factor of the inverse covariance, with any row stride"""
    mask: Tensor | None
    """bool; None: all stay"""
    index: Tensor | None
    """uint8; None where nothing is rounded"""
    unit: tuple[int, int] | None
    """m and n where the mask is chosen under n:m; None: it is given"""

    def decide(self, low: int, high: int, rounding: Rounding) -> None:
        """Decide the inputs from low up to high, at most `MOST_INPUTS`, which are updated for all earlier errors."""
        compression.called("slimlm_sweep", self._structure(rounding), low, high)

    def choose(self, low: int, high: int) -> None:
        """Choose the mask of the units from low up to high, as their weights are now."""
        compression.called("slimlm_choose", self._structure(Rounding()), low, high)

    def _structure(self, rounding: Rounding) -> "_Sweep":
        width, out = self.remaining.shape
        assert all(
            matrix.is_contiguous() and matrix.shape == (width, out) for matrix in (self.remaining, self.value, self.error)
        )
        assert all(matrix is None or matrix.is_contiguous() for matrix in (self.mask, self.index))
        assert self.upper.is_contiguous() and self.upper.shape == (width, width)
        matrices = (self.remaining, self.value, self.error, self.upper, self.mask, self.index)
        of, kept = self.unit or (0, 0)
        return _Sweep(*map(_address, matrices), width, out, of, kept, rounding.structure())


@dataclass(frozen=True, eq=False)
class UnitSolvers:
    """For each unit of m inputs and each mask of it, what solves for the weights that stay."""

    places: Tensor
    """int32 `[masks, n]`, the places in a unit that stay"""
    among: Tensor
    """float32 `[units, masks, n, n]`: the covariance of the inputs that stay"""
    inverse: Tensor
    """likewise: its inverse"""
    upper: Tensor
    """likewise: the upper triangular factor of that"""
    of: int
    """m"""


@dataclass(frozen=True, eq=False)
class Descent:
    """The matrices of coordinate descent on tr((W - B) H (W - B)^T)."""

    gradient: Tensor
    """H (W - B)^T, exact for the inputs that are decided"""
    value: Tensor
    """B^T"""
    change: Tensor
    """the sum of its changes"""
    index: Tensor
    """uint8, indices of the grid's values"""
    mask: Tensor | None
    """bool; None: all stay"""
    covariance: Tensor
    """H `[in, in]`"""
    solvers: UnitSolvers | None = None
    """where masks are chosen, too; None: codes alone are decided"""

    def decide(self, low: int, high: int, rounding: Rounding) -> None:
        """Decide the inputs from low up to high again, at most `MOST_INPUTS`; the gradient of these alone is updated."""
        width, out = self.value.shape
        assert all(matrix.is_contiguous() for matrix in (self.gradient, self.value, self.change, self.index, self.covariance))
        assert self.mask is None or self.mask.is_contiguous()
        matrices = (self.gradient, self.value, self.change, self.index, self.mask, self.covariance)
        of, kept, masks = 0, 0, 0
        tables: tuple[int | None, ...] = (None,) * 4
        if self.solvers is not None:
            of, (masks, kept) = self.solvers.of, self.solvers.places.shape
            tables = tuple(map(_address, (self.solvers.places, self.solvers.among, self.solvers.inverse, self.solvers.upper)))
        structure = _Descent(*map(_address, matrices), width, out, of, kept, masks, *tables, rounding.structure())
        compression.called("slimlm_descend", structure, low, high)


@dataclass(frozen=True, eq=False)
class RightDescent:
    """The matrices of coordinate descent on the right factor R of L R, for an error E; they are `[in, rank]`."""

    gradient: Tensor
    """H (E - L R)^T L, exact for the inputs that are decided"""
    value: Tensor
    """R^T"""
    scale: Tensor
    """of each number"""
    index: Tensor
    """uint8, codes + 2^(bits-1)"""
    covariance: Tensor
    """H `[in, in]`"""
    inner: Tensor
    """L^T L `[rank, rank]`"""
    inverse: Tensor
    """its inverse"""
    bits: int
    """of a code"""

    def decide(self, low: int, high: int) -> Tensor:
        """Decide the inputs from low up to high again, and update the gradient of these alone.

        Returns:
            `[high - low, rank]`: their changes, times L^T L.
        """
        width, rank = self.value.shape
        along = torch.empty(high - low, rank, device="cpu")
        matrices = (self.gradient, along, self.value, self.scale, self.index, self.covariance, self.inner, self.inverse)
        assert all(matrix.is_contiguous() for matrix in matrices)
        compression.called("slimlm_descend_right", _RightDescent(*map(_address, matrices), width, rank, self.bits), low, high)
        return along


def takes(codebook_values: int | None, unit: int, *tensors: Tensor) -> bool:
    """Whether the library sweeps and descends.

    Args:
        codebook_values: how many values the codebook has; None: there is none.
        unit: m of n:m, 0 without.
        tensors: float matrices of any shape `[...]`.
    """
    few = codebook_values is None or codebook_values <= compression.LARGEST_CODEBOOK
    return few and unit <= LARGEST_UNIT and compression.takes(*tensors)


def piece_of(unit: int) -> int:
    """Inputs of a piece, whole units of so many (0: there are none)."""
    return MOST_INPUTS // unit * unit if unit else MOST_INPUTS


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_P, _I32, _I64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Rounding(ctypes.Structure):
    """Mirrors SlimlmRounding."""

    _fields_ = (("scale", _P), ("zero", _P), ("per_input", _I64), ("per_output", _I64), ("codebook", _P), ("bits", _I32))


class _Sweep(ctypes.Structure):
    """Mirrors SlimlmSweep."""

    _fields_ = (
        *((name, _P) for name in ("remaining", "value", "error", "upper", "mask", "index")),
        *(("width", _I64), ("out", _I64), ("of", _I32), ("kept", _I32), ("rounding", _Rounding)),
    )


class _Descent(ctypes.Structure):
    """Mirrors SlimlmDescent."""

    _fields_ = (
        *((name, _P) for name in ("gradient", "value", "change", "index", "mask", "covariance")),
        *(("width", _I64), ("out", _I64), ("of", _I32), ("kept", _I32), ("masks", _I32)),
        *((name, _P) for name in ("places", "among", "inverse", "upper")),
        ("rounding", _Rounding),
    )


class _RightDescent(ctypes.Structure):
    """Mirrors SlimlmRightDescent."""

    _fields_ = (
        *((name, _P) for name in ("gradient", "along", "value", "scale", "index", "covariance", "inner", "inverse")),
        *(("width", _I64), ("rank", _I64), ("bits", _I32)),
    )
