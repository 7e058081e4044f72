"""The CPU kernels as Python functions: pack a layer into one block of bytes, multiply by it.

What the C functions want and give is said in csrc/kernels.h, the layout of the bytes in csrc/layout.h.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError, KernelError
from slimlm.runtime.cpu import native

Precision = Literal["fast", "precise"]
"""Activations as 8-bit or as 16-bit integers, one scale for 128 of them."""

LAYOUT = "cpu-1"
"""Names the layout of the bytes, for files that hold them (csrc/kernels.h: SLIMLM_LAYOUT)."""

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {torch.float32: 0, torch.bfloat16: 2}
PRECISIONS = {"fast": 0, "precise": 1}
"""The numbers that the library knows them by."""
BEYOND_HALF = 7
"""What the kernels answer where a float16 cache does not hold a key or a value (csrc/kernels.h)."""
_ERRORS = {
    1: "an argument that the kernels do not take",
    2: "a packed layer that is damaged, or of another layout",
    3: "a mask that leaves weights out under a table of levels without zero",
    4: "a mask that keeps more than two of four",
    5: "stored tensors of other sizes than the layer's shape asks for",
    6: "not enough memory",
    BEYOND_HALF: "keys or values that float16 does not hold",
}


class Matrix(ctypes.Structure):
    """One stored matrix; mirrors SlimlmMatrix."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("transposed", ctypes.c_int32),
        ("bits", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("two_of_four", ctypes.c_int32),
        ("values", ctypes.c_void_p),
        ("values_bytes", ctypes.c_int64),
        ("keep", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("scale_type", ctypes.c_int32),
        ("scale_rows", ctypes.c_int64),
        ("scale_columns", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("levels", ctypes.c_void_p),
        ("input_scale", ctypes.c_void_p),
    )


class Product(ctypes.Structure):
    """One layer of a call; mirrors SlimlmProduct."""

    _fields_ = (
        ("blob", ctypes.c_void_p),
        ("blob_bytes", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
    )


@cache
def functions() -> ctypes.CDLL:
    """The library with its signatures; raises KernelError where there is none."""
    found = native.library()
    if found is None:
        raise KernelError(f"there are no CPU kernels: {native.status().reason}")
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    signatures: dict[str, tuple[Any, list[Any] | None]] = {
        "slimlm_packed_bytes": (i64, [pointer, i32]),
        "slimlm_pack": (ctypes.c_int, [pointer, i32, pointer, i64]),
        "slimlm_unpack": (ctypes.c_int, [pointer, i64, i32, i32, pointer]),
        "slimlm_verify": (ctypes.c_int, [pointer, i64]),
        "slimlm_products": (ctypes.c_int, None),  # its arguments come as C values
        "slimlm_use": (ctypes.c_int, [ctypes.c_char_p]),
        "slimlm_active": (ctypes.c_char_p, []),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def float_type(dtype: torch.dtype) -> int:
    """The number that the kernels know a floating-point type by."""
    return _TYPES[dtype]


def use_variant(variant: str) -> None:
    """Run this variant from now on (see `native.status`), for tests and measurements; raises KernelError for an unknown one."""
    if functions().slimlm_use(variant.encode()):
        raise KernelError(f"there is no variant {variant!r} of the kernels that this processor can run")


def active_variant() -> str:
    """The name of the variant that runs."""
    return str(functions().slimlm_active().decode())


def pack(matrices: Sequence[Matrix]) -> Tensor:
    """A layer's bytes, uint8 `[size]`: the base, then right and left factor of each low-rank part.

    Raises CheckpointError where the stored tensors do not fit their shape.
    """
    array = (Matrix * len(matrices))(*matrices)
    kernels = functions()
    size = kernels.slimlm_packed_bytes(array, len(matrices))
    _check(-size if size < 0 else 0)
    blob = torch.empty(size, dtype=torch.uint8)
    _check(kernels.slimlm_pack(array, len(matrices), blob.data_ptr(), size))
    return blob


def unpack(blob: Tensor, index: int, shape: tuple[int, int], precision: Precision) -> Tensor:
    """What matrix `index` of the bytes stands for in products of this precision: float32 `[out, in]`."""
    dense = torch.zeros(shape)
    _check(functions().slimlm_unpack(blob.data_ptr(), blob.numel(), index, PRECISIONS[precision], dense.data_ptr()))
    return dense


def is_valid(blob: Tensor) -> bool:
    """Whether bytes from a file are a packed layer of this layout, by their sizes and the sum over their headers."""
    return functions().slimlm_verify(blob.data_ptr(), blob.numel()) == 0


class _Call:
    """The arguments of one call of `slimlm_products`, made once; no other call may use them meanwhile."""

    def __init__(self, blobs: Sequence[Tensor], biases: Sequence[Tensor | None], outs: Sequence[int], width: int) -> None:
        self.x, self.kind, self.batch = ctypes.c_void_p(), ctypes.c_int32(), ctypes.c_int64()
        self.precision, self.threads = ctypes.c_int32(), ctypes.c_int32()
        products = (Product * len(blobs))()
        for product, blob, bias in zip(products, blobs, biases, strict=True):
            product.blob, product.blob_bytes = blob.data_ptr(), blob.numel()
            product.bias = None if bias is None else bias.data_ptr()
        self.outputs = list(zip(products, outs, strict=True))
        count, width_ = ctypes.c_int32(len(blobs)), ctypes.c_int64(width)
        self.arguments = products, count, self.x, self.kind, self.batch, width_, self.precision, self.threads


class PackedProducts:
    """Layers that share an input, ready to multiply: bytes, biases, and the arguments of earlier calls to use again."""

    def __init__(self, blobs: Sequence[Tensor], biases: Sequence[Tensor | None], outs: Sequence[int], width: int) -> None:
        # The call only knows addresses; these keep what lies there alive.
        self.blobs = [blob if blob.data_ptr() % 64 == 0 else blob.clone() for blob in blobs]
        self.biases = [None if bias is None else bias.detach().float().contiguous() for bias in biases]
        self.outs, self.width = tuple(outs), width
        self._run = functions().slimlm_products
        self._calls: list[_Call] = []
        """as many as threads have multiplied at once; a list's pop and append need no lock"""

    def __call__(self, x: Tensor, precision: Precision) -> list[Tensor]:
        """x `[..., in]` times each layer, `[..., out]` in the type of x; float32 and bfloat16 as they are, others widened."""
        if not x.is_cpu:
            raise KernelError(f"the layer is packed for the CPU, and the activations are on {x.device}; move both to one place")
        kind = _ACTIVATIONS.get(x.dtype)
        if kind is None:
            return [y.to(x.dtype) for y in self(x.float(), precision)]
        *leading, width = x.shape
        if width != self.width:
            raise KernelError(f"the layer has {self.width} inputs, and the activations are {list(x.shape)}")
        x = x.contiguous()
        try:
            call = self._calls.pop()
        except IndexError:
            call = _Call(self.blobs, self.biases, self.outs, self.width)
        ys = []
        for product, out in call.outputs:
            y = x.new_empty(*leading, out)
            product.y = y.data_ptr()
            ys.append(y)
        call.x.value, call.kind.value, call.batch.value = x.data_ptr(), kind, prod(leading)
        call.precision.value, call.threads.value = PRECISIONS[precision], torch.get_num_threads()
        error = self._run(*call.arguments)
        self._calls.append(call)
        if error:
            _check(error)
        return ys


def single_product(packed: PackedProducts) -> Product:
    """A single layer, for calls that multiply within; the result knows addresses only, so `packed` must outlive it."""
    [blob], [bias] = packed.blobs, packed.biases
    return Product(blob=blob.data_ptr(), blob_bytes=blob.numel(), bias=None if bias is None else bias.data_ptr())


def describe_error(error: int) -> str:
    """What an error code of the kernels stands for, in words."""
    return _ERRORS.get(error, f"error {error} of csrc/kernels.h")


def _check(error: int) -> None:
    if error:
        raise CheckpointError(f"the CPU kernels found {describe_error(error)}")
