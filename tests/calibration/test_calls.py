"""How models call their blocks: arguments that depend on the text are the right batch's, and what cannot be is refused."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from slimlm.calibration import calls as calls_module
from slimlm.calibration.calls import Arguments, BlockArguments, OutputForm, arguments_within, copied, observe, trial_tokens
from slimlm.calibration.capture import BlockRun, enter, run
from slimlm.core.errors import ModelError, NumericsError
from slimlm.models.structure import blocks_of
from slimlm.tuning import block_reconstruction
from tests.conftest import ENDS, LLAMA_LIKE, random_model

CPU = torch.device("cpu")
PER_LAYER: dict[str, Any] = {
    **LLAMA_LIKE,
    **ENDS,
    "num_hidden_layers": 4,
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 256,
    "use_double_wide_mlp": False,
}
MAMBA: dict[str, Any] = {"n_mamba_heads": 4, "mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 16, "adapter_rank": 8}


def _random(model: PreTrainedModel) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.eval().requires_grad_(False)


def per_layer(shared: int = 0) -> PreTrainedModel:
    """A model whose blocks are given embeddings of their own; the last `shared` of four use the keys of earlier ones."""
    return _random(Gemma4ForCausalLM(Gemma4TextConfig(**PER_LAYER, num_kv_shared_layers=shared)))


def with_embeddings(blocks: tuple[str, ...] = ("mamba", "hybrid")) -> PreTrainedModel:
    """A model whose hybrid blocks are given the embeddings again; they share their weights where there are several."""
    config = Zamba2Config(
        **LLAMA_LIKE | {"num_hidden_layers": len(blocks)}, **ENDS, **MAMBA, num_mem_blocks=1, layers_block_type=list(blocks)
    )
    return _random(Zamba2ForCausalLM(config))


def hidden_states(model: nn.Module, blocks: dict[str, nn.Module], batches: list[Tensor]) -> dict[str, list[Tensor]]:
    """The outputs of all blocks in a plain forward pass of each batch of tokens `[samples, length]`."""
    found: dict[str, list[Tensor]] = {name: [] for name in blocks}
    handles = [
        block.register_forward_hook(
            lambda _, __, output, name=name: found[name].append(output[0] if isinstance(output, tuple) else output)
        )
        for name, block in blocks.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("make", [per_layer, with_embeddings])
def test_each_batch_s_blocks_are_given_the_arguments_of_its_own_tokens(make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    blocks = blocks_of(model)
    # Three batches, the last of one sample.
    samples = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(4))
    flow = enter(model, blocks, samples, tokens_at_once=32)
    expected = hidden_states(model, blocks, list(samples.split(2)))
    assert flow.arguments.text_dependent
    for name, block in blocks.items():
        flow.hidden = list(run(BlockRun(block, name, flow, CPU)))
        for ours, theirs in zip(flow.hidden, expected[name], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5), name


def test_a_block_is_reconstructed_with_the_arguments_of_the_samples_of_each_step() -> None:
    model = per_layer()
    blocks = blocks_of(model)
    samples = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(4))
    flow = enter(model, blocks, samples, tokens_at_once=32)
    name, block = next(iter(blocks.items()))
    targets = list(run(BlockRun(block, name, flow, CPU)))
    own = block_reconstruction._Samples(name, flow, targets, CPU)
    form = block_reconstruction._Form.of(block)
    for step in [(0, torch.tensor([1])), (1, torch.tensor([0, 1])), (2, torch.tensor([0]))]:
        error, size = own.error(block, form, step)
        assert float(error) <= 1e-10 * float(size)


def test_captured_arguments_are_kept_for_one_block_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = per_layer()
    blocks = blocks_of(model)
    samples = torch.randint(256, (5, 16), generator=torch.Generator().manual_seed(4))
    seen: list[str] = []

    def capture(name: str, tokens: Tensor) -> Arguments:
        seen.append(name)
        return arguments_within(model, calls.forms, name, tokens)

    calls = observe(model, blocks).calls
    batches = samples.split(2)
    (first, second), most = list(blocks)[:2], calls_module.MOST_KEPT
    for limit, times in ((most, 3), (0, 6)):
        monkeypatch.setattr(calls_module, "MOST_KEPT", limit)
        arguments = BlockArguments({}, batches, calls.text_dependent, capture)
        seen.clear()
        for name in (first, first, second, second):
            for batch, tokens in enumerate(batches):
                own = arguments.of(name, batch, len(tokens))
                expected = arguments_within(model, calls.forms, name, tokens)
                assert not list(calls_module._differences(own, expected, blocks[name]))
        assert seen == [first] * times + [second] * times


def test_arguments_that_do_not_depend_on_the_text_are_captured_once_for_each_size() -> None:
    model = random_model("llama")
    flow = enter(model, blocks_of(model), torch.randint(256, (5, 16)), tokens_at_once=32)
    assert not flow.arguments.text_dependent
    assert {count for _, count in flow.arguments.shared} == {1, 2}


@pytest.mark.parametrize("shared", [1, 2])
def test_blocks_that_use_keys_and_values_of_earlier_ones_are_refused_by_name(shared: int) -> None:
    model = per_layer(shared)
    with pytest.raises(ModelError, match=rf"model\.layers\.{4 - shared} of Gemma4ForCausalLM is given shared_kv_states"):
        observe(model, blocks_of(model))


class _Handing(nn.Module):
    """A block that hands on a second value, and may use the one that it is given."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.uses = uses

    def forward(self, hidden: Tensor, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output = self.linear(hidden)
        if self.uses and before is not None:
            output = output + before
        return output, output.mean(dim=-1, keepdim=True)


class _Stack(nn.Module):
    """A model of such blocks; with `reads` it uses the last one's second value, too."""

    def __init__(self, uses: bool, reads: bool) -> None:
        super().__init__()
        self.config = LlamaConfig(vocab_size=16)
        self.embedding = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(_Handing(uses) for _ in range(3))
        self.reads = reads

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Tensor:
        hidden, before = self.embedding(tokens), None
        for layer in self.layers:
            hidden, before = layer(hidden, before)
            if self.reads:
                before = before * 2
        return hidden


def test_a_value_that_blocks_hand_on_and_do_not_use_is_no_hindrance() -> None:
    model = _Stack(uses=False, reads=False).eval()
    calls = observe(model, blocks_of(model)).calls
    assert set(calls.forms.values()) == {OutputForm(tuple, 2)}
    assert not calls.text_dependent


def test_a_value_that_blocks_hand_on_and_use_is_refused_by_the_argument_s_name() -> None:
    model = _Stack(uses=True, reads=False).eval()
    with pytest.raises(ModelError, match=r"layers\.1 of _Stack is given before, which earlier blocks compute"):
        observe(model, blocks_of(model))


def test_a_model_that_computes_with_more_of_an_output_than_hidden_states_is_refused() -> None:
    model = _Stack(uses=False, reads=True).eval()
    with pytest.raises(ModelError, match="uses more of its blocks' outputs than their hidden states"):
        observe(model, blocks_of(model))


def test_observing_leaves_the_model_as_it_was() -> None:
    model = per_layer()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    hooks = [dict(module.__dict__) for module in model.modules()]
    observe(model, blocks_of(model))
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    for module, before in zip(model.modules(), hooks, strict=True):
        assert module.__dict__.keys() == before.keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_trial_texts_differ_and_hold_no_token_that_the_config_names() -> None:
    model = random_model("llama")
    model.config.image_token_id = 5
    one, other = trial_tokens(model)
    assert one.shape == other.shape and not torch.equal(one, other)
    assert model.config.eos_token_id == 0
    assert not ({0, 5} & set(one.flatten().tolist())) and 5 not in other


@pytest.mark.parametrize("ends", [7, [7, 9]])
def test_the_second_trial_text_has_the_end_of_a_document_within(ends: int | list[int]) -> None:
    model = random_model("llama")
    model.config.eos_token_id = ends
    one, other = trial_tokens(model)
    assert not ({7, 9} & set(one.flatten().tolist()))
    assert bool(torch.isin(other, torch.tensor(ends)).any(dim=1).all())
    assert not bool(torch.isin(other[:, [0, -1]], torch.tensor(ends)).any())


def test_a_copy_s_containers_are_its_own() -> None:
    value = {"a": [torch.ones(1)], "b": (None, 3)}
    own = copied(value, lambda tensor: tensor + 1)
    own["a"].append(0)
    assert len(value["a"]) == 1 and float(own["a"][0]) == 2 and own["b"] == (None, 3)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_is_not_taken_for_a_model_that_does_not_work(error: Exception) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    model = _Stack(uses=False, reads=False).eval()
    vars(model.layers[1])["forward"] = fail
    with pytest.raises(type(error)) as raised:
        observe(model, blocks_of(model))
    assert raised.value is error


@pytest.mark.parametrize("block", [0, 2])
def test_a_weight_that_is_no_number_is_refused_by_its_block(block: int) -> None:
    model = _Stack(uses=False, reads=False).eval()
    with torch.no_grad():
        model.layers[block].linear.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=rf"the outputs of layers\.{block} of _Stack hold NaN"):
        observe(model, blocks_of(model))


class _Pair(NamedTuple):
    one: Tensor
    other: list[int]


def test_a_copy_has_the_type_of_what_is_copied() -> None:
    pair = copied(_Pair(torch.ones(1), [3]), lambda tensor: tensor + 1)
    assert type(pair) is _Pair and float(pair.one) == 2 and pair.other == [3]
    filled = defaultdict(list, {"a": [torch.ones(1)]})
    own = copied(filled, lambda tensor: tensor + 1)
    own["a"].append(0)
    own["b"].append(1)
    assert float(own["a"][0]) == 2 and len(filled["a"]) == 1 and "b" not in filled
    assert copied(torch.Size([2, 3])) == torch.Size([2, 3])
