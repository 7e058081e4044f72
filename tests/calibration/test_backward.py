"""Gradients that are taken block by block are those of one backward pass through the whole model."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.calibration.backward import Chain, KeptInputs
from slimlm.calibration.calls import BlockArguments, observe
from slimlm.calibration.capture import BlockInputs, enter
from slimlm.calibration.gradients import gradient_statistics
from slimlm.core.errors import ModelError, NumericsError, StatisticError
from slimlm.core.statistics.base import Batch, Needs
from slimlm.core.statistics.fisher import Fisher
from slimlm.core.statistics.output_gradient_covariance import OutputGradientCovariance
from slimlm.evaluation.stored_model import LastOutputs, StoredModel
from slimlm.models.experts import fused_in, take_apart
from slimlm.models.structure import blocks_of, linears_of, weight_of
from tests.conftest import random_model

CPU = torch.device("cpu")
TOKENS = torch.randint(256, (5, 24), generator=torch.Generator().manual_seed(0))
BOTH: Needs = frozenset({Fisher, OutputGradientCovariance})


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The summed cross-entropy of the tokens `[samples, length]` after the first of each sample."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="sum")


def kept_of(model: PreTrainedModel, tokens: Tensor, *, at_once: int = 48) -> tuple[KeptInputs, list[Tensor], list[Tensor]]:
    """The kept inputs of a model's blocks, the gradient at the last outputs, and the batches of tokens."""
    blocks = blocks_of(model)
    inputs: BlockInputs = enter(model, blocks, tokens, tokens_at_once=at_once)
    chain = Chain(list(blocks), lambda name: blocks[name], inputs.arguments, CPU)
    kept = chain.forward(inputs.hidden)
    stored = StoredModel(model, dict(model.state_dict()), lambda tensors: list(tensors))
    forms, batches = observe(model, blocks).calls.forms, list(inputs.arguments.batches)
    gradients = [
        stored.output_gradients(
            LastOutputs(batch, hidden, forms), lambda logits, own=batch: next_token_loss(logits, own)
        ).gradient
        for batch, hidden in zip(batches, kept.outputs, strict=True)
    ]
    return kept, gradients, batches


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_the_gradients_are_those_of_one_backward_pass_through_the_model(family: str) -> None:
    model = random_model(family).requires_grad_(True)
    next_token_loss(model(TOKENS, use_cache=False).logits, TOKENS).backward()
    blocks = blocks_of(model)
    expected = {n: p.grad.clone() for b, m in blocks.items() for n, p in m.named_parameters(prefix=b) if p.grad is not None}
    model.zero_grad()
    kept, gradients, _ = kept_of(model, TOKENS)
    for here in kept.reverse(gradients):
        for parameter in here.block.parameters():
            assert parameter.grad is None, "gradients of a block are taken when it is reached"
        for _ in here.batches:
            pass
    found = {n: p.grad for b, m in blocks.items() for n, p in m.named_parameters(prefix=b) if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) > 10
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * gradient.abs().max() + 1e-9, name


@pytest.mark.parametrize(("family", "at_once"), [("llama", 24), ("llama", 48), ("llama", 8192), ("gpt2", 48), ("mixtral", 24)])
def test_the_statistics_are_those_of_whole_backward_passes(family: str, at_once: int) -> None:
    model = random_model(family)
    for name in fused_in(model):
        take_apart(model, name)
    model.requires_grad_(True)
    blocks = blocks_of(model)
    layers = {f"{block}.{n}": m for block, module in blocks.items() for n, m in linears_of(module).items()}
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    handles = [
        module.register_full_backward_hook(lambda _, __, out, name=name: seen[name].append(out[0]))
        for name, module in layers.items()
    ]
    squares = {name: torch.zeros(weight_of(module).shape) for name, module in layers.items()}
    for sample in TOKENS.split(1):
        model.zero_grad()
        next_token_loss(model(sample, use_cache=False).logits, sample).backward()
        for name, module in layers.items():
            gradient = module.get_parameter("weight").grad
            if gradient is not None:
                squares[name] += (gradient.T if family == "gpt2" else gradient).square()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    model.requires_grad_(False)
    kept, gradients, _ = kept_of(model, TOKENS, at_once=at_once)
    found = {
        f"{block}.{layer}": stats
        for block, own in gradient_statistics(kept, gradients, BOTH, lambda _: False)
        for layer, stats in own.items()
    }
    assert found.keys() == {name for name in layers if seen[name]}
    for name, stats in found.items():
        summed = stats[Fisher] * max(1, stats.tokens // TOKENS.shape[1])
        torch.testing.assert_close(summed, squares[name], rtol=1e-4, atol=1e-6 * float(squares[name].max()))
        rows = torch.cat([g.flatten(0, -2) for g in seen[name]])
        square = rows.T @ rows / len(rows)
        torch.testing.assert_close(stats[OutputGradientCovariance], square, rtol=1e-4, atol=1e-5 * float(square.max()))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters()), "weights need no gradients of their own"


def test_layers_that_are_left_out_have_no_statistics_and_the_last_block_comes_first() -> None:
    kept, gradients, _ = kept_of(random_model("llama"), TOKENS)
    found = list(gradient_statistics(kept, gradients, BOTH, lambda name: "self_attn" in name))
    assert [name for name, _ in found] == ["model.layers.1", "model.layers.0"]
    assert all(set(own) == {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} for _, own in found)


def test_the_fisher_information_by_hand() -> None:
    # Two samples of two tokens, one output, two inputs: gradients 1 * (1, 0) + 2 * (0, 1) and 3 * (1, 1) - 3 * (1, 1) = 0.
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    outputs = torch.tensor([[1.0], [2.0], [3.0], [-3.0]])
    fisher = Fisher()
    fisher.add(Batch(inputs, 2, output_gradients=outputs, samples=2))
    found = fisher.result(4, 2)
    assert found is not None and found.tolist() == [[0.5, 2.0]]


def test_some_tokens_of_several_samples_are_refused() -> None:
    batch = Batch(torch.ones(3, 2), 2, output_gradients=torch.ones(3, 1), samples=2)
    with pytest.raises(StatisticError, match="3 of the 4 tokens of 2 samples"):
        Fisher().add(batch)
    fisher = Fisher()
    fisher.add(replace(batch, samples=1))
    found = fisher.result(3, 3)
    assert found is not None and found.tolist() == [[9.0, 9.0]]


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    kept, gradients, _ = kept_of(random_model("llama"), TOKENS)
    gradients[0][0, 3, 1] = float("inf")
    with pytest.raises(NumericsError, match=r"the gradient at the inputs of model\.layers\.1"):
        for _ in kept.reverse(gradients):
            pass


class Twice(nn.Module):
    """A block that uses its layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(self.layer(hidden))


def test_a_layer_that_is_used_twice_is_refused() -> None:
    block = Twice()
    chain = Chain(["block"], lambda _: block, BlockArguments({("block", 2): ((None,), {})}), CPU)
    kept = chain.forward([torch.ones(2, 3, 4)])
    with pytest.raises(ModelError, match="used twice"):
        list(gradient_statistics(kept, [torch.ones(2, 3, 4)], BOTH, lambda _: False))
