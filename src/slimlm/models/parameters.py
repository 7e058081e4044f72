"""Which tensor of a model's files each of its parameters is, found without reading any.

Transformers itself loads the model, from placeholders in place of the files' tensors. So the names of tensors in the files,
which of them are tied, and what a model computes for itself (rotary tables) are decided by transformers. Experts that
transformers would stack into one tensor stay the separate tensors of the files (`models.stacked_experts`); other tensors that
it makes of several are made once, before (`models.conversion`). Every tensor of the files is accounted for (`models.unplaced`).
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slimlm.core.errors import ModelError, first_line, is_out_of_memory
from slimlm.models.conversion import Keep, Made, Places, make, places_of
from slimlm.models.experts import Share, fused_in, shares_of, take_apart
from slimlm.models.meta import meta_model
from slimlm.models.opening import loading_settings, read_config
from slimlm.models.placeholders import drop_values, placeholder
from slimlm.models.stacked_experts import Stack, stack_of
from slimlm.models.unplaced import Surroundings, Unplaced, fate_of, refuse_integers, refuse_missing, refuse_quantized_tensors
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
    keep: Keep
    """keeps tensors that are made of several of these"""


@dataclass(frozen=True)
class ResolvedModel:
    """A meta model and the tensors of the files that its parameters are."""

    model: PreTrainedModel
    """its parameters have shapes and no values"""
    weights: dict[str, Tensor]
    """views of the files, by name in the model's state"""
    experts: list[str]
    """the names of the modules whose experts were taken apart into linear layers"""
    unplaced: Unplaced
    """what becomes of the tensors of the files that the model does not have"""
    became: dict[str, tuple[str, ...]]
    """names in the files, and the names of what those tensors are or were made into, in the model or in `taken_apart`"""
    taken_apart: dict[str, tuple[str, ...]]
    """tensors of several experts that were made and then taken apart, and the names in the model's state of their parts"""


def resolve_parameters(source: str, folder: Path, files: FileTensors) -> ResolvedModel:
    """The meta model of a folder, and the tensor of the files that each of its parameters is.

    Args:
        source: the model's name in messages.
        folder: holds its config.
        files: its tensors, of any shapes `[...]`.

    Raises:
        ModelError: transformers cannot open the model, a tensor is missing, has another shape or is no weight of the model, or
            the model takes a tensor of a dtype that slimlm does not read.
    """
    stored = files.stored
    try:
        empty = meta_model(folder, stored | {name: raw for name, (_, raw) in files.unread.items()})
        # Transformers would look for the codes, in place of which there are weights.
        vars(empty.config).pop("quantization_config", None)
        around = Surroundings(source, empty, read_config(str(folder)), stored, files.unread)
        places = places_of(empty, [*stored, *files.unread])
        _refuse_unread(around, places)
        refuse_integers(around, _sources(places))
        refuse_quantized_tensors(around, places.without)
        _refuse_other_shapes(source, empty, places.plain, stored)
        untied = _untied(empty, places.plain, files)
        return _resolved(around, _tensors_for(empty, places, files), untied)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{source} cannot be opened as a causal language model: {first_line(error)}") from error


@dataclass(frozen=True)
class _Tensors:
    """The tensors that a model is made of."""

    places: Places
    """where the tensors of the files belong"""
    files: Mapping[str, Tensor]
    """the tensors of the files"""
    plain: dict[str, Tensor]
    """those of the files that are taken as they are, by their names there"""
    made: Made
    """those that were made of several, by name in the model"""
    stacks: dict[str, Stack]
    """those that stay stacks of several, by name in the model"""

    def of(self, key: str, share: Share | None) -> Tensor:
        """A tensor of the model, or its share of one: a view of the files."""
        if key in self.stacks:
            found = None if share is None else self.stacks[key].share(share, self.files)
            assert found is not None, f"{key} stays a stack, and its layers are views of the files"
            return found
        whole = self.made.tensors[key] if key in self.made.tensors else self.plain[key]
        return whole if share is None else share.view(whole[share.expert])


def _tensors_for(empty: PreTrainedModel, places: Places, files: FileTensors) -> _Tensors:
    """The tensors that a model is made of.

    A stack stays one where each layer that is taken out of it is a view of a tensor of the files; others are made as a whole.
    """
    stored, shapes = files.stored, {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    shares: dict[str, list[Share]] = {}
    for share in shares_of(empty):
        shares.setdefault(share.fused, []).append(share)
    stacks = {}
    for name, step in places.converted.items():
        stack = stack_of(step) if name in shares else None
        if stack is None or stack.shape(stored) != shapes[name]:
            continue
        if all(stack.share(share, stored) is not None for share in shares[name]):
            stacks[name] = stack
    steps = [step for name, step in places.converted.items() if name not in stacks]
    plain = {name: stored[name] for name in places.plain.values()}
    return _Tensors(places, stored, plain, make(empty, steps, stored, files.keep), stacks)


def _resolved(around: Surroundings, tensors: _Tensors, untied: set[str]) -> ResolvedModel:
    """The meta model, and what each of its parameters is."""
    given, keys = _placeholders(tensors, untied)
    with loading_settings():
        model, info = type(around.model).from_pretrained(
            None, config=around.model.config, state_dict=given, dtype=torch.float32, output_loading_info=True
        )
    refuse_missing(around, info["missing_keys"], tensors.places.without)
    unplaced = fate_of(around, tensors.places.without, tensors.places.twice)
    keys_of = _keys_of(model, keys, tensors)
    experts = fused_in(model)
    shares = {name: share for fused in experts for name, share in take_apart(model, fused).items()}
    weights: dict[str, Tensor] = {}
    for name, own in model.state_dict(keep_vars=True).items():
        key = keys_of[shares[name].fused] if name in shares else keys_of[name]
        weights[name] = _computed(around, name, own) if key is None else tensors.of(key, shares.get(name))
    drop_values(model.state_dict(keep_vars=True).values())
    became, taken_apart = _became(tensors, weights, shares)
    return ResolvedModel(model.eval().requires_grad_(False), weights, experts, unplaced, became, taken_apart)


def _keys_of(model: PreTrainedModel, by_address: dict[int, str], tensors: _Tensors) -> dict[str, str | None]:
    """For each name in the model's state the key of the tensor that it was given; None where it was given none.

    Transformers gives a few tensors another address, because it pads biases, and converts what was made once more: these are
    found by name, and what is tied to them as the same parameter.
    """
    by_name = {**tensors.places.plain, **{name: name for name in tensors.made.tensors}}
    state = model.state_dict(keep_vars=True)
    found = {name: by_address.get(tensor.data_ptr(), by_name.get(name)) for name, tensor in state.items()}
    by_identity = {id(state[name]): key for name, key in found.items() if key is not None}
    return {name: key or by_identity.get(id(state[name])) for name, key in found.items()}


def _computed(around: Surroundings, name: str, tensor: Tensor) -> Tensor:
    """A buffer that the class computes where the files do not hold it; ModelError for a parameter."""
    if isinstance(tensor, nn.Parameter):
        raise ModelError(
            f"no tensor of the files of {around.source} is {name} of {around.kind}, and transformers fills it with values of "
            "its own; slimlm compresses models whose parameters are all in the files"
        )
    return tensor.clone()


Names = dict[str, tuple[str, ...]]


def _became(tensors: _Tensors, weights: Mapping[str, Tensor], shares: Mapping[str, Share]) -> tuple[Names, Names]:
    """What became of each tensor of the files that has a place, by its name there, and of tensors made and then taken apart.

    Each of the many tensors that one is made of names that one, which is in the second dict with the names of its parts.
    """
    found: dict[str, list[str]] = {}
    starts, names = _by_address(tensors.files)
    for name, tensor in weights.items():
        place = bisect_right(starts, tensor.data_ptr()) - 1
        if tensor.numel() and place >= 0 and tensor.data_ptr() < starts[place] + tensors.files[names[place]].nbytes:
            found.setdefault(names[place], []).append(name)
    parts: dict[str, list[str]] = {}
    for name in weights:
        parts.setdefault(shares[name].fused if name in shares else name, []).append(name)
    apart: Names = {}
    for target, sources in tensors.made.of.items():
        if parts[target] != [target] and len(sources) > 1:
            apart[target] = tuple(parts[target])
        for source in sources:
            names = [target] if target in apart else parts[target]
            found.setdefault(source, [])
            found[source] += [name for name in names if name not in found[source]]
    for target, source in tensors.places.plain.items():
        # Empty tensors, and those that are tied to an equal one.
        found.setdefault(source, parts[target])
    return {name: tuple(became) for name, became in found.items()}, apart


def _by_address(tensors: Mapping[str, Tensor]) -> tuple[list[int], list[str]]:
    """The addresses of tensors that are not empty, in order, and their names."""
    pairs = sorted((tensor.data_ptr(), name) for name, tensor in tensors.items() if tensor.numel())
    return [address for address, _ in pairs], [name for _, name in pairs]


def _refuse_unread(around: Surroundings, places: Places) -> None:
    """Raise ModelError where the model takes a tensor of a dtype that slimlm does not read."""
    for _, names in _sources(places):
        for name in names:
            if name in around.unread:
                raise ModelError(f"{name} in the files of {around.source} {unknown_dtype(around.unread[name][0])}")


def _sources(places: Places) -> Iterator[tuple[str, list[str]]]:
    """Names in the model, and the names in the files of what each is made of."""
    yield from ((target, [name]) for target, name in places.plain.items())
    yield from ((target, step.names()) for target, step in places.converted.items())


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


def _placeholders(tensors: _Tensors, untied: set[str]) -> tuple[dict[str, Tensor], dict[int, str]]:
    """Placeholders for the tensors that a model is made of, by name, and their names by address.

    Transformers ties what has equal values: those of the tensors in `untied` are ones, all others are zeros.
    """
    like = {name: (tuple(t.shape), t.dtype) for name, t in (tensors.plain | tensors.made.tensors).items()}
    for name, stack in tensors.stacks.items():
        like[name] = stack.shape(tensors.files) or (), tensors.files[stack.names()[0]].dtype
    given = {
        name: placeholder(shape, torch.float32 if dtype.is_floating_point else dtype, int(name in untied))
        for name, (shape, dtype) in like.items()
    }
    return given, {tensor.data_ptr(): name for name, tensor in given.items()}
