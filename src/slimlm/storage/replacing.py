"""A checkpoint written into a folder that holds files already, such as an earlier checkpoint."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slimlm.core.errors import CheckpointError
from slimlm.storage import checkpoint
from slimlm.storage.journal import INSIDE
from slimlm.storage.kernel_cache import remove_caches
from slimlm.storage.streams import sync_folder

_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
"""The names of transformers' weight files."""


def refuse_other_contents(out: Path) -> None:
    """Raise CheckpointError where a checkpoint written to `out` would replace anything but a checkpoint."""
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; give a folder")
    if not out.is_dir():
        return
    if (out / INSIDE).exists():
        raise CheckpointError(f"{out} holds an unfinished run, which writes its checkpoint there; give another folder")
    if (out / checkpoint.RECORD).is_file():
        return
    names = sorted(path.name for path in out.iterdir() if _WEIGHTS.fullmatch(path.name))
    if names and not _is_compressed(out):
        raise CheckpointError(f"{out} holds another model ({names[0]}), which would be replaced; give another folder")


def _is_compressed(folder: Path) -> bool:
    """Whether a folder's config is that of a checkpoint; one whose record was lost may be written again."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return bool(config["quantization_config"]["quant_method"] == checkpoint.METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder whose files are moved to `out` when the context ends without an error, and removed when it does not.

    Files of the same names are replaced by a rename, so that what is mapped of them stays as it is. Weight files of an
    earlier checkpoint that are not replaced are removed, with its layers as kernels packed them; other files stay. The record
    is removed first and moved last: a folder in which only some files were replaced has none, and is refused.

    Raises:
        CheckpointError: The disk refuses. Of a complete checkpoint, the files that were not moved are kept, and the message
            names their folder.
    """
    if not out.is_dir():
        with checkpoint.written_beside(out) as partial:
            yield partial
        return
    try:
        partial = Path(tempfile.mkdtemp(prefix=".slimlm.partial-", dir=out))
    except OSError as error:
        raise CheckpointError(f"cannot write to {out}: {error.strerror or error}; give a folder that can be written") from error
    try:
        # Within a folder of its own, whose files get the usual permissions and are synced.
        with checkpoint.written_beside(partial / "whole") as whole:
            yield whole
    finally:
        # What is complete in it by now is kept.
        _remove_empty(partial)
    _move_or_keep(partial / "whole", out)
    shutil.rmtree(partial, ignore_errors=True)


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _move_or_keep(whole: Path, out: Path) -> None:
    """Move a complete checkpoint's files to `out`; where that stops, the rest of them is kept, and the error names it."""
    rest = f"Nothing is lost: move the files that are still in {whole} to {out}, {checkpoint.RECORD} last"
    try:
        _move(whole, out)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint was written, but could not be moved to {out} as a whole: {error}. {rest}"
        ) from error
    except BaseException as stop:
        # Ctrl-C, say, which stays what it is.
        stop.add_note(rest)
        raise


def _move(partial: Path, out: Path) -> None:
    files = sorted(partial.iterdir(), key=lambda path: path.name == checkpoint.RECORD)
    stale = {path for path in out.iterdir() if _WEIGHTS.fullmatch(path.name)} - {out / file.name for file in files}
    (out / checkpoint.RECORD).unlink(missing_ok=True)
    for file in files:
        if file.name == checkpoint.RECORD:
            for path in stale:
                path.unlink()
        file.replace(out / file.name)
    remove_caches(out)
    sync_folder(out)
