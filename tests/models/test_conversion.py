"""Tensors that transformers makes of several tensors of the files are made one at a time, whatever their dtypes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import slimlm
from slimlm.core.errors import DoesNotFitError, ModelError
from slimlm.models.dense import open_dense
from slimlm.models.lazy import open_lazy
from tests.conftest import ENDS, LLAMA_LIKE, save

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}


def hybrid() -> PreTrainedModel:
    """An OLMo-Hybrid: its files hold one tensor where its class has several."""
    torch.manual_seed(0)
    layers = {"layer_types": ["linear_attention", "full_attention"]}
    config = AutoConfig.for_model("olmo_hybrid", **LLAMA_LIKE, **ENDS, **LINEAR, **layers)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15)
    return model


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder with everything of one dimension in float32, in values that bfloat16 does not have."""
    folder = save(hybrid(), tmp_path_factory.mktemp("hybrid") / "m")
    tensors = {name: t.float() + 1e-6 if t.ndim == 1 else t for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_model_of_several_dtypes_is_read_block_by_block_and_whole(mixed: Path, tmp_path: Path) -> None:
    lazy = open_lazy(str(mixed), tmp_path / "scratch", pytest.fail)
    expected = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32).state_dict()
    assert lazy.weights.keys() == expected.keys()
    assert all(torch.equal(tensor.float(), expected[name]) for name, tensor in lazy.weights.items())
    files = load_file(mixed / "model.safetensors")
    assert set(lazy.dtypes.values()) == {torch.float32, torch.bfloat16}
    assert lazy.bytes == sum(tensor.nbytes for tensor in files.values())
    assert lazy.became.keys() == files.keys() and set().union(*lazy.became.values()) == lazy.weights.keys()
    dense = open_dense(str(mixed))
    assert dense.dtypes == lazy.dtypes
    assert all(torch.equal(tensor, expected[name]) for name, tensor in dense.model.state_dict().items())


def test_such_a_model_is_compressed_and_its_tensors_keep_their_dtypes(mixed: Path, tmp_path: Path, text_file: Path) -> None:
    record = slimlm.compress(mixed, tmp_path / "o", recipe="absmax", samples=4, length=16, data=str(text_file)).record
    after, files = load_file(tmp_path / "o" / "model.safetensors"), load_file(mixed / "model.safetensors")
    assert record.original_bytes == sum(tensor.nbytes for tensor in files.values())
    stayed = [name for name in after if name in files and name.endswith("norm.weight")]
    assert stayed and all(torch.equal(after[name], files[name]) and after[name].dtype == torch.float32 for name in stayed)
    assert slimlm.verify(tmp_path / "o").sound


def test_files_that_lack_a_part_are_refused(mixed: Path, tmp_path: Path) -> None:
    lazy = open_lazy(str(mixed), tmp_path / "scratch", pytest.fail)
    one = next(names for names in lazy.became.values() if len(names) > 1 or names[0] not in lazy.became)
    folder = save(hybrid(), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name, names in lazy.became.items() if names == one)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks|Some of them are missing|Download the model again"):
        open_lazy(str(folder), tmp_path / "other", pytest.fail)


def test_a_disk_too_small_for_converted_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(hybrid(), tmp_path / "m")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr("slimlm.models.files.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(DoesNotFitError, match=r"converted to a file of 0\.00 GB in .*scratch first"):
        open_lazy(str(folder), tmp_path / "scratch", pytest.fail)
    assert not (tmp_path / "scratch").exists()
