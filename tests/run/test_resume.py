"""How a run is begun."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from slimlm.core.errors import CheckpointError
from slimlm.events import quiet
from slimlm.run import resume
from slimlm.storage.journal import Content


def test_only_the_first_rank_looks_for_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = False

    @contextmanager
    def join_ranks() -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(first=first, broadcast=lambda _: Content().to_dict())

    monkeypatch.setattr(resume, "join_ranks", join_ranks)
    out = tmp_path / "no" / "such" / "o"
    with resume.open_run(out, tmp_path / "m", restart=False, progress=quiet, notify=pytest.fail) as run:
        assert run.journal.folder != out
    assert not list(tmp_path.iterdir())
    first = True
    with (
        pytest.raises(CheckpointError, match="nor the folder above it exists"),
        resume.open_run(out, tmp_path / "m", restart=False, progress=quiet, notify=pytest.fail),
    ):
        pytest.fail("there is no place for it")
