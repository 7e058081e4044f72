"""Routers: which modules pick experts, in every mixture of experts of the installed transformers."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import slimlm
from benchmarks.tiny_models import NOT_MADE, VARIANTS, save, tiny_config, tiny_model
from slimlm.core.errors import ModelError
from slimlm.models.experts import Experts, fused_in, routers_of, take_apart, without_router
from slimlm.models.structure import blocks_of, linears_of, others_of
from slimlm.preflight.refusals import refuse_unknown
from tests.conftest import random_model

GATE = "mlp.gate"
SHARED = "mlp.shared_expert_gate"
ROUTERS: dict[str, set[str]] = {
    "afmoe": {"mlp.router.gate"},
    "aria_text": {"mlp.router"},
    "axk1": {GATE},
    "axk2": {GATE},
    "bailing_hybrid": {GATE},
    "beam": {GATE},
    "cohere2_moe": {GATE},
    "dbrx": {"ffn.router.layer"},
    "deepseek_v2": {GATE},
    "deepseek_v3": {GATE},
    "deepseek_v32": {GATE},
    "deepseek_v4": {GATE},
    "doge with experts": {"mlp.router_gate"},
    "dots1": {GATE},
    "dots3_note": {GATE},
    "dots3_note_text": {GATE},
    "ernie4_5_moe": {GATE, "mlp.gate.moe_statics"},
    "exaone_moe": {GATE},
    "flex_olmo": {GATE},
    "flint": {GATE},
    # No experts: what mixes the copies of its activations calls itself a router.
    "gemma3n_text": {"altup.modality_router"},
    "gemma4_text with experts": {"router.proj"},
    "glm4_moe": {GATE},
    "glm4_moe_lite": {GATE},
    "glm_moe_dsa": {GATE},
    "gpt_oss": {"mlp.router"},
    "granitemoe": {"block_sparse_moe.router"},
    "granitemoe_swa": {"block_sparse_moe.router"},
    "granitemoehybrid": {"block_sparse_moe.router"},
    "granitemoeshared": {"block_sparse_moe.router"},
    "hunyuan_v1_moe": {"mlp.gate.wg"},
    "hy_v3": {GATE},
    "hy_v4": {GATE},
    "inkling2_text": {GATE},
    "inkling_text": {GATE},
    "jamba": {"feed_forward.router"},
    "jetmoe": {"mlp.router.layer", "self_attention.experts.router.layer"},
    "kimi_linear": {GATE},
    "kolibri1": {GATE},
    "laguna": {GATE},
    "lfm2_moe": {"feed_forward.gate"},
    "llama4": {"feed_forward.router"},
    "llama4_text": {"feed_forward.router"},
    "longcat_flash": {"mlp.router.classifier"},
    "mellum": {GATE},
    "mimo_v2_flash": {GATE},
    "minimax": {GATE},
    "minimax_m2": {GATE},
    "minimax_m3_vl_text": {GATE},
    "mixtral": {GATE},
    "nemotron_h": {"mixer.gate"},
    "olmoe": {GATE},
    "phimoe": {"mlp.router"},
    "qwen2_moe": {GATE, SHARED},
    "qwen3_5_moe": {GATE, SHARED},
    "qwen3_5_moe_text": {GATE, SHARED},
    "qwen3_moe": {GATE},
    "qwen3_next": {GATE, SHARED},
    "qwen4_exp": {GATE, SHARED},
    "qwen4_exp_text": {GATE, SHARED},
    "solar_open": {GATE},
    "zaya": {"mlp.gate.down_proj", *(f"mlp.gate.router_mlp.{name}" for name in ("fc1", "fc2", "out_proj"))},
}
"""By model type and variant: the modules in a block whose matrices pick experts, read in the classes of transformers 5.23."""
COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")


def empty(model_type: str, variant: str = "", experts: int | None = None) -> PreTrainedModel:
    """A model on the meta device with its experts taken apart."""
    config = tiny_config(model_type, variant)
    text = config.get_text_config()
    for name in COUNTS if experts is not None else ():
        if getattr(text, name, None):
            setattr(text, name, experts)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for name in fused_in(model):
        take_apart(model, name)
    return model


def routing(model: PreTrainedModel) -> set[str]:
    """The names in a block of the modules with matrices of their own that count as routers."""
    found = set()
    for block in blocks_of(model).values():
        for name in routers_of(block):
            if any(p.ndim > 1 for p in block.get_submodule(name).parameters(recurse=False)):
                found.add(name)
        assert not found & linears_of(block).keys()
    return found


@pytest.mark.parametrize("key", ROUTERS)
def test_the_routers_are_those_that_the_class_picks_experts_with(key: str) -> None:
    model_type, _, variant = key.partition(" ")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    assert routing(empty(model_type, variant)) == ROUTERS[key]


@pytest.mark.parametrize("experts", [4, 16, 48])
@pytest.mark.parametrize("key", ["afmoe", "gemma4_text with experts", "glm_moe_dsa", "gpt_oss", "hunyuan_v1_moe", "qwen3_next"])
def test_layers_with_as_many_outputs_as_there_are_experts_are_no_routers_by_that_alone(key: str, experts: int) -> None:
    # As many experts as attention heads, as the width of a head, and as the width of the activations.
    model_type, _, variant = key.partition(" ")
    assert routing(empty(model_type, variant, experts)) == ROUTERS[key]


@pytest.mark.slow
def test_every_model_with_experts_is_in_the_table() -> None:
    # Over ten seconds: it makes a model of every class.
    found = set()
    for model_type, variant in [*((name, "") for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *VARIANTS]:
        if model_type not in NOT_MADE:
            model = empty(model_type, variant)
            if routing(model) or any(isinstance(module, Experts) for module in model.modules()):
                found.add(f"{model_type} {variant}".rstrip())
    assert found == ROUTERS.keys()


def test_a_router_inside_a_module_is_not_compressed_and_is_named(tmp_path: Path, text_file: Path) -> None:
    folder = save(tiny_model("afmoe").to(torch.bfloat16), tmp_path / "m")
    record = slimlm.compress(folder, tmp_path / "o", recipe="absmax", data=str(text_file), samples=8, length=32).record
    assert (
        record.skipped["model.layers.1.mlp.router.gate.weight"] == "a router, which picks experts; routers are not compressed"
    )
    assert not any("router" in layer.name for layer in record.layers)
    assert {"model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.experts.0.up_proj"} <= {
        r.name for r in record.layers
    }


class Mixture(nn.Module):
    """Experts whose router is what a test puts beside them."""

    def __init__(self, **beside: nn.Module) -> None:
        super().__init__()
        self.experts = empty("mixtral").model.layers[0].mlp.experts
        for name, module in beside.items():
            self.add_module(name, module)


def block_of(mixture: nn.Module, **beside: nn.Module) -> nn.Module:
    block = nn.ModuleDict({"attention": nn.Sequential(nn.Linear(48, 6), nn.Linear(6, 48)), "mlp": mixture, **beside})
    assert len(block["mlp"].experts) == 6
    return block


def test_a_router_may_be_several_layers_with_choices_besides_the_experts() -> None:
    several = nn.Sequential(nn.Linear(48, 12), nn.GELU(), nn.Linear(12, 8))
    block = block_of(Mixture(pick=several, shared=nn.Sequential(nn.Linear(48, 8), nn.Linear(8, 48))))
    assert routers_of(block) == {"mlp.pick", "mlp.pick.0", "mlp.pick.1", "mlp.pick.2"}
    assert without_router(block) == []


def test_a_router_may_stand_beside_the_module_that_holds_the_experts() -> None:
    block = block_of(Mixture(), choice=nn.Linear(48, 6))
    assert routers_of(block) == {"choice"}
    assert without_router(block) == []


def test_the_gate_of_a_shared_expert_stays_where_the_router_is_a_matrix_of_the_module() -> None:
    mixture = Mixture(shared_gate=nn.Linear(48, 1))
    mixture.weight = nn.Parameter(torch.zeros(6, 48))
    block = block_of(mixture)
    assert routers_of(block) == {"mlp.shared_gate"}
    assert without_router(block) == []
    assert "mlp.weight" in others_of(block)


def test_experts_without_a_router_that_can_be_found_are_refused() -> None:
    block = block_of(Mixture(strange=nn.Linear(48, 5), shared_gate=nn.Linear(48, 1)))
    assert without_router(block) == ["mlp.experts"]
    with pytest.raises(
        ModelError, match=r"layers\.0\.mlp\.experts of LlamaForCausalLM holds experts, .* no router next to them"
    ):
        refuse_unknown(random_model("llama"), {"layers.0": block})
