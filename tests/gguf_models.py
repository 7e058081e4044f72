"""Tiny models in GGUF files, written by the gguf package as llama.cpp's conversion writes them.

The conversion permutes the rows of Llama's queries and keys, and adds 1 to Gemma's norms. K and IQ types have no quantizer in
Python: their blocks are random bytes with scales of a sensible size.
"""

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

from benchmarks.tiny_models import ENDS, model_of, randomized

SIZES: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 64,
    **ENDS,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama3": ("llama", "Llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 8192}}),
    "linear": ("llama", "Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("llama", "Mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen3": ("qwen3", "Qwen3", {}),
    "gemma2": ("gemma2", "Gemma2", {"sliding_window": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3", "Gemma3", {"sliding_window": 16, "tie_word_embeddings": True}),
}
"""By name the architecture in the file, the class of transformers and its config."""
QUANTIZED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F16", "BF16")
"""Types that the gguf package quantizes to."""
SCALES: dict[str, tuple[int, ...]] = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ3_S": (0,), "IQ3_XXS": (0,), "IQ2_S": (0,), "IQ2_XS": (0,), "IQ2_XXS": (0,), "IQ1_S": (0,), "TQ1_0": (52,),
    "TQ2_0": (64,),
}  # fmt: skip
"""Where in a block of these types the scales in float16 are."""
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def source_model(name: str) -> PreTrainedModel:
    """The model that a file is made of."""
    torch.manual_seed(0)
    _, family, options = MODELS[name]
    return randomized(model_of((family, {**SIZES, **options}))).float()


def write(
    path: Path,
    name: str = "llama",
    kinds: tuple[str, ...] = ("Q8_0",),
    *,
    model: PreTrainedModel | None = None,
    tensors_of_a_piece: int = 0,
    change: Callable[[GGUFWriter], None] = lambda _: None,
    extra: Mapping[str, NDArray[np.float32]] | None = None,
) -> Path:
    """Write a tiny model.

    Args:
        path: The file.
        name: One of `MODELS`.
        kinds: The types of its matrices, in turn; vectors are F32.
        model: What it is made of; None: `source_model`.
        tensors_of_a_piece: Split it into pieces of so many tensors.
        change: Adds to the header.
        extra: Further tensors.

    Returns:
        The file, or the first piece.
    """
    architecture = MODELS[name][0]
    model = model or source_model(name)
    writer = GGUFWriter(path, architecture, split_max_tensors=tensors_of_a_piece)
    _write_config(writer, model, architecture)
    _write_tokenizer(writer)
    change(writer)
    in_turn = cycle(kinds)
    for own, values in _tensors(model, architecture).items():
        kind = GGMLQuantizationType[next(in_turn) if values.ndim > 1 else "F32"]
        writer.add_tensor(own, _stored(values, kind), raw_dtype=kind)
    for own, values in (extra or {}).items():
        writer.add_tensor(own, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(path.parent.glob(f"{path.stem}*.gguf"))


def _write_config(writer: GGUFWriter, model: PreTrainedModel, architecture: str) -> None:
    config: Any = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(SIZES["head_dim"])
    writer.add_value_length(SIZES["head_dim"])
    rotary = config.rope_parameters
    rotary = rotary.get("full_attention", rotary)
    writer.add_rope_freq_base(rotary["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(SIZES["head_dim"])
    if rotary["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rotary["factor"])
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)


def _write_tokenizer(writer: GGUFWriter) -> None:
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "al", "ta"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a l", "t a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)


def _tensors(model: PreTrainedModel, architecture: str) -> dict[str, NDArray[np.float32]]:
    """The tensors of a model as a file has them."""
    config: Any = model.config
    kind = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        own, values = names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy()
        assert own is not None, name
        if architecture == "llama" and (".attn_q." in own or ".attn_k." in own):
            heads = config.num_attention_heads if ".attn_q." in own else config.num_key_value_heads
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if architecture.startswith("gemma") and own.endswith("norm.weight"):
            values = values + np.float32(1)
        found[own] = values
    rotary = config.rope_parameters
    if rotary.get("rope_type") == "llama3":
        plain = 1 / rotary["rope_theta"] ** (torch.arange(0, SIZES["head_dim"], 2).double() / SIZES["head_dim"])
        scaled = model.get_submodule("model.rotary_emb").inv_freq
        found["rope_freqs.weight"] = (plain / scaled).float().numpy()
    return found


def _stored(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[Any]:
    """Weights in this type."""
    if kind.name not in SCALES:
        return gguf.quantize(np.ascontiguousarray(values), kind)
    block, size = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(256, size=(values.size // block, size), dtype=np.uint8)
    for place in SCALES[kind.name]:
        blocks[:, place : place + 2] = np.array([2**-9], dtype=np.float16).view(np.uint8)
    return blocks.reshape(len(values), -1)
