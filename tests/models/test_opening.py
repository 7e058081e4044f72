"""What is no full, unquantized model is refused with a message that says what was found and what would work."""

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import slimlm
from slimlm.core.errors import ModelError
from slimlm.models.lazy import open_lazy
from slimlm.models.opening import _ONE_THREAD, loading_settings
from tests.conftest import random_model, save

QUICK: dict[str, Any] = {"recipe": "absmax", "samples": 2, "length": 16}


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama_folder, tmp_path / "m"))


def configure(folder: Path, **more: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def refused(folder: Path, words: str, text_file: Path) -> None:
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(ModelError, match=words):
        slimlm.compress(folder, folder.parent / "o", data=str(text_file), **QUICK)
    assert sorted(path.name for path in folder.parent.iterdir()) == before, "nothing is left behind"


def add_adapter(folder: Path) -> None:
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)},
        folder / "adapter_model.safetensors",
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"}))


def test_an_adapter_beside_a_full_model_is_refused(folder: Path, text_file: Path) -> None:
    add_adapter(folder)
    refused(folder, r"an adapter for some/base .* and the full model as well: .*merge_and_unload\(\)", text_file)


def test_an_adapter_alone_says_of_which_base_it_is(folder: Path, text_file: Path) -> None:
    add_adapter(folder)
    (folder / "model.safetensors").unlink()
    refused(folder, r"an adapter for some/base \(adapter_config\.json\) and no weights of a model\. Merge", text_file)
    (folder / "config.json").unlink()
    refused(folder, r"without config\.json: it holds an adapter for some/base and no model\. Merge", text_file)


def test_an_adapter_s_weights_beside_old_bin_files_are_not_taken_for_the_model(folder: Path, tmp_path: Path) -> None:
    expected = open_lazy(str(folder), tmp_path / "none", pytest.fail)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    add_adapter(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").unlink()
    found = open_lazy(str(folder), tmp_path / "converted", pytest.fail)
    assert all(torch.equal(tensor, expected.weights[name]) for name, tensor in found.weights.items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes"}},
            r"already quantized \(bitsandbytes\).* dequantize them first",
        ),
        ({"compression_config": {"format": "int-quantized"}}, r"already quantized \(compression_config: int-quantized\)"),
        (
            {"text_config": {"quantization_config": {"quant_method": "fp8"}}},
            r"\(fp8, by the quantization_config in text_config\)",
        ),
        ({"num_hidden_layers": 0}, r"LlamaForCausalLM has no blocks: the config says num_hidden_layers = 0"),
    ],
)
def test_a_config_of_what_cannot_be_compressed_is_refused(
    config: dict[str, Any], words: str, folder: Path, text_file: Path
) -> None:
    configure(folder, **config)
    refused(folder, words, text_file)


@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json", "quant_config.json"])
def test_a_file_that_says_that_the_weights_are_quantized_is_read(name: str, folder: Path, text_file: Path) -> None:
    (folder / name).write_text("{}")
    refused(folder, rf"already quantized \(it has a {name}\)", text_file)


def test_of_a_gguf_file_beside_a_config_its_own_path_is_asked_for(folder: Path, text_file: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")
    refused(folder, r"no safetensors file .*; of a GGUF file give its own path, model\.gguf", text_file)


def test_a_folder_whose_inner_folder_is_a_model_says_so(folder: Path, tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "run").mkdir()
    folder.rename(tmp_path / "run" / "checkpoint-5")
    refused(tmp_path / "run", r"there is one in its folder checkpoint-5: give ", text_file)


def test_weights_in_a_format_that_is_not_read_are_named(folder: Path, text_file: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.00.pth")
    refused(folder, r"no safetensors file .*; consolidated\.00\.pth is in a format that slimlm does not read", text_file)


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation"])
def test_an_attention_that_needs_a_package_is_not_used_and_not_written(
    key: str, folder: Path, tmp_path: Path, text_file: Path
) -> None:
    expected = slimlm.compress(folder, tmp_path / "p", data=str(text_file), **QUICK).path
    configure(folder, **{key: "flash_attention_2"})
    out = slimlm.compress(folder, tmp_path / "o", data=str(text_file), **QUICK).path
    ids = torch.arange(8)[None]
    plain = slimlm.load(expected, kernels="reference")(ids).logits
    assert torch.equal(slimlm.load(out, kernels="reference")(ids).logits, plain)
    assert key not in json.loads((out / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(out)


def test_a_tokenizer_with_code_of_its_own_is_named_with_its_class(folder: Path, text_file: Path) -> None:
    (folder / "tokenizer.json").unlink()
    about = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    refused(folder, r"Python code of its own \(tokenization_x\.X\), .* a tokenizer\.json in the folder", text_file)


@pytest.mark.parametrize("installed", [True, False])
def test_a_sentencepiece_model_says_what_reads_it(
    installed: bool, folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr("slimlm.models.opening._installed", lambda _: installed)
    words = r"transformers cannot read tokenizer\.model, although" if installed else r"pip install sentencepiece protobuf"
    refused(folder, words, text_file)


def test_a_dense_model_is_opened_whole_with_the_same_checks(tmp_path: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    add_adapter(folder)
    with pytest.raises(ModelError, match="and the full model as well"):
        slimlm.plan(folder, bits=4.0, recipe="best-24", data="stdlib", samples=2, length=16)


def test_threads_that_load_leave_the_process_s_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_ONE_THREAD, raising=False)
    shown = transformers_logging.is_progress_bar_enabled()
    done = threading.Event()

    def second() -> None:
        with loading_settings():
            done.set()

    thread = threading.Thread(target=second)
    with loading_settings(), loading_settings():
        thread.start()
        assert not done.wait(0.1), "the second waits for the first"
    thread.join()
    assert done.is_set() and _ONE_THREAD not in os.environ
    assert transformers_logging.is_progress_bar_enabled() == shown
