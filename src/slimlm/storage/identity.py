"""The identity of a run or of weights: plain data that can be stored and compared, with messages about differences."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlm.core.layer import refuse_not_finite
from slimlm.storage.mapping import map_file
from slimlm.storage.streams import sha256_of

OUTSIDE = "the rest"
"""The name of the checksum of all weights outside the blocks."""
_SAMPLE = 4096
"""Bytes of each tensor that are read to identify a file."""
_LONGEST_VALUE = 60
"""Characters of a value in a message."""


def differences(before: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two pieces of plain data differ, one sentence per place: "recipe.name was ... and is ..."."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (one, other) in enumerate(zip(before, now, strict=True)):
            yield from differences(one, other, f"{where}[{i}]")
    elif before != now:
        yield f"{where} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def files_identity(files: Iterable[Path]) -> dict[str, str]:
    """The identity of weight files, by name: the size, and the SHA-256 of the header and of each tensor's first 4 KiB.

    Other files (.bin) are read completely. A gigabyte of safetensors takes milliseconds; models that are equal in the bytes
    that are read, and in size, are taken for the same.
    """
    found = {}
    for path in files:
        checksum = _sampled(path) if path.suffix == ".safetensors" else sha256_of(path)
        found[path.name] = f"{path.stat().st_size} bytes, {checksum[:32]}"
    return found


def _sampled(path: Path) -> str:
    mapped = map_file(path, pass_over=True)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        checksum = hashlib.sha256(file.read(length))
    for tensor in mapped.tensors.values():
        if tensor.numel():
            checksum.update(tensor.reshape(-1).view(torch.uint8)[:_SAMPLE].numpy().data)
    return checksum.hexdigest()


def weights_identity(
    weights: Mapping[str, Tensor], blocks: Iterable[str], release: Callable[[Iterable[Tensor]], Any]
) -> dict[str, str]:
    """Read all weights completely; gives a checksum of each block's weights, and one of all others as `OUTSIDE`.

    Args:
        weights: Every tensor of the model, of any shape `[...]`, by full name.
        blocks: The full names of the blocks.
        release: Drops the pages of tensors that have been read.

    Raises:
        NumericsError: A weight holds NaN or infinity.
    """
    owner = {f"{block}.": block for block in blocks}
    checksums = {name: hashlib.sha256() for name in (*owner.values(), OUTSIDE)}
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            refuse_not_finite(name, tensor)
        block = next((block for prefix, block in owner.items() if name.startswith(prefix)), OUTSIDE)
        checksums[block].update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        checksums[block].update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        release([tensor])
    return {name: checksum.hexdigest() for name, checksum in checksums.items()}
