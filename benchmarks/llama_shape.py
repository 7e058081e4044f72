"""The shape of a Llama, of which the benchmarks make random models."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class LlamaShape:
    """What a Llama's speed and size depend on."""

    width: int
    mlp: int
    blocks: int
    heads: int
    key_heads: int
    vocabulary: int = 32000
    context: int = 2048

    @classmethod
    def of_width(cls, width: int, blocks: int, *, vocabulary: int = 32000) -> "LlamaShape":
        """A shape like those of public models: heads of 64, four to a key head, an MLP 2.75 times as wide."""
        return cls(width, width * 11 // 4, blocks, width // 64, width // 256, vocabulary)

    def config(self, **changes: Any) -> LlamaConfig:
        """Its config: bfloat16, a head of its own, no biases, unless `changes` says otherwise."""
        fields: dict[str, Any] = {
            "hidden_size": self.width,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "dtype": "bfloat16",
        }
        config = LlamaConfig(**{**fields, **changes})
        config.architectures = ["LlamaForCausalLM"]
        return config

    def meta_model(self, **changes: Any) -> LlamaForCausalLM:
        """A bfloat16 model of this shape without values, on the meta device."""
        with torch.device("meta"):
            return LlamaForCausalLM(self.config(**changes)).to(torch.bfloat16)
