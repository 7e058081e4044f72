"""Old .bin weight files, of which only tensors are read: other objects are never unpickled (`weights_only`)."""

import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimlm.core.errors import ModelError, first_line
from slimlm.storage.mapping import unknown_dtype
from slimlm.storage.streams import KINDS


def read_bin(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin file by name, mapped into memory where the file's format allows it.

    Raises:
        ModelError: the file is damaged, holds more than tensors or none, declares more bytes than it has, or holds a tensor of
        a
            dtype that slimlm does not read.
    """
    _refuse_oversized(path)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # Files of torch before 1.6 cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ModelError(
            f"{path} is damaged, or holds more than tensors, which slimlm does not run ({first_line(error)}); download it "
            "again, or convert the model to safetensors"
        ) from error
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} holds a {type(loaded).__name__} where tensors by name were expected")
    tensors = {str(name): tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}
    if not tensors:
        raise ModelError(_no_tensors(path, loaded))
    for name, tensor in tensors.items():
        if tensor.dtype not in KINDS.values():
            raise ModelError(f"{name} in {path} {unknown_dtype(str(tensor.dtype))}")
    return tensors


def _refuse_oversized(path: Path) -> None:
    """Raise ModelError where a file declares more bytes than it has, before torch allocates them.

    Torch stores the members of its archives uncompressed; files of torch before 1.6 begin with pickles, the fourth of which
    gives sizes.
    """
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                odd = [i.filename for i in archive.infolist() if i.compress_type != zipfile.ZIP_STORED or i.file_size > size]
                odd += [name for name in archive.namelist() if name.startswith("/") or ".." in name.split("/")]
        else:
            with path.open("rb") as file:
                pickles = [list(pickletools.genops(file)) for _ in range(4)]
            odd = [str(number) for _, number, _ in pickles[-1] if isinstance(number, int) and number > size]
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ModelError(f"{path} is damaged, or was not written by torch ({first_line(error)}); download it again") from error
    if odd:
        raise ModelError(
            f"{path} holds what torch does not write ({odd[0]}): a member that is larger than the file, compressed, or outside "
            "of it. It is not opened; download it again, or convert the model to safetensors"
        )


def _no_tensors(path: Path, loaded: dict[Any, Any]) -> str:
    """The message for a file whose dictionary holds no tensor at its top level."""
    keys = ", ".join(repr(str(key)) for key in list(loaded)[:5]) + (", ..." if len(loaded) > 5 else "")
    message = f"{path} holds no tensors by name, but {f'the keys {keys}' if loaded else 'nothing'}"
    nested = [key for key, value in loaded.items() if isinstance(value, dict) and any(map(torch.is_tensor, value.values()))]
    if not nested:
        return f"{message}; download it again, or give a model as save_pretrained writes it"
    return (
        f"{message}: the tensors are under {str(nested[0])!r}, as a training program saves them. Save these alone: "
        f"torch.save(torch.load(file, weights_only=True)[{nested[0]!r}], file)"
    )
