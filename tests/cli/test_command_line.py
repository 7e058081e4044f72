"""What the verbs say of themselves, and what they refuse before any work."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import slimlm
from slimlm.cli.app import app, main
from slimlm.core.errors import DataError
from slimlm.data.documents import name_of
from slimlm.pipeline import estimate
from tests.conftest import Line

SHORT = ("--recipe", "absmax", "--samples", 2, "--length", 16)


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("compress", ("allenai/c4:en", "by the recipe", "half of the free memory")),
        ("eval", ("the model's context, at most 2048",)),
        ("bench", ("what torch uses", "1, 4 and 16", "CPU threads")),
    ],
)
def test_help_names_the_defaults(verb: str, words: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
    said = " ".join(shown.replace("│", " ").split())
    assert all(each in said for each in words), said


def test_a_plan_says_that_the_output_is_there_and_that_the_text_is_not(
    line: Line,
    llama_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slimlm.pipeline.timed", lambda *_: None)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "notes.txt").touch()
    found = estimate(llama_folder, tmp_path / "o", recipe="absmax", data="nonexistent.txt")
    assert ["already holds something (notes.txt)" in found.problems[0], *found.problems[1:]] == [
        True,
        "no text at nonexistent.txt",
    ]
    fine = estimate(llama_folder, tmp_path / "deep" / "o", recipe="absmax", data="self")
    assert fine.problems == () and not (tmp_path / "deep").exists()
    assert "no folder of its own" in estimate(llama_folder, "/", recipe="absmax").problems[-1]


def test_the_root_is_refused_as_output(line: Line, llama_folder: Path) -> None:
    assert "no folder of its own" in line.refused("compress", llama_folder, "-o", "/", *SHORT)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_no_generator_takes_is_refused(
    seed: int,
    line: Line,
    llama_folder: Path,
    tmp_path: Path,
) -> None:
    assert "at most 64 bits" in line.refused("compress", llama_folder, "-o", tmp_path / "o", "--seed", seed)
    assert "at most 64 bits" in line.refused("generate", llama_folder, "--prompt", "a", "--seed", seed)
    with pytest.raises(DataError, match="at most 64 bits"):
        slimlm.compress(llama_folder, tmp_path / "o", seed=seed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--length", "--tokens"])
def test_verify_refuses_what_only_a_text_needs(option: str, line: Line, tmp_path: Path) -> None:
    assert f"{option} needs --text" in line.refused("verify", tmp_path, option, 64)


def test_a_model_in_the_current_folder_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").mkdir()
    monkeypatch.chdir(tmp_path / "small")
    assert name_of(".") == "small" and name_of("some/hub-name") == "some/hub-name"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
@pytest.mark.parametrize("form", [["methods"], ["methods", "--json"], ["--version"]])
def test_results_that_cannot_be_written_are_one_message(
    form: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("/dev/full").open("w") as full, pytest.raises(SystemExit) as ended:
        monkeypatch.setattr("sys.stdout", full)
        monkeypatch.setattr("sys.argv", ["slimlm", *form])
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("slimlm: reading or writing failed") and said.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file that is always full")
def test_python_s_last_flush_adds_nothing_to_that_message() -> None:
    # A process of its own: Python flushes at its end. The verb imports neither torch nor transformers.
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "slimlm", "--version"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("slimlm: reading or writing failed") and done.stderr.count("\n") == 1
