"""Whatever way an opened model is saved, the folder opens, inspects and verifies, or nothing is touched."""

import filecmp
import json
import shutil
from pathlib import Path
from traceback import format_exception
from typing import Any

import pytest
import torch
import transformers.utils.hub
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import slimlm
from slimlm.core.errors import CheckpointError
from slimlm.record import Record
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage import checkpoint, replacing
from slimlm.storage.journal import INSIDE
from tests.conftest import Checkpoints, Line

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))
BY = {"load": slimlm.load, "transformers": AutoModelForCausalLM.from_pretrained}


@pytest.fixture(params=["llama", "llama-tied", "gpt2", "opt-projected", "qwen3-moe"])
def out(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    """Checkpoints with biases, a tied head, Conv1D, projections and experts, from bfloat16."""
    return checkpoints(request.param, torch.bfloat16).out


@pytest.fixture
def eight(llama_folder: Path, text_file: Path, tmp_path: Path) -> Path:
    """A checkpoint whose embedding and head are packed."""
    options: dict[str, Any] = {"recipe": "absmax", "data": str(text_file), "samples": 4, "length": 32}
    slimlm.compress(llama_folder, tmp_path / "eight", embedding_bits=8, **options)
    return tmp_path / "eight"


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    """A copy to write to."""
    return Path(shutil.copytree(packed, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache")))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sound(folder: Path) -> dict[str, Any]:
    """The record of a folder in which nothing is wrong, and in which nothing is left over."""
    assert slimlm.verify(folder).problems == ()
    assert not [path.name for path in folder.iterdir() if "partial" in path.name or path.name.endswith(".new")]
    record = record_of(folder)
    Record.from_dict(record)
    return record


def record_of(folder: Path) -> dict[str, Any]:
    """The record, with the names of other files and not their checksums: the keys of config.json may be in another order."""
    record = checkpoint.read_record(folder)
    return {**record, "beside": sorted(record["beside"])}


@pytest.mark.parametrize("by", BY)
def test_what_was_opened_is_saved_byte_for_byte(out: Path, by: str, tmp_path: Path) -> None:
    BY[by](out).save_pretrained(tmp_path / "new")
    names = {path.name for path in out.iterdir() if path.is_file()}
    assert {path.name for path in (tmp_path / "new").iterdir()} == names
    same = filecmp.cmpfiles(out, tmp_path / "new", names, shallow=False)[0]
    assert set(same) >= names - {checkpoint.RECORD, "config.json"}
    written, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "new", out))
    assert written == original
    assert sound(tmp_path / "new") == record_of(out)
    assert "edited" not in record_of(out) and slimlm.verify(tmp_path / "new").notes == slimlm.verify(out).notes
    for opened in BY.values():
        assert torch.equal(opened(tmp_path / "new")(IDS).logits, opened(out)(IDS).logits)


@pytest.mark.parametrize("by", BY)
def test_packed_embeddings_are_saved_too(eight: Path, by: str, tmp_path: Path) -> None:
    BY[by](eight).save_pretrained(tmp_path / "new")
    assert sound(tmp_path / "new") == record_of(eight)
    assert torch.equal(slimlm.load(tmp_path / "new")(IDS).logits, slimlm.load(eight)(IDS).logits)


def test_every_command_takes_the_folder(packed: Path, text_file: Path, tmp_path: Path, line: Line) -> None:
    slimlm.load(packed).save_pretrained(tmp_path / "new")
    for command in ("inspect", "verify"):
        assert line(command, tmp_path / "new")[0] == 0
    assert line("generate", tmp_path / "new", "--prompt", "a", "--max-new-tokens", 2)[0] == 0
    assert line("eval", tmp_path / "new", "--text", text_file, "--length", 16, "--tokens", 64)[0] == 0


def test_an_edited_model_is_saved_onto_its_own_folder_and_the_mapped_one_stays_as_it_is(copy: Path, line: Line) -> None:
    model, other = slimlm.load(copy), slimlm.load(copy)
    before = other(IDS).logits
    name = "model.layers.1.mlp.up_proj.bias"
    with torch.no_grad():
        model.get_parameter(name).add_(0.25)
        model.get_parameter("model.norm.weight").mul_(1 + 2**-20)
    expected = model(IDS).logits
    model.save_pretrained(copy)
    assert torch.equal(other(IDS).logits, before)
    assert torch.equal(model(IDS).logits, expected)
    assert sound(copy)["edited"] == sorted([name, "model.norm.weight"])
    assert f"edited changed after the run, which the figures are about: {name}, model.norm" in " ".join(
        line("inspect", copy)[1].split()
    )
    assert any(f"{name} and 1 more: changed and saved again" in note for note in slimlm.verify(copy).notes)
    # The changed norm is not one of float16, so all is computed in float32.
    assert json.loads((copy / "config.json").read_text())["dtype"] == "float32"
    again = slimlm.load(copy)
    assert torch.equal(again.get_parameter("model.norm.weight"), model.get_parameter("model.norm.weight"))
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-4)  # dense products in another order
    again.save_pretrained(copy)
    assert sound(copy)["edited"] == sorted([name, "model.norm.weight"])


def test_shards_of_an_earlier_checkpoint_are_replaced(copy: Path, packed: Path) -> None:
    slimlm.load(copy).save_pretrained(copy, max_shard_size=20_000)
    shards = sorted(path.name for path in copy.glob("*.safetensors"))
    assert len(shards) > 2 and (copy / checkpoint.INDEX).is_file() and "model.safetensors" not in shards
    sound(copy)
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(copy)(IDS).logits, AutoModelForCausalLM.from_pretrained(packed)(IDS).logits
    )
    slimlm.load(copy).save_pretrained(copy, max_shard_size="5GB")
    assert [path.name for path in copy.glob("model*")] == ["model.safetensors"]
    assert sound(copy) == record_of(packed)


def test_tensors_that_are_given_are_written_in_place_of_the_model_s_own(tmp_path: Path, checkpoints: Checkpoints) -> None:
    """As Trainer does, whose tied tensors may be two copies by then."""
    packed = checkpoints("llama-tied", torch.bfloat16).out
    model = slimlm.load(packed)
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= given.keys()
    given["model.norm.weight"] += 1
    model.save_pretrained(tmp_path / "new", state_dict=given, safe_serialization=True)
    assert sound(tmp_path / "new")["edited"] == ["model.norm.weight"]
    again = slimlm.load(tmp_path / "new")
    assert torch.equal(again.state_dict()["model.norm.weight"], given["model.norm.weight"])
    assert (tmp_path / "new" / "model.safetensors").stat().st_size == (packed / "model.safetensors").stat().st_size


def test_a_model_in_another_dtype_is_saved_in_it_and_a_wider_one_as_it_was_stored(tmp_path: Path, packed: Path) -> None:
    slimlm.load(packed, dtype="float64").save_pretrained(tmp_path / "wide")
    assert sound(tmp_path / "wide") == record_of(packed)
    slimlm.load(packed, dtype="bfloat16").save_pretrained(tmp_path / "other")
    assert "model.embed_tokens.weight" in sound(tmp_path / "other")["edited"]
    assert json.loads((tmp_path / "other" / "config.json").read_text())["dtype"] == "bfloat16"
    expected = slimlm.load(packed, dtype="bfloat16")(IDS).logits
    assert torch.equal(slimlm.load(tmp_path / "other", dtype="bfloat16")(IDS).logits, expected)


def test_a_layer_that_was_made_dense_again_is_saved_as_one(tmp_path: Path, packed: Path) -> None:
    model = slimlm.load(packed, dtype="float32")
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    assert isinstance(layer, CompressedLinear)
    dense = torch.nn.Linear(layer.in_features, layer.out_features)
    dense.weight.data, dense.bias = layer.parts().dense(), layer.bias
    model.set_submodule(name, dense)
    model.save_pretrained(tmp_path / "new")
    record = sound(tmp_path / "new")
    assert record["skipped"][name] == "replaced by a dense layer after the run"
    assert name not in {row["name"] for row in record["layers"]}
    again = slimlm.load(tmp_path / "new", dtype="float32")
    assert torch.equal(again.get_submodule(name).get_parameter("weight"), dense.weight)
    torch.testing.assert_close(again(IDS).logits, slimlm.load(packed, dtype="float32")(IDS).logits, rtol=1e-3, atol=1e-3)


def test_a_tokenizer_in_the_folder_stays_and_another_comes_from_the_original(copy: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "new")
    (tmp_path / "new" / "notes.txt").write_text("mine")
    model = slimlm.load(copy)
    model.save_pretrained(tmp_path / "new")
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "new").get_vocab()
    assert (tmp_path / "new" / "notes.txt").read_text() == "mine"
    assert "notes.txt" not in sound(tmp_path / "new")["beside"]
    shutil.rmtree(copy)
    model.save_pretrained(tmp_path / "without")
    sound(tmp_path / "without")
    assert not (tmp_path / "without" / "tokenizer.json").exists()


def test_an_upload_is_of_a_whole_checkpoint(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hub:
        def __init__(self) -> None:
            self.made: list[str] = []

        def create_repo(self, repo_id: str, **_: object) -> Any:
            self.made.append(repo_id)
            return type("Made", (), {"repo_id": repo_id})

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    uploaded: list[tuple[str, dict[str, Any]]] = []
    hub = Hub()
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: Card())
    monkeypatch.setattr(
        PreTrainedModel, "_upload_modified_files", lambda _, folder, name, **__: uploaded.append((name, sound(Path(folder))))
    )
    model = slimlm.load(packed)
    model.push_to_hub("me/tiny")
    model.save_pretrained(tmp_path / "new", push_to_hub=True, repo_id="me/other")
    assert uploaded == [(name, record_of(packed)) for name in ("me/tiny", "me/other")]
    with pytest.raises(CheckpointError, match="a LlamaModel cannot be saved"):
        AutoModel.from_pretrained(packed).push_to_hub("me/bare")
    assert hub.made == ["me/tiny", "me/other"]


def test_a_process_that_is_not_the_main_one_writes_nothing(packed: Path, tmp_path: Path) -> None:
    slimlm.load(packed).save_pretrained(tmp_path / "new", is_main_process=False)
    assert not (tmp_path / "new").exists()


def another_model(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"precious")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return {}


def unfinished_run(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    (folder / INSIDE).mkdir()
    return {}


def variant(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    return {"variant": "fp16"}


def pickles(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    return {"safe_serialization": False}


def another_format(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    return {"save_original_format": False}


def misspelt(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    return {"max_shard": "1GB"}


def lacking(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    return {"state_dict": {name: t for name, t in model.state_dict().items() if name != "model.norm.weight"}}


def unknown(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    return {"state_dict": {**model.state_dict(), "adapter.weight": torch.zeros(3)}}


def cast(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    return {"state_dict": {name: t.bfloat16() if t.is_floating_point() else t for name, t in model.state_dict().items()}}


def nan(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    model.get_parameter("model.norm.weight").data[3] = float("nan")
    return {}


def impossible(model: PreTrainedModel, folder: Path) -> dict[str, Any]:
    model.get_buffer("model.layers.0.mlp.up_proj.weight_scale").fill_(float("inf"))
    return {}


REFUSED = {
    another_model: "holds another model",
    unfinished_run: "holds an unfinished run",
    variant: "`variant='fp16'`",
    pickles: "`safe_serialization=False`",
    another_format: "`save_original_format=False`: a checkpoint has one format",
    misspelt: "`max_shard='1GB'`: save_pretrained has no such argument",
    lacking: "`state_dict` lacks 1 of the model's tensors, model.norm.weight among them",
    unknown: "`state_dict` holds adapter.weight, which LlamaForCausalLM has not",
    cast: r"packed as float\d\d .* packed tensors cannot be cast",
    nan: "model.norm.weight holds 1 values of 48 that are NaN",
    impossible: "model.layers.0.mlp.up_proj cannot be saved",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_saved_is_refused_and_nothing_is_touched(copy: Path, tmp_path: Path, spoil: Any) -> None:
    model = slimlm.load(copy)
    target = tmp_path / "target"
    shutil.copytree(copy, target)
    options = spoil(model, target)
    before = contents(target)
    with pytest.raises(CheckpointError, match=REFUSED[spoil]):
        model.save_pretrained(target, **options)
    assert contents(target) == before
    if spoil not in (another_model, unfinished_run):
        with pytest.raises(CheckpointError, match=REFUSED[spoil]):
            model.save_pretrained(tmp_path / "new", **options)
        assert not (tmp_path / "new").exists()
    assert not list(tmp_path.rglob(".slimlm.partial-*")) and not list(tmp_path.rglob(".new.partial-*"))


def test_what_is_no_path_is_refused_and_what_transformers_no_longer_reads_is_taken(packed: Path, tmp_path: Path) -> None:
    model = slimlm.load(packed)
    with pytest.raises(CheckpointError, match="`save_directory` is of type int"):
        model.save_pretrained(3)
    model.save_pretrained(tmp_path / "new", safe_serialization=True, save_function=torch.save)
    sound(tmp_path / "new")


def test_a_file_is_no_folder(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file is a file; give a folder"):
        slimlm.load(packed).save_pretrained(tmp_path / "file")


def test_a_model_of_another_class_or_without_a_record_is_not_saved(copy: Path, tmp_path: Path) -> None:
    for model in (AutoModel.from_pretrained(copy), slimlm.load(copy).base_model):
        with pytest.raises(CheckpointError, match=r"a LlamaModel cannot be saved: .* Open it with `slimlm\.load`"):
            model.save_pretrained(tmp_path / "new")
    (copy / checkpoint.RECORD).unlink()
    with pytest.raises(CheckpointError, match=r"without slimlm\.json"):
        AutoModelForCausalLM.from_pretrained(copy).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_refuses_leaves_the_folder_as_it_was(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, before = slimlm.load(copy, kernels="reference"), contents(copy)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_stream", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        model.save_pretrained(copy)
    assert contents(copy) == before


@pytest.mark.parametrize(("stop", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(5, "gone"), CheckpointError)])
@pytest.mark.parametrize("done", [0, 1])
def test_a_stop_between_two_renames_loses_nothing(
    copy: Path, monkeypatch: pytest.MonkeyPatch, stop: BaseException, raised: type[BaseException], done: int
) -> None:
    model, expected = slimlm.load(copy, kernels="reference"), record_of(copy)
    replace, moved = Path.replace, []

    def stopped(self: Path, target: Path) -> Path:
        if target.parent == copy:
            moved.append(target.name)
            if len(moved) > done:
                raise stop
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(raised) as caught:
        model.save_pretrained(copy)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"it has no slimlm\.json"):
        slimlm.load(copy)
    (kept,) = copy.glob(".slimlm.partial-*/whole")
    assert f"Nothing is lost: move the files that are still in {kept} to {copy}" in "".join(format_exception(caught.value))
    for file in kept.iterdir():
        file.replace(copy / file.name)
    shutil.rmtree(kept.parent)
    assert sound(copy) == expected


def test_what_is_left_of_a_stop_does_not_keep_the_model_from_being_saved_again(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, expected = slimlm.load(copy, kernels="reference"), record_of(copy)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(replacing, "_move", stop_now)
        model.save_pretrained(copy)
    model.save_pretrained(copy)
    assert slimlm.verify(copy).problems == () and record_of(copy) == expected


def stop_now(*_: object) -> None:
    raise KeyboardInterrupt


def test_tensors_that_no_class_has_a_place_for_are_copied(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    dense = Path(shutil.copytree(llama_folder, tmp_path / "dense"))
    tensors = {**load_file(dense / "model.safetensors"), "mtp.layers.0.weight": torch.ones(4, 4)}
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    slimlm.compress(dense, tmp_path / "out", recipe="absmax", data=str(text_file), samples=4, length=32)
    for by, opened in BY.items():
        opened(tmp_path / "out").save_pretrained(tmp_path / by)
        assert sound(tmp_path / by) == record_of(tmp_path / "out")
        assert torch.equal(load_file(tmp_path / by / "model.safetensors")["mtp.layers.0.weight"], torch.ones(4, 4))
    model = slimlm.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "out")
    assert "edited" not in sound(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"mtp\.layers\.0\.weight is a tensor that no class .* no longer holds it"):
        model.save_pretrained(tmp_path / "gone")
    assert not (tmp_path / "gone").exists()
