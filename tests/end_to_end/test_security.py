"""What others wrote is read as data: no code of theirs runs, no path of theirs leaves the folder, no size is believed."""

import json
import os
import pickle
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

import slimlm
from slimlm.core.errors import CheckpointError, DataError, ModelError
from slimlm.models.dense import open_dense
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.storage import checkpoint
from slimlm.storage.journal import Content, Journal
from slimlm.storage.mapping import map_file
from slimlm.storage.streams import is_plain_name
from tests.conftest import documents


def opened(folder: Path) -> LazyModel:
    return open_lazy(str(folder), folder / "converted", pytest.fail)


@pytest.fixture
def dense(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "dense"))


@pytest.fixture
def copy(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "copy"))


def configure(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_a_model_with_code_of_its_own_is_refused_with_what_was_found_and_what_works(dense: Path) -> None:
    configure(dense, model_type="mystery", auto_map={"AutoModelForCausalLM": "own.Model"})
    for opening in (opened, lambda folder: open_dense(str(folder))):
        with pytest.raises(ModelError, match=r"auto_map: AutoModelForCausalLM: own\.Model.*'mystery'.*What works: a model"):
            opening(dense)


def test_a_model_with_code_that_transformers_has_a_class_for_opens_by_that_class(dense: Path) -> None:
    configure(dense, auto_map={"AutoModelForCausalLM": "own.Model"})
    (dense / "own.py").write_text("raise SystemExit")
    assert type(opened(dense).model).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["somebody/kernel", {"": "somebody/kernel"}])
def test_an_implementation_from_the_hub_is_refused(dense: Path, copy: Path, key: str, value: Any) -> None:
    configure(dense, **{key: value})
    with pytest.raises(ModelError, match=f"says {key} = .*would fetch code"):
        opened(dense)
    configure(copy, **{key: value})
    with pytest.raises(slimlm.SlimlmError, match="would fetch code"):
        slimlm.load(copy)
    configure(dense, **{key: "eager"})
    configure(dense, text_config={key: value})
    if key == "attn_implementation":
        with pytest.raises(ModelError, match="would fetch code"):
            opened(dense)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"vocab_size": 2**40}, "asks for .* weights"),
        ({"hidden_size": 2**30, "head_dim": 4}, "asks for .* weights"),
        ({"head_dim": 2**33}, "asks for .* weights"),
    ],
)
def test_a_config_out_of_all_proportion_is_refused_before_anything_is_made(
    dense: Path, copy: Path, entries: dict[str, Any], words: str
) -> None:
    configure(dense, **entries)
    with pytest.raises(ModelError, match=words):
        opened(dense)
    configure(copy, **entries)
    with pytest.raises(slimlm.SlimlmError, match=words):
        slimlm.load(copy)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "c:x", "x\0.safetensors"])
def test_a_name_that_leads_out_of_a_folder_is_none(name: str, copy: Path, dense: Path, tmp_path: Path) -> None:
    assert not is_plain_name(name)
    record = json.loads((copy / "slimlm.json").read_text())
    record["files"] = {name: record["files"]["model.safetensors"]}
    (copy / "slimlm.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="outside the folder"):
        slimlm.load(copy)
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    # The single file would be read before the index.
    (dense / "model.safetensors").rename(dense / "other.safetensors")
    with pytest.raises(ModelError, match="outside the folder"):
        opened(dense)
    journal = Journal(tmp_path, Content(notes={"text": {"file": name, "sha256": "", "more": 1}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        journal.noted_tensor("text")


def test_a_plain_name_is_one() -> None:
    assert is_plain_name("model-00001-of-00002.safetensors") and is_plain_name("..x")


@pytest.mark.parametrize("length", [0, 10**6, 2**40, 2**64 - 1])
def test_a_header_longer_than_its_file_is_refused(copy: Path, length: int) -> None:
    file = copy / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        map_file(file)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        slimlm.load(copy)


def described(folder: Path, **changes: Any) -> None:
    about = json.loads((folder / "config.json").read_text())["quantization_config"]
    about["layers"]["model.layers.0.mlp.up_proj"] |= changes
    configure(folder, quantization_config=about)


FLOATS = {"kind": "plain", "dtype": "float16"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [2**30, 2**30]}, "weight_mask is .*; of these parts it is"),
        ({"shape": [88]}, "not two numbers"),
        ({"bias": 1}, "neither true nor false"),
        ({"base": None}, "has no base"),
        ({"base": "uniform"}, "a part is 'uniform', not an object with fields"),
        ({"base": {"kind": "mystery"}}, "unknown kind 'mystery'"),
        ({"base": {"kind": "base"}}, "unknown kind 'base'"),
        (
            {"base": {"kind": "uniform", "bits": 99, "group_size": "per-channel", "channel_scale": False}},
            "2 to 8 bits, not 99",
        ),
        ({"base": {"kind": "uniform", "bits": 4, "group": 32, "channel_scale": False}}, "group_size is None"),
        ({"base": {"kind": "plain", "dtype": "Tensor"}}, "dtype is 'Tensor'; it can be float16"),
        ({"base": {"kind": "pruned", "pattern": "2:4", "inner": {"kind": "pruned"}}}, "cannot have a mask"),
        ({"base": {"kind": "low_rank", "rank": 2**50}}, "rank is"),
        (
            {"base": {"kind": "low_rank", "rank": 2, "left": FLOATS, "right": FLOATS}},
            "its base is low_rank, which has no elements",
        ),
        ({"outliers": {"kind": "mystery"}}, "unknown kind 'mystery'"),
        ({"tensors": {"weight": ["uint8", [1]]}}, "its parts are stored in weight, weight_scale, weight_mask"),
        ({"tied_to": "model.embed_tokens"}, "which is no embedding here"),
    ],
)
def test_a_description_that_cannot_be_is_refused_by_load_inspect_and_verify(
    copy: Path, changes: dict[str, Any], words: str
) -> None:
    described(copy, **changes)
    with pytest.raises(CheckpointError, match=words):
        slimlm.load(copy)
    with pytest.raises(CheckpointError, match=f"'model.layers.0.mlp.up_proj' soundly: .*{words}"):
        slimlm.verify(copy)


@pytest.mark.parametrize("kind", ["layers", "embeddings"])
def test_layers_and_embeddings_that_have_no_names_are_refused(copy: Path, kind: str) -> None:
    described(copy, tied_to="model.embed_tokens")
    about = json.loads((copy / "config.json").read_text())["quantization_config"]
    configure(copy, quantization_config={**about, kind: []})
    for opening in (slimlm.load, slimlm.verify):
        with pytest.raises(CheckpointError, match=f"has no {kind} by name"):
            opening(copy)


def as_bin(folder: Path, *, zipped: bool) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "m.bin", _use_new_zipfile_serialization=zipped)
    (folder / "model.safetensors").unlink()
    return (folder / "m.bin").rename(folder / "pytorch_model.bin")


def test_a_bin_archive_that_unpacks_to_more_than_it_is_is_refused(dense: Path) -> None:
    path = as_bin(dense, zipped=True)
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in held.items():
            archive.writestr(name, data + bytes(10**6))
    with pytest.raises(ModelError, match="holds what torch does not write"):
        opened(dense)


@pytest.mark.parametrize("name", ["../../out", "/out"])
def test_a_bin_archive_with_a_path_out_of_it_is_refused(dense: Path, name: str) -> None:
    with zipfile.ZipFile(as_bin(dense, zipped=True), "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ModelError, match="outside of it"):
        opened(dense)


def test_an_old_bin_file_that_speaks_of_more_bytes_than_it_has_is_refused(dense: Path) -> None:
    path = as_bin(dense, zipped=False)
    content = path.read_bytes()
    # The vocabulary, 256 tokens, is said to be 2^30.
    assert pickle.BININT2 + b"\x00\x01" in content
    path.write_bytes(content.replace(pickle.BININT2 + b"\x00\x01", pickle.BININT + (2**30).to_bytes(4, "little")))
    with pytest.raises(ModelError, match=rf"holds what torch does not write \({2**30}\)"):
        opened(dense)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 no archive"])
def test_what_is_no_bin_file_is_refused(dense: Path, content: bytes) -> None:
    as_bin(dense, zipped=True).write_bytes(content)
    with pytest.raises(ModelError, match="damaged, or"):
        opened(dense)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_damaged_parquet_file_is_refused_in_words(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "t.parquet"
    table = pyarrow.table({"text": ["some text"] * 1000})
    pyarrow.parquet.write_table(table, path, use_dictionary=False, compression=compression)
    raw = bytearray(path.read_bytes())
    raw[4:200] = bytes(196)
    path.write_bytes(raw)
    with pytest.raises(DataError, match="is damaged at row 0"):
        list(documents(str(path), "calibration"))
    path.write_bytes(raw[:100])
    with pytest.raises(DataError, match="not a parquet file"):
        list(documents(str(path), "calibration"))


def test_a_parquet_column_that_is_no_text_is_refused_in_words(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, None]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r'none of its 2 rows has text; the first, .*row 0: its "text" is a number'):
        list(documents(str(tmp_path / "t.parquet"), "calibration"))


def test_json_that_is_nested_without_end_is_refused_in_words(tmp_path: Path, dense: Path, copy: Path) -> None:
    deep = "[" * 100_000
    (tmp_path / "t.jsonl").write_text(deep)
    with pytest.raises(DataError, match="line 1 is not JSON"):
        list(documents(str(tmp_path / "t.jsonl"), "calibration"))
    (dense / "config.json").write_text(deep)
    with pytest.raises(ModelError, match="is not JSON"):
        opened(dense)
    (copy / "slimlm.json").write_text(deep)
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read_record(copy)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_written_has_the_permissions_of_the_users_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with checkpoint.written_beside(tmp_path / "out") as folder:
            checkpoint.write_weights(folder, {"a": torch.zeros(3)})
            checkpoint.write_record(folder, {})
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
