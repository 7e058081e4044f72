"""The journal of an unfinished run, set aside by a restarted run until that has begun; a refusal restores it.

    slimlm.aside/    the files of the journal; complete once journal.json is in it, which is moved last
    slimlm.back/     the same files while they are restored
    slimlm.dropped/  the same files while they are removed

Each step ends with the renaming of one file or folder, so a kill at any moment leaves one of these states, and `recover`
continues from it: dropped files are removed, all others are restored.
"""

import shutil
from pathlib import Path

from slimlm.storage.streams import sync_folder

ASIDE, _BACK, _DROPPED = "slimlm.aside", "slimlm.back", "slimlm.dropped"
FOLDERS = frozenset({ASIDE, _BACK, _DROPPED})


def set_aside(folder: Path, last: str, stays: str) -> bool:
    """Set all files but `stays` aside, the file `last` at the end.

    Returns:
        Whether there was a file `last`; without it nothing is moved.
    """
    if not (folder / last).is_file():
        return False
    (folder / ASIDE).mkdir()
    _move_all(folder, folder / ASIDE, last, {stays, *FOLDERS})
    return True


def recover(folder: Path, last: str, stays: str) -> None:
    """Restore files that are set aside, in place of those in the folder; remove files that were dropped."""
    if (folder / _DROPPED).is_dir():
        shutil.rmtree(folder / _DROPPED)
    aside, back = folder / ASIDE, folder / _BACK
    if aside.is_dir():
        if (aside / last).is_file():
            _remove_all(folder, {stays, *FOLDERS})
        _renamed(aside, back)
    if back.is_dir():
        _move_all(back, folder, last, set())
        back.rmdir()


def drop(folder: Path) -> None:
    """Remove the files that are set aside."""
    _renamed(folder / ASIDE, folder / _DROPPED)
    shutil.rmtree(folder / _DROPPED)


def _move_all(source: Path, target: Path, last: str, but: set[str]) -> None:
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        if path.name not in but:
            _renamed(path, target / path.name)


def _renamed(path: Path, target: Path) -> None:
    """Rename a file or folder and sync that to the disk."""
    path.rename(target)
    sync_folder(target.parent)


def _remove_all(folder: Path, but: set[str]) -> None:
    for path in folder.iterdir():
        if path.name in but:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
