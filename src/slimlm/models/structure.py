"""Blocks and linear layers of a causal language model, found by structure.

The decoder is the `nn.ModuleList` that holds the most parameters. Inside its blocks every `nn.Linear` and every
`Conv1D` (GPT-2's linear layer, whose weight is stored `[in, out]`) is compressed by a recipe's steps; everything outside the
blocks (embeddings, final norm, lm_head, projections around the stack) is not. Of that, slimlm.embedding may shorten the bits of
the token embedding and the head.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from slimlm.core.errors import ModelError

LINEAR_KINDS = (nn.Linear, Conv1D)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's blocks by name, in order; raises ModelError where it has no list of blocks."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    sized = [(sum(p.numel() for p in module.parameters()), name, module) for name, module in lists]
    if not sized:
        raise ModelError(f"{type(model).__name__} has no list of blocks (nn.ModuleList); slimlm compresses stacks of blocks")
    _, name, stack = max(sized, key=lambda entry: entry[0])
    return {f"{name}.{i}": block for i, block in enumerate(stack)}


def linears_of(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside a block, by their name within it."""
    return {name: module for name, module in block.named_modules() if isinstance(module, LINEAR_KINDS)}


def weight_of(linear: nn.Module) -> Tensor:
    """The weight as `[out, in]`, whatever way the layer stores it."""
    weight = linear.get_parameter("weight").detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def put_weight(linear: nn.Module, weight: Tensor) -> None:
    """Set the weight from `[out, in]`, whatever way the layer stores it."""
    own = linear.get_parameter("weight")
    own.data.copy_(weight.T if isinstance(linear, Conv1D) else weight)


def swap(block: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the block has the layer `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, new)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens a model's logits are of, as its config says; 1 where it does not."""
    return int(getattr(model.config.get_text_config(), "vocab_size", None) or 1)


def context_length(model: nn.Module) -> int | None:
    """The longest input the model was made for, in tokens, where its config says so."""
    config = getattr(model, "config", None)
    length = getattr(config, "max_position_embeddings", None)
    return int(length) if length else None
