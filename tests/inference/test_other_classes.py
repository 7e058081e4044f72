"""The classes of transformers that hold a causal model's layers under other names open checkpoints, too."""

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    pipeline,
)

import slimlm
from slimlm.core.errors import CheckpointError
from slimlm.inference.module_names import names_in
from slimlm.runtime.linear import CompressedLinear
from tests.conftest import ALL_FAMILIES, Checkpoints

IDS = torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(3))
HEADS = [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]


def layers(model: PreTrainedModel) -> int:
    return sum(isinstance(module, CompressedLinear) for module in model.modules())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_bare_model_gives_the_hidden_states_of_the_causal_one(family: str, checkpoints: Checkpoints) -> None:
    out = checkpoints(family, torch.bfloat16).out
    causal = AutoModelForCausalLM.from_pretrained(out)
    bare, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert type(bare).__name__.endswith("Model") and layers(bare) == layers(causal)
    assert not info["missing_keys"] and {name.split(".")[0] for name in info["unexpected_keys"]} <= {"lm_head"}
    assert torch.equal(bare(IDS).last_hidden_state, causal.base_model(IDS).last_hidden_state)


def test_packed_embeddings_are_found_in_a_bare_model(llama_folder, text_file, tmp_path) -> None:  # type: ignore[no-untyped-def]
    slimlm.compress(llama_folder, tmp_path / "o", recipe="absmax", data=str(text_file), samples=4, length=32, embedding_bits=8)
    bare, causal = AutoModel.from_pretrained(tmp_path / "o"), AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert torch.equal(bare(IDS).last_hidden_state, causal.base_model(IDS).last_hidden_state)


@pytest.mark.parametrize("kind", HEADS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_a_classifier_has_the_layers_and_a_new_head(family: str, kind: type, checkpoints: Checkpoints) -> None:
    """Llama's and Qwen3's class for answers has its base model under another name, which transformers does not translate."""
    out = checkpoints(family, torch.bfloat16).out
    causal = AutoModelForCausalLM.from_pretrained(out)
    model, info = kind.from_pretrained(out, output_loading_info=True)  # type: ignore[attr-defined]
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"score", "classifier", "qa_outputs"}
    assert torch.equal(model.base_model(IDS)[0], causal.base_model(IDS)[0])


def test_pipelines_give_features(checkpoints: Checkpoints) -> None:
    out = checkpoints("llama", torch.bfloat16).out
    bare, tokenizer = AutoModel.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    [features] = pipeline("feature-extraction", model=bare, tokenizer=tokenizer)("alpha beta")
    assert torch.equal(
        torch.tensor(features), bare(**tokenizer("alpha beta", return_tensors="pt")).last_hidden_state[0].float()
    )


def test_a_module_that_a_model_lacks_is_named(checkpoints: Checkpoints) -> None:
    model = AutoModel.from_pretrained(checkpoints("llama", torch.bfloat16).out)
    assert names_in(model, ["model.layers.0.mlp.up_proj", "lm_head"]) == {"model.layers.0.mlp.up_proj": "layers.0.mlp.up_proj"}
    with pytest.raises(CheckpointError, match=r"describes model\.layers\.7\.mlp, and LlamaModel has no such module"):
        names_in(model, ["model.layers.7.mlp"])
