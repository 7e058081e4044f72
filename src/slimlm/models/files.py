"""Which files of a folder hold a model's weights."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from slimlm.core.errors import DoesNotFitError, ModelError
from slimlm.models.bin_files import read_bin
from slimlm.storage.streams import is_plain_name, write_tensors

_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors", "*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
)
"""Index, single file and pattern of all files of each format, the preferred format first."""

_OTHER_FORMATS = (".gguf", ".pth", ".pt", ".ckpt", ".h5", ".msgpack", ".onnx", ".bin")


def weight_files(folder: Path, notify: Callable[[str], None] | None = None) -> list[Path]:
    """The files that hold a model's weights, safetensors before .bin.

    As transformers does, the single file is preferred to those that an index lists, and these to any others: a repository may
    hold the same weights a second time under other names.

    Args:
        folder: the model's folder.
        notify: receives a message where an index is ignored because the single file is there, too.

    Raises:
        ModelError: there are no weights, or the index is damaged or names a file that is missing or outside the folder.
    """
    for index, single, pattern in _LAYOUTS:
        if (folder / single).is_file():
            if notify is not None and (folder / index).is_file():
                notify(
                    f"{folder} holds both {single} and {index}; as transformers does, {single} is read and the index is not. "
                    f"If the files of the index are the ones that you mean, remove {single}"
                )
            return [folder / single]
        if (folder / index).is_file():
            return [folder / name for name in _indexed(folder / index)]
        if files := sorted(path for path in folder.glob(pattern) if not path.name.startswith("adapter_")):
            return files
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHER_FORMATS)
    raise ModelError(f"{folder} holds no weights: no safetensors file and no pytorch_model.bin{_instead(others)}")


def _instead(others: list[str]) -> str:
    """What would work where a folder holds only these files of weights."""
    if gguf := [name for name in others if name.endswith(".gguf")]:
        return f"; of a GGUF file give its own path, {gguf[0]}"
    return f"; {others[0]} is in a format that slimlm does not read: convert it to safetensors" if others else ""


def as_safetensors(paths: Iterable[Path], scratch: Path) -> list[Path]:
    """Weight files as safetensors files; old .bin files are converted, one at a time, and only once.

    Args:
        paths: the files, as `weight_files` gives them.
        scratch: the folder for converted files, created when it is needed.

    Raises:
        ModelError: as `read_bin`.
        DoesNotFitError: the disk is too small for a converted file.
    """
    files = []
    for path in paths:
        if path.suffix == ".safetensors":
            files.append(path)
            continue
        converted = scratch / f"{path.stem}.safetensors"
        if not converted.is_file():
            refuse_full_disk(scratch, path.stat().st_size)
            scratch.mkdir(parents=True, exist_ok=True)
            write_tensors(converted, read_bin(path))
        files.append(converted)
    return files


def refuse_full_disk(folder: Path, size: int) -> None:
    """Raise DoesNotFitError where a folder's disk has no room for `size` bytes that a model's files are converted to."""
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    if (free := shutil.disk_usage(existing).free) < size:
        raise DoesNotFitError(
            f"the model's weights have to be converted to a file of {size / 1e9:.2f} GB in {folder} first, and "
            f"{free / 1e9:.2f} GB are free there. Free more of that disk, or choose another one: by `out`, next to which it "
            "is written; where nothing is compressed and no `out` is given, by the environment variable TMPDIR"
        )


def _indexed(index: Path) -> list[str]:
    """The names of the files that an index lists; all of them exist in its folder."""
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged ({error}); download it again") from error
    for name in names:
        if not is_plain_name(name):
            raise ModelError(f"{index} names a weight file outside the folder: {name!r}")
        if not (index.parent / name).is_file():
            raise ModelError(f"{index.parent / name} is missing, which the index names; download the model again")
    return names
