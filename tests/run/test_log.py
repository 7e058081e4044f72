"""The log next to the output: every layer once, whatever happens to the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import slimlm
from slimlm import pipeline
from slimlm.run.log import log_path
from tests import forked
from tests.conftest import random_model, save


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama", torch.float16), tmp_path_factory.mktemp("model") / "llama")


CHILD = """
import os, sys
import slimlm

model, out, text = sys.argv[1:]
import slimlm.pipeline
slimlm.pipeline.assemble = lambda *_: os._exit(9)
slimlm.compress(model, out, recipe="slim", data=text, samples=6, length=32)
"""


def options(text: Path, recipe: str = "slim") -> dict[str, Any]:
    return {"recipe": recipe, "data": str(text), "samples": 6, "length": 32}


@pytest.fixture(scope="module")
def dead(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory, server: None) -> Path:
    """The folder of a run that ended without a message, all blocks done, when the checkpoint was to be written."""
    folder = tmp_path_factory.mktemp("dead")
    said = folder.with_name("dead.txt")
    ended = forked.start(CHILD, [str(model), str(folder / "o"), str(text_file)], said)
    ended.join()
    assert ended.exitcode == 9, said.read_text()
    return folder


@pytest.fixture
def died(dead: Path, tmp_path: Path) -> Path:
    """What that run was to write, in a folder to resume in."""
    shutil.copytree(dead, tmp_path, dirs_exist_ok=True)
    return tmp_path / "o"


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def kinds(lines: list[dict[str, Any]]) -> list[str]:
    return [line["event"] for line in lines]


WHOLE = ["run", *7 * ["layer"], "block", *7 * ["layer"], "block", "end"]


def test_every_layer_has_a_line_with_the_figures_of_the_record(model: Path, text_file: Path, tmp_path: Path) -> None:
    result = slimlm.compress(model, tmp_path / "o", **options(text_file))
    lines = entries(tmp_path / "o.log.jsonl")
    assert kinds(lines) == WHOLE
    layers = [line for line in lines if line["event"] == "layer"]
    for line, layer in zip(layers, result.record.layers, strict=True):
        assert (line["name"], tuple(line["shape"]), line["bits"]) == (layer.name, layer.shape, layer.bits)
        assert (line["error"], line["bits_per_weight"]) == (layer.error, layer.bits_per_weight)
        assert line["tokens"] == 6 * 32 and line["seconds"] >= 0
    blocks = [line for line in lines if line["event"] == "block"]
    assert [line["error"] for line in blocks] == [
        pytest.approx(sum(line["error"] for line in own) / 7) for own in (layers[:7], layers[7:])
    ]
    assert lines[0]["after"] == 0 and lines[0]["recipe"]["name"] == "slim"
    assert lines[-1]["stored_bytes"] == result.record.stored_bytes


def test_the_log_names_no_folder(model: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[[steps]]\nquantize = "absmax"\n')
    slimlm.compress(model, tmp_path / "o", **options(text_file, str(recipe)))
    for file in (tmp_path / "o.log.jsonl", tmp_path / "o" / "slimlm.json"):
        assert str(tmp_path) not in file.read_text() and str(model.parent) not in file.read_text()
    assert entries(tmp_path / "o.log.jsonl")[0]["recipe"]["name"] == "mine"


@pytest.mark.parametrize("half", ["", '{"event": "layer", "blo'])
@pytest.mark.parametrize("lost", [0, 8])
def test_a_run_that_goes_on_adds_to_the_log_and_makes_up_for_lost_lines(
    model: Path, text_file: Path, died: Path, half: str, lost: int
) -> None:
    path = died.with_name("o.log.jsonl")
    left = path.read_text().splitlines(keepends=True)
    assert kinds([json.loads(line) for line in left]) == WHOLE[:-1], "killed, so it says no end"
    path.write_text("".join(left[: len(left) - lost]) + half)
    result = slimlm.compress(model, died, **options(text_file))
    lines = entries(path)
    assert [line["name"] for line in lines if line["event"] == "layer"] == [layer.name for layer in result.record.layers]
    assert [line["after"] for line in lines if line["event"] == "run"] == [0, 2]
    made_up = [line for line in lines if line["event"] in ("layer", "block") and line["seconds"] is None]
    assert len(made_up) == lost
    assert lines[-1]["event"] == "end"


def test_a_run_that_starts_again_has_lines_of_its_own(model: Path, text_file: Path, died: Path) -> None:
    slimlm.compress(model, died, **options(text_file), restart=True)
    lines = entries(died.with_name("o.log.jsonl"))
    assert kinds(lines) == [*WHOLE[:-1], *WHOLE]
    assert [line["after"] for line in lines if line["event"] == "run"] == [0, 0]


def test_a_run_that_stops_says_so_without_the_words_of_the_error(
    model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "verify_written", stop)
    with pytest.raises(KeyboardInterrupt):
        slimlm.compress(model, tmp_path / "o", **options(text_file))
    assert entries(tmp_path / "o.log.jsonl")[-1] == {"event": "stopped", "why": "KeyboardInterrupt"}


def test_a_run_that_is_refused_leaves_no_log(model: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(slimlm.SlimlmError):
        slimlm.compress(model, tmp_path / "o", **{**options(text_file, "best-24-matched"), "samples": 1})
    assert list(tmp_path.iterdir()) == []


def test_in_a_folder_that_is_there_the_log_lies_inside(model: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    out.mkdir()
    assert log_path(out) == out / "slimlm.log.jsonl"
    (out / "slimlm.log.jsonl").write_text("")  # what a run that was stopped early leaves is in nobody's way
    slimlm.compress(model, out, **options(text_file))
    assert kinds(entries(out / "slimlm.log.jsonl")) == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["o"]
    slimlm.load(out)


def test_reconstructed_blocks_are_logged_as_they_are_stored(model: Path, text_file: Path, tmp_path: Path) -> None:
    result = slimlm.compress(model, tmp_path / "o", **options(text_file, "best-24-matched"))
    layers = [line for line in entries(tmp_path / "o.log.jsonl") if line["event"] == "layer"]
    logged = [(line["error"], tuple(line["reconstruction"])) for line in layers]
    assert logged == [(record.error, record.reconstruction) for record in result.record.layers]
