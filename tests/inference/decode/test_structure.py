"""What is built like Llama, and what is refused, with the reason."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, MixtralConfig, MixtralForCausalLM

from slimlm.inference.decode.structure import refuses
from tests.conftest import random_model
from tests.inference.decode.conftest import TINY, llama


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
