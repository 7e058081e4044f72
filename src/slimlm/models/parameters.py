"""Which tensor of a model's files each of its parameters is, found without reading any.

Transformers itself loads the model, from placeholders in place of the files' tensors. So the names of tensors in the files,
which of them are tied, and what a model computes for itself (rotary tables) are decided by transformers. Experts that
transformers would stack into one tensor stay the separate tensors of the files (`models.stacked_experts`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.core.errors import ModelError, first_line
from slimlm.models.experts import Share, fused_in, take_apart
from slimlm.models.meta import meta_model
from slimlm.models.opening import refuse_missing, without_progress_bars
from slimlm.models.placeholders import placeholder
from slimlm.models.stacked_experts import Stack, stacks_in, taken_as_they_are, taken_of
from slimlm.storage.mapping import unknown_dtype

Release = Callable[[Iterable[Tensor]], Any]
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class FileTensors:
    """The tensors of a model's files, none of them read yet."""

    stored: dict[str, Tensor]
    """views of the files, by their names there"""
    unread: dict[str, tuple[str, Tensor]]
    """tensors of dtypes that slimlm does not read: the dtype, and the bytes"""
    release: Release
    """frees the memory pages of those of its tensors that are views of a file"""


@dataclass(frozen=True)
class ResolvedModel:
    """A meta model and the tensors of the files that its parameters are."""

    model: PreTrainedModel
    """its parameters have shapes and no values"""
    weights: dict[str, Tensor]
    """views of the files, by name in the model's state"""
    experts: list[str]
    """the names of the modules whose experts were taken apart into linear layers"""


def resolve_parameters(source: str, folder: Path, files: FileTensors) -> ResolvedModel | None:
    """The meta model of a folder, and the tensor of the files that each of its parameters is.

    Args:
        source: the model's name in messages.
        folder: holds its config.
        files: its tensors, of any shapes `[...]`.

    Returns:
        The model; None where transformers makes a parameter of several tensors in a way that slimlm does not know.

    Raises:
        ModelError: transformers cannot open the model, a tensor is missing or has another shape, or the model takes a tensor of
            a dtype that slimlm does not read.
    """
    stored = files.stored
    try:
        empty = meta_model(folder, stored | {name: raw for name, (_, raw) in files.unread.items()})
        for name in taken_of(empty, files.unread)[:1]:
            raise ModelError(f"{name} in the files of {source} {unknown_dtype(files.unread[name][0])}")
        stacks = {name: stack for name, stack in stacks_in(empty, stored).items() if stack.shape(stored) is not None}
        names = taken_as_they_are(empty, stored)
        _refuse_other_shapes(source, empty, names, stored)
        given, keys = _placeholders(stored, stacks, _untied(empty, names, files))
        with without_progress_bars():
            model, info = type(empty).from_pretrained(
                None, config=empty.config, state_dict=given, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{source} cannot be opened as a causal language model: {first_line(error)}") from error
    refuse_missing(info, source, type(model).__name__)
    keys_of = {name: keys.get(tensor.data_ptr()) for name, tensor in model.state_dict().items()}
    experts = fused_in(model)
    shares = {name: share for fused in experts for name, share in take_apart(model, fused).items()}
    weights = {}
    for name in model.state_dict():
        key = keys_of[shares[name].fused] if name in shares else keys_of[name]
        tensor = None if key is None else _tensor_of(key, shares.get(name), stored, stacks)
        if tensor is None:
            return None
        weights[name] = tensor
    return ResolvedModel(model.eval().requires_grad_(False), weights, experts)


def _refuse_other_shapes(source: str, empty: PreTrainedModel, names: dict[str, str], stored: dict[str, Tensor]) -> None:
    """Raise ModelError where a tensor of the files has another shape than in the model.

    `names` gives the tensors' names in the files by their names in the model.
    """
    state = empty.state_dict()
    odd = [(in_model, in_file) for in_model, in_file in names.items() if stored[in_file].shape != state[in_model].shape]
    if odd:
        in_model, in_file = odd[0]
        more = f" ({len(odd) - 1} more do not fit either)" if len(odd) > 1 else ""
        raise ModelError(
            f"{in_file} in the files of {source} has the shape {list(stored[in_file].shape)}; by the config, "
            f"{type(empty).__name__} has it in the shape {list(state[in_model].shape)}{more}. Config and weights belong to "
            "different models, or one was changed: download both again"
        )


def _untied(empty: PreTrainedModel, names: dict[str, str], files: FileTensors) -> set[str]:
    """Names in the files of tensors that the config ties to others, although the files hold both and they differ."""
    untied = set()
    for one, other in empty.get_expanded_tied_weights_keys(all_submodels=True).items():
        if one in names and other in names and not _equal(files.stored[names[one]], files.stored[names[other]], files.release):
            untied.add(names[one])
    return untied


def _equal(one: Tensor, other: Tensor, release: Release) -> bool:
    """Whether these are equal in float32, as transformers compares tied tensors; a few rows are read at a time."""
    if one.shape != other.shape:
        return False
    try:
        pairs = zip(one.split(_ROWS_AT_ONCE), other.split(_ROWS_AT_ONCE), strict=True) if one.ndim else [(one, other)]
        return all(torch.equal(a.float(), b.float()) for a, b in pairs)
    finally:
        release([one, other])


def _placeholders(
    stored: dict[str, Tensor], stacks: dict[str, Stack], untied: set[str]
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Placeholders for the tensors of the files, or for what they are stacked into, by name, and their names by address.

    Transformers ties what has equal values: those of the tensors in `untied` are ones, all others are zeros.
    """
    stacked = {name for stack in stacks.values() for name in stack.names()}
    like = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items() if name not in stacked}
    for name, stack in stacks.items():
        like[name] = stack.shape(stored) or (), stored[stack.names()[0]].dtype
    given = {
        name: placeholder(shape, torch.float32 if dtype.is_floating_point else dtype, int(name in untied))
        for name, (shape, dtype) in like.items()
    }
    return given, {tensor.data_ptr(): name for name, tensor in given.items()}


def _tensor_of(key: str, share: Share | None, stored: dict[str, Tensor], stacks: dict[str, Stack]) -> Tensor | None:
    """A tensor of the model, or its share of one: a view of the files; None where it is a view of none."""
    if key not in stacks:
        return stored[key] if share is None else share.view(stored[key][share.expert])
    return None if share is None else stacks[key].share(share, stored)
