"""llama.cpp's quantizer as a baseline: which type it gives each matrix of a file, and the matrices rounded by its own code.

A file type is a mixture: most matrices have its main type, and some roles and blocks another (`RULES`, as llama.cpp's
llama-quant.cpp decides for models of the Llama form without experts). Widths that a type cannot divide get the type that
llama.cpp falls back to. The importance of an input is the mean of its square over calibration tokens, as llama-imatrix
measures it.

Rows are rounded by `ggml_quantize_chunk` of libggml-base, through ctypes, and dequantized by the `gguf` package. The library
comes with llama-cpp-python, or with a prebuilt package that needs no compiler:

    npm pack @node-llama-cpp/linux-x64@3.21.1 && tar xzf node-llama-cpp-linux-x64-3.21.1.tgz    # package/bins/linux-x64

Only matrices in the blocks are rounded, embedding and head stay as they are, so that bits of the blocks compare.
"""

import ctypes
import shutil
from collections.abc import Callable, Mapping
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from torch import Tensor

ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "output",
    "down_proj": "down",
    "gate_proj": "gate",
    "up_proj": "up",
}
"""The roles that llama.cpp tells apart, by the last part of a layer's name."""


@dataclass(frozen=True)
class Place:
    """Where a matrix stands, and what is known for it."""

    role: str
    block: int
    blocks: int
    """of the whole model"""
    heads_per_key: int
    """query heads that share a key head"""
    importance: bool
    """whether an importance matrix is given"""


When = Callable[[Place], bool]


def always(_: Place) -> bool:
    """For every matrix of a role."""
    return True


def shared(place: Place) -> bool:
    """Where values are few, since many query heads share them."""
    return place.heads_per_key >= 4


def spread(place: Place) -> bool:
    """The first and last eighth of the blocks, and every third between."""
    eighth = place.blocks // 8
    return place.block < eighth or place.block >= 7 * place.blocks // 8 or (place.block - eighth) % 3 == 2


def first(share: int, importance: bool | None = None) -> When:
    """The first 1/share of the blocks; with `importance`, only where there is, or is no, importance matrix."""
    return lambda place: place.block < place.blocks // share and importance in (None, place.importance)


def without_importance(place: Place) -> bool:
    """Where no importance matrix is given."""
    return not place.importance


def first_two(place: Place) -> bool:
    """The first two blocks."""
    return place.block < 2


MAIN = {"Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "IQ2_M": "IQ2_S", "IQ3_M": "IQ3_S"}
"""The main type of a file type, where it has another name."""
RULES: dict[str, tuple[tuple[str, When, str], ...]] = {
    "Q4_0": (("down", first(8, importance=True), "Q4_1"),),
    "Q4_1": (),
    "Q5_0": (("down", first(8, importance=True), "Q5_1"),),
    "Q5_1": (),
    "Q8_0": (),
    "IQ4_NL": (("v", shared, "Q5_K"), ("down", first(8, importance=False), "Q5_K")),
    "Q2_K": (("v", shared, "Q4_K"), ("v", always, "Q3_K"), ("down", always, "Q3_K"), ("output", always, "Q3_K")),
    "Q3_K_M": (
        ("v", first_two, "Q5_K"),
        ("v", always, "Q4_K"),
        ("down", first(16), "Q5_K"),
        ("down", always, "Q4_K"),
        ("output", always, "Q4_K"),
    ),
    "Q4_K_M": (("v", spread, "Q6_K"), ("down", spread, "Q6_K")),
    "IQ2_XS": (("v", shared, "Q4_K"), ("v", always, "Q2_K"), ("down", first(8), "Q2_K")),
    "IQ2_M": (("v", shared, "Q4_K"), ("v", always, "IQ3_S"), ("down", first(8), "IQ3_S"), ("output", always, "IQ3_S")),
    "IQ3_XXS": (
        ("v", shared, "Q4_K"),
        ("v", without_importance, "IQ3_S"),
        ("q", always, "IQ2_S"),
        ("k", always, "IQ2_S"),
        ("down", first(8, importance=False), "Q4_K"),
        ("down", without_importance, "Q3_K"),
        ("output", always, "IQ3_S"),
    ),
    "IQ3_M": (("v", always, "Q4_K"), ("down", first(8), "Q4_K"), ("output", always, "Q4_K")),
}
"""By file type: role, condition and type; the first that fits is taken, else the main type."""
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""Instead of a type in blocks of 256 for widths that are no multiple of it; of the others IQ4_NL."""


def type_of(file_type: str, place: Place, width: int) -> str:
    """The type that llama.cpp gives a matrix of this width."""
    kinds = (kind for role, when, kind in RULES[file_type] if role == place.role and when(place))
    kind = next(kinds, MAIN.get(file_type, file_type))
    if width % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        kind = FALLBACK.get(kind, "IQ4_NL")
    if width % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
        raise ValueError(f"a width of {width} is no multiple of 32, and llama.cpp would leave the matrix in 16 bits")
    return kind


class Quantizer:
    """ggml's quantization functions.

    Args:
        folder: Where libggml-base.so is; None: where llama-cpp-python brings it.

    Raises:
        ImportError: There is no such library.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            spec = find_spec("llama_cpp")
            if spec is None or spec.origin is None:
                raise ImportError(
                    "llama.cpp's file types need libggml-base.so: name its folder (`--ggml`), or install llama-cpp-python"
                )
            folder = Path(spec.origin).parent / "lib"
        path = folder / "libggml-base.so"
        if not path.is_file():
            raise ImportError(f"there is no {path}; the head of benchmarks/gguf_types.py says where the library comes from")
        library = ctypes.CDLL(str(path))
        self._quantize, self._needs_importance = library.ggml_quantize_chunk, library.ggml_quantize_requires_imatrix
        self._quantize.restype = c_size_t
        self._quantize.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
        self._needs_importance.restype, self._needs_importance.argtypes = c_bool, [c_int]

    def rounded(self, weight: Tensor, kind: str, importance: Tensor | None) -> tuple[Tensor, int]:
        """A weight `[out, in]` as the type stands for it, float32, and the bits that are stored for it.

        Args:
            weight: The weight.
            kind: A type of ggml's, whose block length divides the width.
            importance: Of the inputs, `[in]`; None: all the same.

        Raises:
            ValueError: The type needs importances, and there are none.
        """
        number = GGMLQuantizationType[kind]
        if importance is None and self._needs_importance(number):
            raise ValueError(f"{kind} needs an importance matrix: measure the setting that ends in +imatrix")
        block, size = GGML_QUANT_SIZES[number]
        source = np.ascontiguousarray(weight.float().numpy())
        rows, columns = source.shape
        stored = np.empty((rows, columns // block * size), np.uint8)
        weights = None if importance is None else np.ascontiguousarray(importance.float().numpy())
        given = None if weights is None else weights.ctypes.data
        written = self._quantize(number, source.ctypes.data, stored.ctypes.data, 0, rows, columns, given)
        assert written == stored.nbytes, f"ggml wrote {written} bytes of {kind}, and {stored.nbytes} were expected"
        return torch.from_numpy(np.ascontiguousarray(dequantize(stored, number))), 8 * written


@dataclass(frozen=True)
class Rounded:
    """What a rounded model stores in the place of its matrices."""

    bits: int
    weights: int
    replaced_bytes: int
    """of the same matrices in the dense model"""
    kinds: Mapping[str, int]
    """matrices by type"""


def write_rounded(
    dense: Path, out: Path, kinds: Mapping[str, str], importance: Mapping[str, Tensor], ggml: Quantizer
) -> Rounded:
    """Write a copy of a dense folder whose layers are rounded and dequantized again, in the dtype of the original.

    Float16 holds what a type stands for to 11 bits, which is far below what the types round away.

    Args:
        dense: A folder with one file of weights.
        out: The folder to write.
        kinds: The type of each layer, by full name.
        importance: Of the inputs of each layer; empty: no importance matrix.
        ggml: The library.
    """
    shutil.copytree(dense, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(dense / "model.safetensors")
    bits = weights = replaced = 0
    counts: dict[str, int] = {}
    for layer, kind in kinds.items():
        weight = tensors[f"{layer}.weight"]
        values, stored = ggml.rounded(weight, kind, importance.get(layer))
        tensors[f"{layer}.weight"] = values.to(weight.dtype)
        bits, weights, replaced = bits + stored, weights + weight.numel(), replaced + weight.nbytes
        counts[kind] = counts.get(kind, 0) + 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return Rounded(bits, weights, replaced, counts)
