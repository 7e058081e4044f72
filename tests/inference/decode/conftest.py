"""Tiny random Llamas."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tests.conftest import ENDS, LLAMA_LIKE

TINY: dict[str, Any] = {**LLAMA_LIKE, **ENDS}


def llama(**options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**TINY, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms far from one, so that a norm without its weight would show.
            parameter.normal_(std=0.15) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    return model


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
