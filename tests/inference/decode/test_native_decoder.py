"""All blocks in one call of the kernels: the logits of the model's own forward, in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from slimlm.core.errors import KernelError
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.inference.decode.native_decoder import NativeDecoder
from slimlm.inference.decode.selection import decoder_for, disagrees
from slimlm.inference.decode.structure import refuses
from slimlm.inference.decode.torch_decoder import TorchDecoder
from slimlm.inference.generate import generate
from slimlm.kernels import native
from slimlm.models.structure import linears_of
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import use_kernels
from tests.conftest import ENDS, LLAMA_LIKE
from tests.inference.decode.conftest import ROPES, llama

pytestmark = pytest.mark.skipif(native.library() is None, reason="there are no CPU kernels")


def packed(model: PreTrainedModel, precision: Any = "precise") -> PreTrainedModel:
    """A copy whose linear layers hold the same float32 weights, but in the kernels' layout."""
    own = copy.deepcopy(model)
    for name, layer in linears_of(own).items():
        assert isinstance(layer, nn.Linear)
        own.set_submodule(name, CompressedLinear.from_parts(Parts(Plain(layer.weight.detach())), layer.bias))
    use_kernels(own, precision)
    return own.eval()


def tokens_of(batch: int, count: int) -> Tensor:
    return torch.randint(256, (batch, count), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel, tokens: Tensor, prompt: int) -> Tensor:
    """After the prompt and after each further token `[batch, further + 1, vocabulary]`, by the fastest decoder."""
    step = decoder_for(model, batch=tokens.shape[0], length=tokens.shape[1])
    assert isinstance(step, NativeDecoder)
    return torch.stack([step.prefill(tokens[:, :prompt]), *(step(column) for column in tokens[:, prompt:].unbind(1))], dim=1)


def expected(model: PreTrainedModel, tokens: Tensor, prompt: int) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).double()(tokens).logits[:, prompt - 1 :]


def difference(found: Tensor, right: Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    return float((found - right).abs().max() / right.abs().max())


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_logits_are_those_of_the_model_s_own_forward(rope: dict[str, Any], batch: int) -> None:
    model, tokens = llama(rope_parameters=rope, attention_bias=True, mlp_bias=True), tokens_of(batch, 30)
    assert difference(logits(packed(model), tokens, 20), expected(model, tokens, 20)) < 1e-5


# Heads of 2 to 80 coordinates; one to six queries for a key head: sets of four and single ones.
SHAPES: list[dict[str, Any]] = [
    {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": dim, "hidden_size": 120, "intermediate_size": 56}
    for heads, keys, dim in [(1, 1, 2), (6, 1, 10), (8, 2, 64), (2, 2, 80), (5, 1, 24)]
]


def words(shape: dict[str, Any]) -> str:
    return "-".join(str(shape[key]) for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda s: f"{s['num_attention_heads']}-{s['num_key_value_heads']}-{s['head_dim']}"
)
@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_heads_of_every_shape(shape: dict[str, Any], prompt: int) -> None:
    model, tokens = llama(**shape), tokens_of(2, 12)
    assert difference(logits(packed(model), tokens, prompt), expected(model, tokens, prompt)) < 1e-5


@pytest.mark.parametrize("batch", [1, 3, 150])
def test_long_prompts_go_through_in_pieces(batch: int) -> None:
    model, prompt = llama(max_position_embeddings=400), {1: 300, 3: 90, 150: 3}[batch]
    tokens = tokens_of(batch, prompt + 2)
    assert difference(logits(packed(model), tokens, prompt), expected(model, tokens, prompt)) < 1e-5


def test_queries_and_keys_with_norms_of_their_own() -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**LLAMA_LIKE, **ENDS}, head_dim=12)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.15) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    tokens = tokens_of(2, 20)
    assert difference(logits(packed(model), tokens, 9), expected(model, tokens, 9)) < 1e-5


@pytest.mark.usefixtures("variant")
def test_keys_and_values_in_half_precision_round_once() -> None:
    model, tokens = llama(), tokens_of(2, 40)
    found = logits(packed(model, "fast"), tokens, 25)
    # Plain weights are multiplied in float32, so what is lost is the caches' float16: 2^-12 of each key and value.
    assert 1e-6 < difference(found, expected(model, tokens, 25)) < 2e-3


def scaled(model: PreTrainedModel, up: str, down: str, power: int, blocks: list[int]) -> PreTrainedModel:
    """The same function: of these blocks one projection times 2^power, another by it."""
    with torch.no_grad():
        for block in blocks:
            model.get_submodule(f"model.layers.{block}.self_attn.{up}").weight.mul_(2.0**power)
            model.get_submodule(f"model.layers.{block}.self_attn.{down}").weight.mul_(2.0**-power)
    return model


BEYOND = [("k_proj", "q_proj", 20), ("k_proj", "q_proj", -30), ("v_proj", "o_proj", 20), ("v_proj", "o_proj", -30)]


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(("up", "down", "power"), BEYOND)
def test_keys_and_values_that_float16_does_not_hold_are_kept_in_float32(up: str, down: str, power: int) -> None:
    model, tokens = llama(), tokens_of(2, 30)
    right = expected(model, tokens, 20)
    # The first block has kept its own in float16 when the second finds that they do not fit.
    beyond = packed(scaled(model, up, down, power, [1]), "fast")
    assert difference(logits(beyond, tokens, 20), right) < 1e-5
    made = generate(beyond, tokens, max_new_tokens=5, stop_tokens=[])
    assert made.decode_path.endswith("with keys and values in float32, as float16 does not hold them")
    assert disagrees(beyond) is None


def test_a_token_that_float16_does_not_hold_leaves_those_before_it() -> None:
    model, tokens = llama(), tokens_of(1, 12)
    tokens[tokens == 255] = 3
    tokens[0, 9] = 255
    # The first coordinate is this token's alone, and the first block's values hear nothing louder.
    with torch.no_grad():
        first = model.get_submodule("model.layers.0")
        model.get_input_embeddings().weight[:, 0] = 0
        model.get_input_embeddings().weight[255, 0] = 1e3
        first.self_attn.v_proj.weight[:, 0] *= 2.0**20
    own = packed(model, "fast")
    step = decoder_for(own, batch=1, length=12)
    assert isinstance(step, NativeDecoder)
    found = torch.stack([step.prefill(tokens[:, :8]), *(step(column) for column in tokens[:, 8:9].unbind(1))], dim=1)
    assert step.keys.dtype == torch.float16
    found = torch.cat((found, *(step(column)[:, None] for column in tokens[:, 9:].unbind(1))), dim=1)
    assert step.values.dtype == torch.float32
    assert difference(found, expected(model, tokens, 8)) < 2e-3  # what was kept before was rounded to float16


def test_heads_of_zeros_are_kept_in_half_precision() -> None:
    model, tokens = llama(), tokens_of(1, 10)
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.v_proj").weight.zero_()
    made = generate(packed(model, "fast"), tokens, max_new_tokens=3, stop_tokens=[])
    assert made.decode_path == "fast decode in the CPU kernels, all blocks in one call"


def test_gates_far_out_do_not_overflow() -> None:
    model, tokens = llama(), tokens_of(1, 8)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.gate_proj").weight.mul_(300)
    assert difference(logits(packed(model), tokens, 4), expected(model, tokens, 4)) < 1e-5


def test_nan_in_one_text_stays_in_it() -> None:
    model, tokens = llama(), tokens_of(2, 9)
    tokens[tokens == 255] = 3
    tokens[1, 4] = 255
    right = expected(model, tokens, 3)
    model.get_input_embeddings().weight.data[255] = float("nan")
    found = logits(packed(model), tokens, 3)
    assert difference(found[0], right[0]) < 1e-5
    assert difference(found[1, :2], right[1, :2]) < 1e-5
    assert found[1, 2:].isnan().all(), "every later token sees it"


def test_nan_at_the_end_of_a_prompt_does_not_reach_what_comes_before() -> None:
    model, tokens = llama(), tokens_of(1, 8)
    tokens[tokens == 255] = 3
    model.get_input_embeddings().weight.data[255] = float("nan")
    step = decoder_for(packed(model), batch=1, length=20)
    step.prefill(torch.cat((tokens, torch.full((1, 4), 255)), dim=1))
    step.position = 8
    found = step(tokens[:, 0])
    assert difference(found, expected(model, torch.cat((tokens, tokens[:, :1]), dim=1), 9)[:, 0]) < 1e-5


def test_the_number_of_threads_changes_nothing() -> None:
    model, tokens = packed(llama(num_hidden_layers=1)), tokens_of(8, 100)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(logits(model, tokens, 97))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_more_tokens_than_there_is_room_for_are_refused() -> None:
    step = decoder_for(packed(llama()), batch=1, length=5)
    with pytest.raises(KernelError, match="6 tokens after position 0 are more than a cache of 5 holds"):
        step.prefill(tokens_of(1, 6))
    step.prefill(tokens_of(1, 5))
    with pytest.raises(KernelError, match="1 tokens after position 5"):
        step(tokens_of(1, 1)[0])


def test_a_batch_of_another_size_is_refused() -> None:
    step = decoder_for(packed(llama()), batch=2, length=5)
    with pytest.raises(KernelError, match="embeddings of 2 x 3 tokens are"):
        step.prefill(tokens_of(1, 3))


def test_it_agrees_with_the_model_s_own_forward_on_the_probe() -> None:
    model = packed(llama(), "fast")
    assert refuses(model, 30) is None
    assert disagrees(model) is None


def in_two_precisions(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.1.mlp.up_proj").use_kernels("fast")


def with_a_dense_layer(model: PreTrainedModel) -> None:
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Linear(48, 96, bias=False))


def with_another_epsilon(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.1.input_layernorm").variance_epsilon = 1e-3


def with_a_narrower_mlp(model: PreTrainedModel) -> None:
    """And nothing else of another size."""
    mlp: Any = model.get_submodule("model.layers.1.mlp")
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, CompressedLinear.from_parts(Parts(Plain(0.1 * torch.randn(40, 48))), None))
    mlp.down_proj = CompressedLinear.from_parts(Parts(Plain(0.1 * torch.randn(48, 40))), None)
    use_kernels(mlp, "precise")


@pytest.mark.parametrize("change", [in_two_precisions, with_a_dense_layer, with_another_epsilon, with_a_narrower_mlp])
def test_models_that_do_not_fit_into_one_call_are_decoded_with_torch(change: Any) -> None:
    model = packed(llama(intermediate_size=96))
    change(model)
    assert refuses(model, 30) is None
    assert isinstance(decoder_for(model, batch=1, length=30), TorchDecoder)
    assert disagrees(model) is None
    assert generate(model, tokens_of(1, 20), max_new_tokens=2, stop_tokens=[]).decode_path == "fast decode with torch"


def test_the_decoder_that_is_probed_is_the_one_that_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(llama(intermediate_size=96))
    in_two_precisions(model)
    # Wrong where torch steps, and not in the one call of the kernels that the probe's precise layers would allow.
    monkeypatch.setattr("slimlm.inference.decode.torch_decoder.attend", lambda queries, keys, values: queries)
    assert "differ by" in str(disagrees(model))
    use_kernels(model, "precise")
    assert disagrees(model) is None


def test_an_error_of_the_kernels_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    step = decoder_for(packed(llama()), batch=1, length=5)
    monkeypatch.setattr(step, "_call", lambda *_: 5)
    with pytest.raises(KernelError, match="refused to decode: stored tensors of other sizes"):
        step.prefill(tokens_of(1, 3))
