"""Placeholders: tensors with a shape and a dtype that take no memory.

A meta model's parameters are such tensors rather than tensors on torch's meta device, so that its modules stay ordinary CPU
modules, whose computed buffers (rotary tables) hold their values and whose parameters can be filled in place.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def placeholder(shape: Iterable[int], dtype: torch.dtype, value: int = 0) -> Tensor:
    """A CPU tensor of this shape, dtype and value, whose elements share one element of memory."""
    return torch.full((), value, dtype=dtype).expand(tuple(shape))


def meta_copy(
    module: nn.Module, outside: Iterable[Tensor] = (), replaced: Iterable[tuple[nn.Module, nn.Module]] = ()
) -> nn.Module:
    """A copy of a module of a meta model, also without values; deepcopy alone would allocate every parameter.

    Args:
        module: the module.
        outside: other tensors `[...]` of the model, which are copied without values, too, if the module refers to them.
        replaced: pairs of a module inside this one, which is not copied, and another that stands in its place in the copy.
    """
    memo: dict[int, Any] = {id(own): other for own, other in replaced}
    for tensor in (*module.state_dict(keep_vars=True).values(), *outside):
        empty = placeholder(tensor.shape, tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def drop_values(tensors: Iterable[Tensor]) -> None:
    """Replace the data of these tensors, of any shapes `[...]`, by placeholders, which frees their memory."""
    for tensor in tensors:
        tensor.data = placeholder(tensor.shape, tensor.dtype)
