"""The packed checkpoint, format 2: a folder that needs no base model.

    config.json           the model's own config, plus `quantization_config`: for every compressed layer and embedding its
                          shape, its parts and the name, dtype and shape of each stored tensor
    *.safetensors         tensors; with several shards, model.safetensors.index.json says which is where
    slimlm.json           the record: recipe, calibration, figures per layer, versions, and size and SHA-256 of each shard
                          and of each tensor
    tokenizer files       as the tokenizer writes them

`docs/checkpoint-format.md` describes the fields and the order of bits. Two guards make transformers refuse the folder with a
message where slimlm is not imported, instead of filling layers with random numbers: `model_type` is a sentence that it
does not know, and every compressed layer stores a one-dimensional tensor under the name `weight`, which fits no dense
layer.

A folder is written under another name and renamed at the end, so a run that is killed leaves no incomplete checkpoint.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.core.profiling import profiled
from slimlm.storage.entries import Description
from slimlm.storage.journal import INSIDE, moved_already
from slimlm.storage.mapping import map_file
from slimlm.storage.streams import (
    described,
    in_file_order,
    is_plain_name,
    sha256_of,
    sync_folder,
    tensor_sum,
    write_stream,
    written,
)

FORMAT = 2
METHOD = "slimlm"
MODEL_TYPE = (
    "slimlm: these weights were compressed by slimlm. Install slimlm (pip install slimlm), and 'import slimlm' before opening "
    "them. Upgrading Transformers does not help."
)
"""What transformers says of a checkpoint where slimlm is not imported; its own advice, to upgrade transformers, follows."""
FORMER_MODEL_TYPE = "slimlm checkpoint: install slimlm, then 'import slimlm' before opening it"
"""The sentence in earlier checkpoints, which open all the same."""
RECORD = "slimlm.json"
SHARD_BYTES = 4 * 10**9
"""The most that one file of weights holds, unless one tensor is larger."""
INDEX = "model.safetensors.index.json"

Files = dict[str, dict[str, Any]]
"""For each shard, by its name: "bytes", "sha256", and "tensors", the SHA-256 of each tensor's bytes."""


def refuse_occupied(out: Path, *, restart: bool = False) -> None:
    """Raise CheckpointError where `refuse_taken` does, or where the disk refuses; the parent folder of `out` is created."""
    refuse_taken(out, restart=restart)
    with _writable(out) as where, tempfile.TemporaryFile(dir=where):
        # The file has no name, so that a process that is killed here leaves nothing.
        pass


def refuse_taken(out: Path, *, restart: bool = False) -> None:
    """Raise CheckpointError where `out` is no folder or holds files; files of an unfinished run are allowed.

    Args:
        out: The output folder.
        restart: Whether the unfinished run is dropped, so that files that it has moved to `out` are refused, too.
    """
    if not out.absolute().name:
        raise CheckpointError(
            f"`out={out}`: this is no folder of its own; give one that does not exist yet, such as {out / 'o'}"
        )
    if out.is_symlink() and not out.exists():
        raise CheckpointError(f"{out} is a link to {out.readlink()}, which is not there; make that folder, or give another")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; give a folder that does not exist yet")
    refuse_strangers(out, set() if restart else moved_already(out))


def refuse_strangers(out: Path, known: set[str]) -> None:
    """Raise CheckpointError where the folder `out` holds anything but these names and a journal."""
    if not out.is_dir():
        return
    names = {path.name for path in out.iterdir()} - known - {INSIDE}
    if names:
        held = ", ".join(sorted(names)[:3])
        raise CheckpointError(f"the output folder {out} already holds something ({held}); give another, or empty it yourself")


def _partial_for(out: Path) -> Path:
    """A new folder that is to be renamed to `out`."""
    with _writable(out) as where:
        return Path(tempfile.mkdtemp(prefix=f".{out.absolute().name}.partial-", dir=where))


@contextmanager
def _writable(out: Path) -> Iterator[Path]:
    """The folder that `out` is written in first: `out` itself where it exists (a mount point or a link), else its parent.

    Raises CheckpointError where the disk refuses that, or work in the context.
    """
    where = out.absolute()
    try:
        if not where.is_dir():
            where = where.parent
            where.mkdir(parents=True, exist_ok=True)
        yield where
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror or error}; give a folder that can be written") from error


Moving = Callable[[list[str]], None]
"""A function that is given the names of files before they are moved to the output folder, together or one by one."""


@contextmanager
def written_beside(out: Path, partial: Path | None = None, moving: Moving | None = None) -> Iterator[Path]:
    """A new folder that is moved to `out` when the context ends without an error, and removed when it does not.

    Args:
        out: The output folder.
        partial: The path of that folder meanwhile, on the same disk; files that are there are removed.
        moving: A function that is given the names of the files before they are moved.

    Raises:
        CheckpointError: The disk refuses. A complete folder that cannot be moved is kept, and the message names it.
    """
    partial = _partial_for(out) if partial is None else _emptied(partial)
    try:
        yield partial
        _give_usual_permissions(partial)
        _sync(partial)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"writing the checkpoint failed: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        files = sorted(partial.iterdir(), key=lambda path: path.name == RECORD)
        # Another process may have written there meanwhile.
        refuse_strangers(out, moved_already(out))
        if moving is not None:
            moving([path.name for path in files])
        if out.is_dir():
            for file in files:
                _move(file, out / file.name)
            partial.rmdir()
            sync_folder(out)
        else:
            partial.rename(out)
            sync_folder(out.absolute().parent)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(f"the checkpoint is complete in {partial}, but could not be moved to {out}: {error}") from error


def _move(file: Path, target: Path) -> None:
    """Rename a file, or copy it where the target is on another disk: `out` may be a mount point by now."""
    try:
        file.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with written(target) as copy, file.open("rb") as source:
            shutil.copyfileobj(source, copy)
        file.unlink()


def _emptied(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder


def _sync(folder: Path) -> None:
    """Sync every file to the disk, so that a renamed folder never holds empty files."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _give_usual_permissions(folder: Path) -> None:
    """Set the permissions that the user's umask gives new files; mkdtemp and some writers make private ones."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def write_weights(
    folder: Path,
    tensors: dict[str, Tensor],
    release: Callable[[Iterable[Tensor]], Any] = lambda _: None,
    *,
    shard_bytes: int | str | None = None,
) -> Files:
    """Write the shards; of tensors that share memory (tied ones) the first is stored.

    Args:
        folder: The checkpoint's folder.
        tensors: The tensors, of any shape `[...]`, by full name.
        release: Called with each tensor once it is written, to drop the memory pages of one that is a view of a file.
        shard_bytes: The most that one file holds, in bytes or such as "5GB"; None: SHARD_BYTES.

    Returns:
        Sizes and checksums of the files.
    """
    first: dict[int, str] = {}
    stored = {n: t for n, t in tensors.items() if t.numel() == 0 or first.setdefault(t.data_ptr(), n) == n}
    split = split_torch_state_dict_into_shards(stored, max_shard_size=SHARD_BYTES if shard_bytes is None else shard_bytes)

    def one_by_one(names: list[str], sums: dict[str, str]) -> Iterator[Tensor]:
        for name in names:
            yield stored[name]
            sums[name] = tensor_sum(stored[name])
            release([stored[name]])

    files: Files = {}
    for file, names in sorted(split.filename_to_tensors.items()):
        about = described({name: stored[name] for name in names})
        order, sums = in_file_order(about), dict[str, str]()
        metadata = {"format": "pt", "slimlm_format": str(FORMAT)}
        whole = write_stream(folder / file, {name: about[name] for name in order}, one_by_one(order, sums), metadata)
        files[file] = {"bytes": (folder / file).stat().st_size, "sha256": whole, "tensors": sums}
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return files


def write_config(folder: Path, config: dict[str, Any], description: Description) -> None:
    """Write config.json: the model's own config with the description of compressed layers and embeddings added."""
    about = {"quant_method": METHOD, "format": FORMAT, **description.to_json()}
    stored = {
        **config,
        "model_type": MODEL_TYPE,
        "slimlm_model_type": config["model_type"],
        "quantization_config": about,
    }
    (folder / "config.json").write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


@profiled("saving")
def write_record(folder: Path, record: dict[str, Any], files: Files | None = None) -> None:
    """Write slimlm.json, with sizes and checksums as `write_weights` gave them; None: they are computed from the files."""
    if files is None:
        files = {path.name: _summed(path) for path in sorted(folder.glob("*.safetensors"))}
    beside = {path.name: sha256_of(path) for path in files_beside(folder)}
    data = {"format": FORMAT, "files": files, "beside": beside, **{k: v for k, v in record.items() if k != "beside"}}
    (folder / RECORD).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def files_beside(folder: Path) -> list[Path]:
    """The files other than weights and record: config, tokenizer, generation config."""
    return [
        path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix != ".safetensors" and path.name != RECORD
    ]


def changed_beside(folder: Path) -> tuple[list[str], list[str]] | None:
    """Names of recorded files other than weights that were changed, and of those that are missing; None: none are recorded."""
    recorded = read_record(folder).get("beside")
    if not isinstance(recorded, dict):
        return None
    there = {path.name: path for path in files_beside(folder)}
    changed = [name for name, sha256 in recorded.items() if name in there and sha256_of(there[name]) != sha256]
    return changed, [name for name in recorded if name not in there]


def _summed(path: Path) -> dict[str, Any]:
    mapped = map_file(path)
    sums = {}
    for name, tensor in mapped.tensors.items():
        sums[name] = tensor_sum(tensor)
        mapped.release([tensor])
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path), "tensors": sums}


def read_record(folder: Path) -> dict[str, Any]:
    """slimlm.json as a dictionary, its format checked."""
    path = folder / RECORD
    if not folder.is_dir():
        raise CheckpointError(f"no folder at {folder}")
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a slimlm checkpoint: it has no {RECORD}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get("files", {}), dict):
        raise CheckpointError(f"{path} is damaged: it holds no record")
    check_format(record.get("format"), folder)
    return dict(record)


def check_format(found: object, where: object) -> None:
    """Raise CheckpointError for a format that this version cannot read."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise CheckpointError(f"{where} names no format version (found {found!r}); the checkpoint is damaged")
    if found < FORMAT:
        raise CheckpointError(
            f"{where} has checkpoint format {found}, of an unreleased version of slimlm; this slimlm reads format {FORMAT}. "
            "Compress the model again"
        )
    if found > FORMAT:
        raise CheckpointError(
            f"{where} has checkpoint format {found}; this slimlm reads format {FORMAT}. Install a newer slimlm"
        )


def check_files(folder: Path) -> list[Path]:
    """The paths of the shards, each checked for its recorded size and a valid header; raises CheckpointError.

    Only headers are read, which takes milliseconds whatever the size; `verify_files` reads everything.
    """
    shards = []
    for name, expected in recorded_files(folder).items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the checkpoint again")
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise CheckpointError(f"{path} has {size} bytes where {expected['bytes']} were written; copy the checkpoint again")
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
        shards.append(path)
    return shards


def verify_files(folder: Path) -> None:
    """Check every shard as `check_files` does, and against its recorded SHA-256; raises CheckpointError.

    SHA-256 takes one to three seconds per GB, so opening a checkpoint does not do this.
    """
    shards = check_files(folder)
    files = recorded_files(folder)
    for path in shards:
        if sha256_of(path) != files[path.name]["sha256"]:
            raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the recorded one; copy the checkpoint again")


def fingerprint(folder: Path) -> str:
    """A checksum of the names and recorded checksums of all shards, which identifies the weights."""
    sums = sorted((name, str(about["sha256"])) for name, about in recorded_files(folder).items())
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def recorded_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of each shard by its name, as recorded; raises CheckpointError where that makes no sense."""
    files = read_record(folder).get("files", {})
    if not files:
        raise CheckpointError(f"{folder / RECORD} lists no weight files; the checkpoint is damaged")
    for name, expected in files.items():
        if not isinstance(expected, dict) or not isinstance(expected.get("bytes"), int) or "sha256" not in expected:
            raise CheckpointError(f"{folder / RECORD} gives no size and checksum for {name}; the checkpoint is damaged")
        if not is_plain_name(name):
            raise CheckpointError(f"{folder / RECORD} names a weight file outside the folder: {name!r}")
        if not isinstance(expected.get("tensors", {}), dict):
            raise CheckpointError(f"{folder / RECORD} gives no checksums of the tensors in {name}; the checkpoint is damaged")
    return dict(files)


def stored_bytes(folder: Path) -> int:
    """Size of a folder's weight files."""
    return sum(p.stat().st_size for p in folder.glob("*.safetensors"))
