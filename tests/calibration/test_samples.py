"""The calibration samples of several texts, and of conversations."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import slimlm
from slimlm import pipeline
from slimlm.calibration.samples import Calibration, Drawn, draw_samples, sources_of
from slimlm.core.errors import CheckpointError, DataError
from slimlm.data.mixture import Data, Mixture
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.storage import checkpoint
from tests.conftest import byte_tokenizer, random_model, save

LENGTH = 32
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of 200 windows each, every one of a single character: "a", "b" or "c"."""
    folder = tmp_path_factory.mktemp("texts")
    for name in "abc":
        (folder / f"{name}.txt").write_text("".join(name + chr(ord("A") + i % 26) + str(i) for i in range(2000)))
    return {name: str(folder / f"{name}.txt") for name in "abc"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> LazyModel:
    folder = save(random_model("llama"), tmp_path_factory.mktemp("model") / "m")
    return open_lazy(str(folder), folder / "none", pytest.fail)


def drawn(dense: LazyModel, data: Data, samples: int, seed: int = 0) -> Drawn:
    return draw_samples(dense, Calibration(data, samples, LENGTH, seed), pytest.fail)


def source_of(windows: Tensor) -> list[str]:
    """The letter of the text that each window `[count, length]` is from."""
    texts = byte_tokenizer().batch_decode(windows)
    return ["".join({letter for letter in text if letter in "abc"}) for text in texts]


def test_a_mixture_s_samples_are_those_that_each_source_gives_alone_in_turn(dense: LazyModel, texts: dict[str, str]) -> None:
    # Law 32.
    mixture = Mixture.of({texts["a"]: 0.7, texts["b"]: 0.3})
    found = drawn(dense, mixture, 20)
    letters = source_of(found.samples)
    assert letters[:10] == [*"abaaabaaba"]
    for name, count in (("a", 14), ("b", 6)):
        alone = drawn(dense, texts[name], count)
        rows = [i for i, letter in enumerate(letters) if letter == name]
        assert torch.equal(found.samples[rows], alone.samples)


def test_the_same_seed_gives_the_same_samples_another_seed_others_and_the_order_of_the_sources_no_others(
    dense: LazyModel, texts: dict[str, str]
) -> None:
    mixture = Mixture.of({texts["a"]: 0.5, texts["b"]: 0.5})
    one = drawn(dense, mixture, 12).samples
    assert torch.equal(one, drawn(dense, mixture, 12).samples)
    assert not torch.equal(one, drawn(dense, mixture, 12, seed=1).samples)
    turned = drawn(dense, Mixture.of({texts["b"]: 0.5, texts["a"]: 0.5}), 12).samples
    assert sorted(one.tolist()) == sorted(turned.tolist())


def test_a_source_alone_and_with_the_share_one_is_the_same(dense: LazyModel, texts: dict[str, str]) -> None:
    plain, whole = drawn(dense, texts["a"], 9), drawn(dense, Mixture.of({texts["a"]: 1.0}), 9)
    assert torch.equal(plain.samples, whole.samples)
    assert plain.held_back is not None and whole.held_back is not None and torch.equal(plain.held_back, whole.held_back)


def test_windows_of_every_source_are_held_back_and_none_of_them_is_a_sample(dense: LazyModel, texts: dict[str, str]) -> None:
    found = drawn(dense, Mixture.of({texts["a"]: 0.8, texts["b"]: 0.15, texts["c"]: 0.05}), 40)
    assert found.held_back is not None
    letters = source_of(found.held_back)
    # 64 windows of 32 tokens are 2,048; of c no more are left of the 16 that were read.
    assert (letters.count("a"), letters.count("b"), letters.count("c")) == (51, 10, 3)
    assert not {tuple(row) for row in found.samples.tolist()} & {tuple(row) for row in found.held_back.tolist()}


def test_a_source_that_is_used_up_is_named_and_the_others_are_held_back(
    dense: LazyModel, texts: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("b" * (3 * LENGTH))
    told: list[str] = []
    wanted = Calibration(Mixture.of({texts["a"]: 0.7, str(tmp_path / "few.txt"): 0.3}), 10, LENGTH)
    found = draw_samples(dense, wanted, told.append)
    assert found.held_back is not None and set(source_of(found.held_back)) == {"a"}
    assert len(told) == 1 and "few.txt is held back; the comparison at the end is on the rest" in told[0]


def test_a_source_with_too_little_text_says_how_many_samples_it_has_and_how_many_are_asked(
    dense: LazyModel, texts: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("b" * (4 * LENGTH))
    mixture = Mixture.of({texts["a"]: 0.7, str(tmp_path / "few.txt"): 0.3})
    said = r"few\.txt gives 4 samples of 32 tokens, and its share of 0\.3 of 20 samples is 6; give .*, or at most 15 `samples`"
    with pytest.raises(DataError, match=said):
        drawn(dense, mixture, 20)
    assert len(draw_samples(dense, Calibration(mixture, 15, LENGTH), [].append).samples) == 15


def test_samples_too_few_for_a_share_are_refused_before_any_text_is_read(
    dense: LazyModel, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimlm.calibration.samples.draw_samples", lambda *_: pytest.fail("text was read"))
    monkeypatch.setattr("slimlm.run.prepare.rehearse", lambda *_: pytest.fail("the model was run"))
    options: dict[str, Any] = {"data": {texts["a"]: 0.95, texts["b"]: 0.05}, "samples": 8, "length": LENGTH, "recipe": "absmax"}
    said = r"`samples=8`: the share of .*b\.txt \(0\.05\) is less than one sample; give at least 20 samples"
    with pytest.raises(DataError, match=said):
        slimlm.compress(dense.source, tmp_path / "o", **options)
    with pytest.raises(DataError, match=said):
        slimlm.estimate(dense.source, **options)
    assert not (tmp_path / "o").exists()


def test_record_and_log_name_every_source_with_share_samples_and_checksum(
    dense: LazyModel, texts: dict[str, str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"recipe": "absmax", "samples": 10, "length": LENGTH}
    data = {texts["a"]: 0.7, texts["b"]: 0.3}
    record = slimlm.compress(dense.source, tmp_path / "o", data=data, **options).record
    own = drawn(dense, Mixture.of(data), 10).samples[[1, 5, 8]]
    found = record.calibration
    assert (found["data"], found["chat"]) == ("a.txt (0.7), b.txt (0.3)", "auto")
    assert [(source["data"], source["share"], source["samples"]) for source in found["sources"]] == [
        ("a.txt", 0.7, 7),
        ("b.txt", 0.3, 3),
    ]
    assert found["sources"][1]["sha256"] == hashlib.sha256(own.numpy().tobytes()).hexdigest()
    header = json.loads((tmp_path / "o.log.jsonl").read_text().splitlines()[0])
    assert header["calibration"] == found == checkpoint.read_record(tmp_path / "o")["calibration"]
    alone = slimlm.compress(dense.source, tmp_path / "alone", data=texts["a"], **options).record.calibration
    assert [(source["data"], source["share"], source["samples"]) for source in alone["sources"]] == [("a.txt", 1.0, 10)]


def test_the_sources_of_a_text_that_gives_fewer_samples_are_those_that_it_gives() -> None:
    samples = torch.arange(6).view(3, 2)
    (source,) = sources_of(samples, Calibration("stdlib", 5, 2))
    assert (source["samples"], source["sha256"]) == (3, hashlib.sha256(samples.numpy().tobytes()).hexdigest())


def test_a_run_is_resumed_with_the_same_sources_and_shares_only_and_a_changed_one_is_named(
    dense: LazyModel, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.txt").write_text(Path(texts["b"]).read_text())
    options: dict[str, Any] = {"recipe": "absmax", "samples": 10, "length": LENGTH}
    data = {texts["a"]: 0.7, tmp_path / "d.txt": 0.3}
    monkeypatch.setattr(pipeline, "verify_written", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        slimlm.compress(dense.source, tmp_path / "o", data=data, **options)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"calibration\.data\[0\]\[1\] was 0\.7 and is 0\.5"):
        slimlm.compress(dense.source, tmp_path / "o", data={texts["a"]: 0.5, tmp_path / "d.txt": 0.5}, **options)
    with pytest.raises(CheckpointError, match=r'calibration\.chat was "auto" and is "no"'):
        slimlm.compress(dense.source, tmp_path / "o", data=data, chat="no", **options)
    (tmp_path / "d.txt").write_text(Path(texts["c"]).read_text())
    with pytest.raises(CheckpointError, match=r"text: [^ ]*d\.txt has changed since, or the tokenizer has"):
        slimlm.compress(dense.source, tmp_path / "o", data=data, **options)
    (tmp_path / "d.txt").write_text(Path(texts["b"]).read_text())
    told: list[str] = []
    resumed = slimlm.compress(dense.source, tmp_path / "o", data=data, notify=told.append, **options).record
    assert any("resuming after block" in note for note in told)
    assert resumed.layers == slimlm.compress(dense.source, tmp_path / "p", data=data, **options).record.layers


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> LazyModel:
    """A model whose tokenizer has a chat template."""
    folder = save(random_model("llama"), tmp_path_factory.mktemp("chatty") / "m")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return open_lazy(str(folder), folder / "none", pytest.fail)


def test_a_note_says_that_the_model_has_a_chat_template_where_no_text_holds_conversations(
    chatty: LazyModel, texts: dict[str, str], tmp_path: Path
) -> None:
    chats = tmp_path / "chats.jsonl"
    chats.write_text(100 * (json.dumps({"prompt": "what?", "completion": "that."}) + "\n"))

    def notes(data: Data, chat: Any = "auto") -> list[str]:
        told: list[str] = []
        draw_samples(chatty, Calibration(data, 4, LENGTH, chat=chat), told.append)
        return [note for note in told if "has a chat template" in note]

    assert len(notes(texts["a"])) == 1 and "`messages`" in notes(texts["a"])[0]
    assert notes(texts["a"], "no") == notes(texts["a"], "yes") == []
    assert notes(str(chats)) == notes(Mixture.of({texts["a"]: 0.5, str(chats): 0.5})) == []


def test_a_chat_template_that_is_asked_for_and_missing_is_refused_before_anything_runs(
    dense: LazyModel, texts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slimlm.run.prepare.rehearse", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(DataError, match='`chat="yes"`: the model\'s tokenizer has no chat template'):
        slimlm.compress(dense.source, tmp_path / "o", data=texts["a"], chat="yes", recipe="absmax")
    with pytest.raises(DataError, match='`chat="yes"`: the model\'s tokenizer has no chat template'):
        slimlm.estimate(dense.source, data=texts["a"], chat="yes", recipe="absmax")
    with pytest.raises(DataError, match='`chat="no"` says how text is read, and with `data="self"` the model writes it'):
        slimlm.estimate(dense.source, data="self", chat="no")
    assert not (tmp_path / "o").exists()
