"""A loss of power, as far as it can be tested without one: what a name stands for is on the disk before the name is.

The syncs and renames of a run are written down and gone through.
"""

import os
from pathlib import Path
from typing import Any

import pytest

import slimlm
from tests.faults.conftest import Lines


def calls_of(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Syncs, and renames from and to, of paths in a folder, in their order."""
    calls: list[tuple[str, Path]] = []
    sync, replace, rename = os.fsync, os.replace, os.rename

    def synced(handle: int) -> None:
        sync(handle)
        calls.append(("sync", Path(f"/proc/self/fd/{handle}").readlink()))

    def moved(real: Any) -> Any:
        def move(old: Any, new: Any) -> None:
            inside = [path for path in Path(old).rglob("*") if path.is_file()]
            calls.extend(("from", path) for path in inside or [Path(old)])
            real(old, new)
            calls.append(("to", Path(new)))

        return move

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", synced)
        patched.setattr(os, "replace", moved(replace))
        patched.setattr(os, "rename", moved(rename))
        run()
    return [(what, path) for what, path in calls if path.is_relative_to(folder)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the files of a process are not listed here")
@pytest.mark.parametrize("there", [False, True])
def test_what_is_renamed_was_synced_and_its_folder_is_before_the_next(
    there: bool, lines: Lines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o"
    if there:
        out.mkdir()
    asked: dict[str, Any] = {"recipe": str(lines.folder / "matched.toml"), "data": str(lines.folder / "text.txt")}
    calls = calls_of(lambda: slimlm.compress(lines.model, out, samples=4, length=16, **asked), tmp_path, monkeypatch)
    synced: set[Path] = set()
    unsynced: set[Path] = set()
    renames = 0
    for what, path in calls:
        if what == "sync":
            synced.add(path)
            unsynced = {name for name in unsynced if name.parent != path}
        elif what == "from":
            assert path in synced, f"{path.name} was renamed before it was on the disk"
            # Files of the checkpoint follow one another: any of them may be lost, and is moved again.
            assert not {name for name in unsynced if name.parent != out}, f"{unsynced} are not on the disk yet"
        else:
            renames += 1
            unsynced.add(path)
    assert not unsynced
    assert renames >= 12
    # The journal's own name.
    assert calls[0] == ("sync", out if there else tmp_path)
