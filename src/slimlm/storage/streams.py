"""Safetensors files written a tensor at a time, so that all tensors need not be in memory together.

A file appears under its name only when it is complete and on the disk: it is written under another name, synced and renamed.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError

Described = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The dtype and shape of tensors by name."""

KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes that slimlm reads and writes, by their names in safetensors files."""
NAMES = {dtype: name for name, dtype in KINDS.items()}
"""The inverse of `KINDS`."""
_ALIGNMENT = 64
"""Bytes: the tensors of a file begin at a multiple of this, so that how they lie in memory does not depend on the header."""
NEW = ".new"
"""The suffix of files that are not complete yet."""


def described(tensors: dict[str, Tensor]) -> Described:
    """The dtypes and shapes `[...]` of tensors, as `write_stream` takes them."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def in_file_order(about: Described) -> list[str]:
    """The names, wide dtypes first, so that every tensor begins at a multiple of the size of its elements."""
    return sorted(about, key=lambda name: (-about[name][0].itemsize, name))


def write_stream(path: Path, about: Described, pieces: Iterable[Tensor], metadata: dict[str, str] | None = None) -> str:
    """Write a safetensors file of tensors that are given one after another.

    Args:
        path: The file.
        about: The dtypes and shapes, in the order in which the tensors are given.
        pieces: The tensors `[...]`, each complete or as consecutive slices along its first dimension.
        metadata: Metadata for the header.

    Returns:
        The file's SHA-256.

    Raises:
        OSError: The disk refuses; an earlier file of that name is not changed.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, (dtype, shape) in about.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % _ALIGNMENT)
    sum_of = hashlib.sha256()
    with written(path) as file:
        for data in (len(head).to_bytes(8, "little"), head):
            file.write(data)
            sum_of.update(data)
        for piece in pieces:
            raw = _bytes_of(piece)
            file.write(raw)
            sum_of.update(raw)
        assert file.tell() == 8 + len(head) + end, f"{path.name}: the pieces are not the tensors that were described"
    return sum_of.hexdigest()


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors of any shape `[...]` that are in memory; gives the file's SHA-256."""
    about = described(tensors)
    order = in_file_order(about)
    return write_stream(path, {name: about[name] for name in order}, (tensors[name] for name in order))


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which replaces the one at `path` once it is complete and synced; after an error it is removed."""
    new = path.with_name(path.name + NEW)
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Sync a folder's names to the disk, where the system can open folders."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def tensor_sum(tensor: Tensor, whole: Any = None) -> str:
    """The SHA-256 of the bytes of a tensor `[...]`; they are added to `whole`, a checksum of their file, too."""
    raw = _bytes_of(tensor)
    if whole is not None:
        whole.update(raw)
    return hashlib.sha256(raw).hexdigest()


def is_plain_name(name: str) -> bool:
    """Whether this is the name of a file in a folder, without a path, a drive or a null byte."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", ":", "\0"}


def sha256_of(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sum(path: Path, expected: str) -> None:
    """Raise CheckpointError where a file is missing or is not what was written."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    if sha256_of(path) != expected:
        raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the recorded one")
