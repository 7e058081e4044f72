"""A model's files with weights in place of the codes that they hold; each weight is made when it is asked for."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimlm.models import awq, compressed_tensors, fp8, gptq, mxfp4
from slimlm.models.codes import FLOAT8, CodedWeight, Codes, Decoded
from slimlm.models.parameters import FileTensors, Release
from slimlm.storage.streams import Described

Reader = Callable[[Codes], Decoded]
READERS: dict[str, Reader] = {
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read,
    "mxfp4": mxfp4.read,
    "compressed-tensors": compressed_tensors.read,
    "gptq": gptq.read,
    "awq": awq.read,
}
"""By the `quant_method` of the config."""
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Dequantized:
    """What a model's files hold once their codes are read; no weight is made yet."""

    form: str | None
    """the format of the codes, in words; None: no weight was rounded to codes"""
    dtype: torch.dtype
    """what the weights are dequantized to, unless they say another"""
    weights: dict[str, CodedWeight]
    """the weights, by the names that they would have in the files of the model that was quantized"""
    left_out: dict[str, str]
    """the names in the files of what belongs to no weight, and why"""
    files: FileTensors
    """the files"""

    @property
    def used(self) -> set[str]:
        """The names in the files of what is replaced by weights, or left out."""
        return {name for weight in self.weights.values() for name in weight.of} | set(self.left_out)

    @property
    def described(self) -> Described:
        """The dtypes and shapes of the weights."""
        return {name: (self._dtype_of(weight), weight.shape) for name, weight in self.weights.items()}

    def _dtype_of(self, weight: CodedWeight) -> torch.dtype:
        return self.dtype if weight.dtype is None else weight.dtype

    def pieces(self) -> Iterator[Tensor]:
        """The weights one after another, each as consecutive slices along its first dimension."""
        for weight in self.weights.values():
            yield from (piece.to(self._dtype_of(weight)) for piece in weight.make())
            self.files.release(_views(self.files, weight.of))

    def whole(self) -> dict[str, Tensor]:
        """The weights in memory."""
        return {name: torch.cat([piece.to(self._dtype_of(own)) for piece in own.make()]) for name, own in self.weights.items()}

    def replaced(self, made: Mapping[str, Tensor], release: Release) -> FileTensors:
        """The files with these weights in place of their codes; `release` is theirs and that of the weights."""
        used, files = self.used, self.files
        stored = {name: tensor for name, tensor in files.stored.items() if name not in used}
        unread = {name: entry for name, entry in files.unread.items() if name not in used}
        return FileTensors(stored | dict(made), unread, release, files.keep)

    def became(self, found: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        """What became of each tensor of the files, where `found` says it of the dequantized ones by their names."""
        names = {name: own for name, own in found.items() if name not in self.weights}
        return names | {part: found.get(name, ()) for name, weight in self.weights.items() for part in weight.of}


def _views(files: FileTensors, names: tuple[str, ...]) -> list[Tensor]:
    return [files.stored[name] if name in files.stored else files.unread[name][1] for name in names]


def read_codes(source: str, config: Mapping[str, Any], about: Mapping[str, Any], files: FileTensors) -> Dequantized:
    """Read which weights the codes of a model's files stand for; checks everything and makes none.

    Args:
        source: the model's name in messages.
        config: its config.
        about: the config's description of the quantization, whose method is one of `READERS`.
        files: its tensors.

    Raises:
        ModelError: the format is not read, or a tensor is missing or does not fit.
    """
    floats = {name: raw.view(FLOAT8[dtype]) for name, (dtype, raw) in files.unread.items() if dtype in FLOAT8}
    codes = Codes(source, about, files.stored | floats)
    codes.pass_over_others()
    decoded = READERS[str(about["quant_method"])](codes)
    for name in decoded.weights:
        if name in codes.tensors and name not in decoded.weights[name].of:
            raise codes.error(f"the files hold {name} twice, as codes and as it is; remove the one that is wrong")
    return Dequantized(decoded.form, _dtype(config), decoded.weights, codes.passed_over, files)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that the config gives the model; bfloat16 where it gives none."""
    inner = config.get("text_config")
    for each in (config, inner if isinstance(inner, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if (found := _DTYPES.get(str(each.get(key)).removeprefix("torch."))) is not None:
                return found
    return torch.bfloat16


def identity(paths: list[Any]) -> str:
    """What tells these files from others that lay there before: names, sizes and times of change."""
    return json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths])
