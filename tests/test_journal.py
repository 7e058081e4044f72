"""A run that stops at any moment goes on where it was, and what comes out is the same, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import slimlm
from slimlm.events import Event
from slimlm.storage.journal import open_journal

from .conftest import random_model, save
from .test_refusals import Line, line  # noqa: F401, a fixture

CHILD = """
import os, sys
import slimlm
from slimlm.storage import journal, streams

model, out, text, recipe, where, number = sys.argv[1:]
count = 0

def dying(function, half):
    def run(*arguments, **options):
        global count
        count += 1
        if count == int(number):
            if half:
                arguments[0].with_name(arguments[0].name + ".new").write_bytes(b"half of it")
            os._exit(9)
        return function(*arguments, **options)
    return run

if where == "after a block":
    before = journal.Journal.commit
    def commit(self, *arguments):
        held = before(self, *arguments)
        if len(self.blocks) == int(number):
            os._exit(9)
        return held
    journal.Journal.commit = commit
elif where == "while writing tensors":
    journal.write_tensors = dying(journal.write_tensors, True)
elif where == "while writing activations":
    journal.write_stream = dying(journal.write_stream, True)
elif where == "before the journal":
    journal.Journal._write = dying(journal.Journal._write, False)
elif where == "while the checkpoint is written":
    slimlm.pipeline.write = dying(slimlm.pipeline.write, False)
elif where == "while it is verified":
    slimlm.pipeline.verify = dying(slimlm.pipeline.verify, False)
slimlm.compress(model, out, recipe=recipe, data=text, samples=6, length=32)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(random_model("llama"), tmp_path_factory.mktemp("model") / "llama")


def options(text: Path, recipe: str = "slim") -> dict[str, Any]:
    return {"recipe": recipe, "data": str(text), "samples": 6, "length": 32}


def died(model: Path, out: Path, text: Path, where: str, number: int, recipe: str = "slim") -> Path:
    """A run that ended in the middle, and the journal that it left."""
    typed = [sys.executable, "-c", CHILD, str(model), str(out), str(text), recipe, where, str(number)]
    ended = subprocess.run(typed, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 9, ended.stderr
    assert not out.exists()
    return out.with_name(out.name + ".partial")


def same(one: Path, other: Path) -> None:
    """The same files with the same bytes; of the record all but the times and the memory."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    for path in one.iterdir():
        if path.name == "slimlm.json":
            records = [json.loads((folder / path.name).read_text()) for folder in (one, other)]
            first, second = ({k: v for k, v in r.items() if k not in ("seconds", "peak_memory")} for r in records)
            assert first == second
        else:
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name


@pytest.fixture(scope="module")
def undisturbed(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for recipe in ("slim", "best-matched"):
        found[recipe] = tmp_path_factory.mktemp("undisturbed") / "out"
        slimlm.compress(model, found[recipe], **options(text_file, recipe))
    return found


@pytest.mark.parametrize(
    ("where", "number", "recipe"),
    [
        ("after a block", 1, "slim"),
        ("after a block", 1, "best-matched"),
        ("after a block", 2, "slim"),
        ("while writing tensors", 3, "slim"),
        ("while writing activations", 3, "best-matched"),
        ("before the journal", 4, "slim"),
        ("while the checkpoint is written", 1, "slim"),
        ("while it is verified", 1, "slim"),
    ],
)
def test_a_run_that_died_goes_on_and_gives_the_same_bytes(
    model: Path, undisturbed: dict[str, Path], text_file: Path, tmp_path: Path, where: str, number: int, recipe: str
) -> None:
    journal = died(model, tmp_path / "o", text_file, where, number, recipe)
    kept = len(json.loads((journal / "journal.json").read_text())["content"]["blocks"])
    assert kept >= 1
    told: list[str] = []
    events: list[Event] = []
    slimlm.compress(
        model,
        tmp_path / "o",
        **options(text_file, recipe),
        tell=told.append,
        progress=events.append,
    )
    assert any(f"going on after block {kept} of 2" in text for text in told)
    compressing = [event for event in events if event.stage == "compress"]
    assert {(event.done, event.total) for event in compressing} == {(done, 2) for done in range(kept, 3)}
    assert [block.number for block in compressing[0].blocks] == list(range(1, kept + 1))
    same(undisturbed[recipe], tmp_path / "o")
    assert not journal.exists()


@pytest.mark.slow
def test_a_run_killed_at_random_moments_gives_the_same_bytes(
    model: Path, undisturbed: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    clock, out = random.Random(0), tmp_path / "o"
    typed = [sys.executable, "-c", CHILD, str(model), str(out), str(text_file), "slim", "nowhere", "0"]
    for _ in range(30):
        process = subprocess.Popen(typed, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        time.sleep(clock.uniform(3, 9))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
    else:
        subprocess.run(typed, check=True)
    same(undisturbed["slim"], out)


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
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(text_file.read_bytes())
    out = tmp_path / "o"
    journal = died(model, out, text, "after a block", 1)
    left = {path.name: path.read_bytes() for path in journal.iterdir() if path.name != "lock"}
    typed = ["compress", model, "-o", out, "--data", text, "--samples", 6, "--length", 32]
    said = line.refused(*typed, "--recipe", "absmax")
    assert "holds another run, with 1 finished blocks" in said
    assert 'recipe.name was "slim" and is "absmax"' in said and "--restart" in said
    assert "calibration.seed was 0 and is 1" in line.refused(*typed, "--recipe", "slim", "--seed", 1)
    other = save(random_model("llama-tied"), tmp_path / "other")
    assert "model.model.safetensors was" in line.refused("compress", other, *typed[2:], "--recipe", "slim")
    text.write_text("something else entirely. " * 400)
    assert "other calibration text" in line.refused(*typed, "--recipe", "slim")
    assert {path.name: path.read_bytes() for path in journal.iterdir() if path.name != "lock"} == left
    status, _, _ = line(*typed, "--recipe", "absmax", "--restart")
    assert status == 0
    slimlm.load(out)
    assert not journal.exists()


@pytest.mark.parametrize("file", ["journal.json", "block-0001.safetensors", "inputs-0001.safetensors", "text.safetensors"])
@pytest.mark.parametrize("how", ["a bit", "half"])
def test_a_damaged_journal_is_refused_in_words(
    model: Path, undisturbed: dict[str, Path], text_file: Path, tmp_path: Path, file: str, how: str
) -> None:
    journal = died(model, tmp_path / "o", text_file, "after a block", 1)
    data = bytearray((journal / file).read_bytes())
    data[len(data) // 2] ^= 1
    (journal / file).write_bytes(data if how == "a bit" else data[: len(data) // 2])
    with pytest.raises(slimlm.SlimlmError, match="--restart"):
        slimlm.compress(model, tmp_path / "o", **options(text_file))
    slimlm.compress(model, tmp_path / "o", **options(text_file), restart=True)
    same(undisturbed["slim"], tmp_path / "o")


def test_two_runs_on_one_output_are_refused(model: Path, text_file: Path, tmp_path: Path) -> None:
    with (
        open_journal(tmp_path / "o", restart=False),
        pytest.raises(slimlm.SlimlmError, match="another process is writing"),
    ):
        slimlm.compress(model, tmp_path / "o", **options(text_file))


def test_a_full_disk_leaves_the_journal_as_it_was(
    model: Path, undisturbed: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.fsync, iter(range(100))

    def full(handle: int) -> None:
        # The second block's file is the first that does not fit.
        if Path(f"/proc/self/fd/{handle}").readlink().name == "block-0002.safetensors.new" and next(calls) == 0:
            raise OSError(28, "No space left on device")
        real(handle)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("the files of a process are not told here")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(slimlm.SlimlmError, match=r"No space left.*1 finished blocks are kept"):
        slimlm.compress(model, tmp_path / "o", **options(text_file))
    assert not list(tmp_path.rglob("*.new"))
    slimlm.compress(model, tmp_path / "o", **options(text_file))
    same(undisturbed["slim"], tmp_path / "o")


def test_an_output_folder_that_is_there_keeps_the_journal_inside(
    model: Path, undisturbed: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "o"
    out.mkdir()
    real, moved = Path.replace, []

    def stopping(self: Path, target: Path) -> Path:
        if target.parent == out:
            moved.append(target.name)
            if len(moved) == 3:
                raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", stopping)
        slimlm.compress(model, out, **options(text_file))
    assert (out / "slimlm.partial" / "journal.json").is_file() and (out / moved[0]).is_file()
    (out / "stranger").write_text("x")
    with pytest.raises(slimlm.SlimlmError, match=r"already holds something \(stranger\)"):
        slimlm.compress(model, out, **options(text_file))
    (out / "stranger").unlink()
    slimlm.compress(model, out, **options(text_file))
    same(undisturbed["slim"], out)


def test_a_folder_that_is_no_journal_is_left_alone(model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "o.partial").mkdir()
    (tmp_path / "o.partial" / "mine").write_text("precious")
    for restart in (False, True):
        with pytest.raises(slimlm.SlimlmError, match="holds something else"):
            slimlm.compress(model, tmp_path / "o", **options(text_file), restart=restart)
    assert (tmp_path / "o.partial" / "mine").read_text() == "precious"


def test_ctrl_c_says_how_to_go_on_and_ends_with_130(
    line: Line,  # noqa: F811
    model: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from slimlm import blockwise

    real = blockwise.compress_block

    def stopping(block: Any, name: str, *arguments: Any) -> Any:
        if name.endswith(".1"):
            raise KeyboardInterrupt
        return real(block, name, *arguments)

    monkeypatch.setattr(blockwise, "compress_block", stopping)
    status, out, err = line("compress", model, "-o", tmp_path / "o", "--recipe", "slim", "--data", text_file, "--samples", 6)
    assert (status, out) == (130, "")
    assert "Traceback" not in err
    assert "1 finished blocks are kept" in " ".join(err.split()) and "the same line goes on" in " ".join(err.split())
