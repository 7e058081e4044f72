"""What a journal keeps is not made again, and another run's is not touched. Faults done to runs are in tests/faults."""

from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import slimlm
from slimlm import pipeline
from slimlm.recipe import recipe_from_dict
from slimlm.run.block import BlockTask
from slimlm.storage import set_aside
from slimlm.storage.journal import open_journal
from tests.conftest import Line, random_model, save
from tests.faults.harness import same


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama"), tmp_path_factory.mktemp("model") / "llama")


def interrupted(at: str) -> Callable[..., Any]:
    """What compresses a block, and is interrupted at the block whose name ends so."""
    real = pipeline.compress_block

    def stopping(task: BlockTask) -> Any:
        if task.name.endswith(at):
            raise KeyboardInterrupt
        return real(task)

    return stopping


def test_a_plan_is_kept(model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = {"joint": "alternation", "rounds": 1, "descent_rounds": 0, "group_size": 16}
    recipe = recipe_from_dict({"name": "quick", "sequential": True, "steps": [step]}, source="test")
    asked: Any = {"recipe": recipe, "data": "self", "samples": 6, "length": 16, "bits": 5.0}
    slimlm.compress(model, tmp_path / "undisturbed", **asked)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    told: list[str] = []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("slimlm.pipeline.starting_streams", stop)
        slimlm.compress(model, tmp_path / "o", **asked, notify=told.append)
    assert "the same call resumes from there" in told[-1]
    # Neither a plan nor the model's own text is made again, so the whole model is not opened.
    monkeypatch.setattr("slimlm.run.prepare.make_plan", stop)
    monkeypatch.setattr("slimlm.run.prepare.open_dense", stop)
    slimlm.compress(model, tmp_path / "o", **asked)
    same(tmp_path / "undisturbed", tmp_path / "o")


def test_another_recipe_model_or_text_is_refused_and_said_and_restart_starts_again(
    line: Line,
    model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    out = tmp_path / "o"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("slimlm.pipeline.compress_block", interrupted(".1"))
        slimlm.compress(model, out, recipe="slim", data=str(text), samples=6, length=32)
    journal = out.with_name("o.partial")
    left = {path.name: path.read_bytes() for path in journal.iterdir() if path.name != "slimlm.lock"}
    typed = ["compress", model, "-o", out, "--data", text, "--samples", 6, "--length", 32]
    said = line.refused(*typed, "--recipe", "absmax")
    assert "holds another run, with 1 finished blocks" in said
    assert 'recipe.name was "slim" and is "absmax"' in said and "restart" in said
    assert "calibration.seed was 0 and is 1" in line.refused(*typed, "--recipe", "slim", "--seed", 1)
    other = save(random_model("llama-tied"), tmp_path / "other")
    assert "model.model.safetensors was" in line.refused("compress", other, *typed[2:], "--recipe", "slim")
    text.write_text("something else entirely. " * 400)
    assert "other calibration text" in line.refused(*typed, "--recipe", "slim")
    assert {path.name: path.read_bytes() for path in journal.iterdir() if path.name != "slimlm.lock"} == left
    status, _, _ = line(*typed, "--recipe", "absmax", "--restart")
    assert status == 0
    slimlm.load(out)
    assert not journal.exists()


def test_a_run_that_failed_does_not_hold_the_lock(tmp_path: Path) -> None:
    """Although its error, which a notebook keeps, holds its frames."""
    with pytest.raises(KeyboardInterrupt) as kept, open_journal(tmp_path / "o", restart=False) as journal:
        journal.note("plan", {})
        raise KeyboardInterrupt
    with open_journal(tmp_path / "o", restart=False) as journal:
        assert journal.notes == {"plan": {}}
    assert kept


def begun(model: Path, text: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A run that was interrupted after one block; gives the files of its journal."""
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("slimlm.pipeline.compress_block", interrupted(".1"))
        slimlm.compress(model, out, recipe="slim", data=str(text), samples=6, length=32)
    return kept_in(out.with_name("o.partial"))


def kept_in(journal: Path) -> dict[str, bytes]:
    return {str(path.relative_to(journal)): path.read_bytes() for path in journal.rglob("*") if path.name != "slimlm.lock"}


def test_a_restart_that_is_refused_drops_nothing(
    line: Line,
    model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "o"
    left = begun(model, text_file, out, monkeypatch)
    typed = ["compress", model, "-o", out, "--recipe", "slim", "--samples", 6, "--length", 32]
    assert "no text at nonexistent.txt" in line.refused(*typed, "--data", "nonexistent.txt", "--restart")
    assert kept_in(out.with_name("o.partial")) == left

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("slimlm.pipeline.decide", stop)
        status, _, said = line(*typed, "--data", text_file, "--restart")
    assert status == 130 and "nothing of it is kept; the run that was in" in " ".join(said.split())
    assert kept_in(out.with_name("o.partial")) == left
    status, _, said = line(*typed, "--data", text_file)
    assert status == 0 and "resuming after block 1 of" in said


class KilledError(BaseException):
    """In place of a kill: nothing is done after it."""


def killed_at(number: int, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Do this until the given renaming, counted from 0."""
    real, calls = Path.rename, count()

    def rename(path: Path, target: Path) -> Path:
        if next(calls) == number:
            raise KilledError
        return real(path, target)

    with monkeypatch.context() as patched, suppress(KilledError):
        patched.setattr(Path, "rename", rename)
        work()


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("first", range(9))
@pytest.mark.parametrize("second", range(5))
def test_a_restart_that_is_killed_at_any_moment_leaves_the_old_journal_or_the_new(
    accepted: bool, first: int, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = {"journal.json": "old", "text": "old", "block": "old"}, {"journal.json": "new", "text": "new"}
    for name, content in {**old, "lock": ""}.items():
        (tmp_path / name).write_text(content)

    def restart() -> None:
        assert set_aside.set_aside(tmp_path, "journal.json", "lock")
        for name, content in new.items():
            (tmp_path / name).write_text(content)
        if accepted:
            set_aside.drop(tmp_path)

    def settle() -> None:
        set_aside.recover(tmp_path, "journal.json", "lock")

    killed_at(first, restart, monkeypatch)
    killed_at(second, settle, monkeypatch)
    settle()
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "lock"}
    assert found == (new if accepted and first > len(old) else old)
