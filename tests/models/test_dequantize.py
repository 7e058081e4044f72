"""Models whose files hold codes: opened, compressed, resumed and refused, against the dense model of the same weights.

The folders are written here by the published layouts: the programs that write most of them need a GPU.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import slimlm
from benchmarks.tiny_models import FAMILIES, model_of, randomized
from slimlm.core.errors import ModelError, SlimlmError
from slimlm.models.codes import Codes
from slimlm.models.dense import open_dense
from slimlm.models.dequantize import READERS
from slimlm.models.lazy import LazyModel, open_lazy
from tests.conftest import random_model, save
from tests.models.test_codes import stream

Tensors = dict[str, Tensor]
Written = tuple[dict[str, Any], Tensors]
QUICK: dict[str, Any] = {"recipe": "absmax", "samples": 4, "length": 16}
LINEAR = "_proj.weight"


def as_fp8(tensors: Tensors) -> Written:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(LINEAR):
            out[name] = tensor
            continue
        rows, columns = tensor.shape
        grid = torch.rand(-(-rows // 32), -(-columns // 32), generator=torch.Generator().manual_seed(0)) / 64 + 1 / 64
        wide = grid.repeat_interleave(32, 0)[:rows].repeat_interleave(32, 1)[:, :columns]
        out[name] = (tensor.float() / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        out[f"{name}_scale_inv"] = grid
    return {"quant_method": "fp8", "weight_block_size": [32, 32]}, out


def by_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in float8 and a scale for each row `[out, 1]`, as FBGEMM quantizes."""
    scale = tensor.float().abs().amax(1, keepdim=True) / 448
    return (tensor.float() / scale).to(torch.float8_e4m3fn), scale


def as_fbgemm(tensors: Tensors) -> Written:
    out: Tensors = {}
    for name, tensor in tensors.items():
        # FBGEMM's layers leave out the first and the last block's, which the config names.
        if not name.endswith(LINEAR) or ".layers.0." in name:
            out[name] = tensor
            continue
        out[name], out[f"{name}_scale"] = by_rows(tensor)
        out[f"{name.removesuffix('weight')}input_scale_ub"] = torch.full((1,), 1200.0)
    return {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["model.layers.0"]}, out


def as_mixture(tensors: Tensors) -> Written:
    about, out = as_packed({name: tensor for name, tensor in tensors.items() if "self_attn" in name or LINEAR not in name})
    groups = {"attention": {**about["config_groups"]["group_0"], "targets": ["re:.*self_attn.*"], "format": "pack-quantized"}}
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups["mlp"] = {"targets": ["re:.*mlp.*"], "weights": weights, "format": "float-quantized"}
    for name in (name for name in tensors if name.endswith(LINEAR) and ".mlp." in name):
        out[name], out[f"{name}_scale"] = by_rows(tensors[name])
    return {**about, "format": "mixed-precision", "config_groups": groups}, out


def grid_of(tensor: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes 0 to 15 `[out, in]` and scales `[out, groups]`, zero point 8."""
    scales = (tensor.float().unflatten(1, (-1, size)).abs().amax(2) / 7).half()
    codes = (tensor.float() / scales.float().repeat_interleave(size, 1)).round().add(8).clamp(0, 15).long()
    return codes, scales


def as_gptq(tensors: Tensors) -> Written:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(LINEAR):
            out[name] = tensor
            continue
        layer, (codes, scales) = name.removesuffix(".weight"), grid_of(tensor, 8)
        out |= {
            f"{layer}.qweight": stream(codes, 4).T,
            f"{layer}.qzeros": stream(torch.full((scales.shape[1], len(scales)), 7), 4),
            f"{layer}.scales": scales.T,
            f"{layer}.g_idx": torch.arange(tensor.shape[1]).int() // 8,
        }
    return {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True, "desc_act": False}, out


def as_awq(tensors: Tensors) -> Written:
    def packed(values: Tensor) -> Tensor:
        return stream(values.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].flatten(1), 4)

    out: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(LINEAR):
            out[name] = tensor
            continue
        layer, (codes, scales) = name.removesuffix(".weight"), grid_of(tensor, 8)
        out |= {
            f"{layer}.qweight": packed(codes.T),
            f"{layer}.qzeros": packed(torch.full((scales.shape[1], len(scales)), 8)),
            f"{layer}.scales": scales.T,
        }
    return {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}, out


def as_packed(tensors: Tensors) -> Written:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(LINEAR):
            out[name] = tensor
            continue
        codes, scales = grid_of(tensor, 8)
        out |= {f"{name}_packed": stream(codes, 4), f"{name}_scale": scales, f"{name}_shape": torch.tensor(tensor.shape)}
        out[f"{name.removesuffix('weight')}input_scale"] = torch.ones(1)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "ignore": []}, out


def as_mxfp4(tensors: Tensors) -> Written:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[name] = tensor
            continue
        experts, inputs, rows = tensor.shape
        draw = torch.Generator().manual_seed(0)
        out[f"{name}_blocks"] = torch.randint(256, (experts, rows, inputs // 32, 16), generator=draw, dtype=torch.uint8)
        out[f"{name}_scales"] = torch.randint(120, 124, (experts, rows, inputs // 32), generator=draw, dtype=torch.uint8)
    return {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens"]}, out


WRITERS: dict[str, Callable[[Tensors], Written]] = {
    "fp8": as_fp8, "fbgemm": as_fbgemm, "gptq": as_gptq, "awq": as_awq, "compressed-tensors": as_packed, "mixture": as_mixture,
    "mxfp4": as_mxfp4,
}  # fmt: skip


def coded(kind: str, folder: Path) -> Path:
    """A tiny model whose files hold codes."""
    if kind == "mxfp4":
        torch.manual_seed(0)
        family, config = FAMILIES["gpt-oss"]
        model = randomized(model_of((family, {**config, "hidden_size": 64, "intermediate_size": 32}))).half()
    else:
        model = random_model("llama", torch.float16)
    save(model, folder)
    about, tensors = WRITERS[kind](load_file(folder / "model.safetensors"))
    rewrite(folder, lambda _: tensors, about)
    return folder


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], about: dict[str, Any] | None = None) -> None:
    tensors = {name: t.clone().contiguous() for name, t in change(load_file(folder / "model.safetensors")).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if about is not None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": about}))


def dense_of(folder: Path, out: Path) -> Path:
    """The dense model of the weights that the codes of a folder stand for."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    about = config.pop("quantization_config")
    codes = Codes("m", about, tensors)
    codes.pass_over_others()
    weights = READERS[about["quant_method"]](codes).weights
    used = {name for weight in weights.values() for name in weight.of} | set(codes.passed_over)
    plain = {name: tensor for name, tensor in tensors.items() if name not in used}
    plain |= {name: torch.cat(list(weight.make())).half().contiguous() for name, weight in weights.items()}
    out.mkdir()
    save_file(plain, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def opened(folder: Path, scratch: Path) -> LazyModel:
    return open_lazy(str(folder), scratch, lambda _: None)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_logits_are_those_of_the_dense_model_of_the_dequantized_weights(kind: str, tmp_path: Path) -> None:
    folder = coded(kind, tmp_path / "m")
    expected = AutoModelForCausalLM.from_pretrained(dense_of(folder, tmp_path / "d"), dtype=torch.float32)
    ids = torch.arange(8)[None]
    found = open_dense(str(folder)).model
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_model_of_codes_is_compressed_as_the_dense_one_and_says_what_it_was(
    kind: str, tmp_path: Path, text_file: Path
) -> None:
    folder = coded(kind, tmp_path / "m")
    (folder / "quantize_config.json").write_text("{}")
    told: list[str] = []
    record = slimlm.compress(folder, tmp_path / "o", data=str(text_file), notify=told.append, **QUICK).record
    assert record.source is not None and record.source.stored_as is not None
    assert sum("already rounded" in text for text in told) == 1
    tokens = [path for path in folder.iterdir() if path.name.startswith("tokenizer")]
    dense = dense_of(folder, tmp_path / "d")
    for path in tokens:
        (dense / path.name).write_bytes(path.read_bytes())
    slimlm.compress(dense, tmp_path / "p", data=str(text_file), **QUICK)
    ours, theirs = (load_file(tmp_path / out / "model.safetensors") for out in ("o", "p"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert slimlm.verify(tmp_path / "o").problems == ()
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "slimlm"
    assert not (tmp_path / "o" / "quantize_config.json").exists()


def test_scales_of_activations_are_left_out_with_the_reason(tmp_path: Path) -> None:
    lazy = opened(coded("compressed-tensors", tmp_path / "m"), tmp_path / "s")
    assert len(lazy.unplaced.left_out) == 14
    assert set(lazy.unplaced.left_out.values()) == {
        "it belongs to quantized activations, and slimlm computes with those of the model"
    }


def test_dequantized_weights_are_used_again_unless_the_files_have_changed(tmp_path: Path) -> None:
    folder, name = coded("gptq", tmp_path / "m"), "model.layers.0.mlp.up_proj"
    before = opened(folder, tmp_path / "s").weights[f"{name}.weight"].clone()
    written = (tmp_path / "s" / "dequantized.safetensors").stat().st_mtime_ns
    assert torch.equal(opened(folder, tmp_path / "s").weights[f"{name}.weight"], before)
    assert (tmp_path / "s" / "dequantized.safetensors").stat().st_mtime_ns == written
    rewrite(folder, lambda tensors: tensors | {f"{name}.scales": 2 * tensors[f"{name}.scales"]})
    assert torch.equal(opened(folder, tmp_path / "s").weights[f"{name}.weight"], 2 * before)


COMPANIONS = {
    "fp8": "weight_scale_inv", "fbgemm": "weight_scale", "gptq": "qzeros", "awq": "scales",
    "compressed-tensors": "weight_shape", "mixture": "weight_scale",
    "mxfp4": "gate_up_proj_scales",
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_companion_and_a_cut_file_are_refused_before_any_work(kind: str, tmp_path: Path, text_file: Path) -> None:
    folder = coded(kind, tmp_path / "m")
    whole = (folder / "model.safetensors").read_bytes()
    first = next(name for name in load_file(folder / "model.safetensors") if name.endswith(COMPANIONS[kind]))
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != first})
    with pytest.raises(ModelError, match=rf"and no {first}, without which"):
        slimlm.compress(folder, tmp_path / "o", data=str(text_file), **QUICK)
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be used"):
        slimlm.compress(folder, tmp_path / "o", data=str(text_file), **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "nothing is left behind"


def test_codes_without_a_description_are_refused(tmp_path: Path) -> None:
    folder = coded("gptq", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="already quantized: its files hold"):
        opened(folder, tmp_path / "s")


def test_a_method_that_is_no_text_is_refused(tmp_path: Path) -> None:
    folder = coded("gptq", tmp_path / "m")
    rewrite(folder, lambda tensors: tensors, {"quant_method": ["gptq"]})
    with pytest.raises(ModelError, match="already quantized"):
        opened(folder, tmp_path / "s")


@pytest.mark.parametrize("kind", WRITERS)
def test_damaged_codes_are_read_or_refused_in_words(kind: str, tmp_path: Path) -> None:
    folder = coded(kind, tmp_path / "m")
    raw, draw = (folder / "model.safetensors").read_bytes(), torch.Generator().manual_seed(0)
    for trial in range(8):
        damaged = bytearray(raw)
        for place in torch.randint(8, len(raw) if trial % 2 else 4000, (3,), generator=draw).tolist():
            damaged[place] ^= 1 << (trial % 8)
        (folder / "model.safetensors").write_bytes(damaged)
        try:
            opened(folder, tmp_path / f"s{trial}")
        except SlimlmError:
            continue
