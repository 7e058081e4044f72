"""Several ways to compress one model, compared with the original, as the demo shows them."""

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

import slimlm
from slimlm.bench.recipes import Setting, Trial, compare_recipes
from slimlm.cli.demo import _trials
from slimlm.core.errors import CheckpointError
from slimlm.events import Event
from slimlm.models.dense import open_dense
from slimlm.record import Record
from slimlm.report.comparison import comparison_table
from slimlm.storage.checkpoint import read_record


def setting(text: Path) -> Setting:
    return Setting(str(text), samples=4, length=32, measured_samples=3, prompts=("one two", "three"))


def test_each_trial_is_a_row_beside_the_original_and_its_model_is_kept_where_asked(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    stages: list[str] = []

    def observer(event: Event) -> None:
        stages.append(event.stage)

    trials = (Trial("a", "rounded", "absmax", continues=True), Trial("b", "pruned", "slim", out=tmp_path / "kept"))
    seen: list[str] = []
    found = compare_recipes(
        llama_folder,
        trials,
        setting(text_file),
        store=tmp_path / "store",
        progress=observer,
        each=lambda row: seen.append(row.name),
    )
    assert seen == ["original", "a", "b"]
    assert not list(tmp_path.glob("store*"))
    original, rounded, pruned = found.rows
    assert [row.name for row in found.rows] == ["original", "a", "b"]
    assert found.tokens == 3 * 31
    assert original.bytes == open_dense(str(llama_folder)).bytes > rounded.bytes
    assert 16 <= original.bits_per_weight <= 32 and 4 < rounded.bits_per_weight < 8
    assert all(math.isfinite(row.perplexity) for row in found.rows)
    assert original.seconds == 0 < min(rounded.seconds, pruned.seconds)
    assert {name: len(texts) for name, texts in found.continuations.items()} == {"original": 2, "a": 2}
    assert slimlm.verify(tmp_path / "kept").sound
    assert {
        "original: evaluate",
        "recipe 1 of 2, a: compress",
        "recipe 2 of 2, b: compress",
        "recipe 2 of 2, b: evaluate",
    } <= set(stages)
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(comparison_table(found, "title"))
    text = console.export_text()
    change = f"{pruned.perplexity / original.perplexity - 1:+.1%}"
    assert "title" in text and "100%" in text and change in text


def test_a_folder_that_is_taken_is_refused_before_any_work(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    trials = (Trial("a", "rounded", "absmax"), Trial("b", "pruned", "slim", out=tmp_path))
    with pytest.raises(CheckpointError, match="already holds something"):
        compare_recipes(
            llama_folder, trials, setting(text_file), store=tmp_path, progress=lambda _: pytest.fail("work has begun")
        )


def test_the_folders_above_the_store_are_made_where_they_do_not_exist(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    found = compare_recipes(
        llama_folder, (Trial("a", "rounded", "absmax"),), setting(text_file), store=tmp_path / "a" / "b" / "c"
    )
    assert [row.name for row in found.rows] == ["original", "a"]


def test_a_store_that_cannot_be_written_is_refused_before_any_work(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write to .*file/store.*XDG_CACHE_HOME"):
        compare_recipes(
            llama_folder,
            (Trial("a", "rounded", "absmax"),),
            setting(text_file),
            store=tmp_path / "file" / "store",
            each=lambda _: pytest.fail("work has begun"),
        )


@pytest.mark.parametrize("damage", ["weights", "record"])
def test_a_kept_model_that_is_damaged_is_made_again(llama_folder: Path, text_file: Path, tmp_path: Path, damage: str) -> None:
    trial, store = Trial("a", "rounded", "absmax"), tmp_path / "store"

    def stop(event: Event) -> None:
        if event.stage == "recipe 1 of 1, a: evaluate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare_recipes(llama_folder, (trial,), setting(text_file), store=store, progress=stop)
    [kept] = [path for path in store.iterdir() if path.is_dir()]
    if damage == "record":
        (kept / "slimlm.json").unlink()
    else:
        weights = kept / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()  # It may be mapped.
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    told: list[str] = []
    found = compare_recipes(llama_folder, (trial,), setting(text_file), store=store, notify=told.append)
    assert [text for text in told if text.startswith(f"{kept}, from an earlier call, is damaged")]
    assert len(found.rows) == 2 and not store.exists()


def test_a_comparison_that_was_stopped_continues_with_what_was_compressed(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    trials = (Trial("a", "rounded", "absmax"), Trial("b", "rounded in groups of 32", "gptq-32", out=tmp_path / "kept"))

    def stop(event: Event) -> None:
        if event.stage == "recipe 2 of 2, b: compress":
            raise KeyboardInterrupt

    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        compare_recipes(llama_folder, trials, setting(text_file), store=tmp_path / "store", progress=stop, notify=told.append)
    assert len(told) == 1 and told[0].startswith("calibration has 128 tokens"), "and not that nothing is kept"
    [finished] = [path for path in (tmp_path / "store").iterdir() if (path / "slimlm.json").is_file()]
    assert finished.name.startswith("a-")
    before = Record.from_dict(read_record(finished)).seconds
    stages: list[str] = []
    found = compare_recipes(
        llama_folder,
        trials,
        setting(text_file),
        store=tmp_path / "store",
        progress=lambda event: stages.append(event.stage),
    )
    assert found.rows[1].seconds == before
    assert "recipe 1 of 2, a: compress" not in stages and "recipe 2 of 2, b: compress" in stages
    assert slimlm.verify(tmp_path / "kept").sound and not (tmp_path / "store").exists()


def test_the_demo_shows_rounding_gptq_and_one_sparse_model_and_more_with_full() -> None:
    quick, full = _trials(Path("kept"), full=False), _trials(Path("kept"), full=True)
    assert [trial.recipe for trial in quick] == ["absmax", "gptq", "slim"]
    assert {"absmax", "magnitude", "wanda", "slim", "best-24"} <= {trial.recipe for trial in full}
    assert sum(trial.bits is not None for trial in full) == 2
    assert len({trial.name for trial in full}) == len(full)
    assert [trial.out for trial in quick] == [None, None, Path("kept")] and full[-1].out == Path("kept")
