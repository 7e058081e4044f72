"""The library's functions for compression: loops over weights that torch would make in many passes (csrc/compression.h).

Each has its law in a form written with torch, which core runs where `takes` says no: without the library, on a GPU, or for
another dtype. Results are the same for any number of threads, and the same as the torch form's up to rounding in float32.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from slimlm.kernels import native

_ERRORS = {1: "an argument that it does not take", 6: "not enough memory"}


class CompressionKernelError(RuntimeError):
    """A function of the library could not do what it was called for."""


def available() -> bool:
    """Whether the library can be used."""
    return native.library() is not None


def takes(*tensors: Tensor) -> bool:
    """Whether the functions here take these tensors of any shape `[...]`: float32 on the CPU, and there is a library."""
    return all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors) and available()


@cache
def _functions() -> ctypes.CDLL:
    library = native.library()
    assert library is not None, "callers ask `takes` first"
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures: dict[str, list[Any]] = {
        "slimlm_encode": [pointer, i64, i64, pointer, i64, i64, i32, pointer, i32],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int, arguments
    return library


def _called(name: str, *arguments: object) -> None:
    """Call a function; tensors pass as addresses, and the number of threads, torch's, is added at the end.

    Raises:
        CompressionKernelError: it returns an error.
    """
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    error = getattr(_functions(), name)(*values, torch.get_num_threads())
    if error:
        raise CompressionKernelError(f"{name} found {_ERRORS.get(error, f'error {error} of csrc/kernels.h')}")


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
    _called("slimlm_encode", weight, rows, width, scale, len(scale), group, bits, codes)
    return codes
