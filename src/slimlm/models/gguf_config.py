"""The config of a model in a GGUF file, by the names that transformers has for the keys of its header.

Transformers' own conversion leaves out what changes the rotary frequencies; here it is carried over, or the file is refused.
"""

import math
from typing import Any

import torch
from torch import Tensor
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from slimlm.models.gguf_header import PLAIN, Gguf

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}
"""The architectures that are read, and what transformers calls them; files of Mistral models say llama."""
EMBEDDING, HEAD, ROTARY_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
"""Names of tensors in the files."""
_BEYOND = {"qwen3": {"attention.key_length": "head_dim"}}
"""Keys that transformers does not read, and their names in the config."""
_NEEDED = ("context_length", "block_count", "feed_forward_length", "embedding_length", "attention.head_count")
_WIDE_ACTIVATIONS = ("gemma2", "gemma3")
"""Architectures whose activations go beyond the range of float16."""
_SCALED_QUERIES = {"gemma2": 46, "gemma3": 62}
"""The blocks of the Gemma models (27B) whose scores have another scale than the others', which no header says."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""How all Llama models from 3.1 on have their rotary frequencies scaled, but for the factor."""


def config_of(gguf: Gguf) -> dict[str, Any]:
    """The config of a model as transformers would write it.

    Raises:
        ModelError: the architecture is not read, the header lacks what a config needs, or has what no config can say.
    """
    architecture = gguf.text("general.architecture")
    if architecture not in MODEL_TYPES:
        raise gguf.error(
            f"the architecture is {architecture!r}; of GGUF files slimlm reads {', '.join(MODEL_TYPES)}. Give the folder of "
            "the original model"
        )
    tensors = gguf.tensors
    for key in _NEEDED:
        found = gguf.number(f"{architecture}.{key}")
        if not isinstance(found, int) or found < 1:
            raise gguf.error(f"its header says {architecture}.{key} = {found}; it is a whole number above 0. Download it again")
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise gguf.error(f"it holds no matrix {EMBEDDING}, which every language model has. Download it again")
    names = {**GGUF_CONFIG_MAPPING[architecture], **_BEYOND.get(architecture, {})}
    given = {name: gguf.number(f"{architecture}.{key}") for key, name in names.items() if name is not None}
    if given.get("num_key_value_heads") is None:
        # Left out where every head has keys and values of its own; a list says how many each block has.
        if f"{architecture}.attention.head_count_kv" in gguf.metadata:
            raise gguf.error("its blocks differ in their heads of keys, which slimlm does not read. Give the original's folder")
        given["num_key_value_heads"] = given["num_attention_heads"]
    if given["num_hidden_layers"] == _SCALED_QUERIES.get(architecture):
        given["query_pre_attn_scalar"] = (given["hidden_size"] or 0) // (given["num_attention_heads"] or 1)
    theta = given.pop("rope_theta", None)
    kind = MODEL_TYPES[architecture]
    config: dict[str, Any] = {
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
        "model_type": kind,
        **{name: value for name, value in given.items() if value is not None},
        **_ends(gguf),
        "vocab_size": tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": HEAD not in tensors,
        "dtype": _dtype(gguf, architecture),
    }
    if rotary := _rotary(gguf, architecture, theta):
        config["rope_parameters"] = rotary
    elif theta is not None:
        config["rope_theta"] = theta
    return config


def _ends(gguf: Gguf) -> dict[str, int]:
    """The ids of the tokens that begin and end a text, and of padding."""
    names = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    found = {name: gguf.number(f"tokenizer.ggml.{key}") for name, key in names.items()}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _dtype(gguf: Gguf, architecture: str) -> str:
    """What a model computes in on a GPU: the type of its matrices; of codes float16, which their scales are in."""
    kinds = {tensor.kind for tensor in gguf.tensors.values() if len(tensor.shape) > 1}
    if kinds <= set(PLAIN):
        return "bfloat16" if "BF16" in kinds else "float16" if "F16" in kinds else "float32"
    return "bfloat16" if architecture in _WIDE_ACTIVATIONS else "float16"


def _rotary(gguf: Gguf, architecture: str, theta: float | None) -> dict[str, Any] | None:
    """The scaling of rotary frequencies; None where they are not scaled."""
    kind = gguf.text(f"{architecture}.rope.scaling.type")
    factor = gguf.number(f"{architecture}.rope.scaling.factor") or gguf.number(f"{architecture}.rope.scale_linear")
    if kind is None and factor not in (None, 0, 1):
        kind = "linear"  # as older files say it
    factors = gguf.tensors.get(ROTARY_FACTORS)
    if factors is not None:
        return _llama3(gguf, architecture, theta)
    if kind in (None, "none"):
        return None
    original = gguf.number(f"{architecture}.rope.scaling.original_context_length")
    if factor is None or theta is None or kind not in ("linear", "yarn") or architecture in _WIDE_ACTIVATIONS:
        raise gguf.error(
            f"its rotary frequencies are scaled (rope.scaling.type = {kind}, factor {factor}), which slimlm reads for llama, "
            "qwen2 and qwen3 as linear or yarn. Give the folder of the original model"
        )
    found = {"rope_type": kind, "rope_theta": theta, "factor": float(factor)}
    return found if original is None else found | {"original_max_position_embeddings": int(original)}


def _llama3(gguf: Gguf, architecture: str, theta: float | None) -> dict[str, Any]:
    """The scaling of Llama 3.1 and later, whose factors a file holds as a tensor in place of the settings they follow from."""
    tensor, width = gguf.tensors[ROTARY_FACTORS], gguf.number(f"{architecture}.rope.dimension_count")
    if tensor.kind == "F32" and theta is not None and width == 2 * math.prod(tensor.shape):
        held = gguf.mapped().tensors[ROTARY_FACTORS].clone().view(torch.float32)
        settings = {"rope_type": "llama3", "rope_theta": theta, "factor": float(held.max()), **_LLAMA3}
        if torch.allclose(held, rotary_factors(settings, int(width)), rtol=1e-4):
            return settings
    raise gguf.error(
        f"{ROTARY_FACTORS} scales the rotary frequencies in another way than Llama 3.1 and later do, and slimlm reads no "
        "other. Give the folder of the original model"
    )


def rotary_factors(settings: dict[str, Any], width: int) -> Tensor:
    """What each rotary frequency is divided by (rope_type "llama3" of transformers).

    Args:
        settings: The rope parameters.
        width: The rotary dimensions of a head.

    Returns:
        float32 `[width / 2]`.
    """
    low, high, original = (
        settings["low_freq_factor"],
        settings["high_freq_factor"],
        settings["original_max_position_embeddings"],
    )
    wavelength = 2 * math.pi * settings["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    smooth = ((original / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / settings["factor"] + smooth)).float()
