"""Safetensors files mapped into memory: tensors that are views of the file, whose memory pages can be dropped.

A view takes address space; its pages are read when the tensor is read, and the system may drop them again. The mapping is
private: writing to a tensor changes this process's copy of the page and never the file. A mapped file must not be changed or
truncated in place; replacing it by renaming another file is allowed.
"""

import json
import mmap
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimlm.core.errors import CheckpointError, UnknownDtypeError
from slimlm.storage.streams import KINDS

TEMPORARY = ".spilled"
"""The suffix of files that are mapped and then unlinked at once; a killed run may leave one."""


@dataclass(frozen=True)
class MappedFile:
    """The tensors of one safetensors file, none of them read yet."""

    tensors: dict[str, Tensor]
    """The tensors by name, in the order of the file; each has a storage of its own, which keeps the mapping alive."""
    metadata: dict[str, str]
    """The metadata in the header."""
    memory: mmap.mmap = field(repr=False)
    """The mapping."""
    start: int
    """The address of the first byte of the file."""
    header: bytes = field(repr=False)
    """The bytes before the tensors, which follow without gaps."""
    unread: dict[str, tuple[str, Tensor]] = field(default_factory=dict)
    """Tensors of dtypes that slimlm does not read, where these are not refused: the dtype, and the bytes, in the
    tensor's own shape where its elements take one byte each."""

    def release(self, tensors: Iterable[Tensor]) -> int:
        """Drop the memory pages that hold only these tensors, of any shape `[...]`.

        Reading a tensor later reads its pages from the file again. Tensors that are not views of this file are ignored. Values
        that were written to a view since it was mapped are lost, so this is for tensors that are only read.

        Returns:
            The bytes that were dropped; 0 where the system cannot do that.
        """
        if not hasattr(mmap, "MADV_DONTNEED"):
            return 0
        dropped = 0
        for begin, end in _joined(self._spans(tensors)):
            first, last = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if first < last:
                self.memory.madvise(mmap.MADV_DONTNEED, first, last - first)
                dropped += last - first
        return dropped

    def _spans(self, tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
        """First and last byte in the file of each tensor that is a view of it."""
        found = []
        for tensor in tensors:
            begin = tensor.data_ptr() - self.start
            end = begin + tensor.numel() * tensor.element_size()
            if tensor.device.type == "cpu" and tensor.is_contiguous() and 0 <= begin < end <= len(self.memory):
                found.append((begin, end))
        return found


@dataclass(frozen=True)
class MappedFiles:
    """The tensors of several safetensors files, such as the shards of a model."""

    files: dict[str, MappedFile]
    """The files, by their names."""

    @classmethod
    def of(cls, paths: Iterable[Path], *, pass_over: bool = False) -> "MappedFiles":
        """Map these files; raises what `map_file` raises."""
        return cls({path.name: map_file(path, pass_over=pass_over) for path in paths})

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; of a name in several files the last."""
        return {name: tensor for file in self.files.values() for name, tensor in file.tensors.items()}

    @cached_property
    def unread(self) -> dict[str, tuple[str, Tensor]]:
        """See `MappedFile.unread`."""
        return {name: entry for file in self.files.values() for name, entry in file.unread.items()}

    def release(self, tensors: Iterable[Tensor]) -> int:
        """Drop the pages of those of these tensors `[...]` that are views of the files; see `MappedFile.release`."""
        views = list(tensors)
        return sum(file.release(views) for file in self.files.values())


def map_file(path: Path, *, pass_over: bool = False) -> MappedFile:
    """Map a safetensors file.

    Args:
        path: The file.
        pass_over: Put tensors of dtypes that slimlm does not read into `unread` instead of refusing the file.

    Raises:
        CheckpointError: It is no safetensors file, or is truncated, or has tensors of dtypes that slimlm does not read.
        OSError: It cannot be read.
    """
    about, metadata, data = _header(path)
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    unread = {}
    for name in [name for name, entry in about.items() if pass_over and entry["dtype"] not in KINDS]:
        entry = about.pop(name)
        begin, end = entry["data_offsets"]
        shape = entry["shape"] if prod(entry["shape"]) == end - begin else [end - begin]
        raw = {"dtype": "U8", "shape": shape, "data_offsets": [begin, end]}
        unread[name] = entry["dtype"], _view(path, memory, name, raw, data)
    tensors = {name: _view(path, memory, name, entry, data) for name, entry in about.items()}
    start = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return MappedFile(tensors, metadata, memory, start, memory[:data], unread)


def map_and_unlink(path: Path) -> MappedFile:
    """Map a file and remove its name, so that the data exist as long as the mapping."""
    file = map_file(path)
    path.unlink()
    return file


def _header(path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str], int]:
    """The entries of a file's tensors, its metadata, and the offset of its data in bytes."""
    try:
        # Checks that the tensors lie inside the file, fill it, and do not overlap.
        with safe_open(path, "pt"):
            pass
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    except RuntimeError as error:
        # Torch raises this where no more files can be opened or no more addresses are free.
        raise OSError(str(error)) from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        about = json.loads(file.read(length).decode("utf-8"))
    metadata = about.pop("__metadata__", None) or {}
    in_order = sorted(about.items(), key=lambda entry: entry[1]["data_offsets"])
    return dict(in_order), metadata, 8 + length


def unknown_dtype(dtype: str) -> str:
    """The message about a tensor of a dtype that slimlm does not read, without the tensor's name."""
    eight = dtype.startswith(("F8", "torch.float8"))
    advice = "; weights in float8 have to be dequantized to bf16 (with their scales) first" if eight else ""
    return f"has the dtype {dtype}; slimlm reads {', '.join(KINDS)}{advice}"


def _view(path: Path, memory: mmap.mmap, name: str, entry: dict[str, Any], data: int) -> Tensor:
    """One tensor as a view of the mapping; a copy where the file does not align it."""
    if entry["dtype"] not in KINDS:
        raise UnknownDtypeError(f"{name} in {path} {unknown_dtype(entry['dtype'])}")
    dtype, shape, begin = KINDS[entry["dtype"]], entry["shape"], data + entry["data_offsets"][0]
    if prod(shape) == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    if begin % dtype.itemsize:
        raw = bytearray(memory[begin : begin + prod(shape) * dtype.itemsize])
        return torch.frombuffer(raw, dtype=dtype).view(shape)
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=begin).view(shape)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans with those that touch or overlap joined, so that a page shared by two neighbours can be dropped."""
    joined: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((begin, end))
    return joined
