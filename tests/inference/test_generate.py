"""Text from a model: the tokens of transformers' own `generate`, whole characters, honest endings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import slimlm
from benchmarks.tiny_models import tiny_model
from slimlm.inference.decode import selection
from slimlm.inference.generate import TextStream, generate, room_for, stop_tokens_of
from tests.conftest import ALL_FAMILIES, ENDS, LLAMA_LIKE, Line, byte_tokenizer, random_model, save
from tests.fake_gpu import FAKE_GPU, fake_gpu

MORE: dict[str, Any] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA_LIKE, **ENDS, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE, **ENDS)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE, **ENDS, tie_word_embeddings=True)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**LLAMA_LIKE, **ENDS, head_dim=12)),
}
FAST = {"llama", "llama-tied", "mistral", "qwen2", "qwen2-tied", "qwen3"}


def model_of(family: str, monkeypatch: pytest.MonkeyPatch) -> PreTrainedModel:
    monkeypatch.setattr("tests.conftest.FAMILIES", {**ALL_FAMILIES, **MORE})
    return random_model(family)


def prompt_of(batch: int, length: int = 8) -> Tensor:
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(3))


def reference(model: PreTrainedModel, prompt: Tensor, count: int, **options: Any) -> Tensor:
    """The new tokens of transformers' greedy search."""
    mask = torch.ones_like(prompt)
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, **options)
    return made[:, prompt.shape[1] :]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", sorted({*ALL_FAMILIES, *MORE}))
def test_greedy_tokens_are_those_of_transformers(name: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name, monkeypatch)
    prompt = prompt_of(batch)
    made = generate(model, prompt, max_new_tokens=30, stop_tokens=[])
    assert torch.equal(made.tokens, reference(model, prompt, 30, eos_token_id=None))
    assert ("fast decode" in made.decode_path) == (name in FAST), made.decode_path
    assert (made.stopped, made.batch, made.prompt_tokens) == ("length", batch, 8)


def test_a_compressed_model_is_decoded_fast(tmp_path: Path, llama_folder: Path, text_file: Path) -> None:
    slimlm.compress(llama_folder, tmp_path / "out", recipe="slim", data=str(text_file), samples=8, length=32)
    model = slimlm.load(tmp_path / "out", dtype=torch.float32)
    made = generate(model, prompt_of(1), max_new_tokens=20, stop_tokens=[])
    assert made.decode_path == "fast decode with torch"
    assert torch.equal(made.tokens, reference(model, prompt_of(1), 20, eos_token_id=None))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_writing_stops_at_an_end_token_and_a_text_that_ended_repeats_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name, monkeypatch)
    free = generate(model, prompt_of(2), max_new_tokens=20, stop_tokens=[]).tokens
    # A token of the first text that the second, which must not end, does not have.
    first = next(token for token in free[0, 3:].tolist() if token not in free[1])
    ending = free[0].tolist().index(first)
    both = generate(model, prompt_of(2), max_new_tokens=20, stop_tokens=[first])
    assert both.stopped == "length"
    assert torch.equal(both.tokens[1], free[1])
    assert torch.equal(both.tokens[0, : ending + 1], free[0, : ending + 1])
    assert set(both.tokens[0, ending:].tolist()) == {first}
    alone = generate(model, prompt_of(2)[:1], max_new_tokens=20, stop_tokens=[first, 255])
    assert alone.stopped == "end"
    assert torch.equal(alone.tokens[0], free[0, : ending + 1])


def test_without_ends_the_model_s_own_end_a_text() -> None:
    model = random_model("llama")
    assert stop_tokens_of(model) == [0]
    free = generate(model, prompt_of(1), max_new_tokens=10, stop_tokens=[]).tokens[0]
    model.generation_config.eos_token_id = [int(free[3]), 77]
    assert generate(model, prompt_of(1), max_new_tokens=10).stopped == "end"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_context_is_filled_and_never_exceeded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name, monkeypatch)
    made = generate(model, prompt_of(1, 60), max_new_tokens=50, stop_tokens=[])
    assert made.tokens.shape == (1, 4)
    assert made.stopped == "context"
    with pytest.raises(slimlm.SlimlmError, match="the prompt has 64 tokens; the model's context holds 64"):
        generate(model, prompt_of(1, 64), max_new_tokens=1)
    assert room_for(model, 63) == 1


def test_one_token_comes_from_the_prompt_alone() -> None:
    made = generate(random_model("llama"), prompt_of(1), max_new_tokens=1, stop_tokens=[])
    assert made.tokens.shape == (1, 1)
    assert made.new_rate is None
    assert made.prompt_rate > 0


@pytest.mark.parametrize("options", [{"max_new_tokens": 0}, {"max_new_tokens": 1, "temperature": -1.0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(slimlm.SlimlmError, match="at least 1 new token"):
        generate(random_model("llama"), prompt_of(1), **options)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(slimlm.SlimlmError, match="the prompt is empty"):
        generate(random_model("llama"), torch.zeros(1, 0, dtype=torch.long), max_new_tokens=1)


def test_a_seed_gives_the_same_text_again_and_another_seed_another() -> None:
    model = random_model("llama")
    state = torch.get_rng_state()

    def drawn(seed: int, temperature: float = 1.0) -> list[int]:
        made = generate(model, prompt_of(1), max_new_tokens=20, temperature=temperature, seed=seed, stop_tokens=[])
        return list(made.tokens[0].tolist())

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    # At a temperature near 0 the likeliest token is drawn.
    assert drawn(1, 1e-4) == generate(model, prompt_of(1), max_new_tokens=20, stop_tokens=[]).tokens[0].tolist()
    assert torch.equal(state, torch.get_rng_state()), "the caller's random numbers must be left alone"


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_from_logits_that_are_not_finite_no_token_comes(value: str, temperature: float) -> None:
    model = random_model("llama")
    model.get_submodule("model.norm").weight.data[0] = float(value)
    with pytest.raises(slimlm.SlimlmError, match="not finite"):
        generate(model, prompt_of(1), max_new_tokens=3, temperature=temperature)


def test_a_model_whose_fast_decoder_disagrees_is_run_by_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = generate(random_model("llama"), prompt_of(1), max_new_tokens=10, stop_tokens=[]).tokens
    model = random_model("llama")
    monkeypatch.setattr("slimlm.inference.decode.torch_decoder.attend", lambda queries, keys, values: queries)
    made = generate(model, prompt_of(1), max_new_tokens=10, stop_tokens=[])
    assert "static cache (its logits differ by" in made.decode_path
    assert torch.equal(made.tokens, expected)


def test_a_model_without_a_static_cache_gets_one_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("gpt2", monkeypatch)
    expected = generate(model, prompt_of(1), max_new_tokens=10, stop_tokens=[]).tokens
    monkeypatch.setattr(type(model), "_can_compile_fullgraph", False)
    made = generate(model, prompt_of(1), max_new_tokens=10, stop_tokens=[])
    assert "a growing cache, as transformers has no static one" in made.decode_path
    assert torch.equal(made.tokens, expected)


@pytest.mark.parametrize(
    ("kind", "cache"),
    [("minimax", "the model's own kind of cache"), ("xlstm", "the model's own kind of cache"), ("bamba", "cache")],
)
# Some classes say that a faster implementation of theirs is missing.
@pytest.mark.filterwarnings("default")
def test_a_model_with_a_cache_of_another_kind_writes_what_it_writes_without_one(kind: str, cache: str) -> None:
    model = tiny_model(kind)
    text = prompt = prompt_of(2)
    for _ in range(6):
        text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    made = generate(model, prompt, max_new_tokens=6, stop_tokens=[])
    assert torch.equal(made.tokens, text[:, 8:])
    assert cache in made.decode_path


def test_each_step_is_reported_as_it_comes() -> None:
    told: list[list[int]] = []
    made = generate(random_model("llama"), prompt_of(3), max_new_tokens=5, stop_tokens=[], each=told.append)
    assert torch.equal(torch.tensor(told).T, made.tokens)


class TableDecoder:
    """A model that is a table of logits `[token, next token]`."""

    path = "a table"

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def prefill(self, prompt: Tensor) -> Tensor:
        return self(prompt[:, -1])

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.table.index_select(0, tokens)


@pytest.mark.parametrize("stop_tokens", [[], [255]], ids=["no stop tokens", "a stop token"])
def test_a_gpu_is_waited_for_once_for_every_token(stop_tokens: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted is what `generate` asks for, as the decoder is a table."""
    table = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    table[:, 255] = -9
    waits, reported = list[int](), list[list[int]]()
    with fake_gpu() as counts:
        decoder = TableDecoder(table.to(FAKE_GPU))
        monkeypatch.setattr(selection, "refuses", lambda model, length: None)
        monkeypatch.setattr(selection, "decoder_for", lambda model, batch, length: decoder)
        prompt = torch.tensor([[3], [4]]).to(FAKE_GPU)
        for count in (10, 20):
            before = counts.waits
            made = generate(random_model("llama"), prompt, max_new_tokens=count, stop_tokens=stop_tokens, each=reported.append)
            waits.append(counts.waits - before)
    assert waits[1] - waits[0] == 10
    assert made.tokens.T.tolist() == reported[10:]


TEXT = "naïve café, 北京 and 東京; \U0001f600\U0001f680 done\n"


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Words with a leading mark, and bytes for what is not a word, as Llama's first tokenizer had them."""
    words = ["<s>", "</s>", "▁a", "▁word", "北"] + [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True, ignore_merges=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def pieces_of(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> list[str]:
    pieces = TextStream(tokenizer)
    return [*(pieces.put([token]) for token in tokens), pieces.end()]


def test_pieces_join_to_the_text_and_tear_no_character() -> None:
    tokenizer = byte_tokenizer()
    pieces = pieces_of(tokenizer, tokenizer(TEXT)["input_ids"])
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[:2] == ["n", "a"], "what is whole is not held back"


def test_spaces_at_the_edges_of_tokens_and_bytes_that_make_a_character_are_kept() -> None:
    tokenizer = fallback_tokenizer()
    tokens = [0, 3, 2, *(5 + byte for byte in "京".encode()), 4, 3, 1]
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == "word a京北 word" == tokenizer.decode(tokens, skip_special_tokens=True)
    assert "京" in pieces


def test_a_character_that_never_ends_is_shown_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer("a é")["input_ids"][:-1]
    assert pieces_of(tokenizer, tokens) == ["a", " ", "", "\ufffd"]


def test_the_command_prints_the_text_and_on_standard_error_how_fast_it_came(llama_folder: Path, line: Line) -> None:
    status, out, err = line("generate", llama_folder, "--prompt", "one two", "--max-new-tokens", 6)
    assert status == 0
    assert out.startswith("one two")
    assert "prompt: 8 tokens" in err
    assert "tokens/s after the first" in err
    assert "made by fast decode with torch" in err


def test_the_command_gives_one_object_with_text_counts_seconds_and_rates(llama_folder: Path, line: Line) -> None:
    arguments = (llama_folder, "--prompt", "one two", "--max-new-tokens", 6)
    _, streamed, _ = line("generate", *arguments)
    status, out, err = line("generate", *arguments, "--json")
    data = json.loads(out)
    assert status == 0
    assert "one two" + data["text"] + "\n" == streamed
    assert (data["prompt_tokens"], data["new_tokens"], data["stopped"]) == (8, 6, "length")
    assert data["prompt_tokens_per_second"] == pytest.approx(8 / data["prompt_seconds"])
    assert data["new_tokens_per_second"] == pytest.approx(5 / data["new_seconds"])
    assert "tokens/s" not in err


def test_the_command_says_why_another_family_is_slower_and_what_does_not_fit(tmp_path: Path, line: Line) -> None:
    folder = save(random_model("gpt2"), tmp_path / "gpt2")
    _, _, err = line("generate", folder, "--prompt", "a" * 60, "--max-new-tokens", 50)
    assert "the model's context is full" in err
    assert "the model's forward with a static cache (it is not built like Llama" in err
    status, out, err = line("generate", folder, "--prompt", "a" * 70)
    assert (status, out) == (2, "")
    assert "the prompt has 71 tokens; the model's context holds 64" in err
