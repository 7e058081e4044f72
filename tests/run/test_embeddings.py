"""Embedding and head in few bits: what becomes of them, what stays and why, and that it reads back as one model."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BioGptConfig,
    BioGptForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import slimlm
from slimlm.core.errors import RecipeError
from slimlm.data.windows import tokens_of, windows_of
from slimlm.evaluation.compare import open_any
from slimlm.evaluation.perplexity import perplexity
from slimlm.inference.generate import generate
from slimlm.models.bundled import bundled_model
from slimlm.models.embeddings import GROUP_SIZE, embeddings_of
from slimlm.recipe import Recipe, open_recipe, shipped
from slimlm.run.config import RunConfig
from slimlm.run.embeddings import compress_embeddings
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import packed_layers
from tests.conftest import ENDS, LLAMA_LIKE, Line, needs_kernels, random_model, save
from tests.memory import MIB, needs_smaps, resident

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))
TIED = {"llama-tied", "opt", "opt-projected", "gpt2", "gemma2"}


def squeezed(model: PreTrainedModel, folder: Path, text_file: Path, bits: int = 8, **options: Any) -> slimlm.Result:
    save(model, folder / "dense")
    return slimlm.compress(
        folder / "dense",
        folder / "out",
        recipe="absmax",
        embedding_bits=bits,
        data=str(text_file),
        samples=2,
        length=16,
        **options,
    )


def rounded(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """The nearest point of the grid, written out group by group."""
    found = torch.empty_like(weight)
    top = 2 ** (bits - 1) - 1
    for start in range(0, weight.shape[1], GROUP_SIZE):
        piece = weight[:, start : start + GROUP_SIZE]
        scale = (piece.abs().amax(dim=1, keepdim=True) / top).half().float()
        found[:, start : start + GROUP_SIZE] = (piece / scale).round() * scale
    return found


@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.slow), 8])
def test_both_ends_become_the_nearest_points_of_a_grid_and_tied_ones_stay_one(
    family: str, bits: int, tmp_path: Path, text_file: Path
) -> None:
    dense = random_model(family)
    weights = [m.weight.detach().clone() for m in (dense.get_input_embeddings(), dense.get_output_embeddings())]
    record = squeezed(dense, tmp_path, text_file, bits).record
    model = slimlm.load(tmp_path / "out", kernels="reference")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, CompressedEmbedding) and isinstance(head, CompressedLinear)
    for end, weight in zip((embedding, head), weights, strict=True):
        torch.testing.assert_close(end.parts().base.dense(), rounded(weight, bits), rtol=1e-6, atol=0)
    assert (embedding.weight.data_ptr() == head.weight.data_ptr()) == (family in TIED)
    names = {name for name, module in model.named_modules() if module is embedding or module is head}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    kept = {name for name in names if f"{name}.weight" in stored}
    assert {end.name for end in record.embeddings} == kept
    assert len(kept) == (1 if family in TIED else 2)
    for end in record.embeddings:
        own = [t for name, t in stored.items() if name.startswith(f"{end.name}.weight")]
        assert end.bits == sum(8 * t.numel() * t.element_size() for t in own)
        weight = weights[0] if end.name.endswith(("embed_tokens", "wte")) else weights[1]
        assert end.error == pytest.approx(float((rounded(weight, bits) - weight).norm() / weight.norm()), rel=1e-3)
    # The figure of the blocks is theirs alone.
    assert not {layer.name for layer in record.layers} & names and not names & record.skipped.keys()


def test_slimlm_and_transformers_load_the_same_and_save_the_same(family: str, tmp_path: Path, text_file: Path) -> None:
    squeezed(random_model(family, torch.bfloat16), tmp_path, text_file)
    for dtype in ("auto", torch.float32, torch.float16):
        ours = slimlm.load(tmp_path / "out", dtype=dtype, kernels="reference")
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        slimlm.use_kernels(theirs, "reference")
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    assert ours.get_input_embeddings()(IDS).dtype == torch.float16
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    for number, model in enumerate((ours, theirs)):
        model.tie_weights()
        model.save_pretrained(tmp_path / f"again-{number}")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"again-{number}", dtype=torch.float32)
        slimlm.use_kernels(again, "reference")
        expected = slimlm.load(tmp_path / "out", dtype=torch.float32, kernels="reference")
        stored = load_file(tmp_path / f"again-{number}" / "model.safetensors")
        assert stored.keys() == load_file(tmp_path / "out" / "model.safetensors").keys()
        written = json.loads((tmp_path / f"again-{number}" / "config.json").read_text())["quantization_config"]
        assert written["embeddings"] == config["embeddings"]
        # Norms and biases went through float16.
        torch.testing.assert_close(again(IDS).logits, expected(IDS).logits, rtol=1e-2, atol=1e-2)


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_the_kernels_multiply_by_the_head_and_generation_looks_rows_up(family: str, tmp_path: Path, text_file: Path) -> None:
    squeezed(random_model(family, torch.bfloat16), tmp_path, text_file)
    model = slimlm.load(tmp_path / "out", kernels="precise")
    assert "lm_head" in packed_layers(model)
    expected = slimlm.load(tmp_path / "out", dtype=torch.float32, kernels="reference")
    assert float((model(IDS).logits - expected(IDS).logits).abs().max()) < 1e-3 * float(expected(IDS).logits.abs().max())
    made = generate(model, IDS[:, :6], max_new_tokens=12, stop_tokens=[])
    assert made.decode_path == "fast decode in the CPU kernels, all blocks in one call"
    text = IDS[:, :6]
    for _ in range(12):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(made.tokens, text[:, 6:])
    # The next load maps what the first has packed; a tied head among it.
    again = slimlm.load(tmp_path / "out", kernels="precise")
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@needs_kernels
@needs_smaps
@pytest.mark.parametrize("tied", [False, True])
def test_of_the_stored_matrices_only_the_rows_looked_up_stay_in_memory(tied: bool, tmp_path: Path, text_file: Path) -> None:
    options = {**LLAMA_LIKE, **ENDS, "vocab_size": 32768, "hidden_size": 512, "tie_word_embeddings": tied}
    torch.manual_seed(0)
    squeezed(LlamaForCausalLM(LlamaConfig(**options)).eval(), tmp_path, text_file)
    file = tmp_path / "out" / "model.safetensors"
    assert file.stat().st_size > (16 if tied else 32) * MIB
    model = slimlm.load(tmp_path / "out")
    assert resident(file) < 1.5 * MIB
    model(torch.tensor([[0, 1, 2]]))
    # Around what is read the system maps what it has at hand, up to 2 MiB where it keeps files in large pages.
    assert resident(file) < 6 * MIB


@needs_kernels
def test_a_tied_head_follows_other_weights_of_its_embedding(tmp_path: Path, text_file: Path) -> None:
    squeezed(random_model("llama-tied"), tmp_path, text_file)
    model = slimlm.load(tmp_path / "out", kernels="precise")
    before = model(IDS).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.embed_tokens.weight_scale"] *= 2
    model.load_state_dict(state)
    expected = slimlm.load(tmp_path / "out", kernels="reference")
    expected.load_state_dict(state)
    assert not torch.allclose(model(IDS).logits, before, rtol=0.1)
    assert float((model(IDS).logits - expected(IDS).logits).abs().max()) < 1e-3 * float(before.abs().max())


def test_a_copy_of_a_tied_model_has_a_matrix_of_its_own(tmp_path: Path, text_file: Path) -> None:
    squeezed(random_model("llama-tied"), tmp_path, text_file)
    model = slimlm.load(tmp_path / "out", dtype=torch.float32, kernels="reference")
    expected = model(IDS).logits
    twin = deepcopy(model)
    assert twin.lm_head.embedding is twin.model.embed_tokens
    twin.model.embed_tokens.weight.fill_(128)  # the code of zero
    slimlm.use_kernels(twin, "reference")
    assert float(twin(IDS).logits.abs().max()) == 0
    assert torch.equal(model(IDS).logits, expected)


@needs_kernels
def test_casts_keep_a_tied_head_s_packing_and_moves_forget_it(tmp_path: Path, text_file: Path) -> None:
    squeezed(random_model("llama-tied"), tmp_path, text_file)
    model = slimlm.load(tmp_path / "out", kernels="precise")
    blob, expected = model.lm_head.prepare().blob, model(IDS).logits
    for place in (torch.float32, "cpu", torch.bfloat16, torch.float32):
        model.to(place)
        assert model.lm_head.prepare().blob.data_ptr() == blob.data_ptr()
    # Norms went through bfloat16.
    torch.testing.assert_close(model(IDS).logits, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
    model.to("meta")
    assert model.lm_head.stored().blob is None and model.lm_head.weight.device.type == "meta"


def test_gemma_s_scaled_embedding_is_scaled_as_before(tmp_path: Path, text_file: Path) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**LLAMA_LIKE, **ENDS, head_dim=12, layer_types=["full_attention"] * 2)
    model = Gemma3ForCausalLM(config).eval()
    rows = model.get_input_embeddings()(IDS).detach()
    squeezed(model, tmp_path, text_file)
    loaded = slimlm.load(tmp_path / "out", kernels="reference").get_input_embeddings()
    assert isinstance(loaded, CompressedEmbedding) and loaded.factor == pytest.approx(48**0.5)
    assert float((loaded(IDS) - rows).norm()) < 0.01 * float(rows.norm())


class Odd(nn.Embedding):
    """Does more than look up."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.normalize(super().forward(ids), dim=-1)


class Bounded(nn.Linear):
    """Is no plain product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def skipped_of(model: PreTrainedModel) -> dict[str, str]:
    embeddings = embeddings_of(model, 8)
    compress_embeddings(model, embeddings)
    packed = {n for n, m in model.named_modules() if isinstance(m, CompressedEmbedding | CompressedLinear)}
    assert packed == set(embeddings.names)
    assert not packed & embeddings.skipped.keys()
    return embeddings.skipped


def test_what_computes_something_else_stays_and_says_why() -> None:
    odd = random_model("llama")
    odd.model.embed_tokens = Odd(256, 48)
    assert skipped_of(odd) == {"model.embed_tokens": "a Odd, which may do more than look up"}
    bounded = random_model("llama")
    bounded.lm_head = Bounded(48, 256)
    assert skipped_of(bounded) == {"lm_head": "a Bounded, not an nn.Linear"}
    changing = random_model("llama")
    changing.model.embed_tokens.max_norm = 1.0
    assert skipped_of(changing) == {"model.embed_tokens": "its rows change while they are looked up (max_norm)"}


def test_of_two_tied_ends_both_stay_or_none() -> None:
    model = random_model("llama-tied")
    head = Bounded(48, 256, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    assert skipped_of(model) == {
        "model.embed_tokens": "tied to one that is not compressed",
        "lm_head": "a Bounded, not an nn.Linear",
    }
    shared = random_model("llama")
    shared.model.layers[0].extra = nn.Linear(48, 256, bias=False)
    shared.model.layers[0].extra.weight = shared.lm_head.weight
    assert skipped_of(shared) == {"lm_head": "model.layers.0.extra has the same weight"}


def test_what_stays_is_named_in_the_record_and_the_rest_is_compressed(tmp_path: Path, text_file: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    options = {**sizes, **ENDS, "vocab_size": 256, "max_position_embeddings": 64, "tie_word_embeddings": False}
    record = squeezed(BioGptForCausalLM(BioGptConfig(**options)).eval(), tmp_path, text_file).record
    reason = "a BioGptScaledWordEmbedding, which may do more than look up"
    assert record.skipped == {"biogpt.embed_tokens": reason}
    assert [end.name for end in record.embeddings] == ["output_projection"]


def test_sixteen_bits_leave_both_as_they_are_stored(tmp_path: Path, text_file: Path) -> None:
    record = squeezed(random_model("llama", torch.bfloat16), tmp_path, text_file, 16).record
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "out"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(before[name], after[name]) and after[name].dtype == torch.bfloat16
    assert record.embeddings == () and record.skipped == {"lm_head": "outside the blocks"}


def test_the_blocks_layers_come_out_the_same_with_and_without(tmp_path: Path, text_file: Path) -> None:
    model = random_model("llama")
    plain = squeezed(model, tmp_path / "16", text_file, 16).record
    small = squeezed(model, tmp_path / "8", text_file, 8).record
    assert plain.layers == small.layers and plain.bits_per_weight == small.bits_per_weight
    assert small.stored_bytes < plain.stored_bytes
    assert open_any(str(tmp_path / "8" / "out")).bits_per_weight == pytest.approx(plain.bits_per_weight)


def test_at_eight_bits_the_bundled_model_s_perplexity_hardly_moves() -> None:
    opened = open_any(str(bundled_model()))
    tokens = tokens_of(opened.tokenizer, "stdlib", "evaluation", at_most=4 * 512)
    windows = windows_of(tokens, 512, source="stdlib")
    before = perplexity(opened.model, windows).value
    compress_embeddings(opened.model, embeddings_of(opened.model, 8))
    assert perplexity(opened.model, windows).value == pytest.approx(before, rel=0.005)


# Asking for it


def test_of_the_shipped_recipes_only_the_best_ones_ask_for_it() -> None:
    asked = {name: open_recipe(name).embedding_bits for name in shipped()}
    assert {name for name, bits in asked.items() if bits != 16} == {"best", "best-24", "best-24-matched"}
    assert asked["best"] == asked["best-24"] == asked["best-24-matched"] == 8


@pytest.mark.parametrize("bits", [3, 9, 0, 17, True, 8.0, "8"])
def test_other_bits_are_refused_in_words(bits: Any) -> None:
    with pytest.raises(RecipeError, match="4 to 8 bits, or 16"):
        RunConfig(model="m", recipe="slim", embedding_bits=bits)


def test_a_number_given_takes_precedence_over_the_recipe_s() -> None:
    def opened(recipe: str, bits: int | None) -> Recipe:
        return RunConfig(model="m", recipe=recipe, embedding_bits=bits).opened_recipe

    assert opened("best-24", 16).embedding_bits == 16
    assert opened("slim", 5).embedding_bits == 5
    assert opened("best-24", None) == open_recipe("best-24")


def test_the_command_line_asks_and_shows(llama_folder: Path, tmp_path: Path, text_file: Path, line: Line) -> None:
    options = ["--recipe", "absmax", "--data", text_file, "--samples", 2, "--length", 16, "--embedding-bits", 8]
    _, shown, _ = line("compress", llama_folder, "--out", tmp_path / "out", *options)
    assert "256 x 48, 8-bit (groups of 32), 8.667 bits per weight" in " ".join(shown.split())
    _, shown, _ = line("inspect", tmp_path / "out")
    rows = [row for row in shown.splitlines() if row.startswith(("lm_head ", "model.embed"))]
    assert len(rows) == 4  # a row in the table of layers and one in the summary for each
    data = json.loads(line("inspect", tmp_path / "out", "--json")[1])
    assert [end["name"] for end in data["embeddings"]] == ["model.embed_tokens", "lm_head"]
    assert data["recipe"]["embedding_bits"] == 8
