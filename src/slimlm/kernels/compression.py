"""The library's functions for compression: loops over weights that torch would make in many passes (csrc/compression.h).

Each has its law in a form written with torch, which core runs where `takes` (of numbers) or `takes_bytes` says no: without the
library, on a GPU, or for another dtype. Results are the same for any number of threads, and the same as the torch form's up to
rounding in float32.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slimlm.kernels import native

LARGEST_CODEBOOK = 16
"""Values of the largest codebook whose scales are searched here."""
_ERRORS = {1: "an argument that it does not take", 6: "not enough memory"}


class CompressionKernelError(RuntimeError):
    """A function of the library could not do what it was called for."""


class _Grid(ctypes.Structure):
    """Mirrors SlimlmGrid."""

    _fields_ = (("values", ctypes.c_void_p), ("count", ctypes.c_int32), ("even", ctypes.c_int32))


class _Sets(ctypes.Structure):
    """Mirrors SlimlmSets."""

    _fields_ = (
        ("points", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("sets", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("points_per_set", ctypes.c_int64),
        ("points_per_point", ctypes.c_int64),
        ("weights_per_set", ctypes.c_int64),
        ("weights_per_point", ctypes.c_int64),
    )


def available() -> bool:
    """Whether the library can be used."""
    return native.library() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the functions here take these numbers of any shape `[...]`: float32 on the CPU, and there is a library."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors) and available()


def takes_bytes(*tensors: Tensor, sizes: tuple[int, ...] = (1,)) -> bool:
    """Whether they take these elements of any shape `[...]`: of so many bytes each, on the CPU, and there is a library."""
    return all(tensor.dtype.itemsize in sizes and tensor.device.type == "cpu" for tensor in tensors) and available()


@cache
def _functions() -> ctypes.CDLL:
    library = native.library()
    assert library is not None, "callers ask `takes` first"
    pointer, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    signatures: dict[str, list[Any]] = {
        "slimlm_encode": [pointer, i64, i64, pointer, i64, i64, i32, pointer, i32],
        "slimlm_best_scale": [pointer, pointer, i32, i32, pointer, i32],
        "slimlm_nearby_scale": [pointer, pointer, pointer, pointer, i32],
        "slimlm_affine_scale": [pointer, i32, i32, pointer, pointer, i32],
        "slimlm_least_squares_scale": [pointer, pointer, i64, i64, i32, pointer, pointer, i32],
        "slimlm_histogram": [pointer, pointer, i64, f32, f32, i32, pointer, i32],
        "slimlm_sweep": [pointer, i64, i64, i32],
        "slimlm_choose": [pointer, i64, i64, i32],
        "slimlm_descend": [pointer, i64, i64, i32],
        "slimlm_descend_right": [pointer, i64, i64],
        "slimlm_pack_codes": [pointer, i64, i64, i32, pointer, i32],
        "slimlm_unpack_codes": [pointer, i64, i64, i32, pointer, i32],
        "slimlm_gather": [pointer, pointer, i64, i64, i64, i32, pointer, i32],
        "slimlm_scatter": [pointer, pointer, i64, i64, i64, i32, pointer, i32],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int, arguments
    return library


def called(name: str, *arguments: object) -> None:
    """Call a function; tensors and structures pass as addresses; the number of threads, torch's, is added where it takes one.

    Raises:
        CompressionKernelError: it returns an error.
    """
    function = getattr(_functions(), name)
    threads = (torch.get_num_threads(),) if len(function.argtypes) > len(arguments) else ()
    error = function(*map(_as_c, arguments), *threads)
    if error:
        raise CompressionKernelError(f"{name} found {_ERRORS.get(error, f'error {error} of csrc/kernels.h')}")


def _as_c(argument: object) -> object:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


def encode(weight: Tensor, scale: Tensor, *, bits: int, group: int) -> Tensor:
    """The codes of a weight on the even grid, ties to even.

    Args:
        weight: float32 `[out, in]`.
        scale: float32 `[rows, groups]`, rows 1 or out; a scale of zero gives code 0.
        bits: of the even grid, 2 to 8.
        group: consecutive inputs that share a scale.

    Returns:
        int8 `[out, in]`.
    """
    weight, scale = weight.contiguous(), scale.contiguous()
    rows, width = weight.shape
    assert scale.shape in {(1, -(-width // group)), (rows, -(-width // group))}
    codes = torch.empty(rows, width, dtype=torch.int8, device="cpu")
    called("slimlm_encode", weight, rows, width, scale, len(scale), group, bits, codes)
    return codes


def best_scale(
    points: Tensor, weights: Tensor, values: Tensor, *, even: bool, coarse: int, either_sign: bool = False
) -> Tensor:
    """The scale of least weighted squared error for each set (slimlm.core.solvers.scale_search).

    Args:
        points: float32 `[sets, size]`, with any strides.
        weights: float32 `[sets, size]`, with any strides.
        values: float32 `[values]`, ascending, the last above zero: those of a grid, a codebook with at most `LARGEST_CODEBOOK`.
        even: whether they are consecutive whole numbers.
        coarse: candidates of the first scan.
        either_sign: whether negative scales are tried, too.

    Returns:
        float32 `[sets]`; 0 for a set of zeros.
    """
    values = values.contiguous()
    scale = torch.empty(len(points), device="cpu")
    called("slimlm_best_scale", _sets(points, weights), _grid(values, even), coarse, either_sign, scale)
    return scale


def nearby_scale(points: Tensor, weights: Tensor, values: Tensor, start: Tensor, *, even: bool) -> Tensor:
    """A scale `[sets]` no worse than an earlier one, `start` `[sets]`; the other arguments are as for `best_scale`."""
    values, start = values.contiguous(), start.contiguous()
    assert start.shape == points.shape[:1]
    scale = torch.empty(len(points), device="cpu")
    called("slimlm_nearby_scale", _sets(points, weights), _grid(values, even), start, scale)
    return scale


def affine_scale(points: Tensor, weights: Tensor, *, bits: int, coarse: int) -> tuple[Tensor, Tensor]:
    """The scale and the zero of least weighted squared error for each set (slimlm.core.solvers.affine_search).

    Args:
        points: float32 `[sets, size]`, with any strides.
        weights: float32 `[sets, size]`, with any strides.
        bits: of the codes, 1 to 8.
        coarse: scales of the first scan.

    Returns:
        Scales and zeros, both float32 `[sets]`.
    """
    scale, zero = torch.empty(len(points), device="cpu"), torch.empty(len(points), device="cpu")
    called("slimlm_affine_scale", _sets(points, weights), bits, coarse, scale, zero)
    return scale, zero


def least_squares_scale(sets: Tensor, scale: Tensor, *, bits: int, weights: Tensor | None) -> Tensor:
    """Each scale `[sets]`, or the least-squares one for its codes where that errs less, for float32 numbers `[sets, size]`."""
    sets, scale = sets.contiguous(), scale.contiguous()
    weights = None if weights is None else weights.contiguous()
    assert scale.shape == sets.shape[:1] and (weights is None or weights.shape == sets.shape)
    fitted = torch.empty_like(scale)
    called("slimlm_least_squares_scale", sets, weights, len(sets), sets.shape[1], bits, scale, fitted)
    return fitted


def histogram(numbers: Tensor, weights: Tensor | None, *, low: float, width: float, bins: int) -> Tensor:
    """The sums of the weights (of ones) of numbers `[...]` in each bin, float64 `[bins]`; bin 0 begins at `low`."""
    numbers = numbers.contiguous()
    weights = None if weights is None else weights.contiguous()
    assert weights is None or weights.shape == numbers.shape
    totals = torch.empty(bins, dtype=torch.float64, device="cpu")
    called("slimlm_histogram", numbers, weights, numbers.numel(), low, width, bins, totals)
    return totals


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of a byte each `[rows, count]` as a stream of bits, uint8 `[rows, bytes]` (slimlm.core.bits)."""
    codes = codes.contiguous()
    rows, count = codes.shape
    packed = torch.empty(rows, (count * bits + 7) // 8, dtype=torch.uint8, device="cpu")
    called("slimlm_pack_codes", codes, rows, count, bits, packed)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes uint8 `[rows, count]` of a stream of bits, uint8 `[rows, bytes]`."""
    packed = packed.contiguous()
    assert packed.shape[1] == (count * bits + 7) // 8
    codes = torch.empty(len(packed), count, dtype=torch.uint8, device="cpu")
    called("slimlm_unpack_codes", packed, len(packed), count, bits, codes)
    return codes


def gather(elements: Tensor, mask: Tensor, kept: int) -> Tensor:
    """The elements `[out, in]` of 1, 2 or 4 bytes where a mask, bool `[out, in]`, is True, `kept` a row: `[out, kept]`."""
    elements, mask = elements.contiguous(), mask.contiguous()
    rows, width = elements.shape
    assert mask.shape == elements.shape and mask.dtype == torch.bool
    some = torch.empty(rows, kept, dtype=elements.dtype, device="cpu")
    called("slimlm_gather", elements, mask, rows, width, kept, elements.dtype.itemsize, some)
    return some


def scatter(elements: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `gather`: elements `[out, kept]` at their places in `[out, in]`, zero where the mask is False."""
    elements, mask = elements.contiguous(), mask.contiguous()
    rows, width = mask.shape
    assert len(elements) == rows and mask.dtype == torch.bool
    full = torch.empty(rows, width, dtype=elements.dtype, device="cpu")
    called("slimlm_scatter", elements, mask, rows, width, elements.shape[1], elements.dtype.itemsize, full)
    return full


def _grid(values: Tensor, even: bool) -> _Grid:
    return _Grid(values.data_ptr(), len(values), even)


def _sets(points: Tensor, weights: Tensor) -> _Sets:
    assert points.shape == weights.shape
    sets, size = points.shape
    return _Sets(points.data_ptr(), weights.data_ptr(), sets, size, *points.stride(), *weights.stride())
