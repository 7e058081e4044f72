"""The lean step: the logits of the model's own forward, or a reason in words."""

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.inference.decode import lean
from slimlm.inference.decode.grouped import direct, joint
from slimlm.inference.decode.lean import LeanStep, StaticStep, attend, captured, disagrees, refuses
from slimlm.inference.generate import generate
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import use_kernels
from tests.conftest import ENDS, LLAMA_LIKE, random_model
from tests.runtime.fake_devices import pretend_cards

TINY: dict[str, Any] = {**LLAMA_LIKE, **ENDS}


def llama(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms far from one, so that a norm without its weight would show.
            parameter.normal_(std=0.15) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    return model


def logits_of_both(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of tokens `[batch, count]` after the fourth, by the lean step and by the model's own forward."""
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens[:, :4], past_key_values=cache)
        step = LeanStep(model, batch=tokens.shape[0], length=tokens.shape[1])
        step.fill(cache)
        ours = torch.stack([step(column) for column in tokens[:, 4:].unbind(1)], dim=1)
        return ours, model(tokens).logits[:, 4:]


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_logits_are_those_of_the_model_s_own_forward(rope: dict[str, Any], batch: int) -> None:
    model = llama(rope_parameters=rope, attention_bias=True, mlp_bias=True)
    tokens = torch.randint(256, (batch, 30), generator=torch.Generator().manual_seed(1))
    assert refuses(model, 30) is None
    ours, theirs = logits_of_both(model, tokens)
    # float32 in another order of addition, logits of size one to ten
    assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_half_precision_it_agrees_within_the_rounding(dtype: torch.dtype, family: str) -> None:
    model = random_model(family, dtype)
    assert refuses(model, 30) is None
    assert disagrees(model) is None


def test_embeddings_and_norms_of_two_dtypes_give_activations_of_the_wider() -> None:
    model = llama()
    model.get_input_embeddings().to(torch.bfloat16)
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(1))
    assert refuses(model, 12) is None
    ours, theirs = logits_of_both(model, tokens)
    assert ours.dtype == torch.float32
    # transformers rounds the first norm's output to the embedding's bfloat16: 2^-9 of one block's input
    assert float((ours - theirs).abs().max()) < 2e-2 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gpt2", "not built like Llama: the model holds lm_head, transformer"),
        ("opt", "not built like Llama: the decoder holds decoder"),
        ("mistral-window", "a window of 16 positions, and 17 are needed"),
        ("qwen2-mixed-attention", "a window of 16 positions, and 17 are needed"),
    ],
)
def test_what_is_not_understood_is_refused_in_words(family: str, words: str) -> None:
    reason = refuses(random_model(family), 17)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-mixed-attention"])
def test_a_window_that_holds_every_position_changes_nothing(family: str) -> None:
    model = random_model(family)
    assert refuses(model, 16) is None
    assert disagrees(model) is None


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: GemmaForCausalLM(GemmaConfig(**TINY, head_dim=12)), "its embedding is a Gemma"),
        (lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=2)), "the mlp of block 0 holds"),
        (lambda: llama(hidden_act="gelu"), "the activation of block 0"),
        (lambda: llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "rope type dynamic"),
    ],
    ids=["gemma", "mixtral", "gelu", "dynamic rope"],
)
def test_other_arithmetic_is_refused_in_words(model: Any, words: str) -> None:
    torch.manual_seed(0)
    reason = refuses(model().eval(), 8)
    assert reason is not None
    assert words in reason


def test_hooks_and_training_are_refused() -> None:
    model = llama()
    assert "training" in str(refuses(model.train(), 8))
    model.eval().get_submodule("model.layers.1.mlp.up_proj").register_forward_pre_hook(lambda *_: None)
    assert "hooks" in str(refuses(model, 8))


def test_a_norm_of_another_formula_is_refused() -> None:
    class PlusOne(nn.Module):
        """Gemma's norm in Llama's clothes."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(width))
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.rms_norm(x, self.weight.shape, 1 + self.weight, self.variance_epsilon)

    model = llama()
    model.get_submodule("model").norm = PlusOne(48)
    assert "the last norm (PlusOne) is not" in str(refuses(model, 8))


@pytest.mark.parametrize(
    "model",
    [
        lambda: GraniteForCausalLM(GraniteConfig(**TINY, residual_multiplier=0.5, embedding_multiplier=3.0)),
        lambda: HeliumForCausalLM(HeliumConfig(**TINY, head_dim=12)),
    ],
    ids=["granite multiplies", "helium rotates neighbours"],
)
def test_a_model_of_the_same_structure_that_computes_something_else_does_not_agree(model: Any) -> None:
    torch.manual_seed(0)
    other = model().eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    assert refuses(other, 20) is None
    assert "differ by" in str(disagrees(other))


def test_the_probe_is_as_long_whatever_is_generated_first() -> None:
    torch.manual_seed(0)
    model = HeliumForCausalLM(HeliumConfig(**TINY, head_dim=12)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.15)
    prompt = torch.randint(1, 256, (1, 12), generator=torch.Generator().manual_seed(1))
    generate(model, prompt[:, :1], max_new_tokens=1, ends=[])
    made = generate(model, prompt, max_new_tokens=12, ends=[])
    right = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert "its logits differ by" in made.way
    assert torch.equal(made.tokens, right[:, 12:])


@pytest.mark.parametrize("window", [1, 3])
def test_the_probe_stays_within_what_the_blocks_see(window: int) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=window)).eval()
    assert refuses(model, window) is None
    assert disagrees(model) is None


@pytest.mark.parametrize("owner", ["model", "model.layers.1.self_attn", "model.layers.0.mlp"])
@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_tensors_that_llama_has_not_are_refused(owner: str, kind: str) -> None:
    """Such as the sinks that GPT-OSS's attention adds to its softmax."""
    model = llama()
    module = model.get_submodule(owner)
    if kind == "parameter":
        module.sinks = nn.Parameter(torch.zeros(4))
    else:
        module.register_buffer("sinks", torch.zeros(4))
    assert "has tensors of its own, which Llama's has not: sinks" in str(refuses(model, 8))


def test_attention_of_one_query_is_the_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    queries, keys, values = (torch.randn(2, n, 4, generator=generator) for n in (3, 5, 5))
    expected = torch.softmax(torch.einsum("hgw,hsw->hgs", queries, keys), -1)
    assert torch.allclose(attend(queries, keys, values), torch.einsum("hgs,hsw->hgw", expected, values), atol=1e-6)
    halves = attend(queries.bfloat16(), keys.bfloat16(), values.bfloat16())
    # bfloat16 keeps 8 bits
    assert torch.allclose(halves.float(), attend(queries, keys, values), atol=3e-2)


def test_layers_called_together_or_directly_give_what_they_give_one_by_one() -> None:
    torch.manual_seed(3)
    layers = [nn.Linear(6, out, bias=out > 2) for out in (2, 3, 4)]
    x = torch.randn(2, 6)
    for count in (1, 2, 3):
        for together, layer in zip(joint(layers[:count])(x), layers[:count], strict=True):
            assert torch.equal(together, layer(x))
    doubled = nn.Sequential(layers[0])
    assert torch.equal(direct(doubled)(x), layers[0](x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_whose_position_is_a_tensor_gives_what_the_lean_step_gives(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean, "_LEAST_SEEN", 4)
    model, tokens = llama().to(dtype), torch.randint(5, 50, (2, 12), generator=torch.Generator().manual_seed(1))
    steps = [kind(model, batch=2, length=12) for kind in (LeanStep, StaticStep)]
    for _ in range(2):  # a second text after the first: nothing of it is left
        first, second = (step.read(tokens[:, :3]) for step in steps)
        assert torch.equal(first, second)
        for column in tokens[:, 3:].unbind(1):
            with torch.no_grad():
                expected, found = (step(column) for step in steps)
            torch.testing.assert_close(found, expected, rtol=0, atol={torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype])
    assert isinstance(steps[1], StaticStep) and sorted(steps[1].replays) == [4, 8, 12]


def test_a_static_step_is_made_once_for_as_many_positions_and_runs_the_same_call(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.device] = []

    def counted(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        made.append(device)
        return captured(call, device)

    monkeypatch.setattr(lean, "captured", counted)
    step, token = StaticStep(llama(max_position_embeddings=300), batch=1, length=300), torch.tensor([7])
    with torch.no_grad():
        for position in (0, 1, 255):
            step.position = position
            step(token)
        assert made == [torch.device("cpu")] and list(step.replays) == [256]
        step.position = 256
        step(token)
    assert list(step.replays) == [256, 300]


def test_off_a_card_what_is_captured_is_the_call_itself() -> None:
    def call() -> Tensor:
        return torch.zeros(1)

    assert captured(call, torch.device("cpu")) is call


@pytest.mark.parametrize("index", [0, 1])
def test_a_call_is_captured_on_its_own_card_whichever_is_the_current_one(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cards, where, number = pretend_cards(monkeypatch), torch.device("cuda", index), torch.zeros(1)
    replay = captured(cards.on(where, lambda: number * 2), where)
    for value in (3.0, 5.0):
        number.fill_(value)
        assert float(replay()) == 2 * value
    assert cards.used == [where] and cards.current == torch.device("cuda", 0)


def test_a_graph_that_replays_nothing_is_found_and_the_models_own_forward_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        left = call()
        return lambda: left.clone()

    model, prompt = random_model("llama"), torch.arange(3, 11)[None]
    expected = generate(model, prompt, max_new_tokens=12, ends=[]).tokens
    monkeypatch.setattr(lean, "_kind", lambda model: StaticStep)
    monkeypatch.setattr(lean, "captured", nothing)
    made = generate(model, prompt, max_new_tokens=12, ends=[])
    assert "its logits differ by" in made.way
    assert torch.equal(made.tokens, expected)


def counted_captures(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Let every model be stepped through as on a card; where steps are captured from now on."""
    made: list[torch.device] = []

    def counted(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        made.append(device)
        return captured(call, device)

    monkeypatch.setattr(lean, "_kind", lambda model: StaticStep)
    monkeypatch.setattr(lean, "captured", counted)
    monkeypatch.setattr(lean, "disagrees", lambda model: None)
    return made


def written(model: PreTrainedModel, *, batch: int = 1, count: int = 12) -> Tensor:
    prompt = torch.randint(1, 256, (batch, 8), generator=torch.Generator().manual_seed(3))
    return generate(model, prompt, max_new_tokens=count, ends=[]).tokens


def test_a_step_is_captured_before_the_first_token_comes_and_for_one_token_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen, model = counted_captures(monkeypatch), list[int](), llama()
    written(model, count=1)
    assert not made
    generate(model, torch.arange(3, 11)[None], max_new_tokens=5, ends=[], each=lambda tokens: seen.append(len(made)))
    assert seen == [1] * 5


def test_a_second_text_is_written_with_the_steps_that_the_first_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [written(llama(), count=count) for count in (12, 5, 20)]
    made, model = counted_captures(monkeypatch), llama()
    with torch.inference_mode():
        found = [written(model, count=12)]
    found += [written(model, count=count) for count in (5, 20)]
    assert len(made) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    written(model, batch=2)
    written(model)
    assert len(made) == 3, "one is kept for a model, and texts of another number take none of its memory"


def test_nothing_of_a_text_that_was_not_finite_is_left_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    counted_captures(monkeypatch)
    model, prompt = llama(), torch.arange(3, 11)[None]
    step = lean.stepper(model, batch=1, length=20)
    assert isinstance(step, StaticStep)
    first = step.read(prompt)
    step.keys.fill_(float("nan"))
    step.values.fill_(float("inf"))
    lean.keep(model, step)
    again = lean.stepper(model, batch=1, length=20)
    assert again is step and torch.equal(again.read(prompt), first)
    with torch.no_grad():
        assert bool(again(torch.tensor([5])).isfinite().all())


def test_whoever_takes_what_was_kept_has_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model, prompt = counted_captures(monkeypatch), llama(), torch.arange(3, 11)[None]
    expected = written(model)
    within: list[Tensor] = []
    generate(model, prompt, max_new_tokens=2, ends=[], each=lambda tokens: within.append(written(model)))
    assert len(within) == 2 and all(torch.equal(one, expected) for one in within)
    assert len(made) == 2


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a weight is written to": lambda model: nn.init.normal_(model.model.layers[0].mlp.up_proj.weight, std=0.15),
    "a norm is written to without a trace": lambda model: model.model.norm.weight.data.mul_(2),
    "a weight is another": lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach().clone())),
    "a weight lies elsewhere": lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data.clone()),
    "a bias is added": lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(256))),
    "another dtype": lambda model: model.bfloat16(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changed_is_captured_anew(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = counted_captures(monkeypatch), llama()
    written(model)
    CHANGES[change](model)
    after = written(model)
    assert len(made) == 2
    lean._KEPT.clear()
    assert torch.equal(after, written(model))


def test_what_is_kept_keeps_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    counted_captures(monkeypatch)
    model = llama()
    written(model)
    kept = ref(lean._KEPT[model].step)
    alive = ref(model)
    del model
    gc.collect()
    assert alive() is None and kept() is None


def compressed() -> PreTrainedModel:
    """A model with one compressed layer, which the reference multiplies."""
    model = llama()
    own = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(own, nn.Linear)
    weight = own.weight.detach()
    model.set_submodule("model.layers.1.mlp.up_proj", CompressedLinear.from_parts(Parts(Plain(weight)), None))
    return model


@pytest.mark.parametrize("change", ["other kernels", "moved", "loaded"])
def test_where_layers_are_chosen_for_anew_what_was_kept_is_dropped_at_once(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = counted_captures(monkeypatch), compressed()
    written(model)
    assert model in lean._KEPT
    if change == "other kernels":
        use_kernels(model, "reference")
    elif change == "moved":
        model.get_submodule("model.layers.1.mlp.up_proj")._apply(lambda tensor: tensor.clone())
    else:
        model.load_state_dict(model.state_dict())
    gc.collect()
    assert model not in lean._KEPT
    written(model)
    assert len(made) == 2


def test_layers_that_were_repacked_are_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a cast, after which the choice is the same and what the kernels read lies elsewhere."""
    made, model = counted_captures(monkeypatch), compressed()
    written(model)
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, CompressedLinear)
    layer._prepared = None
    written(model)
    assert len(made) == 2


@pytest.mark.parametrize(("length", "room"), [(1, 256), (256, 256), (257, 512), (1030, 1280), (4097, 5120), (7900, 8000)])
def test_room_is_for_texts_a_little_longer_and_within_the_context(length: int, room: int) -> None:
    model = llama(max_position_embeddings=8000)
    assert lean._room(model, length) == room
