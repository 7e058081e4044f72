"""Weights that a model's files hold as codes: what a reader of one format gives, and what all readers need.

A reader is given the config's description of the quantization and all tensors of the files, none of them read yet. It checks
names, dtypes and shapes, and says which weights the codes stand for, and how each is made when it is asked for. Scales that
belong to activations or to the cache of keys and values are no part of a weight; they are named and left out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimlm.core.bits import packed_bytes, unpack
from slimlm.core.errors import ModelError

FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}
"""Dtypes of codes and of scales, by their names in safetensors files."""
_ACTIVATIONS = (
    "input_scale", "output_scale", "activation_scale", "input_zero_point", "output_zero_point", "input_scale_ub",
    "input_global_scale",
)  # fmt: skip

_CACHE = ("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point", "k_cache_scale", "v_cache_scale", "kv_scale")


@dataclass(frozen=True)
class CodedWeight:
    """A weight that the files hold as codes."""

    shape: tuple[int, ...]
    """its shape once it is dequantized"""
    of: tuple[str, ...]
    """the names in the files of the codes and of all that belongs to them"""
    make: Callable[[], Iterator[Tensor]]
    """gives it in float32: whole, or as consecutive slices along its first dimension"""
    dtype: torch.dtype | None = None
    """what it is stored in once it is dequantized; None: the model's dtype"""


@dataclass(frozen=True)
class Decoded:
    """What the codes in a model's files stand for."""

    form: str
    """the format in words, such as "fp8, a scale for each block of 128 x 128" """
    weights: dict[str, CodedWeight]
    """the weights, by the names that they would have in the files of the model that was quantized"""


@dataclass(frozen=True)
class Codes:
    """What a reader is given."""

    source: str
    """the model's name in messages"""
    about: Mapping[str, Any]
    """the config's description of the quantization"""
    tensors: Mapping[str, Tensor]
    """all tensors of the files, of any shapes `[...]`, by their names there"""
    passed_over: dict[str, str] = field(default_factory=dict)
    """the names of tensors that no weight is made of, and why; readers add to it"""

    def error(self, message: str) -> ModelError:
        """The error that says `message` of this model and what would work."""
        return ModelError(f"{self.source}: {message}. {INSTEAD}")

    def companion(self, codes: str, name: str) -> Tensor:
        """The tensor that belongs to some codes; ModelError where it is missing."""
        if name not in self.tensors:
            raise self.error(f"the files hold the codes {codes} and no {name}, without which their values are not known")
        return self.tensors[name]

    def integer(self, key: str, allowed: tuple[int, ...]) -> int:
        """An entry of the description that is one of these whole numbers."""
        value = self.about.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
            raise self.error(f"the quantization_config says {key} = {value!r}; slimlm reads {', '.join(map(str, allowed))}")
        return value

    def flat(self, name: str, dtypes: tuple[torch.dtype, ...]) -> Tensor:
        """A matrix of one of these dtypes."""
        tensor = self.tensors[name]
        if tensor.ndim != 2 or tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise self.error(f"{name} is {found}; the format has a matrix of {wanted} there")
        return tensor

    def expect(self, name: str, *shapes: tuple[int, ...]) -> None:
        """Raise ModelError unless a tensor has one of these shapes."""
        if (shape := tuple(self.tensors[name].shape)) not in shapes:
            wanted = " or ".join(str(list(each)) for each in shapes)
            raise self.error(f"{name} has the shape {list(shape)}; by the codes and the quantization_config it is {wanted}")

    def pass_over_others(self) -> None:
        """Note the scales of activations and of the cache of keys and values, which are no part of a weight."""
        for name in self.tensors:
            leaf = name.rpartition(".")[2]
            if leaf in _ACTIVATIONS:
                self.passed_over[name] = "it belongs to quantized activations, and slimlm computes with those of the model"
            elif leaf in _CACHE:
                self.passed_over[name] = "it belongs to a quantized cache of keys and values, which slimlm does not use"


INSTEAD = (
    "What works: the original model; or a copy that the program which quantized this one, or transformers, has dequantized to "
    "16 bits (from_pretrained with dequantize=True in the quantization config where the method has it, then save_pretrained)"
)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The codes in rows of int32 words, as a stream of bits that begins at the lowest one.

    Args:
        words: int32 `[rows, words]`.
        bits: of a code, 1 to 8.
        count: codes in a row.

    Returns:
        uint8 `[rows, count]`.
    """
    raw = words.contiguous().view(torch.uint8)
    return unpack(raw[:, : packed_bytes(count, bits)], bits, count)


def words_for(count: int, bits: int) -> int:
    """The int32 words that `count` codes take."""
    return -(-count * bits // 32)


def power_of_two(exponents: Tensor) -> Tensor:
    """Scales `[...]` in float32 that are stored as exponents alone (E8M0): 2^(e - 127); 255 is NaN."""
    wide = exponents.view(torch.uint8).float()
    return torch.where(wide == 255, torch.nan, torch.exp2(wide - 127))


def scales_of(stored: Tensor) -> Tensor:
    """Scales `[...]` in float32, whether they are stored as numbers or as exponents (uint8, E8M0)."""
    return power_of_two(stored) if stored.dtype in (torch.uint8, torch.float8_e8m0fnu) else stored.float()


def spread(values: Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> Tensor:
    """Values `[rows / tile rows, columns / tile columns]`, one for each tile, repeated to this shape; the last may be cut."""
    rows = values.repeat_interleave(tile[0], dim=0)[: shape[0]] if values.shape[0] > 1 else values
    return rows.repeat_interleave(tile[1], dim=1)[:, : shape[1]] if values.shape[1] > 1 else rows


def tiles(shape: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """How many tiles cover a matrix, by rows and columns."""
    return -(-shape[0] // tile[0]), -(-shape[1] // tile[1])
