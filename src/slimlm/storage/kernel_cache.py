"""A cache of layers as a kernel backend packs them, in the checkpoint's folder, so that they are packed once.

    OUT/.cache/huggingface/slimlm/kernels-LAYOUT.safetensors

holds one uint8 tensor per layer, each beginning at a multiple of 64 bytes of the file, and as metadata the layout and the
fingerprint of the checkpoint that it was made from. The hub's tools never upload the folder `.cache/huggingface`, and no
pattern `*.safetensors` in the checkpoint's own folder fits a file in there, so the cache is neither uploaded nor counted. It
may be deleted at any time.

The file is written layer by layer under another name and renamed when it is complete, so a file of this name is complete. A
load checks its header, size, layout and fingerprint, but computes no checksum of its bytes.
"""

import json
import os
import re
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.events import Notify
from slimlm.storage.mapping import MappedFile, map_file

ALIGNMENT = 64
_VERSION = "1"
_PADDING = "#"
"""The first character of the names of padding tensors; no layer's name begins with it."""
_ABANDONED = 3600.0
"""Seconds without a write after which an incomplete file is removed, because its process was killed."""


class _CannotWriteError(Exception):
    """The cache cannot be written; the message is the reason."""


def cache_path(folder: Path, layout: str) -> Path:
    """The file that holds a checkpoint's packed layers.

    Args:
        folder: the checkpoint.
        layout: the name of the kernels' layout: letters, digits, dots, dashes and underscores.
    """
    assert re.fullmatch(r"[\w.-]+", layout, re.ASCII), f"a kernel layout is called {layout!r}"
    return folder / ".cache" / "huggingface" / "slimlm" / f"kernels-{layout}.safetensors"


def remove_caches(folder: Path) -> None:
    """Remove the packed layers of a checkpoint's folder, in every layout; what is mapped of them stays as it is."""
    for path in cache_path(folder, "any").parent.glob("kernels-*.safetensors"):
        path.unlink(missing_ok=True)


def load_or_pack(
    folder: Path,
    layout: str,
    fingerprint: str,
    names: Sequence[str],
    make: Callable[[str], Tensor],
    is_valid: Callable[[Tensor], bool],
    notify: Notify,
) -> dict[str, Tensor]:
    """Load the packed layers of a checkpoint from the cache; where there is none that fits, pack them and write it.

    Args:
        folder: the checkpoint.
        layout: the name of the kernels' layout.
        fingerprint: identifies the checkpoint's contents.
        names: the layers.
        make: packs the layer of a name, gives uint8 `[bytes]`; called in the order of `names`, one result is held at a time.
        is_valid: whether a layer's packed bytes are valid.
        notify: receives a message where a cache does not fit, or cannot be written; then all packed layers are held in memory.

    Returns:
        uint8 `[bytes]` by the layer's name.
    """
    cached = open_cache(folder, layout, fingerprint, names, is_valid, notify)
    if cached is not None:
        return cached
    try:
        with CacheWriter(folder, layout, fingerprint, names) as writer:
            for name in names:
                writer.add(name, make(name))
            return writer.finish()
    except _CannotWriteError as error:
        path = cache_path(folder, layout)
        notify(
            f"packed layers cannot be stored in {path} ({error}), so they take memory of their own and each load packs again"
        )
    return {name: make(name) for name in names}


def open_cache(
    folder: Path,
    layout: str,
    fingerprint: str,
    names: Sequence[str],
    is_valid: Callable[[Tensor], bool],
    notify: Notify,
) -> dict[str, Tensor] | None:
    """The packed layers as views of the cache, which may hold more layers than are asked for.

    The arguments are those of `load_or_pack`.

    Returns:
        uint8 `[bytes]` by the layer's name; None where there is no cache, where it lacks layers, or where it does not fit, of
        which `notify` receives a message.
    """
    path = cache_path(folder, layout)
    if not path.is_file():
        return None
    try:
        found = map_file(path)
        if set(names) - _layers(found).keys() and _misfit(found, layout, fingerprint, (), is_valid) is None:
            # Made for a load in which these layers had no kernels, and now made again with them.
            return None
        wrong = _misfit(found, layout, fingerprint, names, is_valid)
    except (CheckpointError, OSError) as error:
        wrong = f"is damaged: {error}"
    if wrong is None:
        return {name: found.tensors[name] for name in names}
    notify(f"the packed layers in {path} are packed again: the file {wrong}")
    return None


def _misfit(
    found: MappedFile, layout: str, fingerprint: str, names: Sequence[str], is_valid: Callable[[Tensor], bool]
) -> str | None:
    """Why a cache does not fit, or None where it does."""
    about = found.metadata
    if about.get("slimlm_kernels") != _VERSION or about.get("layout") != layout:
        return f"holds version {about.get('slimlm_kernels')}, layout {about.get('layout')}, not {_VERSION}, {layout}"
    if about.get("fingerprint") != fingerprint:
        return "was made from another checkpoint"
    layers = _layers(found)
    if any(t.dtype != torch.uint8 or t.ndim != 1 or t.data_ptr() % ALIGNMENT for t in layers.values() if t.numel()):
        return "holds tensors that are no packed layers"
    if damaged := [name for name in names if not is_valid(layers[name])]:
        return f"holds {len(damaged)} damaged layers, {damaged[0]} among them"
    return None


def _layers(found: MappedFile) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in found.tensors.items() if not name.startswith(_PADDING)}


class CacheWriter:
    """Writes a cache layer by layer without holding them; an incomplete file is removed at the end of the context.

    Args:
        folder: the checkpoint.
        layout: the name of the kernels' layout.
        fingerprint: identifies the checkpoint's contents.
        names: the layers that will be added, in any order; they determine the room for the header.
    """

    def __init__(self, folder: Path, layout: str, fingerprint: str, names: Sequence[str]) -> None:
        self._path = cache_path(folder, layout)
        self._metadata = {"slimlm_kernels": _VERSION, "layout": layout, "fingerprint": fingerprint}
        self._names = frozenset(names)
        self._entries: dict[str, tuple[int, int]] = {}
        """The begin and end of each tensor in the data, padding included."""
        self._room = _header_room(self._metadata, self._names)
        self._partial = self._path.with_name(f".{self._path.name}.partial-{secrets.token_hex(4)}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self._path)
            self._file = self._partial.open("xb")
            self._file.seek(self._room)
        except OSError as error:
            raise _CannotWriteError(error.strerror or str(error)) from error

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError as refused:  # the last buffer did not fit on the disk
            if error is None:
                raise _CannotWriteError(refused.strerror or str(refused)) from refused
        finally:
            self._partial.unlink(missing_ok=True)

    def add(self, name: str, blob: Tensor) -> None:
        """Write one layer's bytes, uint8 `[bytes]` on the CPU."""
        assert name in self._names and name not in self._entries, f"{name} was not announced, or was added before"
        assert blob.dtype == torch.uint8 and blob.ndim == 1 and blob.is_contiguous() and blob.device.type == "cpu"
        begin = max((end for _, end in self._entries.values()), default=0)
        padding = -blob.numel() % ALIGNMENT
        try:
            self._file.write(blob.numpy().data)
            self._file.write(bytes(padding))
        except OSError as error:
            raise _CannotWriteError(error.strerror or str(error)) from error
        self._entries[name] = begin, begin + blob.numel()
        if padding:
            self._entries[f"{_PADDING}{len(self._entries)}"] = begin + blob.numel(), begin + blob.numel() + padding

    def finish(self) -> dict[str, Tensor]:
        """Complete the file, give it its name, and return its layers as views of it."""
        assert self._names <= self._entries.keys(), "layers that were announced are missing"
        header = _header(self._metadata, self._entries)
        assert len(header) <= self._room
        try:
            self._file.seek(0)
            self._file.write((self._room - 8).to_bytes(8, "little") + header[8:].ljust(self._room - 8))
            self._file.flush()
            os.fsync(self._file.fileno())
            layers = _layers(map_file(self._partial))
            self._partial.replace(self._path)
            _sync_folder(self._path.parent)
        except OSError as error:
            raise _CannotWriteError(error.strerror or str(error)) from error
        return layers


def _header(metadata: dict[str, str], entries: dict[str, tuple[int, int]]) -> bytes:
    """The header of a safetensors file whose tensors are uint8 `[bytes]`; `entries` gives the first and last offset of each."""
    about: dict[str, Any] = {"__metadata__": metadata}
    for name, (begin, end) in entries.items():
        about[name] = {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
    text = json.dumps(about, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text


def _header_room(metadata: dict[str, str], names: frozenset[str]) -> int:
    """An upper bound of the bytes of the header for these layers and their padding, a multiple of the alignment."""
    most = 10**18
    every = [*names, *(f"{_PADDING}{most + i}" for i in range(len(names)))]
    return -(-len(_header(metadata, dict.fromkeys(every, (most, 2 * most)))) // ALIGNMENT) * ALIGNMENT


def _remove_abandoned(path: Path) -> None:
    """Remove incomplete files of killed processes in the folder of `path`."""
    for partial in path.parent.glob(f".{path.name}.partial-*"):
        if time.time() - partial.stat().st_mtime > _ABANDONED:
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename in this folder survive a loss of power, where the system can open folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
