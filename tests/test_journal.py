"""What a journal keeps is not made again, and another run's is not touched. Faults done to runs are in tests/faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slimlm
from slimlm import blockwise
from slimlm.storage.journal import open_journal

from .conftest import random_model, save
from .faults.harness import same
from .test_refusals import Line, line  # noqa: F401, a fixture


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama"), tmp_path_factory.mktemp("model") / "llama")


def interrupted(at: str) -> Callable[..., Any]:
    """What compresses a block, and is interrupted at the block whose name ends so."""
    real = blockwise.compress_block

    def stopping(block: Any, name: str, *arguments: Any) -> Any:
        if name.endswith(at):
            raise KeyboardInterrupt
        return real(block, name, *arguments)

    return stopping


def test_a_plan_is_kept(model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = {"data": "self", "samples": 6, "length": 16, "bits": 5.0}
    slimlm.compress(model, tmp_path / "undisturbed", **asked)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    told: list[str] = []
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("slimlm.pipeline.compress_blocks", stop)
        slimlm.compress(model, tmp_path / "o", **asked, tell=told.append)
    assert "the same line goes on from there" in told[-1]
    # Neither a plan nor the model's own text is made again, so the whole model is not opened.
    monkeypatch.setattr("slimlm.pipeline.make_plan", stop)
    monkeypatch.setattr("slimlm.pipeline.open_dense", stop)
    slimlm.compress(model, tmp_path / "o", **asked)
    same(tmp_path / "undisturbed", tmp_path / "o")


def test_another_recipe_model_or_text_is_refused_and_said_and_restart_begins_anew(
    line: Line,  # noqa: F811
    model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    out = tmp_path / "o"
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("slimlm.blockwise.compress_block", interrupted(".1"))
        slimlm.compress(model, out, recipe="slim", data=str(text), samples=6, length=32)
    journal = out.with_name("o.partial")
    left = {path.name: path.read_bytes() for path in journal.iterdir() if path.name != "slimlm.lock"}
    typed = ["compress", model, "-o", out, "--data", text, "--samples", 6, "--length", 32]
    said = line.refused(*typed, "--recipe", "absmax")
    assert "holds another run, with 1 finished blocks" in said
    assert 'recipe.name was "slim" and is "absmax"' in said and "--restart" in said
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
