"""Mixtures of experts: taken apart, measured, compressed, written and opened again."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

import slimlm
from slimlm.calibration.capture import BlockInputs, BlockRun, enter, run
from slimlm.calibration.measurement import POOLED, measure
from slimlm.core.errors import ModelError
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.mean_abs import MeanAbs
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.statistics.peak_abs import PeakAbs
from slimlm.events import Event
from slimlm.models.experts import Experts, fused_in, take_apart
from slimlm.models.structure import blocks_of, linears_of
from slimlm.recipe import Recipe, recipe_from_dict
from slimlm.runtime.linear import CompressedLinear
from tests.conftest import ENDS, LLAMA_LIKE, MIXTURES, random_model, save

CPU = torch.device("cpu")
IDS = torch.randint(1, 256, (4, 32), generator=torch.Generator().manual_seed(3))
QUICK: dict[str, Any] = {"steps": [{"quantize": "absmax", "bits": 4, "group_size": "per-channel"}]}
STARVED = "model.layers.1.mlp.experts.2"


def quick(**more: Any) -> Recipe:
    return recipe_from_dict({**QUICK, **more}, source="test")


def apart(family: str) -> PreTrainedModel:
    model = random_model(family)
    for name in fused_in(model):
        take_apart(model, name)
    return model


def starving() -> PreTrainedModel:
    """A model whose second block never picks its third expert of four."""
    model = random_model("gpt-oss")
    model.model.layers[1].mlp.router.bias.data[2] = -1e4
    return model


def options(text: Path, **more: Any) -> dict[str, Any]:
    return {"recipe": quick(), "data": str(text), "samples": 8, "length": 32, **more}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_taken_apart_compute_what_the_class_computes_from_the_same_memory(family: str) -> None:
    model = random_model(family)
    with torch.no_grad():
        expected = model(IDS).logits
    state = dict(model.state_dict())
    for name in fused_in(model):
        shares = take_apart(model, name)
        experts = model.get_submodule(name)
        assert isinstance(experts, Experts)
        assert shares.keys() == {f"{name}.{key}" for key in experts.state_dict()}
        for full, share in shares.items():
            weight, fused = model.get_parameter(full), state[share.fused]
            assert weight.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()
            assert torch.equal(weight, share.view(fused[share.expert]))
        fused_numbers = sum(state[fused].numel() for fused in {share.fused for share in shares.values()})
        assert sum(p.numel() for p in experts.parameters()) == fused_numbers
    with torch.no_grad():
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(copy.deepcopy(model)(IDS).logits, model(IDS).logits)


def test_what_is_no_fused_module_is_not_taken_apart() -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp is a LlamaMLP"):
        take_apart(random_model("llama"), "model.layers.0.mlp")


@pytest.mark.parametrize("family", MIXTURES)
def test_routers_are_no_linear_layers_of_a_block(family: str) -> None:
    block = apart(family).model.layers[1]
    names = set(linears_of(block))
    assert {f"mlp.experts.{i}.{p}_proj" for i in range(len(block.mlp.experts)) for p in ("gate", "up", "down")} <= names
    assert not any("router" in name or name.endswith(".gate") for name in names)


def test_a_linear_layer_that_picks_experts_is_a_router_too(tmp_path: Path, text_file: Path) -> None:
    sizes = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 40}
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**LLAMA_LIKE, **ENDS, **sizes))
    # One number for all tokens' shared expert, from an nn.Linear.
    assert isinstance(model.model.layers[0].mlp.shared_expert_gate, nn.Linear)
    record = slimlm.compress(save(model, tmp_path / "m"), tmp_path / "o", **options(text_file)).record
    for i in range(2):
        for name in ("gate", "shared_expert_gate"):
            assert "router" in record.skipped[f"model.layers.{i}.mlp.{name}.weight"]
    assert "model.layers.0.mlp.shared_expert.up_proj" in {layer.name for layer in record.layers}


# Experts that are given too few tokens


def rows_of(block: nn.Module, flow: BlockInputs, name: str, layers: list[str]) -> dict[str, torch.Tensor]:
    """All inputs `[tokens, in]` of these layers, in float64."""
    seen: dict[str, list[torch.Tensor]] = {layer: [] for layer in layers}
    handles = [
        block.get_submodule(layer).register_forward_pre_hook(lambda _m, args, layer=layer: seen[layer].append(args[0]))
        for layer in layers
    ]
    list(run(BlockRun(block, name, flow, CPU)))
    for handle in handles:
        handle.remove()
    return {layer: torch.cat(rows or [torch.empty(0)]).double() for layer, rows in seen.items()}


@pytest.mark.parametrize(("windows", "starved"), [(12, {2}), (1, {0, 1, 2, 3})])
def test_experts_with_fewer_tokens_than_inputs_are_measured_on_those_of_all_together(windows: int, starved: set[int]) -> None:
    model = starving()
    for fused in fused_in(model):
        take_apart(model, fused)
    blocks = blocks_of(model)
    ids = torch.randint(1, 256, (windows, 32), generator=torch.Generator().manual_seed(5))
    flow = enter(model, blocks, ids)
    first, second = list(blocks)
    flow.hidden = list(run(BlockRun(blocks[first], first, flow, CPU)))
    block = blocks[second]
    names = [name for name in linears_of(block) if ".experts." in name]
    needs = frozenset({Covariance, MeanAbs, MeanSquare, PeakAbs})
    stats = measure(BlockRun(block, second, flow, CPU), linears_of(block), needs)
    rows = rows_of(block, flow, second, names)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        own = {i: rows[f"mlp.experts.{i}.{projection}"] for i in range(4)}
        together = torch.cat([own[0], own[1], own[3]])
        assert len(own[2]) == 0
        for i in range(4):
            found = stats[f"mlp.experts.{i}.{projection}"]
            assert (found.note == POOLED) == (i in starved)
            expected = together if i in starved else own[i]
            assert found.tokens == len(expected)
            torch.testing.assert_close(found[Covariance].double(), expected.T @ expected / len(expected), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[MeanAbs].double(), expected.abs().mean(dim=0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found[PeakAbs].double(), expected.abs().amax(dim=0), rtol=1e-5, atol=1e-6)
    assert stats["self_attn.q_proj"].note is None


@pytest.mark.parametrize("recipe", ["slim", "gptq"])
def test_starved_experts_are_compressed_and_named(recipe: str, tmp_path: Path, text_file: Path) -> None:
    told: list[str] = []
    folder = save(starving(), tmp_path / "m")
    record = slimlm.compress(folder, tmp_path / "o", **options(text_file, recipe=recipe), notify=told.append).record
    noted = {layer.name for layer in record.layers if POOLED in layer.notes}
    assert {f"{STARVED}.{name}_proj" for name in ("gate", "up", "down")} <= noted
    (words,) = [text for text in told if "experts" in text]
    assert f"{len(noted)} of the experts' layers" in words
    assert all(name in words for name in [layer.name for layer in record.layers if layer.name in noted][:8])
    model = slimlm.load(tmp_path / "o", kernels="reference")
    assert bool(model(IDS).logits.isfinite().all())
    # Far better than nothing: the weights are those of the original, in four bits.
    dense = apart_of(folder)
    weight = dense.get_parameter(f"{STARVED}.up_proj.weight")
    found = sum(part.dense() for part in model.get_submodule(f"{STARVED}.up_proj").parts())
    assert float((found - weight).norm() / weight.norm()) < 0.6


def apart_of(folder: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name in fused_in(model):
        take_apart(model, name)
    return model.requires_grad_(False)


def test_whole_windows_of_an_expert_are_refused_before_the_work_and_other_layers_are_not(
    tmp_path: Path, text_file: Path
) -> None:
    folder = save(random_model("mixtral"), tmp_path / "m")
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts\.0\.gate_proj is an expert's.*experts\.\*"):
        slimlm.compress(folder, tmp_path / "o", **options(text_file, recipe="l2qer"))
    assert not (tmp_path / "o.partial").exists()
    steps = [{"quantize": "absmax", "bits": 4, "group_size": "per-channel"}, {"compensate": "l2qer", "rank": 0.1}]
    left = quick(steps=steps, ignore=["*.experts.*"])
    record = slimlm.compress(folder, tmp_path / "o", **options(text_file, recipe=left)).record
    assert {layer.name.rpartition(".")[2] for layer in record.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert record.skipped["model.layers.1.mlp.experts.2.up_proj"] == "ignored by the recipe"
    # Experts that stay are stored one by one, too, and open in both ways.
    ours = slimlm.load(tmp_path / "o", kernels="reference")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    slimlm.use_kernels(theirs, "reference")
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    weight = apart_of(folder).get_parameter(f"{STARVED}.up_proj.weight")
    assert torch.equal(ours.get_parameter(f"{STARVED}.up_proj.weight"), weight)


# The way of a run


@pytest.mark.parametrize("family", MIXTURES)
def test_a_run_that_stopped_after_a_block_gives_the_same_bytes(family: str, tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model(family, torch.bfloat16), tmp_path / "m")
    slimlm.compress(folder, tmp_path / "whole", **options(text_file))

    def stop(event: Event) -> None:
        if (event.stage, event.done) == ("compress", 1) and event.blocks:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slimlm.compress(folder, tmp_path / "o", **options(text_file), progress=stop)
    told: list[str] = []
    slimlm.compress(folder, tmp_path / "o", **options(text_file), notify=told.append)
    assert any("resuming after block 1 of 2" in text for text in told)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "o" / name).read_bytes()


def test_a_loaded_model_can_be_saved_and_opened_again(tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model("qwen3-moe"), tmp_path / "m")
    slimlm.compress(folder, tmp_path / "o", **options(text_file))
    expected = slimlm.load(tmp_path / "o", kernels="reference")
    for number, model in enumerate((expected, AutoModelForCausalLM.from_pretrained(tmp_path / "o"))):
        model.save_pretrained(tmp_path / f"again-{number}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"again-{number}")
        slimlm.use_kernels(again, "reference")
        assert again.state_dict().keys() == expected.state_dict().keys()
        assert torch.equal(again(IDS).logits, expected(IDS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [{"recipe": "best-24-matched"}, {"recipe": "best-24", "bits": 5.0}])
def test_matching_and_plans_take_experts(asked: dict[str, Any], tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model("qwen3-moe"), tmp_path / "m")
    record = slimlm.compress(folder, tmp_path / "o", **options(text_file, **asked)).record
    assert {layer.name for layer in record.layers} >= {f"{STARVED}.{name}_proj" for name in ("gate", "up", "down")}
    model = slimlm.load(tmp_path / "o")
    layers = {name for name, module in model.named_modules() if isinstance(module, CompressedLinear)}
    assert layers - {"lm_head"} == {layer.name for layer in record.layers}
    assert bool(model(IDS).logits.isfinite().all())
