"""Tuning lowers the loss on text that is held back or gives the model as it was; what is not trained keeps every bit."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import slimlm
from slimlm.core import grid
from slimlm.core.errors import CheckpointError, DataError, RecipeError, SlimlmError
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.uniform import Uniform
from slimlm.events import Event
from slimlm.inference.load import read_description
from slimlm.record import Record
from slimlm.run.tune import Tuned
from slimlm.storage import checkpoint
from slimlm.storage.journal import Journal
from slimlm.tuning import loop
from tests.conftest import Checkpoints, Line, random_model, save

GPTQ: dict[str, Any] = {"name": "gptq-3", "steps": [{"quantize": "gptq", "bits": 3, "group_size": "per-channel"}]}
OPTIONS: dict[str, Any] = {"length": 32, "batch": 2, "notify": lambda _: None}


@dataclasses.dataclass(frozen=True)
class Example:
    """A compressed model, its original and a text."""

    out: Path
    dense: Path
    text: Path

    def tune(self, folder: Path, *, tokens: int = 4 * 64, **options: Any) -> Tuned:
        given = {"against": self.dense, **OPTIONS, **options}
        return slimlm.tune(self.out, folder, data=self.text, tokens=tokens, **given)


@pytest.fixture(scope="module")
def gptq(llama_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Example:
    """A tiny Llama at 3 bits."""
    out = tmp_path_factory.mktemp("gptq") / "out"
    slimlm.compress(llama_folder, out, recipe=GPTQ, data=text_file, samples=8, length=48, device="cpu", notify=lambda _: None)
    return Example(out, llama_folder, text_file)


@pytest.fixture(scope="module")
def slim(checkpoints: Checkpoints, text_file: Path) -> Example:
    """A tiny Llama with 2:4 sparsity, 4 bits and an adapter of 4 bits."""
    made = checkpoints()
    return Example(made.out, made.dense, text_file)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def changed(one: Path, other: Path) -> set[str]:
    """The last parts of the names of tensors that differ."""
    before, after = tensors_of(one), tensors_of(other)
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    return {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("method", ["end_to_end", "peqa", "slim_peft", "slim_peft_paper"])
@pytest.mark.parametrize("example", ["gptq", "slim"])
def test_tuning_lowers_the_loss_and_moves_nothing_else(
    method: str, example: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:  # law 27
    own: Example = request.getfixturevalue(example)
    if example == "gptq" and method.startswith("slim_peft"):
        with pytest.raises(RecipeError, match=r"trains adapters, and .* has none.* suit it: end_to_end, peqa$"):
            own.tune(tmp_path / "tuned", method=method)
        return
    rates = {"slim_peft_paper": 1e-3}
    tuned = own.tune(tmp_path / "tuned", method=method, tokens=8 * 64, rate=rates.get(method))
    done = tuned.tuning
    assert done.steps == 8 and done.tokens == 512 and done.after.loss < done.before.loss and done.best_step > 0
    assert slimlm.verify(tuned.path).sound
    moved = changed(own.out, tuned.path)
    adapter = {"adapter_left", "adapter_left_scale", "adapter_right", "adapter_right_scale"}
    expected = {
        "peqa": {"weight_scale", *(adapter & {"adapter_left_scale", "adapter_right_scale"} if example == "slim" else ())},
        "end_to_end": {"weight_scale", "weight", "bias", *(adapter if example == "slim" else ())},
    }.get(method, adapter)
    assert moved <= expected and moved & expected
    packed = {name for name in tensors_of(own.out) if name.endswith("_proj.weight")}
    before, after = tensors_of(own.out), tensors_of(tuned.path)
    assert packed and all(torch.equal(before[name], after[name]) for name in packed), "codes of the base do not move"


def test_the_kl_of_three_bits_falls_by_a_fifth_in_forty_small_steps(gptq: Example, tmp_path: Path) -> None:
    done = gptq.tune(tmp_path / "tuned", tokens=40 * 64, method="end_to_end", rate=0.02).tuning
    assert done.before.divergence is not None and done.after.divergence is not None
    assert done.after.divergence.mean.value < 0.8 * done.before.divergence.mean.value
    assert done.after.loss == done.after.divergence.mean.value


def test_the_reported_loss_is_what_the_written_folder_gives(gptq: Example, tmp_path: Path) -> None:  # law 26
    tuned = gptq.tune(tmp_path / "tuned", tokens=8 * 64, method="peqa")
    again = dataclasses.replace(gptq, out=tuned.path).tune(tmp_path / "again", tokens=8 * 64, method="peqa", rate=0.0)
    assert again.tuning.before.loss == pytest.approx(tuned.tuning.after.loss, rel=1e-6)
    assert len(again.record.tuning) == 2 and again.record.tuning[0] == tuned.tuning


@pytest.mark.parametrize("example", ["gptq", "slim"])
def test_a_rate_of_zero_gives_the_same_bytes(example: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:  # law 27
    own: Example = request.getfixturevalue(example)
    said: list[str] = []
    tuned = own.tune(tmp_path / "tuned", method="end_to_end", rate=0.0, notify=said.append)
    assert weights_of(tuned.path) == weights_of(own.out)
    assert any("no form was better than the given model" in words for words in said)
    assert tuned.tuning.best_step == 0 and tuned.tuning.after == tuned.tuning.before


def test_a_rate_that_is_far_too_large_gives_the_model_as_it_was_and_says_so(gptq: Example, tmp_path: Path) -> None:  # law 27
    said: list[str] = []
    tuned = gptq.tune(tmp_path / "tuned", method="end_to_end", rate=1e3, notify=said.append)
    assert weights_of(tuned.path) == weights_of(gptq.out)
    assert any("a smaller `rate`" in words or "NaN" in words for words in said)


def test_values_that_were_tuned_are_on_their_grids(slim: Example, tmp_path: Path) -> None:  # law 27
    tuned = slim.tune(tmp_path / "tuned", method="end_to_end", tokens=8 * 64)
    about, tensors = read_description(tuned.path), tensors_of(tuned.path)
    found = 0
    for name, entry in about.layers.items():
        own = {key: tensors[f"{name}.{key}"] for key in entry.tensors}
        assert not list(entry.parts.check(own, entry.shape))
        adapter = entry.parts.from_stored(own, entry.shape).adapter
        if isinstance(adapter, LowRank) and isinstance(adapter.left, Uniform):
            left = adapter.left
            codes = left.dense() / grid.spread(left.scale.float(), left.shape[1], left.group_size)
            assert torch.allclose(codes, codes.round(), atol=1e-4) and float(codes.abs().max()) <= 2 ** (left.bits - 1)
            found += 1
    assert found


class KilledError(BaseException):
    """In the place of SIGKILL: nothing that stops a run in order catches it."""


@pytest.mark.parametrize(("method", "example"), [("end_to_end", "slim"), ("slim_peft", "slim"), ("peqa", "gptq")])
def test_a_run_that_is_killed_at_any_step_and_typed_again_gives_the_same_bytes(
    method: str, example: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: Example = request.getfixturevalue(example)
    unbroken = own.tune(tmp_path / "unbroken", method=method, tokens=6 * 64)
    monkeypatch.setattr(loop, "_BETWEEN_COMMITS", 0.0)
    commit, calls = Journal.commit_steps, 0

    def killing(self: Journal, steps: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 5, 9):
            raise KilledError
        commit(self, steps, tensors)
        if calls in (3, 8, 12):
            raise KilledError

    monkeypatch.setattr(Journal, "commit_steps", killing)
    kills = 0
    while True:
        try:
            broken = own.tune(tmp_path / "broken", method=method, tokens=6 * 64)
            break
        except KilledError:
            kills += 1
    assert kills == 6
    assert weights_of(broken.path) == weights_of(unbroken.path)
    assert same_results(broken) == same_results(unbroken)
    assert not (tmp_path / "broken.partial").exists()


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_run_that_is_stopped_keeps_its_last_step(
    gptq: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    unbroken = gptq.tune(tmp_path / "unbroken", tokens=6 * 64)

    def stop(event: Event) -> None:
        if event.stage == "tune" and event.done == step:
            raise KeyboardInterrupt

    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        gptq.tune(tmp_path / "broken", tokens=6 * 64, progress=stop, notify=said.append)
    assert f"{step} finished steps are kept" in said[-1]
    seen: list[int] = []
    broken = gptq.tune(
        tmp_path / "broken", tokens=6 * 64, progress=lambda e: seen.append(e.done) if e.stage == "tune" else None
    )
    assert seen == list(range(step, 7)), "no step is made again"
    assert weights_of(broken.path) == weights_of(unbroken.path)


def same_results(tuned: Tuned) -> Record:
    return dataclasses.replace(
        tuned.record, tuning=tuple(dataclasses.replace(t, seconds=0.0, peak_memory=None) for t in tuned.record.tuning)
    )


def test_blocks_and_activations_in_files_give_the_same_bytes(gptq: Example, tmp_path: Path) -> None:  # law 28
    one, other = gptq.tune(tmp_path / "one"), gptq.tune(tmp_path / "other", memory=1)
    assert weights_of(one.path) == weights_of(other.path)


def test_another_call_is_refused_while_a_run_is_unfinished(gptq: Example, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "tune" and event.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptq.tune(tmp_path / "tuned", progress=stop)
    with pytest.raises(CheckpointError, match=r"with 1 finished steps; what differs: seed was 0 and is 1"):
        gptq.tune(tmp_path / "tuned", seed=1)
    with pytest.raises(CheckpointError, match=r"data was \S+ and is"):
        dataclasses.replace(gptq, text=gptq.out / "config.json").tune(tmp_path / "tuned")
    assert gptq.tune(tmp_path / "tuned", seed=1, restart=True).tuning.settings["seed"] == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens": 63}, r"`tokens=63` do not suffice for one step, which takes 2 windows of 32 tokens, 64 in all"),
        ({"length": 4096}, r"`length=4096` is more than the model's context of \d+ tokens"),
        ({"method": "peqq"}, "no method of tuning is called 'peqq'; did you mean 'peqa'"),
        ({"against": None}, "none is named; give it as `against`"),
        ({"rate": -1}, "`rate=-1`: give a rate of at least 0"),
        ({"batch": 0}, "`batch=0`: give a whole number of at least 1"),
        ({"data": "self"}, "`data` names the text to tune on"),
        ({"data": []}, "`data` is empty"),
        ({"memory": "lots"}, "`memory='lots'`"),
    ],
)
def test_what_makes_no_sense_is_refused_and_leaves_nothing(
    gptq: Example, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    given = {"data": gptq.text, "tokens": 256, "against": gptq.dense, **OPTIONS, **options}
    with pytest.raises(SlimlmError, match=words):
        slimlm.tune(gptq.out, tmp_path / "tuned", **given)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_occupied_or_no_checkpoint_is_refused(gptq: Example, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already holds something"):
        gptq.tune(tmp_path)
    with pytest.raises(CheckpointError, match="is not a slimlm checkpoint"):
        dataclasses.replace(gptq, out=gptq.dense).tune(tmp_path / "tuned")
    with pytest.raises(CheckpointError, match="lies inside the model's folder"):
        gptq.tune(gptq.out / "tuned")


def test_another_vocabulary_or_tokenizer_is_refused(gptq: Example, tmp_path: Path) -> None:
    other = random_model("llama", torch.float16)
    other.resize_token_embeddings(other.config.vocab_size + 8)
    folder = save(other, tmp_path / "other")
    with pytest.raises(DataError, match=r"predicts \d+ tokens and `against=.*` \d+"):
        dataclasses.replace(gptq, dense=folder).tune(tmp_path / "tuned")
    shutil.copytree(gptq.dense, tmp_path / "dense")
    file = tmp_path / "dense" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="cuts text into other tokens"):
        dataclasses.replace(gptq, dense=tmp_path / "dense").tune(tmp_path / "tuned")


def test_the_command_line_tunes_and_prints_what_it_did(line: Line, gptq: Example, tmp_path: Path) -> None:
    typed = ("tune", gptq.out, "--data", gptq.text, "--against", gptq.dense, "--method", "peqa")
    small = ("--length", 32, "--batch", 2, "--quiet")
    status, out, err = line(*typed, "--out", tmp_path / "one", "--tokens", 256, *small)
    assert status == 0 and "written and verified" in out and "KL to the original" in out, err
    status, out, _ = line(*typed, "--out", tmp_path / "two", "--tokens", 256, *small, "--json")
    assert status == 0 and json.loads(out)["tuning"][0]["method"] == "peqa"
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    said = line.refused(*typed, "--out", tmp_path / "three", "--tokens", 63, *small)
    assert "--tokens 63 do not suffice for one step" in said and "a smaller --batch or --length" in said


def test_a_tuned_folder_opens_and_says_that_it_was_tuned(gptq: Example, tmp_path: Path) -> None:
    tuned = gptq.tune(tmp_path / "tuned", method="peqa")
    assert "peqa" in repr(tuned) and str(tuned.path) in repr(tuned)
    found = slimlm.verify(tuned.path)
    assert any("tuned after the run by peqa, on 256 tokens" in note for note in found.notes)
    model = slimlm.load(tuned.path, kernels="reference")
    assert bool(model(torch.arange(8)[None]).logits.isfinite().all())
    assert "tuning" not in checkpoint.read_record(gptq.out)


def test_several_texts_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    data = {str(tmp_path / "a.txt"): 0.5, str(tmp_path / "b.txt"): 0.5}
    with pytest.raises(DataError, match="tuning takes one"):
        slimlm.tune(tmp_path / "none", tmp_path / "out", data=data, tokens=100)
