"""Whether a model is built like Llama, so that the fast decoders compute what its own forward computes.

Llama, Mistral, Qwen2 and Qwen3 are, among others. What is not known is refused, with the reason: `refuses` looks at the tree of
modules, at the settings and at the arithmetic of norms and activations. That the logits agree is checked by selection.py.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimlm.inference.decode.grouped import Call
from slimlm.runtime.dense import WideEmbedding
from slimlm.runtime.embedding import CompressedEmbedding
from slimlm.runtime.linear import CompressedLinear

_MODEL = {"model", "lm_head"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}
_BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = ("q_norm", "k_norm")
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
# Rotary embeddings whose angles do not change with the length of the text.
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")
# Settings under which a model of this structure computes something else; none of them may be set.
_UNKNOWN_SETTINGS = ("attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size", "no_rope_layers")
ACTIVATIONS = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of activations in which the fast decoders compute."""


def refuses(model: nn.Module, length: int) -> str | None:
    """Why a model cannot be decoded fast; None: it can.

    Args:
        model: a causal language model.
        length: the number of positions that are needed.
    """
    for check in (_structure, _settings, _arithmetic):
        if (reason := check(model)) is not None:
            return reason
    return _window(model, length)


def visible_positions(model: nn.Module) -> int | None:
    """The number of positions that the blocks with the narrowest attention window see; None: all blocks see every position."""
    window: int | None = getattr(model.config, "sliding_window", None)
    return window if window and "sliding_attention" in _attention_types(model) else None


def activation_dtype(model: Any) -> torch.dtype:
    """The dtype of the hidden states, which is that of embeddings and norms added up."""
    embedding = model.model.embed_tokens
    widens = isinstance(embedding, WideEmbedding | CompressedEmbedding)
    own = embedding.activations if widens else embedding.weight.dtype
    return torch.promote_types(own, model.model.norm.weight.dtype)


def device_of(model: Any) -> torch.device:
    """The device of the hidden states."""
    return model.model.norm.weight.device


def embedding_of(model: Any) -> Call:
    """A function from tokens `[...]` to their rows `[..., width]`, a new tensor in the dtype of the activations."""
    module, dtype = model.model.embed_tokens, activation_dtype(model)
    if isinstance(module, CompressedEmbedding):
        return lambda tokens: module.forward(tokens).to(dtype)
    weight: Tensor = module.weight
    return lambda tokens: F.embedding(tokens, weight).to(dtype)


def rms_norms(model: Any) -> dict[str, Any]:
    """All RMS norms, by a name for messages."""
    norms = {"the last norm": model.model.norm}
    for i, block in enumerate(model.model.layers):
        norms |= {f"{name} of block {i}": getattr(block, name) for name in ("input_layernorm", "post_attention_layernorm")}
        norms |= {f"{name} of block {i}": norm for name, norm in head_norms(block.self_attn).items()}
    return norms


def head_norms(attention: Any) -> dict[str, Any]:
    """The RMS norms of an attention's queries and keys, by name; empty where it has none."""
    return {name: getattr(attention, name) for name in _HEAD_NORMS if hasattr(attention, name)}


def linears_of_block(block: Any) -> tuple[Any, ...]:
    """The linear layers of a block in the order q, k, v, o, gate, up, down."""
    attention, mlp = block.self_attn, block.mlp
    products = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    return *products, mlp.gate_proj, mlp.up_proj, mlp.down_proj


def _structure(model: nn.Module) -> str | None:
    """Where the tree of modules differs from Llama's."""
    if (reason := _children(model, "the model", _MODEL)) is not None:
        return reason
    decoder: Any = model.get_submodule("model")
    if (reason := _children(decoder, "the decoder", _DECODER)) is not None:
        return reason
    for i, block in enumerate(decoder.layers):
        if (reason := _children(block, f"block {i}", _BLOCK)) is not None:
            return reason
        normed = any(name in _HEAD_NORMS for name, _ in block.self_attn.named_children())
        expected = _ATTENTION | (set(_HEAD_NORMS) if normed else set())
        if (reason := _children(block.self_attn, f"the attention of block {i}", expected)) is not None:
            return reason
        if (reason := _children(block.mlp, f"the mlp of block {i}", _MLP)) is not None:
            return reason
        for name, module in (*block.self_attn.named_children(), *block.mlp.named_children()):
            if name.endswith("_proj") and not isinstance(module, nn.Linear | CompressedLinear):
                return f"{name} of block {i} is a {type(module).__name__}"
    return None


def _children(module: nn.Module, name: str, expected: set[str]) -> str | None:
    found = {child for child, _ in module.named_children()}
    if found == expected:
        own = [own for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))]
        return f"{name} has tensors of its own, which Llama's has not: {', '.join(own)}" if own else None
    return f"it is not built like Llama: {name} holds {', '.join(sorted(found))} in place of {', '.join(sorted(expected))}"


def _settings(model: nn.Module) -> str | None:
    """Where the config or the modules' own settings ask for more than the fast decoders compute."""
    config: Any = model.config
    decoder: Any = model.get_submodule("model")
    for name in _UNKNOWN_SETTINGS:
        if getattr(config, name, None):
            return f"its config sets {name}"
    if decoder.rotary_emb.rope_type not in _FIXED_ROPE:
        return f"its rotary angles (rope type {decoder.rotary_emb.rope_type}) change with the length of the text"
    if model.training:
        return "the model is in training mode"
    if type(decoder.embed_tokens) not in (nn.Embedding, WideEmbedding, CompressedEmbedding):
        return f"its embedding is a {type(decoder.embed_tokens).__name__}"
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        return "hooks are set on its modules, which fast decoding would not run"
    if len({(p.device.type, p.device.index) for p in model.parameters()}) > 1:
        return "its weights lie on several devices"
    return None


def _arithmetic(model: nn.Module) -> str | None:
    """Where an attention, activation, norm or rotary embedding is another than the fast decoders compute."""
    decoder: Any = model.get_submodule("model")
    for i, block in enumerate(decoder.layers):
        attention, first = block.self_attn, decoder.layers[0].self_attn
        if any(norm.weight.numel() != attention.head_dim for norm in head_norms(attention).values()):
            return f"block {i} norms its queries across heads"
        probe = torch.linspace(-4, 4, 9, dtype=torch.float32, device="cpu")
        if not torch.allclose(block.mlp.act_fn(probe), F.silu(probe), atol=1e-6):
            return f"the activation of block {i} is {type(block.mlp.act_fn).__name__}, not SiLU"
        sizes = [(a.head_dim, a.num_key_value_groups, a.k_proj.out_features, a.scaling) for a in (attention, first)]
        if sizes[0] != sizes[1]:
            return f"the attention of block {i} has other sizes than that of block 0"
    for name, norm in rms_norms(model).items():
        if not _is_rms_norm(norm):
            return f"{name} ({type(norm).__name__}) is not x w / sqrt(mean(x^2) + eps)"
    if activation_dtype(model) not in ACTIVATIONS:
        return f"its activations are {str(activation_dtype(model)).removeprefix('torch.')}"
    with torch.no_grad():
        weight = decoder.norm.weight
        angles = decoder.rotary_emb(weight[None, None], torch.zeros(1, 1, dtype=torch.long, device=weight.device))[0]
    if angles.shape[-1] != decoder.layers[0].self_attn.head_dim:
        return f"only {angles.shape[-1]} of a head's {decoder.layers[0].self_attn.head_dim} coordinates are rotated"
    return None


def _is_rms_norm(module: Any) -> bool:
    """Whether a norm without a bias computes x w / sqrt(mean(x^2) + eps)."""
    weight = getattr(module, "weight", None)
    if weight is None or getattr(module, "bias", None) is not None or not hasattr(module, "variance_epsilon"):
        return False
    x = torch.linspace(-1, 2, weight.shape[0], dtype=weight.dtype, device=weight.device)[None]
    with torch.no_grad():
        expected = F.rms_norm(x.float(), weight.shape, weight.float(), module.variance_epsilon)
        found = module(x).float()
    # Two roundings of the weight's dtype; a weight of 1 + w (Gemma) is off by the whole output.
    return torch.allclose(found, expected, rtol=4 * torch.finfo(weight.dtype).eps, atol=1e-5)


def _window(model: nn.Module, length: int) -> str | None:
    """Where some block sees fewer than all the positions."""
    if unknown := _attention_types(model) - {"full_attention", "sliding_attention"}:
        return f"its config names layers of type {', '.join(sorted(unknown))}"
    if (window := visible_positions(model)) is not None and length > window:
        return f"its attention sees a window of {window} positions, and {length} are needed"
    return None


def _attention_types(model: nn.Module) -> set[str]:
    config: Any = model.config
    window = getattr(config, "sliding_window", None)
    return set(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
