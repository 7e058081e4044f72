"""Which decoder a model gets: one whose logits agree with the model's own forward, kept as long as it fits."""

import gc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    HeliumConfig,
    HeliumForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.inference.decode import cuda_graph, selection
from slimlm.inference.decode.cuda_graph import CudaGraphDecoder, capture
from slimlm.inference.decode.selection import KEPT, disagrees
from slimlm.inference.decode.structure import refuses
from slimlm.inference.generate import generate
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import use_kernels
from tests.conftest import random_model
from tests.inference.decode.conftest import TINY, llama


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_in_half_precision_it_agrees_within_the_rounding(dtype: torch.dtype, family: str) -> None:
    model = random_model(family, dtype)
    assert refuses(model, 30) is None
    assert disagrees(model) is None


@pytest.mark.parametrize("family", ["mistral-window", "qwen2-mixed-attention"])
def test_a_window_that_holds_every_position_changes_nothing(family: str) -> None:
    model = random_model(family)
    assert refuses(model, 16) is None
    assert disagrees(model) is None


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
    generate(model, prompt[:, :1], max_new_tokens=1, stop_tokens=[])
    made = generate(model, prompt, max_new_tokens=12, stop_tokens=[])
    right = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert "its logits differ by" in made.decode_path
    assert torch.equal(made.tokens, right[:, 12:])


@pytest.mark.parametrize("window", [1, 3])
def test_the_probe_stays_within_what_the_blocks_see(window: int) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**TINY, sliding_window=window)).eval()
    assert refuses(model, window) is None
    assert disagrees(model) is None


def test_a_graph_that_replays_nothing_is_found_and_the_models_own_forward_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        left = call()
        return lambda: left.clone()

    model, prompt = random_model("llama"), torch.arange(3, 11)[None]
    expected = generate(model, prompt, max_new_tokens=12, stop_tokens=[]).tokens
    monkeypatch.setattr(selection, "decoder_class", lambda model: CudaGraphDecoder)
    monkeypatch.setattr(cuda_graph, "capture", nothing)
    made = generate(model, prompt, max_new_tokens=12, stop_tokens=[])
    assert "its logits differ by" in made.decode_path
    assert torch.equal(made.tokens, expected)


def counted_captures(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Decode every model as on a GPU; gives the devices on which steps are captured from now on."""
    made: list[torch.device] = []

    def counted(call: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        made.append(device)
        return capture(call, device)

    monkeypatch.setattr(selection, "decoder_class", lambda model: CudaGraphDecoder)
    monkeypatch.setattr(cuda_graph, "capture", counted)
    monkeypatch.setattr(selection, "disagrees", lambda model: None)
    return made


def written(model: PreTrainedModel, *, batch: int = 1, count: int = 12) -> Tensor:
    prompt = torch.randint(1, 256, (batch, 8), generator=torch.Generator().manual_seed(3))
    return generate(model, prompt, max_new_tokens=count, stop_tokens=[]).tokens


def test_a_step_is_captured_before_the_first_token_comes_and_for_one_token_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen, model = counted_captures(monkeypatch), list[int](), llama()
    written(model, count=1)
    assert not made
    generate(model, torch.arange(3, 11)[None], max_new_tokens=5, stop_tokens=[], each=lambda tokens: seen.append(len(made)))
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
    step = selection.decoder_for(model, batch=1, length=20)
    assert isinstance(step, CudaGraphDecoder)
    first = step.prefill(prompt)
    step.keys.fill_(float("nan"))
    step.values.fill_(float("inf"))
    KEPT.keep(model, step)
    again = selection.decoder_for(model, batch=1, length=20)
    assert again is step and torch.equal(again.prefill(prompt), first)
    with torch.no_grad():
        assert bool(again(torch.tensor([5])).isfinite().all())


def test_whoever_takes_a_kept_decoder_has_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made, model, prompt = counted_captures(monkeypatch), llama(), torch.arange(3, 11)[None]
    expected = written(model)
    within: list[Tensor] = []
    generate(model, prompt, max_new_tokens=2, stop_tokens=[], each=lambda tokens: within.append(written(model)))
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
def test_a_model_that_changed_is_captured_again(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, model = counted_captures(monkeypatch), llama()
    written(model)
    CHANGES[change](model)
    after = written(model)
    assert len(made) == 2
    KEPT.clear()
    assert torch.equal(after, written(model))


def test_a_kept_decoder_keeps_no_model_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    counted_captures(monkeypatch)
    model = llama()
    written(model)
    kept = ref(KEPT.peek(model))
    alive = ref(model)
    del model
    gc.collect()
    assert alive() is None and kept() is None


def compressed() -> PreTrainedModel:
    """A model with one compressed layer, on the reference."""
    model = llama()
    own = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(own, nn.Linear)
    weight = own.weight.detach()
    model.set_submodule("model.layers.1.mlp.up_proj", CompressedLinear.from_parts(Parts(Plain(weight)), None))
    return model


@pytest.mark.parametrize("change", ["other kernels", "moved", "loaded"])
def test_a_kept_decoder_is_dropped_as_soon_as_layers_select_their_backends_again(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, model = counted_captures(monkeypatch), compressed()
    written(model)
    assert KEPT.peek(model) is not None
    if change == "other kernels":
        use_kernels(model, "reference")
    elif change == "moved":
        model.get_submodule("model.layers.1.mlp.up_proj")._apply(lambda tensor: tensor.clone())
    else:
        model.load_state_dict(model.state_dict())
    gc.collect()
    assert KEPT.peek(model) is None
    written(model)
    assert len(made) == 2


def test_layers_that_were_repacked_are_captured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a cast, after which the selection is the same and what the kernels read lies elsewhere."""
    made, model = counted_captures(monkeypatch), compressed()
    written(model)
    layer = model.get_submodule("model.layers.1.mlp.up_proj")
    assert isinstance(layer, CompressedLinear)
    layer._ready = None
    written(model)
    assert len(made) == 2


@pytest.mark.parametrize(("length", "room"), [(1, 256), (256, 256), (257, 512), (1030, 1280), (4097, 5120), (7900, 8000)])
def test_room_is_for_texts_a_little_longer_and_within_the_context(length: int, room: int) -> None:
    model = llama(max_position_embeddings=8000)
    assert selection.positions_to_allocate(model, length) == room
