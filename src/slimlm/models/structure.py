"""Blocks and linear layers of a causal language model, found by structure.

The decoder is the `nn.ModuleList` that holds the most parameters. Inside its blocks every `nn.Linear` and every `Conv1D`
(GPT-2's linear layer, whose weight is stored `[in, out]`) is compressed by a recipe's steps; everything outside the blocks
(embeddings, final norm, lm_head, projections around the stack) is not, but `slimlm.run.embeddings` can quantize the token
embedding and lm_head. Experts whose weights a class fuses into one tensor become linear layers when `models.experts` takes them
apart; routers are never compressed.
"""

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from slimlm.core.errors import ModelError
from slimlm.models.experts import ROUTER, routers_of

LINEAR_KINDS = (nn.Linear, Conv1D)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in order.

    Raises:
        ModelError: the model has no list of blocks.
    """
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sized = [(sum(p.numel() for p in module.parameters()), name, module) for name, module in lists]
    if not sized:
        raise ModelError(f"{type(model).__name__} has no list of blocks (nn.ModuleList); slimlm compresses stacks of blocks")
    weights, name, stack = max(sized, key=lambda entry: entry[0])
    if not weights:
        count = getattr(text_config(model), "num_hidden_layers", None)
        asked = "" if count is None else f": the config says num_hidden_layers = {count}"
        raise ModelError(f"{type(model).__name__} has no blocks{asked}; there is nothing to compress")
    return {f"{name}.{i}": block for i, block in enumerate(stack)}


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block, except for routers, by their name within it."""
    routers = routers_of(block)
    return {name: module for name, module in block.named_modules() if _is_linear(module) and name not in routers}


def _is_linear(module: nn.Module) -> bool:
    """Whether this computes x W^T + b; a class with its own `forward` is tried on small numbers."""
    kind = next((kind for kind in LINEAR_KINDS if isinstance(module, kind)), None)
    if kind is None or type(module).forward is kind.forward:
        return kind is not None
    probe = copy.copy(module)
    weight, bias = torch.arange(15.0).view(3, 5).sin(), torch.arange(3.0).cos() if module.bias is not None else None
    probe._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    x = torch.arange(10.0).view(2, 5).cos()
    # Such a class may raise any exception.
    with suppress(Exception), torch.no_grad():
        return torch.allclose(probe(x), F.linear(x, weight, bias), atol=1e-5)
    return False


def others_of(block: nn.Module) -> dict[str, str]:
    """The matrices of a block that are not the weight of a linear layer: by name, a description for reports."""
    weights, routers = {f"{name}.weight" for name in linears_of(block)}, routers_of(block)
    others = {}
    for name, parameter in block.named_parameters():
        if parameter.ndim > 1 and name not in weights:
            owner = name.rpartition(".")[0]
            kind = type(block.get_submodule(owner)).__name__
            unknown = f"{tuple(parameter.shape)} of a {kind}, not a linear layer that slimlm knows"
            others[name] = ROUTER if owner in routers else unknown
    return others


def weight_of(linear: nn.Module) -> Tensor:
    """The weight `[out, in]`, in whichever layout the layer stores it."""
    weight = linear.get_parameter("weight").detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def put_weight(linear: nn.Module, weight: Tensor) -> None:
    """Set the weight from `[out, in]`, in whichever layout the layer stores it."""
    linear.get_parameter("weight").data.copy_(weight.T if isinstance(linear, Conv1D) else weight)


def swap(block: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the layer `name` of the block by `new`."""
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, new)


def vocabulary_size(model: nn.Module) -> int:
    """The number of tokens in a model's vocabulary, by its config; 1 where it does not say."""
    return int(getattr(text_config(model), "vocab_size", None) or 1)


def text_config(model: nn.Module) -> Any:
    """The config of a model, or of its language part where it also has others (images); None where it has none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if isinstance(config, PreTrainedConfig) else config


def context_length(model: nn.Module) -> int | None:
    """The longest input that the model was made for, in tokens; None where its config does not say."""
    length = getattr(text_config(model), "max_position_embeddings", None)
    return int(length) if length and length > 0 else None
