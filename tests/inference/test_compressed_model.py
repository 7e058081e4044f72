"""What an opened model says of itself, and what transformers' methods do with it."""

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    StaticCache,
)

import slimlm
from slimlm.core.errors import ModelError
from slimlm.inference.generate import generate
from slimlm.runtime.dense import WideEmbedding
from tests.conftest import Checkpoints, needs_kernels, random_model, save

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))
BY = {"load": slimlm.load, "transformers": AutoModelForCausalLM.from_pretrained}


@pytest.fixture(scope="module")
def eight(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Llama in bfloat16 whose embedding and head are packed."""
    folder = tmp_path_factory.mktemp("eight")
    save(random_model("llama-tied", torch.bfloat16), folder / "dense")
    options: dict[str, Any] = {"recipe": "absmax", "data": str(text_file), "samples": 4, "length": 32}
    slimlm.compress(folder / "dense", folder / "out", embedding_bits=8, **options)
    return folder / "out"


@pytest.fixture(params=["llama", "llama-tied", "gpt2", "opt-projected", "gemma2", "mixtral"])
def narrow(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    """Checkpoints from bfloat16, with tied and other heads."""
    return checkpoints(request.param, torch.bfloat16).out


@needs_kernels
def test_the_dtype_is_that_of_the_activations(narrow: Path, eight: Path) -> None:
    for folder in (narrow, eight):
        model = slimlm.load(folder)
        hidden = model(IDS, output_hidden_states=True).hidden_states
        assert {state.dtype for state in hidden} == {model.dtype} == {model.config.dtype} == {model.base_model.dtype}
        assert model.dtype == torch.float32
        assert slimlm.load(folder, dtype="float64").dtype == torch.float64
        assert slimlm.load(folder, kernels="reference").dtype == torch.bfloat16
        assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


@needs_kernels
def test_every_cache_holds_what_the_model_computes(checkpoints: Checkpoints) -> None:
    model = slimlm.load(checkpoints("llama", torch.bfloat16).out)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, **options, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config, max_cache_len=30)
    assert torch.equal(model.generate(IDS, **options, past_key_values=cache), expected)


@needs_kernels
@pytest.mark.slow(reason="transformers' scheduler waits for half a minute before its first batch on a CPU")
def test_continuous_batching_gives_the_tokens_of_one_text_after_another(checkpoints: Checkpoints) -> None:
    model = slimlm.load(checkpoints("llama", torch.bfloat16).out)
    config = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompts = [IDS[0, :5].tolist(), IDS[1, :9].tolist()]
    found = [answer.generated_tokens for answer in model.generate_batch(prompts, generation_config=config).values()]
    alone = [model.generate(torch.tensor([p]), generation_config=config)[0, len(p) :].tolist() for p in prompts]
    assert found == alone


@pytest.mark.parametrize("by", BY)
def test_the_number_of_parameters_is_the_original_s(narrow: Path, eight: Path, by: str) -> None:
    for folder in (narrow, eight):
        model, dense = BY[by](folder), AutoModelForCausalLM.from_pretrained(folder.parent / "dense")
        assert model.num_parameters() == dense.num_parameters()
        assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(exclude_embeddings=True)
        model.requires_grad_(False)
        assert model.num_parameters(only_trainable=True) == 0


def test_a_copy_and_a_pickle_are_models_of_the_same_class(eight: Path) -> None:
    model = slimlm.load(eight)
    for other in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and type(other.base_model) is type(model.base_model)
        assert isinstance(other, LlamaForCausalLM) and type(other).__name__ == "LlamaForCausalLM"
        assert torch.equal(other(IDS).logits, model(IDS).logits)
        assert other.origin == model.origin


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("count", [263, 251])
def test_tokens_are_added_and_removed(narrow: Path, by: str, count: int, tmp_path: Path) -> None:
    model = BY[by](narrow)
    before = model(IDS.clamp_max(250)).logits
    model.resize_token_embeddings(count)
    after = model(IDS.clamp_max(250)).logits
    kept = min(count, 256)
    # The head's sums of 48 terms are added in another order.
    torch.testing.assert_close(after[..., :kept], before[..., :kept], rtol=1e-4, atol=1e-4)
    assert after.shape[-1] == count
    generate(model, torch.tensor([[count - 1, 5]]), max_new_tokens=2)
    model.save_pretrained(tmp_path / "new")
    assert slimlm.verify(tmp_path / "new").sound
    again = BY[by](tmp_path / "new")
    assert again.config.vocab_size == count
    torch.testing.assert_close(again(IDS.clamp_max(250)).logits, after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", BY)
def test_packed_embeddings_are_not_resized_and_the_model_stays_as_it_was(eight: Path, by: str) -> None:
    model = BY[by](eight)
    before = model(IDS).logits
    assert model.resize_token_embeddings(256) is model.get_input_embeddings()
    assert model.resize_token_embeddings(pad_to_multiple_of=64) is model.get_input_embeddings()
    for wanted in ({"new_num_tokens": 263}, {"new_num_tokens": 200}, {"pad_to_multiple_of": 100}):
        with pytest.raises(
            ModelError, match=r"embed_tokens is packed \(8-bit .* compress the original without `embedding_bits`"
        ):
            model.resize_token_embeddings(**wanted)
    model.tie_weights()
    assert torch.equal(model(IDS).logits, before) and model.config.vocab_size == 256


@needs_kernels
def test_embeddings_that_are_set_work_in_the_model_s_dtype(checkpoints: Checkpoints) -> None:
    for family in ("llama", "llama-tied", "gpt2"):
        model = slimlm.load(checkpoints(family, torch.bfloat16).out)
        expected = model(IDS).logits
        table, head = nn.Embedding(256, 48, dtype=torch.bfloat16), nn.Linear(48, 256, bias=False, dtype=torch.bfloat16)
        table.weight.data = model.get_input_embeddings().weight.detach().clone()
        head.weight.data = model.get_output_embeddings().weight.detach().clone()
        model.set_input_embeddings(table)
        model.set_output_embeddings(head)
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
        assert isinstance(model.get_input_embeddings(), WideEmbedding) and model.dtype == torch.float32
        model.tie_weights()
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)


# Slow: torch compiles each; `load` is what the documentation names.
@pytest.mark.parametrize("how", ["load", *(pytest.param(way, marks=pytest.mark.slow) for way in ("reference", "transformers"))])
def test_a_prepared_model_is_one_graph(eight: Path, checkpoints: Checkpoints, how: str) -> None:
    for folder in (eight, checkpoints("llama", torch.bfloat16).out):
        model: PreTrainedModel
        if how == "transformers":
            model = AutoModelForCausalLM.from_pretrained(folder)
        else:
            model = slimlm.load(folder, kernels="reference" if how == "reference" else "auto")
        slimlm.prepare(model)
        torch._dynamo.reset()
        with torch.no_grad():
            # More rows than a dense head of 16 bits multiplies by kernels, and fewer.
            for ids in (IDS, IDS[:1, :4]):
                compiled = torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False).logits
                torch.testing.assert_close(compiled, model(ids, use_cache=False).logits)
