"""Perplexity and rounded activations."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slimlm.core.errors import NumericsError
from slimlm.evaluation.activations import fp8_per_tensor, int8_per_group, int8_per_token, rounded_activations
from slimlm.evaluation.perplexity import perplexity
from tests.conftest import random_model


def test_perplexity_equals_a_token_by_token_computation() -> None:  # law 31
    model = random_model("llama")
    windows = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in windows:
            for end in range(1, 20):
                log_probability = model(row[None, :end]).logits[0, -1].double().log_softmax(dim=-1)
                total -= float(log_probability[row[end]])
                count += 1
    measured = perplexity(model, windows)
    assert measured.tokens == count == 57
    # float32 losses against float64 ones
    assert measured.value == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity() -> None:
    class Uniform(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anything = nn.Parameter(torch.zeros(1))

        def forward(self, ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*ids.shape, 50))

    assert perplexity(Uniform(), torch.zeros(2, 9, dtype=torch.int64)).value == pytest.approx(50, rel=1e-5)


def test_logits_that_are_not_numbers_are_refused() -> None:
    model = random_model("llama")
    model.get_parameter("lm_head.weight").data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="no perplexity"):
        perplexity(model, torch.zeros(1, 8, dtype=torch.int64))


@pytest.mark.parametrize("rounding", [fp8_per_tensor, int8_per_token, int8_per_group])
def test_rounding_keeps_the_largest_value_and_leaves_its_input_alone(rounding: object) -> None:  # law 30
    x = torch.randn(4, 7, 200, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    rounded = rounding(x)  # type: ignore[operator]
    assert torch.equal(x, before)
    assert rounded.shape == x.shape
    assert float(rounded.abs().max()) == pytest.approx(float(x.abs().max()), rel=1e-6)
    assert not torch.equal(rounded, x)


def test_fp8_errs_by_at_most_a_sixteenth_in_its_normal_range() -> None:  # law 30: three mantissa bits, half a step
    x = torch.logspace(-3, 0, 1000)
    normal = x / x.max() * 448 >= 2**-6
    assert float(((fp8_per_tensor(x) - x).abs() / x)[normal].max()) <= 2**-4


def test_int8_errs_by_at_most_half_a_step_of_its_own_token_or_group() -> None:
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1, 10, 0, 1e4])[:, None]
    half_step = x.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert bool(((int8_per_token(x) - x).abs() <= half_step * (1 + 1e-5)).all())
    tail = x[:, 128:]
    half_step = tail.abs().amax(dim=1, keepdim=True) / 127 / 2
    assert bool(((int8_per_group(x)[:, 128:] - tail).abs() <= half_step * (1 + 1e-5)).all())


def test_rounding_acts_inside_the_context_only_and_not_on_the_head() -> None:
    model = random_model("llama")
    ids = torch.arange(16)[None]
    with torch.no_grad():
        plain = model(ids).logits
        with rounded_activations(model, "int8-token"):
            rounded = model(ids).logits
            head = [m for m in model.modules() if m._forward_pre_hooks]
        again = model(ids).logits
    assert torch.equal(plain, again)
    assert not torch.equal(plain, rounded)
    assert model.get_output_embeddings() not in head
