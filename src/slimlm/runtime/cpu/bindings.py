"""The CPU kernels as Python functions: pack a layer into one block of bytes, multiply by it.

csrc/kernels.h documents the C functions, csrc/layout.h the layout of the bytes.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError, KernelError
from slimlm.kernels import native

Precision = Literal["fast", "precise"]
"""Activations as 8-bit or as 16-bit integers, one scale for 128 of them."""

LAYOUT = "cpu-2"
"""The name of the layout of the bytes, for files that hold them (csrc/kernels.h: SLIMLM_LAYOUT)."""

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {torch.float32: 0, torch.bfloat16: 2}
PRECISIONS = {"fast": 0, "precise": 1}
"""The library's numbers for precisions."""
BEYOND_HALF = 7
"""The error code for a key or a value that a float16 cache does not hold (csrc/kernels.h)."""
_ERRORS = {
    1: "an argument that the kernels do not take",
    2: "a packed layer that is damaged, or of another layout",
    3: "a mask over a codebook without zero",
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
        ("zero", ctypes.c_void_p),
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
    """The library with the signatures of its functions.

    Raises:
        KernelError: there is none.
    """
    library = native.library()
    if library is None:
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
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def address(tensor: Tensor, dtype: torch.dtype, count: int) -> int:
    """The address of a tensor's values, for the library to read or write.

    Args:
        tensor: `[...]`, contiguous, on the CPU; the caller keeps it alive.
        dtype: as which the library takes it.
        count: the number of values that the library takes there.

    Raises:
        KernelError: the tensor is another than the library takes.
    """
    if tensor.dtype != dtype or not tensor.is_cpu or tensor.numel() != count or not tensor.is_contiguous():
        found = f"{tensor.numel()} {tensor.dtype} on {tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
        raise KernelError(f"the CPU kernels were to be given {count} {dtype} on the CPU, and the values are {found}")
    return tensor.data_ptr()


def float_type(dtype: torch.dtype) -> int:
    """The library's number for a floating-point type."""
    return _TYPES[dtype]


def use_variant(variant: str) -> None:
    """Run this variant of the kernels from now on (see `native.status`), for tests and measurements.

    Raises:
        KernelError: there is no such variant, or the processor cannot run it.
    """
    if functions().slimlm_use(variant.encode()):
        raise KernelError(f"there is no variant {variant!r} of the kernels that this processor can run")


def active_variant() -> str:
    """The name of the variant that is in use."""
    return str(functions().slimlm_active().decode())


def pack(matrices: Sequence[Matrix]) -> Tensor:
    """A layer in the kernels' layout.

    Args:
        matrices: the base, then the right and the left factor of each low-rank part.

    Returns:
        uint8 `[bytes]`.

    Raises:
        CheckpointError: the stored tensors do not fit their shape.
    """
    array = (Matrix * len(matrices))(*matrices)
    kernels = functions()
    size = kernels.slimlm_packed_bytes(array, len(matrices))
    _check(-size if size < 0 else 0)
    blob = torch.empty(size, dtype=torch.uint8, device="cpu")
    _check(kernels.slimlm_pack(array, len(matrices), blob.data_ptr(), size))
    return blob


def unpack(blob: Tensor, index: int, shape: tuple[int, int], precision: Precision) -> Tensor:
    """The matrix that products of a precision multiply by.

    Args:
        blob: a packed layer, uint8 `[bytes]`.
        index: 0 for the base, then the factors in the order of `pack`.
        shape: out, in.
        precision: of the products.

    Returns:
        float32 `[out, in]`.
    """
    dense = torch.zeros(shape, dtype=torch.float32, device="cpu")
    at = address(blob, torch.uint8, blob.numel())
    _check(functions().slimlm_unpack(at, blob.numel(), index, PRECISIONS[precision], dense.data_ptr()))
    return dense


def is_valid(blob: Tensor) -> bool:
    """Whether bytes from a file, uint8 `[bytes]`, are a packed layer of this layout, by sizes and the sum of its headers."""
    return functions().slimlm_verify(address(blob, torch.uint8, blob.numel()), blob.numel()) == 0


class _Call:
    """The arguments of a call of `slimlm_products`, made once and used again; two calls must not use them at the same time."""

    def __init__(self, blobs: Sequence[Tensor], biases: Sequence[Tensor | None], outs: Sequence[int], width: int) -> None:
        self.x, self.kind, self.batch = ctypes.c_void_p(), ctypes.c_int32(), ctypes.c_int64()
        self.precision, self.threads = ctypes.c_int32(), ctypes.c_int32()
        products = (Product * len(blobs))()
        for product, blob, bias, out in zip(products, blobs, biases, outs, strict=True):
            product.blob, product.blob_bytes = address(blob, torch.uint8, blob.numel()), blob.numel()
            product.bias = None if bias is None else address(bias, torch.float32, out)
        self.outputs = list(zip(products, outs, strict=True))
        count, width_ = ctypes.c_int32(len(blobs)), ctypes.c_int64(width)
        self.arguments = products, count, self.x, self.kind, self.batch, width_, self.precision, self.threads


class PackedProducts:
    """Packed layers that share an input, multiplied in one call.

    Args:
        blobs: the packed layers, uint8 `[bytes]` each.
        biases: `[out]` each, or None.
        outs: number of outputs of each layer.
        width: number of inputs.
    """

    def __init__(self, blobs: Sequence[Tensor], biases: Sequence[Tensor | None], outs: Sequence[int], width: int) -> None:
        # The call holds addresses only; these lists keep alive what lies there.
        self.blobs = [blob if blob.data_ptr() % 64 == 0 else blob.clone() for blob in blobs]
        self.biases = [None if bias is None else bias.detach().float().contiguous() for bias in biases]
        self.outs, self.width = tuple(outs), width
        self._run = functions().slimlm_products
        self._calls: list[_Call] = []
        """those not in use, as many as threads have multiplied at once; a list's pop and append need no lock"""

    def __call__(self, x: Tensor, precision: Precision) -> list[Tensor]:
        """The product with each layer.

        Args:
            x: activations `[..., in]` on the CPU; other dtypes than float32 and bfloat16 are widened to float32.
            precision: of the activations inside.

        Returns:
            `[..., out]` for each layer, in the dtype of x.

        Raises:
            KernelError: the activations are elsewhere or of another width.
        """
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
            product.y = address(y, x.dtype, y.numel())
            ys.append(y)
        call.x.value, call.kind.value, call.batch.value = x.data_ptr(), kind, prod(leading)
        call.precision.value, call.threads.value = PRECISIONS[precision], torch.get_num_threads()
        error = self._run(*call.arguments)
        self._calls.append(call)
        if error:
            _check(error)
        return ys


def single_product(packed: PackedProducts) -> Product:
    """One layer as an argument of `slimlm_decode`; it holds addresses only, so `packed` must outlive it."""
    [blob], [bias], [out] = packed.blobs, packed.biases, packed.outs
    at = None if bias is None else address(bias, torch.float32, out)
    return Product(blob=address(blob, torch.uint8, blob.numel()), blob_bytes=blob.numel(), bias=at)


def describe_error(error: int) -> str:
    """The meaning of an error code of the kernels."""
    return _ERRORS.get(error, f"error {error} of csrc/kernels.h")


def _check(error: int) -> None:
    if error:
        raise CheckpointError(f"the CPU kernels found {describe_error(error)}")
