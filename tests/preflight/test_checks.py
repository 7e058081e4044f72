"""What cannot fit is refused before the work, and what might fit is not."""

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import slimlm
from slimlm.cli.app import app
from slimlm.core.errors import CheckpointError, DataError, DoesNotFitError, RecipeError
from slimlm.core.statistics.fisher import Fisher
from slimlm.events import Notify
from slimlm.methods.quantize.gptq import Gptq
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.pipeline import estimate
from slimlm.preflight.checks import check_disk, check_memory, check_whole
from slimlm.preflight.estimate import Memory, memory_of
from slimlm.recipe import NamedStep, open_recipe
from slimlm.run.config import RunConfig
from slimlm.run.prepare import run_needs
from slimlm.storage import checkpoint
from tests.conftest import Line, random_model, save
from tests.preflight.test_needs import needs_of

OPTIONS: dict[str, Any] = {"recipe": "absmax", "samples": 4, "length": 32}
MEMORY = Memory(process=100, begin=0, block=60, end=0, activations=30, on_disk=False, least=50, total=1000, free=500)
Usage = namedtuple("Usage", "total used free")


def with_memory(**changes: object) -> Memory:
    return Memory(**{**vars(MEMORY), **changes})


def test_memory_is_refused_only_where_the_least_is_more_than_all_there_is() -> None:
    assert check_memory(MEMORY, None) is None
    assert check_memory(with_memory(total=None, free=None, least=10**9), None) is None
    assert check_memory(with_memory(total=50), None) is None
    with pytest.raises(DoesNotFitError, match=r"at least 50 bytes, and there are 49 bytes.*`memory`"):
        check_memory(with_memory(total=49), None)
    assert check_memory(with_memory(total=49), 50) is None, "one who says that there is more is believed"


def test_memory_that_is_tight_is_told_with_what_would_help() -> None:
    assert "about 190 bytes" in str(check_memory(with_memory(free=99), None))
    assert check_memory(with_memory(free=101), None) is None
    assert check_memory(with_memory(free=99, on_disk=True), None) is None


def test_the_advice_is_about_what_takes_the_most() -> None:
    few, no_covariances = "Fewer `samples`", "fewer `samples` do not"
    assert few in str(check_memory(with_memory(free=99, activations=70), None))
    assert no_covariances in str(check_memory(with_memory(free=60, covariances=40), None))
    with pytest.raises(DoesNotFitError, match=r"40 bytes of it are covariances.*every expert.*\(slim, absmax\)"):
        check_memory(with_memory(total=49, covariances=40), None)


def test_a_mixture_whose_covariances_do_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(random_model("mixtral"), tmp_path / "m")
    there = needs_of(folder, "gptq").least_bytes - 1
    monkeypatch.setattr("slimlm.preflight.estimate.total_and_free", lambda: (there, there))
    check_memory(memory_of(needs_of(folder, "slim"), None), None)
    with pytest.raises(DoesNotFitError, match="the memory does not suffice"):
        check_memory(memory_of(needs_of(folder, "gptq"), None), None)


def test_the_disk_is_refused_where_output_and_journal_do_not_fit(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs, journal = needs_of(llama_folder, "absmax"), tmp_path / "o.partial"
    needed = needs.disk_bytes

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, size))

    free(2 * needed)
    assert check_disk(needs, tmp_path / "deep" / "o", journal) is None
    free(needed)
    assert "nearly full" in str(check_disk(needs, tmp_path / "o", journal))
    free(needed - 1)
    with pytest.raises(DoesNotFitError, match="another disk, or fewer `samples`"):
        check_disk(needs, tmp_path / "o", journal)
    journal.mkdir()
    (journal / "block-0001.safetensors").write_bytes(b"x")
    assert check_disk(needs, tmp_path / "o", journal) is not None, "what an unfinished run has written already counts"


def in_bin_files(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    return copy


def test_converted_weights_are_needed_until_the_end(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, journal = in_bin_files(llama_folder, tmp_path / "m"), tmp_path / "o.partial"
    dense = open_lazy(str(folder), journal / "original", pytest.fail)
    needs = run_needs(RunConfig(model=str(folder), recipe="absmax", samples=8, length=32), dense)
    converted = sum(path.stat().st_size for path in (journal / "original").iterdir())
    assert dense.converted_bytes == converted > 0
    plain = needs_of(llama_folder, "absmax")
    assert needs.disk_bytes - plain.disk_bytes == converted
    assert dense.whole_bytes - plain.dense.whole_bytes == converted, "a plan has them in memory as well"
    # What is written already takes no more room, and none of it becomes free for the rest.
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, plain.disk_bytes))
    assert check_disk(needs, tmp_path / "o", journal) is not None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, plain.disk_bytes - 1))
    with pytest.raises(DoesNotFitError, match="of converted weights"):
        check_disk(needs, tmp_path / "o", journal)


def test_an_estimate_converts_on_the_disk_of_the_output_and_counts_it(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = in_bin_files(llama_folder, tmp_path / "m"), []

    def opened(source: str, scratch: Path, notify: Notify) -> LazyModel:
        made.append(scratch)
        return open_lazy(source, scratch, notify)

    monkeypatch.setattr("slimlm.pipeline.open_lazy", opened)
    monkeypatch.setattr("slimlm.pipeline.timed", lambda *_: None)
    found = estimate(folder, tmp_path / "o", **OPTIONS)
    plain = estimate(llama_folder, tmp_path / "o", **OPTIONS)
    assert made[0].parent == tmp_path and not made[0].exists()
    assert found.disk - plain.disk > 0.9 * (llama_folder / "model.safetensors").stat().st_size


def test_a_run_takes_no_more_disk_than_was_said(
    llama_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 0
    write = checkpoint.write_record

    def counted(folder: Path, record: dict[str, Any], files: dict[str, Any]) -> None:
        nonlocal most
        most = max(most, sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")))
        write(folder, record, files)

    monkeypatch.setattr(checkpoint, "write_record", counted)
    slimlm.compress(llama_folder, tmp_path / "o", data=str(text_file), **OPTIONS)
    needs = needs_of(llama_folder, "absmax", samples=4)
    headers = 3 * 200 * len(needs.dense.weights)
    # The text may have less to hold back than is counted.
    assert needs.disk_bytes <= most + needs.activations_bytes + needs.held_back_bytes and most <= needs.disk_bytes + headers


def test_compress_refuses_what_cannot_fit_and_leaves_nothing(
    line: Line,
    llama_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = ["compress", llama_folder, "-o", tmp_path / "o", "--recipe", "absmax", "--data", text_file, "--samples", "4"]
    with monkeypatch.context() as small:
        small.setattr("slimlm.preflight.estimate.total_and_free", lambda: (2**12, 2**11))
        assert "the memory does not suffice" in line.refused(*typed)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 100))
        assert "the disk does not suffice" in line.refused(*typed)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_for_more_than_all_memory_is_refused_before_the_model_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimlm.preflight.checks.total_and_free", lambda: (100, 50))
    assert check_whole(100, None) is None
    assert check_whole(101, 101) is None
    with pytest.raises(DoesNotFitError, match="the whole model in memory, 101 bytes"):
        check_whole(101, None)


def test_an_estimate_says_what_would_be_refused(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimlm.pipeline.timed", lambda *_: None)
    assert estimate(llama_folder, tmp_path / "o", **OPTIONS).problems == ()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 100))
    found = estimate(llama_folder, tmp_path / "o", **OPTIONS)
    assert found.disk_free == 100 and ["the disk does not suffice" in text for text in found.problems] == [True]


def test_the_command_shows_it_as_a_table_and_as_json(llama_folder: Path) -> None:
    typed = ["plan", str(llama_folder), "--recipe", "gptq", "--samples", "2", "--length", "16"]
    shown = CliRunner().invoke(app, typed)
    assert shown.exit_code == 0, shown.output
    said = " ".join(shown.stdout.split())
    for words in (
        "14 in 2 blocks",
        "lm_head",
        "outside the blocks",
        "bits per weight",
        "too few: give more calibration samples",
    ):
        assert words in said
    data = json.loads(CliRunner().invoke(app, [*typed, "--json"]).stdout)
    assert data.keys() == {"estimate"}
    assert data["estimate"]["memory"]["peak"] > data["estimate"]["memory"]["block"] > 0
    assert data["estimate"]["total_seconds"] == pytest.approx(sum(data["estimate"]["seconds"].values()))


def test_there_is_nothing_to_save_without_a_plan(line: Line, llama_folder: Path, tmp_path: Path) -> None:
    assert "no plan to save" in line.refused("plan", llama_folder, "--save", tmp_path / "r.toml")


def test_an_output_inside_the_model_s_folder_is_refused(llama_folder: Path, tmp_path: Path, text_file: Path) -> None:
    model = tmp_path / "m"
    shutil.copytree(llama_folder, model)
    before = sorted(model.rglob("*"))
    (tmp_path / "link").symlink_to(model)
    for out in (model / "q", model / "deep" / "q", tmp_path / "link" / "q"):
        with pytest.raises(CheckpointError, match=r"lies inside the model's folder .*, such as .*m-q"):
            slimlm.compress(model, out, recipe="absmax", data=text_file, samples=2, length=16)
        estimated = slimlm.estimate(model, out, recipe="absmax", data=text_file)
        assert any("inside the model's folder" in problem for problem in estimated.problems)
    assert sorted(model.rglob("*")) == before


def test_one_missing_folder_above_the_output_is_made_and_named_and_goes_again_where_the_run_fails(
    llama_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    asked = {"recipe": "absmax", "samples": 2, "length": 16}
    with pytest.raises(CheckpointError, match=r"neither .*no.such nor the folder above it exists.*below "):
        slimlm.compress(llama_folder, tmp_path / "no" / "such" / "q", data=text_file, **asked)
    with pytest.raises(DataError, match="no text at"):
        slimlm.compress(llama_folder, tmp_path / "one" / "q", data=str(tmp_path / "none.txt"), **asked)
    assert not list(tmp_path.iterdir())
    told: list[str] = []
    slimlm.compress(llama_folder, tmp_path / "one" / "q", data=text_file, notify=told.append, **asked)
    assert f"{tmp_path / 'one'} does not exist yet and is made" in told and (tmp_path / "one" / "q" / "config.json").is_file()


def test_the_user_is_notified_where_threads_would_spin(
    monkeypatch: pytest.MonkeyPatch, llama_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    told: list[str] = []
    monkeypatch.setattr("slimlm.pipeline.spinning_on_a_busy_machine", lambda threads: "threads spin")
    asked = {"recipe": "absmax", "samples": 2, "length": 16}
    slimlm.compress(llama_folder, tmp_path / "o", data=text_file, notify=told.append, **asked)
    assert "threads spin" in told


def test_a_block_that_does_not_fit_is_refused_before_one_is_read(
    monkeypatch: pytest.MonkeyPatch, llama_folder: Path, tmp_path: Path, text_file: Path
) -> None:
    monkeypatch.setattr("slimlm.preflight.estimate.total_and_free", lambda: (100, 100))
    monkeypatch.setattr("slimlm.run.prepare.rehearse", lambda *_: pytest.fail("a block was read"))
    monkeypatch.setattr("slimlm.run.prepare.open_dense", lambda *_: pytest.fail("the whole model was read"))
    for options in ({}, {"bits": 4, "memory": 100}):
        with pytest.raises(DoesNotFitError, match="the memory does not suffice"):
            slimlm.compress(llama_folder, tmp_path / "o", data=str(text_file), **{**OPTIONS, "recipe": "gptq", **options})


@dataclasses.dataclass(frozen=True)
class _Feeling(Gptq):
    """A step that wants a statistic of gradients."""

    needs = frozenset({Fisher})


def test_a_step_that_needs_gradients_is_refused_at_the_start(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(open_recipe("gptq"), steps=(NamedStep("quantize", "gptq", _Feeling()),))
    with pytest.raises(RecipeError, match="needs Fisher, which is made of a loss's gradients"):
        slimlm.compress(llama_folder, tmp_path / "out", recipe=recipe, data=str(text_file), samples=2, length=16)
    assert not (tmp_path / "out").exists()
