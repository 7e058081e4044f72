"""The names of a model's files and of its class, and tensors that transformers makes of others.

Transformers has a conversion mapping from the names of the files to those of the class. It also makes tensors: it cuts fused
ones, joins split ones and permutes rows, and computes nothing. Here that is done for one tensor of the model at a time, in the
dtype in which the files store it. Pieces that are rows of one tensor stay views of the files; others are kept by a function
that the caller gives, which may write them to a file.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, Split, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from slimlm.core.errors import ModelError, first_line, is_out_of_memory
from slimlm.storage.streams import Described

Keep = Callable[[Described, Iterable[Tensor]], dict[str, Tensor]]
"""A function that takes the dtypes and shapes of tensors, and the tensors one at a time, and gives them back by name."""


@dataclass(frozen=True)
class Conversion:
    """One step of the mapping: tensors of a model and the tensors of the files that they are made of."""

    target: str
    """a name in the model; of several the first"""
    converter: WeightConverter
    sources: dict[str, tuple[str, ...]]
    """names in the files by the patterns of the mapping"""

    def names(self) -> list[str]:
        """All names in the files."""
        return [name for names in self.sources.values() for name in names]


@dataclass(frozen=True)
class Places:
    """Where the tensors of a model's files belong in its class."""

    plain: dict[str, str] = field(default_factory=dict)
    """names in the files of tensors that are taken as they are, by their names in the model"""
    converted: dict[str, Conversion] = field(default_factory=dict)
    """steps of the mapping, by name in the model"""
    twice: list[tuple[str, str]] = field(default_factory=list)
    """pairs of names in the files that have the same name in the model; the first is in `plain`"""
    without: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """names in the files that have no place in the model, with the names that transformers looks for there"""


def places_of(model: PreTrainedModel, stored: Iterable[str]) -> Places:
    """Where tensors belong, by their names in the files, as transformers matches them when it loads.

    Args:
        model: the model, which may be on the meta device.
        stored: the names of the tensors in the files.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, found = model.state_dict(), Places()
    sources: dict[str, dict[str, list[str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = name, None
        if target not in state:
            targets = (target,) if pattern is None else tuple(_all_targets(target, by_pattern[pattern]))
            found.without[name] = targets
        elif pattern is not None:
            sources.setdefault(target, {}).setdefault(pattern, []).append(name)
        elif (first := found.plain.setdefault(target, name)) != name:
            found.twice.append((first, name))
    for target, parts in sources.items():
        own = {pattern: tuple(names) for pattern, names in parts.items()}
        found.converted[target] = Conversion(target, by_pattern[next(iter(own))], own)
    return found


def _all_targets(target: str, converter: WeightConverter) -> Iterator[str]:
    first, *_ = patterns = converter.target_patterns
    return (target.replace(first, pattern) for pattern in patterns)


@dataclass(frozen=True)
class Made:
    """Tensors of a model that were made of others."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    """the tensors `[...]`, by name in the model"""
    of: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """the names in the files of what each was made of"""


def make(model: PreTrainedModel, steps: Iterable[Conversion], stored: Mapping[str, Tensor], keep: Keep) -> Made:
    """Make the tensors of a model that these steps give.

    Args:
        model: the model on the meta device.
        steps: the steps.
        stored: the tensors of the files, of any shapes `[...]`, by name.
        keep: is given the tensors that are no views of the files.

    Raises:
        ModelError: transformers cannot make a tensor of what the files hold.
    """
    views: dict[str, Tensor] = {}
    of: dict[str, tuple[str, ...]] = {}
    later: list[Conversion] = []
    about: Described = {}
    state = model.state_dict()
    for step in steps:
        cut = all(isinstance(op, Chunk | Split) and op.dim == 0 for op in step.converter.operations)
        likes = stored if cut else {name: stored[name].to("meta") for name in step.names()}
        made = _converted(model, step, likes)
        _refuse_unfit(model, step, made, state)
        of |= dict.fromkeys(made, tuple(step.names()))
        if cut:
            views |= made
        else:
            later.append(step)
            about |= {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()}
    kept = keep(about, (t for step in later for t in _converted(model, step, stored).values())) if later else {}
    return Made(views | kept, of)


def _converted(model: PreTrainedModel, step: Conversion, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What transformers makes of these tensors, in a dtype that holds the values of all of them."""
    dtype = reduce(torch.promote_types, (stored[name].dtype for name in step.names()))
    converter = deepcopy(step.converter)
    for pattern, names in step.sources.items():
        for name in names:
            converter.add_tensor(step.target, name, pattern, stored[name].to(dtype))
    try:
        found = converter.convert(step.target, model=model, config=model.config)
    except (ValueError, RuntimeError, LookupError, AttributeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        used = step.names()
        raise ModelError(
            f"transformers makes {step.target} of {type(model).__name__} of {len(used)} tensors of the files, {used[0]} among "
            f"them, and cannot do so with those that are there: {first_line(error)}. Download the model again"
        ) from error
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}


def _refuse_unfit(model: PreTrainedModel, step: Conversion, made: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ModelError where a tensor that was made is not one of the model's, or has another shape."""
    kind, names = type(model).__name__, step.names()
    for name, tensor in made.items():
        if name not in state:
            raise ModelError(
                f"transformers makes {name} of {names[0]}, and {kind} has no tensor of that name; slimlm leaves no part of a "
                "tensor out"
            )
        if tensor.shape != state[name].shape:
            raise ModelError(
                f"{name} of {kind} is made of {len(names)} tensors of the files, {names[0]} among them, which gives the shape "
                f"{list(tensor.shape)}; by the config it is {list(state[name].shape)}. Some of them are missing, or config and "
                "weights belong to different models: download both again"
            )
