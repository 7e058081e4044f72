"""Models of no family that is tested in full: they work as they are found, or are refused by the name of what is unknown."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimlm
from slimlm.core.errors import ModelError
from slimlm.inference.generate import generate
from slimlm.models.experts import fused_in, take_apart
from slimlm.models.structure import linears_of, put_weight
from slimlm.recipe import recipe_from_dict
from tests.conftest import ENDS, FAMILIES, LLAMA_LIKE, VOCABULARY, random_model, save

GPT = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 48, "n_layer": 2, "n_head": 4}
NEO = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
FEW = {"num_experts": 3, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 3, "num_experts_per_tok": 2}
INNER = {"moe_intermediate_size": 40}
SHARED = {**FEW, **INNER, "shared_expert_intermediate_size": 40}
ROUTED = {**INNER, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
WINDOW = {"sliding_window": 16}

WORK: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": ("Bloom", {**BLOOM, **ENDS}),
    "codegen": ("CodeGen", {**GPT, **ENDS, "rotary_dim": 8}),
    "cohere": ("Cohere", {**LLAMA_LIKE, **ENDS}),
    "cohere2": ("Cohere2", {**LLAMA_LIKE, **ENDS, **WINDOW}),
    "deepseek-v2": (
        "DeepseekV2",
        {**LLAMA_LIKE, **ENDS, **LATENT, **ROUTED, "q_lora_rank": None, "n_group": None, "topk_method": "greedy"},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {**LLAMA_LIKE, **ENDS, **LATENT, **ROUTED, "q_lora_rank": 24, "n_group": 2, "topk_group": 1},
    ),
    "exaone4": ("Exaone4", {**LLAMA_LIKE, **ENDS, **WINDOW, "sliding_window_pattern": 2}),
    "gemma": ("Gemma", {**LLAMA_LIKE, **ENDS, "head_dim": 16}),
    "glm4": ("Glm4", {**LLAMA_LIKE, **ENDS, "head_dim": 16}),
    "glm4-moe": ("Glm4Moe", {**LLAMA_LIKE, **ENDS, **ROUTED, "head_dim": 16, "n_group": 1, "topk_group": 1}),
    "gpt-bigcode": ("GPTBigCode", {**GPT, **ENDS}),
    "gpt-j": ("GPTJ", {**GPT, **ENDS, "rotary_dim": 8}),
    "gpt-neo": ("GPTNeo", {**NEO, **ENDS, "attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "granite": (
        "Granite",
        {**LLAMA_LIKE, **ENDS, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "granite-moe": ("GraniteMoe", {**LLAMA_LIKE, **ENDS, **LOCAL}),
    "lfm2": ("Lfm2", {**LLAMA_LIKE, **ENDS, "layer_types": ["conv", "full_attention"]}),
    "mamba2": (
        "Mamba2",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_heads": 12,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            **ENDS,
        },
    ),
    "mpt": ("Mpt", {"vocab_size": VOCABULARY, "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "nemotron": ("Nemotron", {**LLAMA_LIKE, **ENDS}),
    "olmo2": ("Olmo2", {**LLAMA_LIKE, **ENDS}),
    "olmo3": ("Olmo3", {**LLAMA_LIKE, **ENDS, **WINDOW}),
    "olmoe": ("Olmoe", {**LLAMA_LIKE, **ENDS, **FEW}),
    "phi": ("Phi", {**LLAMA_LIKE, **ENDS}),
    "phi-moe": ("Phimoe", {**LLAMA_LIKE, **ENDS, **LOCAL}),
    "qwen2-moe": ("Qwen2Moe", {**LLAMA_LIKE, **ENDS, **SHARED}),
    "qwen3-next": ("Qwen3Next", {**LLAMA_LIKE, **ENDS, **SHARED, **LINEAR, "head_dim": 16}),
    "smollm3": ("SmolLM3", {**LLAMA_LIKE, **ENDS}),
    "starcoder2": ("Starcoder2", {**LLAMA_LIKE, **ENDS, **WINDOW}),
}
"""By name the class, less "ForCausalLM", and its config; docs/models.md lists them."""


def made(kind: str, config: dict[str, Any]) -> Callable[[], PreTrainedModel]:
    def make() -> PreTrainedModel:
        return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))

    return make


def folder_of(name: str, make: Callable[[], PreTrainedModel], path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(FAMILIES, name, make)
    return save(random_model(name), path / "dense")


def quick(**more: Any) -> Any:
    steps = [{"quantize": "absmax", "bits": 8, "group_size": "per-channel"}]
    return recipe_from_dict({"steps": steps, **more}, source="test")


def options(text: Path, **more: Any) -> dict[str, Any]:
    return {"recipe": quick(), "data": str(text), "samples": 8, "length": 32, **more}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
# Some classes say that a faster implementation of theirs is missing.
@pytest.mark.filterwarnings("default")
def test_it_is_compressed_opened_and_written_with(
    name: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(name, made(*WORK[name]), tmp_path, monkeypatch)
    told: list[str] = []
    record = slimlm.compress(folder, tmp_path / "out", **options(text_file), notify=told.append).record
    assert record.coverage > 0.9 and not any("loaded as a whole" in text for text in told)
    ids = torch.randint(1, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    ours = slimlm.load(tmp_path / "out", kernels="reference")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    slimlm.use_kernels(theirs, "reference")
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    # The original with each weight put back from its parts; test_experts.py has that experts taken apart compute the same.
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    for fused in fused_in(dense):
        take_apart(dense, fused)
    for layer in record.layers:
        put_weight(dense.get_submodule(layer.name), ours.get_submodule(layer.name).parts().dense())
    assert torch.allclose(dense(ids).logits, ours(ids).logits, atol=1e-4, rtol=1e-4)
    options_of = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = ours.generate(ids[:, :8], attention_mask=torch.ones(2, 8, dtype=torch.long), **options_of)[:, 8:]
    assert torch.equal(generate(ours, ids[:, :8], max_new_tokens=8, stop_tokens=[]).tokens, written)


MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4, **ENDS}
JET = {**LLAMA_LIKE, "kv_channels": 12, "num_local_experts": 4}
RWKV = {"vocab_size": VOCABULARY, "hidden_size": 48, "num_hidden_layers": 2, "context_length": 64, **ENDS}
SPARE = {
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0, 0.0],
}


def gemma3n() -> PreTrainedModel:
    config = {**LLAMA_LIKE, **SPARE, "vocab_size_per_layer_input": VOCABULARY, "head_dim": 16, "sliding_window": 16}
    types = {"layer_types": ["sliding_attention", "full_attention"]}
    return transformers.Gemma3nForCausalLM(transformers.Gemma3nTextConfig(**config, **types))


def llama4() -> PreTrainedModel:
    config = {**LLAMA_LIKE, **ENDS, "head_dim": 16, "intermediate_size_mlp": 88, "num_local_experts": 4}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**config))


def bart() -> PreTrainedModel:
    sizes = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "encoder_layers": 1}
    config = {"vocab_size": VOCABULARY, "d_model": 48, "encoder_attention_heads": 4, "max_position_embeddings": 64}
    return transformers.BartForCausalLM(transformers.BartConfig(**config, **sizes))


REFUSED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "bart": (bart, r"layers\.0\.encoder_attn\.k_proj got no input"),
    "mamba": (made("Mamba", MAMBA), r"layers\.0\.mixer\.dt_proj got no input.*\*\.mixer\.dt_proj"),
    "jetmoe": (made("JetMoe", JET), r"JetMoeForCausalLM are in no linear layer.*JetMoeParallelExperts"),
    "rwkv": (made("Rwkv", RWKV), r"RwkvForCausalLM fails where its blocks are read one at a time"),
    "gemma3n": (gemma3n, r"layers\.0 of Gemma3nForCausalLM is given activations \[4, "),
    "llama4": (llama4, r"Llama4ForCausalLM are in no linear layer.*experts.*Llama4TextExperts"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("default")
def test_it_is_refused_with_the_name_of_what_is_not_understood(
    name: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = REFUSED[name]
    folder = folder_of(name, make, tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=words):
        slimlm.compress(folder, tmp_path / "out", **options(text_file))
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_more_than_linear_is_not_compressed() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Split(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(x), x

    class Written(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.T + (0 if self.bias is None else self.bias)

    kinds = {"plain": nn.Linear, "doubled": Doubled, "split": Split, "written": Written}
    block = nn.ModuleDict({f"{name}-{bias}": kind(8, 4, bias=bias) for name, kind in kinds.items() for bias in (True, False)})
    assert set(linears_of(block)) == {"plain-True", "plain-False", "written-True", "written-False"}
    assert block["written-True"].weight.shape == (4, 8)


def test_what_is_left_out_lets_a_model_be_compressed(tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("mamba", REFUSED["mamba"][0], tmp_path, monkeypatch)
    recipe = quick(ignore=["*.dt_proj"])
    slimlm.compress(folder, tmp_path / "out", **options(text_file, recipe=recipe))
    ids = torch.randint(1, 256, (2, 32), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        found = slimlm.load(tmp_path / "out", kernels="reference")(ids).logits
    assert float((found - expected).norm() / expected.norm()) < 0.1
