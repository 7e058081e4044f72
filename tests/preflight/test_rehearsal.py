"""What cannot work at the end of a run is refused before its first block, and nothing is left behind."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    xLSTMConfig,
    xLSTMForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import slimlm
from slimlm.calibration.calls import observe
from slimlm.calibration.stages import kind_of
from slimlm.core.errors import CheckpointError, ModelError, NumericsError, SlimlmError
from slimlm.events import Event
from slimlm.models.lazy import open_lazy
from slimlm.models.structure import blocks_of, linears_of
from slimlm.pipeline import estimate, plan
from slimlm.preflight import rehearsal
from slimlm.preflight.rehearsal import rehearse
from slimlm.recipe import recipe_from_dict
from slimlm.run.config import RunConfig
from slimlm.run.prepare import rehearsed, run_needs
from tests.calibration.test_calls import per_layer, with_embeddings
from tests.conftest import ENDS, LLAMA_LIKE, Line, random_model, save

OPTIONS: dict[str, Any] = {"recipe": "absmax", "samples": 4, "length": 32}
BASE = {**LLAMA_LIKE, **ENDS}


def _randomised(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def sparse(types: tuple[str, str] = ("full", "full"), mlp: str = "dense") -> PreTrainedModel:
    """A model whose blocks hand on the tokens that attention looks at."""
    return _randomised(
        GlmMoeDsaForCausalLM(
            GlmMoeDsaConfig(
                **BASE | {"num_key_value_heads": 4},
                kv_lora_rank=16,
                q_lora_rank=24,
                qk_rope_head_dim=8,
                qk_nope_head_dim=16,
                v_head_dim=16,
                moe_intermediate_size=40,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                index_n_heads=4,
                index_head_dim=16,
                index_topk=8,
                mlp_layer_types=[mlp, mlp],
                indexer_types=list(types),
            )
        )
    )


def hybrid() -> PreTrainedModel:
    """A model whose blocks hand on attention weights, or None."""
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
    return _randomised(BambaForCausalLM(BambaConfig(**BASE, **sizes, attn_layer_indices=[1])))


def recurrent() -> PreTrainedModel:
    """A model whose blocks hand on their states."""
    return _randomised(xLSTMForCausalLM(xLSTMConfig(**BASE, num_heads=4, qk_dim_factor=0.5)))


def refused(folder: Path, out: Path, text_file: Path, **options: Any) -> str:
    """The message of a run that is refused before its first block, and leaves nothing."""
    seen: list[Event] = []
    with pytest.raises(SlimlmError) as error:
        slimlm.compress(folder, out, data=str(text_file), progress=seen.append, **{**OPTIONS, **options})
    assert {event.stage for event in seen} <= {"open the model"}
    assert not out.exists() and not out.with_name(f"{out.name}.partial").exists()
    return str(error.value)


@pytest.mark.parametrize("make", [hybrid, recurrent, per_layer, with_embeddings])
def test_models_whose_blocks_are_called_or_answer_in_their_own_way_are_compressed(
    make: Callable[[], PreTrainedModel], tmp_path: Path, text_file: Path
) -> None:
    folder = save(make().to(torch.bfloat16), tmp_path / "m")
    # Near-lossless, so that a wrong argument anywhere would show.
    recipe = recipe_from_dict({"steps": [{"quantize": "absmax", "bits": 8, "group_size": 16}]}, source="test")
    found = slimlm.compress(folder, tmp_path / "o", data=str(text_file), recipe=recipe, samples=4, length=32)
    assert found.record.perplexity is not None
    assert found.record.perplexity.compressed == pytest.approx(found.record.perplexity.dense, rel=0.05)
    assert slimlm.verify(tmp_path / "o").sound


def test_block_outputs_with_indices_are_passed_on_where_these_are_not_used(tmp_path: Path, text_file: Path) -> None:
    folder = save(sparse().to(torch.bfloat16), tmp_path / "m")
    steps = [{"quantize": "absmax", "bits": 8, "group_size": 8}]
    recipe = recipe_from_dict({"ignore": ["*.indexer.weights_proj"], "steps": steps}, source="test")
    found = slimlm.compress(folder, tmp_path / "o", data=str(text_file), recipe=recipe, samples=4, length=32)
    assert found.record.perplexity is not None
    assert found.record.perplexity.compressed == pytest.approx(found.record.perplexity.dense, rel=0.1)


def test_indices_that_a_block_takes_from_an_earlier_one_are_refused(tmp_path: Path, text_file: Path) -> None:
    folder = save(sparse(("full", "shared")).to(torch.bfloat16), tmp_path / "m")
    message = refused(folder, tmp_path / "o", text_file)
    assert "model.layers.1 of GlmMoeDsaForCausalLM is given prev_topk_indices" in message


def test_layers_whose_weight_is_read_in_another_way_are_refused_with_what_to_ignore(tmp_path: Path, text_file: Path) -> None:
    # It casts activations to the dtype of the layer's weight, which would be that of codes.
    message = refused(save(sparse().to(torch.bfloat16), tmp_path / "m"), tmp_path / "o", text_file)
    assert "model.layers.0.self_attn.indexer.weights_proj (one of 2 layers)" in message
    assert 'ignore = ["*.self_attn.indexer.weights_proj"]' in message


def test_unfit_layers_are_looked_for_by_kind_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = open_lazy(str(save(sparse(mlp="sparse").to(torch.bfloat16), tmp_path / "m")), tmp_path, pytest.fail)
    blocks = blocks_of(lazy.model)
    own = {name: {kind_of(block, layer) for layer in linears_of(block)} for name, block in blocks.items()}
    tried: list[int] = []

    def copy_gives(trial: Any, block: nn.Module, layers: list[str], *others: Any) -> Any:
        tried.append(len({kind_of(block, layer) for layer in layers}))
        return of_trial(trial, block, layers, *others)

    of_trial = rehearsal._Trial._copy_gives
    monkeypatch.setattr(rehearsal._Trial, "_copy_gives", copy_gives)
    with pytest.raises(ModelError, match=r"weights_proj \(one of 2 layers\)"):
        rehearse(lazy, blocks, [f"{name}.{layer}" for name, block in blocks.items() for layer in linears_of(block)])
    first, second = (len(kinds) for kinds in own.values())
    assert any("experts.*" in kind for kind in own["model.layers.0"])
    # All together, none, each kind by itself; then all of the second block but the kind that is unfit.
    assert tried[: first + 2] == [first, 0, *[1] * first]
    assert set(tried[first + 2 :]) == {second - 1}


def test_layers_without_input_in_any_block_are_refused_before_the_first(tmp_path: Path, text_file: Path) -> None:
    folder = save(_randomised(MambaForCausalLM(MambaConfig(**BASE, state_size=8))).to(torch.bfloat16), tmp_path / "m")
    assert 'ignore = ["*.mixer.dt_proj"]' in refused(folder, tmp_path / "o", text_file)


def test_shared_keys_and_values_are_refused_by_compress_plan_and_estimate(tmp_path: Path, text_file: Path, line: Line) -> None:
    folder = save(per_layer(shared=2).to(torch.bfloat16), tmp_path / "m")
    assert "shared_kv_states" in refused(folder, tmp_path / "o", text_file)
    with pytest.raises(ModelError, match="shared_kv_states"):
        plan(folder, bits=4, data=str(text_file), recipe="gptq", samples=4, length=32)
    with pytest.raises(ModelError, match="shared_kv_states"):
        estimate(folder, **OPTIONS)
    assert "shared_kv_states" in line.refused("plan", folder, "--recipe", "absmax")


@pytest.mark.parametrize(("make", "dependent"), [(per_layer, True), (lambda: random_model("llama"), False)])
def test_an_estimate_knows_whether_arguments_depend_on_the_text(
    make: Callable[[], PreTrainedModel], dependent: bool, tmp_path: Path
) -> None:
    folder = save(make().to(torch.bfloat16), tmp_path / "m")
    needs = run_needs(RunConfig.of(folder, **OPTIONS), open_lazy(str(folder), tmp_path, pytest.fail))
    # Counted until it is known.
    assert needs.text_dependent and needs.captured_bytes > 0
    known = rehearsed(needs, None)
    assert known.text_dependent == dependent
    assert known.captured_bytes == (needs.captured_bytes if dependent else 0)


def test_blocks_that_share_weights_are_refused_by_compress_plan_and_estimate(tmp_path: Path, text_file: Path) -> None:
    folder = save(with_embeddings(("mamba", "hybrid", "mamba", "hybrid")).to(torch.bfloat16), tmp_path / "m")
    message = refused(folder, tmp_path / "o", text_file)
    assert "model.layers.3.shared_transformer" in message and "is model.layers.1.shared_transformer" in message
    for ask in (lambda: plan(folder, bits=4, data=str(text_file)), lambda: estimate(folder, data=str(text_file))):
        with pytest.raises(ModelError, match="share weights"):
            ask()


def test_a_generation_config_that_transformers_refuses_is_refused(tmp_path: Path, text_file: Path) -> None:
    folder = save(random_model("llama"), tmp_path / "m")
    (folder / "generation_config.json").write_text('{"num_return_sequences": 3}')
    assert "generation_config.json" in refused(folder, tmp_path / "o", text_file)
    with pytest.raises(ModelError, match=r"num_return_sequences.*\); correct the file"):
        estimate(folder, data=str(text_file))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError("FOLDER/config.json is of no use"), ModelError, "opened again: MODEL/config.json is of no use"),
        (OSError(28, "No space left on device"), CheckpointError, "in the folder of temporary files: No space left"),
        (ModelError("the tokenizer of FOLDER cannot be opened"), ModelError, "the tokenizer of MODEL cannot be opened"),
    ],
)
def test_a_failure_of_the_files_names_the_model_and_no_temporary_folder(
    error: Exception, kind: type[SlimlmError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random_model("llama"), tmp_path / "m")

    def fail(source: str) -> None:
        raise type(error)(*(arg.replace("FOLDER", source) if isinstance(arg, str) else arg for arg in error.args))

    monkeypatch.setattr(rehearsal, "open_tokenizer", fail)
    with pytest.raises(kind) as raised:
        estimate(folder, **OPTIONS)
    assert said.replace("MODEL", str(folder)) in str(raised.value) and "slimlm-" not in str(raised.value)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_config_s_switches_change_nothing(family: str, tmp_path: Path, text_file: Path, line: Line) -> None:
    plain, switched = (save(random_model(family, torch.bfloat16), tmp_path / name) for name in ("plain", "switched"))
    config = json.loads((switched / "config.json").read_text())
    # Attention weights have only the "eager" implementation, which both therefore name.
    both = {"attn_implementation": "eager"}
    asked = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    asked |= {"output_router_logits": True} if family == "mixtral" else {}
    (plain / "config.json").write_text(json.dumps(config | both))
    (switched / "config.json").write_text(json.dumps(config | both | asked))
    options = {"data": str(text_file), **OPTIONS}
    found = [slimlm.compress(folder, tmp_path / f"o-{folder.name}", **options) for folder in (plain, switched)]
    assert found[0].record.perplexity == found[1].record.perplexity
    assert json.loads((found[1].path / "config.json").read_text()).items() >= asked.items()
    assert (found[0].path / "model.safetensors").read_bytes() == (found[1].path / "model.safetensors").read_bytes()
    assert slimlm.verify(found[1].path).sound
    ids = torch.arange(8)[None]
    logits = [slimlm.load(result.path, kernels="reference")(ids).logits for result in found]
    assert torch.equal(logits[0], logits[1])
    status, _, _ = line("eval", found[1].path, "--text", text_file, "--length", 32)
    assert status == 0
    status, _, _ = line("generate", found[1].path, "--prompt", "alpha", "--max-new-tokens", 3)
    assert status == 0


class _Outside(LlamaDecoderLayer):
    """A block that adds a value from outside of itself, which is no part of it."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        output = super().forward(hidden_states, **kwargs)
        return output + self.outside[0].weight.mean()


def test_a_block_that_reads_a_weight_outside_of_itself_is_refused(tmp_path: Path) -> None:
    lazy = open_lazy(str(save(random_model("llama"), tmp_path / "m")), tmp_path, pytest.fail)
    assert isinstance(lazy.model, LlamaForCausalLM)
    for block in lazy.model.model.layers:
        block.__class__ = _Outside
        block.outside = (lazy.model.model.embed_tokens,)
    with pytest.raises(ModelError, match="gives other outputs than the block in its model"):
        rehearse(lazy, blocks_of(lazy.model))


def test_a_model_whose_logits_need_more_than_the_last_block_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = open_lazy(str(save(random_model("llama"), tmp_path / "m")), tmp_path, pytest.fail)

    class Whole(nn.Linear):
        """A head that looks at all positions at once."""

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input + input.mean(dim=1, keepdim=True))

    monkeypatch.setattr(lazy.model.get_output_embeddings(), "__class__", Whole)
    with pytest.raises(ModelError, match="do not follow from its last block's outputs alone"):
        rehearse(lazy, blocks_of(lazy.model))


def test_logits_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    lazy = open_lazy(str(save(random_model("llama"), tmp_path / "m")), tmp_path, pytest.fail)
    lazy.weights["model.norm.weight"] = torch.full((48,), float("inf")) * 0
    with pytest.raises(NumericsError, match="hold NaN on random tokens"):
        rehearse(lazy, blocks_of(lazy.model))


def test_tensors_outside_the_blocks_are_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Its embedding is of a class of its own, which is not used in 16 bits.
    lazy = open_lazy(str(save(random_model("gemma2", torch.bfloat16), tmp_path / "m")), tmp_path, pytest.fail)
    outside = lazy.outer_tensors(blocks_of(lazy.model))
    shared: list[bool] = []

    def observing(model: nn.Module, *args: Any, **options: Any) -> Any:
        own = model.state_dict()
        shared.extend(own[name].data_ptr() == tensor.data_ptr() for name, tensor in outside.items())
        return observe(model, *args, **options)

    monkeypatch.setattr(rehearsal, "observe", observing)
    rehearse(lazy, blocks_of(lazy.model))
    assert shared and all(shared)


def test_a_model_that_does_worse_than_guessing_is_an_alarm(tmp_path: Path, text_file: Path) -> None:
    messages: list[str] = []
    for scale in (0.01, 3.0):
        model = random_model("llama")
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        folder = save(model, tmp_path / f"m{scale}")
        slimlm.compress(folder, tmp_path / f"o{scale}", data=str(text_file), notify=messages.append, **OPTIONS)
    alarms = [message for message in messages if "guessing" in message]
    assert len(alarms) == 1 and "vocabulary" in alarms[0]
