"""GGUF files: opened as transformers opens them, compressed, resumed and refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import slimlm
from slimlm.core.errors import ModelError, SlimlmError
from slimlm.models.dense import open_dense
from slimlm.models.gguf_config import config_of
from slimlm.models.gguf_header import READ, open_gguf
from slimlm.models.lazy import LazyModel, open_lazy
from tests.gguf_models import MODELS, QUANTIZED, SCALES, TEMPLATE, source_model, write

QUICK: dict[str, Any] = {"recipe": "absmax", "samples": 4, "length": 16}
IDS = torch.arange(8, 40)[None]
ALIKE = 1e-4
"""Of the largest logit: what the order of sums may change."""


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def deviation(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """The largest difference of logits over the largest logit."""
    ours, theirs = logits(model), logits(other)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def as_transformers_opens_it(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def opened(source: Path, scratch: Path) -> LazyModel:
    return open_lazy(str(source), scratch, lambda _: None)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_the_logits_are_those_of_the_file_opened_by_transformers(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", name, QUANTIZED)
    found = open_dense(str(path)).model
    assert deviation(found, as_transformers_opens_it(path)) <= ALIKE
    assert deviation(found, source_model(name)) > ALIKE, "quantization changes the logits"


@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_float32_is_the_model_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    assert deviation(open_dense(str(write(tmp_path / "m.gguf", name, ("F32",)))).model, source_model(name)) <= ALIKE


def test_what_a_header_may_leave_out_is_as_llama_cpp_takes_it(tmp_path: Path) -> None:
    llama = open_gguf(str(write(tmp_path / "m.gguf", "llama", ("F32",))))
    llama.metadata.pop("llama.attention.head_count_kv")
    assert config_of(llama)["num_key_value_heads"] == config_of(llama)["num_attention_heads"]
    llama.metadata["llama.rope.scale_linear"] = 4.0
    assert config_of(llama)["rope_parameters"]["rope_type"] == "linear"
    assert config_of(llama)["rope_parameters"]["factor"] == 4.0
    llama.metadata["llama.attention.head_count_kv"] = [1, 2]
    with pytest.raises(ModelError, match="differ in their heads"):
        config_of(llama)
    gemma = open_gguf(str(write(tmp_path / "g.gguf", "gemma2", ("F32",))))
    assert "query_pre_attn_scalar" not in config_of(gemma)
    gemma.metadata["gemma2.block_count"] = 46
    config = config_of(gemma)
    assert config["query_pre_attn_scalar"] == config["hidden_size"] // config["num_attention_heads"]


def test_all_types_are_dequantized_as_transformers_does_it(tmp_path: Path) -> None:
    kinds = (*QUANTIZED, *SCALES)
    assert set(READ) - set(kinds) == {"F32", "IQ1_M", "MXFP4"}, "each type is in a file here, or its reason is known"
    held: set[str] = set()
    for some in (kinds[:11], kinds[11:]):
        path = write(tmp_path / "m.gguf", "llama", some)
        held |= set(open_gguf(str(path)).weights_by_type)
        ours, theirs = (model.state_dict() for model in (open_dense(str(path)).model, as_transformers_opens_it(path)))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert held == {*kinds, "F32"}


def test_matrices_in_16_bits_stay_so_and_codes_become_float32(tmp_path: Path) -> None:
    lazy = opened(write(tmp_path / "m.gguf", "llama", ("F16", "BF16", "Q8_0")), tmp_path / "s")
    kinds = {name: text.split()[0] for name, text in lazy.listed.items()}
    wanted = {"F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32, "F32": torch.float32}
    for name, (own, *_) in lazy.became.items():
        assert lazy.dtypes[own] == wanted[kinds[name]], name
    assert lazy.config["dtype"] == "float16"


def test_tokenizer_and_chat_template_are_carried_over(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    ours, theirs = opened(path, tmp_path / "s").tokenizer, AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "alpha beta\n\nstone tatata é 12"
    assert ours is not None and ours(text).input_ids == theirs(text).input_ids
    assert ours.decode(ours(text).input_ids) == text
    assert ours.chat_template == TEMPLATE


@pytest.mark.parametrize("given", ["file", "folder", "pieces"])
def test_a_file_is_compressed_and_the_record_says_what_it_was(given: str, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "m").mkdir()
    path = write(tmp_path / "m" / "model.gguf", tensors_of_a_piece=9 if given == "pieces" else 0)
    told: list[str] = []
    source = path.parent if given == "folder" else path
    result = slimlm.compress(source, tmp_path / "o", data=str(text_file), notify=told.append, **QUICK)
    assert sum("already rounded" in text for text in told) == 1
    about = result.record.source
    assert about is not None and about.stored_as is not None
    assert about.stored_as == "GGUF, 852,480 weights in Q8_0, 1,280 weights in F32"
    assert result.record.original_bytes == 852_480 * 34 // 32 + 4 * 1280
    assert about.tensors["blk.0.attn_q.weight"] == "Q8_0 [256, 256]"
    assert about.became["blk.0.attn_q.weight"] == ("model.layers.0.self_attn.q_proj.weight",)
    pieces = sorted(path.name for path in path.parent.iterdir())
    assert about.files == dict.fromkeys(pieces, "read: its tensors are listed") and len(pieces) == (
        3 if given == "pieces" else 1
    )
    assert slimlm.verify(tmp_path / "o").problems == ()
    assert not [path for path in tmp_path.iterdir() if path.name not in ("m", "o", "o.log.jsonl")], "nothing else is left"
    found = slimlm.evaluate(tmp_path / "o", against=source, text=str(text_file), tokens=64, length=16)
    assert found.divergence is not None and found.models[1].bits_per_weight == 8.5
    assert AutoTokenizer.from_pretrained(tmp_path / "o").chat_template == TEMPLATE


def test_a_file_of_plain_weights_is_not_called_rounded(tmp_path: Path) -> None:
    told: list[str] = []
    assert open_lazy(str(write(tmp_path / "m.gguf", kinds=("F16",))), tmp_path / "s", told.append).stored_as is None
    assert told == []


def test_dequantized_weights_are_used_again_unless_the_file_has_changed(tmp_path: Path) -> None:
    path, name = write(tmp_path / "m.gguf"), "model.layers.0.mlp.up_proj.weight"
    before = opened(path, tmp_path / "s").weights[name].clone()
    made = tmp_path / "s" / "dequantized.safetensors"
    written = made.stat().st_mtime_ns
    assert torch.equal(opened(path, tmp_path / "s").weights[name], before)
    assert made.stat().st_mtime_ns == written
    write(path, kinds=("Q4_0",))
    assert not torch.equal(opened(path, tmp_path / "s").weights[name], before)


def test_a_plan_opens_the_whole_model(tmp_path: Path, text_file: Path) -> None:
    path = write(tmp_path / "m.gguf")
    plan, _ = slimlm.plan(path, bits=4.5, recipe="best-24", data=str(text_file), samples=4, length=16)
    assert plan.to_dict()["asked_bits"] == 4.5


# --- what is refused -------------------------------------------------------------------------------------------------


def add(key: str, value: str | int) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)


def other_architecture(path: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))


def other_type(path: Path) -> None:
    entry = next(tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.0.attn_q.weight").field
    raw = bytearray(path.read_bytes())
    place = entry.offset + sum(part.nbytes for part in entry.parts[:4])
    raw[place : place + 4] = (99).to_bytes(4, "little")
    path.write_bytes(raw)


def cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def big_endian(path: Path) -> None:
    path.write_bytes(b"GGUF\0\0\0\x03" + path.read_bytes()[8:])


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes and is no GGUF file"),
    "no GGUF": (lambda path: path.write_bytes(b"PK" * 99), "does not begin as a GGUF file does"),
    "truncated data": (cut(0.9), r"is truncated, or damaged: .* ends at byte \d+, and the file has \d+"),
    "truncated header": (cut(0.005), "is truncated, or damaged: its header goes on"),
    "big endian": (big_endian, "slimlm reads 2 and 3"),
    "architecture": (other_architecture, "the architecture is 'mamba'; of GGUF files slimlm reads llama, qwen2, qwen3, gemma2"),
    "type": (other_type, r"blk\.0\.attn_q\.weight .* is of a type that slimlm does not read \(number 99\); it reads F32, F16"),
    "two models": (lambda path: shutil.copy(path, path.with_name("other.gguf")), "holds 2 GGUF models: m.gguf, other.gguf"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_cannot_be_read_is_refused_before_anything_is_made(what: str, tmp_path: Path, text_file: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    change, words = REFUSED[what]
    change(write(folder / "m.gguf"))
    for call in (slimlm.compress, slimlm.estimate):
        with pytest.raises(ModelError, match=words):
            call(folder, tmp_path / "o", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "nothing is left behind"


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    first = write(tmp_path / "m.gguf", tensors_of_a_piece=9)
    second = tmp_path / "m-00002-of-00003.gguf"
    second.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"is one of 3 pieces, and m-00002-of-00003\.gguf is not beside it"):
        slimlm.compress(first, tmp_path / "o", **QUICK)
    shutil.copy(first, second)
    with pytest.raises(ModelError, match=r"says that it is piece 0 \(counted from 0\) of 3, and by its name it is 1 of 3"):
        slimlm.compress(first, tmp_path / "o", **QUICK)


def test_without_the_package_gguf_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match=r"pip install 'slimlm\[gguf\]'"):
        slimlm.compress(path, tmp_path / "o", **QUICK)


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor": ({"extra": {"blk.0.other.weight": np.zeros(3, np.float32)}}, r"blk\.0\.other\.weight has no place in LlamaFor"),
    "rotary factors": ({"extra": {"rope_freqs.weight": np.full(64, 3, np.float32)}}, "in another way than Llama 3.1"),
    "scaling": ({"change": add("llama.rope.scaling.type", "longrope")}, r"rope\.scaling\.type = longrope"),
    "tokenizer": ({"change": add("tokenizer.ggml.unknown_token_id", 10**6)}, "cannot make a tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGED)
def test_what_transformers_would_leave_out_is_refused(what: str, tmp_path: Path) -> None:
    options, words = CHANGED[what]
    path = write(tmp_path / "m.gguf", **options)
    with pytest.raises(ModelError, match=words):
        slimlm.compress(path, tmp_path / "o", **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"], "nothing is left behind"


def test_damaged_headers_are_read_or_refused_in_words(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    raw, draw = path.read_bytes(), np.random.default_rng(0)
    header = min(tensor.begin for tensor in open_gguf(str(path)).tensors.values())
    refused = 0
    for _ in range(200):
        damaged = bytearray(raw)
        for place in draw.integers(header, size=3):
            damaged[place] ^= 1 << draw.integers(8)
        path.write_bytes(damaged)
        try:
            open_gguf(str(path))
        except SlimlmError as error:
            refused += "damaged" in str(error) or "type" in str(error)
    assert refused > 20


def test_the_config_is_written_as_transformers_writes_it(tmp_path: Path) -> None:
    lazy = opened(write(tmp_path / "m.gguf", "llama3"), tmp_path / "s")
    config = json.loads((tmp_path / "s" / "gguf" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rope_parameters"]["rope_type"] == "llama3"
    assert lazy.unplaced.left_out == {"rope_freqs.weight": "the config says how rotary frequencies are scaled"}
