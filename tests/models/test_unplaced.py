"""Every tensor of a model's files becomes one of the model, is stored as it is, is named as left out, or is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

import slimlm
from slimlm.core.errors import ModelError
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.models.structure import blocks_of
from slimlm.preflight.needs import RunNeeds
from slimlm.run.config import RunConfig
from slimlm.run.prepare import run_needs
from slimlm.storage import checkpoint
from tests.conftest import ENDS, LLAMA_LIKE, random_model, save

Tensors = dict[str, Tensor]
QUICK: dict[str, Any] = {"recipe": "absmax", "samples": 4, "length": 16}
HEAD = "v_head.summary.weight"
F8 = torch.zeros(4).to(torch.float8_e4m3fn)


def changed(folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> Path:
    """A tiny Llama in bfloat16 whose files and config are changed."""
    save(random_model("llama", torch.bfloat16), folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone().contiguous() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def opened(folder: Path, told: list[str] | None = None) -> LazyModel:
    return open_lazy(str(folder), folder / "converted", pytest.fail if told is None else told.append)


def another_block(tensors: Tensors) -> Tensors:
    return tensors | {name.replace("layers.1.", "layers.2."): t for name, t in tensors.items() if "layers.1." in name}


def with_head(tensors: Tensors) -> Tensors:
    return tensors | {HEAD: torch.randn(1, 48, generator=torch.Generator().manual_seed(2))}


def with_mtp(tensors: Tensors) -> Tensors:
    return tensors | {"mtp.fc.weight": torch.randn(48, 96, generator=torch.Generator().manual_seed(1)).bfloat16()}


@pytest.mark.parametrize(
    ("change", "config", "count"),
    [(with_mtp, {}, 1), (another_block, {"num_nextn_predict_layers": 1}, 16), (with_head, {}, 1)],
    ids=["a module that the class does not have", "a declared block", "a value head"],
)
def test_what_the_class_has_no_place_for_is_stored_as_it_is_and_the_folder_opens(
    change: Callable[[Tensors], Tensors], config: dict[str, Any], count: int, tmp_path: Path, text_file: Path
) -> None:
    folder = changed(tmp_path / "m", change, **config)
    plain = save(random_model("llama", torch.bfloat16), tmp_path / "plain")
    before = load_file(folder / "model.safetensors")
    extra = {name: before[name] for name in before.keys() - load_file(plain / "model.safetensors").keys()}
    told: list[str] = []
    record = slimlm.compress(folder, tmp_path / "o", data=str(text_file), notify=told.append, **QUICK).record
    alone = slimlm.compress(plain, tmp_path / "p", data=str(text_file), **QUICK).record
    notes = [text for text in told if "have no place in LlamaForCausalLM" in text]
    assert len(notes) == 1 and notes[0].startswith(f"{count} tensors of the files") and len(extra) == count
    after = load_file(tmp_path / "o" / "model.safetensors")
    assert all(torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in extra.items())
    size = sum(tensor.nbytes for tensor in extra.values())
    assert record.original_bytes == alone.original_bytes + size == sum(tensor.nbytes for tensor in before.values())
    assert sum(tensor.nbytes for tensor in after.values()) == size + sum(
        tensor.nbytes for tensor in load_file(tmp_path / "p" / "model.safetensors").values()
    )
    assert record.source is not None and set(record.source.unplaced) == extra.keys()
    assert record.source.tensors.keys() == before.keys() and not record.source.left_out
    assert slimlm.verify(tmp_path / "o").problems == ()
    ids = torch.arange(8)[None]
    ours = slimlm.load(tmp_path / "o", kernels="reference", dtype=torch.float32)(ids).logits
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32)
    slimlm.use_kernels(theirs, "reference")
    expected = slimlm.load(tmp_path / "p", kernels="reference", dtype=torch.float32)(ids).logits
    assert torch.equal(ours, theirs(ids).logits) and torch.equal(ours, expected)


def test_the_estimate_counts_what_is_stored_as_it_is(tmp_path: Path) -> None:
    def needs(folder: Path) -> RunNeeds:
        return run_needs(RunConfig(model=str(folder), recipe="absmax"), opened(folder, []))

    with_it, without = changed(tmp_path / "a", with_mtp), changed(tmp_path / "b", dict)
    assert needs(with_it).stored_bytes - needs(without).stored_bytes == 48 * 96 * 2
    assert needs(with_it).dense.bytes - needs(without).dense.bytes == 48 * 96 * 2


def test_a_vision_tower_is_stored_beside_the_language_model(tmp_path: Path, text_file: Path) -> None:
    text = {**LLAMA_LIKE, **ENDS, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    text |= dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2)
    text |= dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 48, "patch_size": 14}
    vision["num_position_embeddings"] = 16
    config = Qwen3_5Config(text_config={**text, "rope_parameters": rotary}, vision_config=vision, image_token_id=250)
    torch.manual_seed(0)
    folder = save(Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16), tmp_path / "m")
    before = load_file(folder / "model.safetensors")
    record = slimlm.compress(folder, tmp_path / "o", data=str(text_file), **QUICK).record
    tower = {name for name in before if ".visual." in name}
    assert record.source is not None and tower and set(record.source.unplaced) == tower
    assert record.source.became["model.language_model.norm.weight"] == ("model.norm.weight",)
    after = load_file(tmp_path / "o" / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in tower)
    assert slimlm.verify(tmp_path / "o").sound
    slimlm.load(tmp_path / "o")
    # The config of the folder names the class with the tower, which is there.
    assert json.loads((tmp_path / "o" / "config.json").read_text())["architectures"] == ["Qwen3_5ForConditionalGeneration"]


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, "LlamaForCausalLM computes it"),
        ({"model.layers.0.self_attn.k_norm.bias": torch.zeros(6)}, "a bias of zeros, which LlamaForCausalLM does not have"),
        ({"model.layers.1.self_attn.k_norm.bias": F8}, "a bias of zeros, which LlamaForCausalLM does not have"),
    ],
)
def test_what_is_left_out_is_named_with_the_reason(extra: Tensors, reason: str, tmp_path: Path) -> None:
    lazy = opened(changed(tmp_path / "m", lambda tensors: tensors | extra))
    assert lazy.unplaced.left_out == dict.fromkeys(extra, reason)
    assert lazy.unplaced.stored == {} and lazy.bytes == opened(changed(tmp_path / "p", dict)).bytes


def test_what_is_left_out_because_of_its_dtype_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    lazy = opened(changed(tmp_path / "m", lambda tensors: with_mtp(tensors) | {"mtp.up.weight": F8, "odd.scale": F8}), told)
    assert lazy.unplaced.left_out == dict.fromkeys(
        ("mtp.up.weight", "odd.scale"), "its dtype is F8_E4M3, which slimlm does not read"
    )
    assert lazy.unplaced.stored.keys() == {"mtp.fc.weight"} and len(told) == 1
    assert told[0].startswith("1 tensors of the files (0.01 MB) have no place")
    assert "2 tensors of the files have no place in LlamaForCausalLM and will not be in the checkpoint" in told[0]
    assert "(F8_E4M3): 1 of multi-token prediction (mtp.up.weight); 1 of odd (odd.scale)" in told[0]


def test_the_blocks_are_counted_once_however_many_tensors_have_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walks: list[object] = []

    def counted(model: nn.Module) -> dict[str, nn.Module]:
        walks.append(model)
        return blocks_of(model)

    monkeypatch.setattr("slimlm.models.unplaced.blocks_of", counted)
    many = {f"mtp.layers.{i}.weight": torch.ones(2) for i in range(50)}
    assert len(opened(changed(tmp_path / "m", lambda tensors: tensors | many), []).unplaced.stored) == 50
    assert len(walks) <= 2


def test_a_tensor_that_is_there_twice_is_left_out_once(tmp_path: Path) -> None:
    one, other = "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    lazy = opened(changed(tmp_path / "m", lambda tensors: tensors | {one: tensors[other]}))
    assert lazy.unplaced.left_out == {other: f"the same as {one}"} and lazy.became[one] == (other,)


Q = "model.layers.0.self_attn.q_proj"


def renamed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without_head(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head")}


def quantized(tensors: Tensors) -> Tensors:
    return {name: t for name, t in tensors.items() if name != f"{Q}.weight"} | {f"{Q}.qweight": torch.zeros(6, 64).int()}


REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "a block that the config does not count": (
        another_block, {}, r"hold 3 blocks or more \(model\.layers\.2\.\S+\), and LlamaForCausalLM has 2 .*_hidden_layers to 3"
    ),
    "such a block in a dtype that slimlm does not read": (
        lambda t: t | {"model.layers.2.mlp.up_proj.weight": F8}, {}, r"hold 3 blocks or more \(model\.layers\.2\.\S+\)"
    ),
    "such a norm in it": (
        lambda t: t | {"model.layers.0.self_attn.q_norm.weight": F8}, {}, r"q_norm\.weight, and model\.layers\.0\.self_attn of"
    ),
    "a copy in it": (lambda t: t | {"model.layers.0.mlp.up_proj.weight": F8, "layers.0.mlp.up_proj.weight":
        t["model.layers.0.mlp.up_proj.weight"]}, {}, r"hold both .* differ"),
    "a model of more than text": (
        renamed("text_model."), {"architectures": ["LlamaForConditionalGeneration"]},
        r"names LlamaForConditionalGeneration, a model of more than text, .* \(text_model\.lm_head\.weight for"
    ),
    "a norm inside a module of the class": (
        lambda t: t | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)}, {},
        r"q_norm\.weight, and model\.layers\.0\.self_attn of LlamaForCausalLM has no such tensor",
    ),
    "two different tensors for one": (
        lambda t: t | {"layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"] + 1}, {},
        r"both layers\.0\.mlp\.up_proj\.weight and model\.layers\.0\.mlp\.up_proj\.weight",
    ),
    "DistributedDataParallel": (renamed("module."), {}, r"module\.lm_head\.weight for lm_head\.weight.*model\.module\.save_"),
    "torch.compile": (renamed("_orig_mod."), {}, r"_orig_mod\.lm_head\.weight for lm_head\.weight.*model\._orig_mod"),
    "both": (renamed("module._orig_mod."), {}, r"module\._orig_mod\.lm_head\.weight for lm_head\.weight"),
    "inside": (
        lambda t: {n.replace("layers.0.", "layers.0._orig_mod."): v for n, v in t.items()}, {}, "as a program does that wraps"
    ),
    "another prefix": (renamed("policy.net."), {}, r"with 'policy\.net\.' in front"),
    "a reward model": (
        lambda t: without_head(t) | {"score.weight": torch.ones(1, 48)}, {"architectures": ["LlamaForSequenceClassification"]},
        r"is no language model: config\.json says LlamaForSequenceClassification .* score\.weight",
    ),
    "a tied reward model": (
        lambda t: without_head(t) | {"score.weight": torch.ones(1, 48)},
        {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True}, "is no language model",
    ),
    "a model for embeddings": (
        lambda t: {n.removeprefix("model."): v for n, v in without_head(t).items()}, {"architectures": ["LlamaModel"]},
        r"without the head that predicts tokens \(LlamaModel\)",
    ),
    "an adapter that is not merged": (
        lambda t: t | {f"{Q}.lora_A.default.weight": torch.ones(4, 48)}, {}, r"not merged .*merge_and_unload"
    ),
    "codes of GPTQ": (quantized, {}, rf"already quantized: its files hold {Q}\.qweight, which belongs to the codes of {Q}"),
    "a scale": (lambda t: t | {f"{Q}.weight_scale_inv": torch.ones(1, 1)}, {}, "already quantized: its files hold"),
    "weights of another program": (
        lambda t: {n.replace("self_attn", "attention"): v for n, v in t.items()}, {}, r"tensors of other names instead, such as"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_shows_that_the_class_is_not_what_the_files_were_made_for_is_refused(
    name: str, tmp_path: Path, text_file: Path
) -> None:
    change, config, words = REFUSED[name]
    folder = changed(tmp_path / "m", change, **config)
    with pytest.raises(ModelError, match=words):
        slimlm.compress(folder, tmp_path / "o", data=str(text_file), **QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["m"], "nothing is left behind"


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("where", [f"{Q}.weight", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_integers_are_not_taken_for_weights(dtype: torch.dtype, where: str, kind: str, tmp_path: Path) -> None:
    folder = changed(tmp_path / "m", lambda tensors: tensors | {where: (50 * tensors[where].float()).round().to(dtype)})
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=rf"hold {where} as {str(dtype).removeprefix('torch.')}, and LlamaForCausalLM computes"
    ):
        opened(folder)
    with pytest.raises(ModelError, match="codes of a quantized model"):
        slimlm.estimate(folder)


def test_integers_for_an_expert_are_not_taken_for_weights(tmp_path: Path) -> None:
    folder = save(random_model("qwen3-moe"), tmp_path / "m")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.2.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"hold {name} as int8"):
        opened(folder)


def test_a_weight_whose_square_overflows_is_refused_before_the_work(tmp_path: Path, text_file: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        huge = tensors["model.layers.1.mlp.down_proj.weight"].float()
        huge[0, 0] = 3e38
        return tensors | {"model.layers.1.mlp.down_proj.weight": huge}

    folder = changed(tmp_path / "m", change)
    with pytest.raises(slimlm.SlimlmError, match=r"layers\.1\.mlp\.down_proj\.weight holds a weight of 3e\+38"):
        slimlm.compress(folder, tmp_path / "o", **{**QUICK, "recipe": "slim-code"}, data=str(text_file))
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_verify_names_a_tensor_of_the_original_that_is_not_in_the_folder(tmp_path: Path, text_file: Path) -> None:
    out = slimlm.compress(changed(tmp_path / "m", with_mtp), tmp_path / "o", data=str(text_file), **QUICK).path
    record = checkpoint.read_record(out)
    record["source"]["tensors"]["model.extra.weight"] = "F32 [2]"
    record["source"]["files"]["LICENSE"] = "copied"
    (out / checkpoint.RECORD).write_text(json.dumps(record))
    problems = slimlm.verify(out).problems
    assert problems == (
        "model.extra.weight of the original should be here as model.extra.weight, and is not",
        "LICENSE was copied from the original, and is not here",
    )
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["others"].append("gone.weight")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(slimlm.SlimlmError, match=r"gone\.weight is missing"):
        slimlm.load(out)
    assert any("gone.weight" in problem for problem in slimlm.verify(out).problems)
