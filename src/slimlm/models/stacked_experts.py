"""The tensors of a model's files that transformers stacks into one: the weights of single experts.

A model's files mostly hold one tensor per expert and projection, where its class has one for all experts; transformers
has a conversion mapping from the files to the class. Where it stacks experts, and gate above up, each linear layer that
`models.experts` takes out of the class's tensor is a tensor of the files, so nothing has to be concatenated.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from slimlm.models.experts import Share


@dataclass(frozen=True)
class Stack:
    """One tensor of a model, `[experts, out, ...]`, and the tensors of the files that it is made of."""

    pieces: tuple[tuple[str, ...], ...]
    """names in the files, expert by expert: of the tensors of the first half of the rows, then of the second; or of all"""

    def names(self) -> list[str]:
        """All names in the files."""
        return [name for half in self.pieces for name in half]

    def shape(self, stored: dict[str, Tensor]) -> tuple[int, ...] | None:
        """The shape `[experts, out, ...]` of the stacked tensor; None where the shapes of the pieces differ."""
        shapes = {stored[name].shape for name in self.names()}
        if len(shapes) > 1 or len({len(half) for half in self.pieces}) > 1:
            return None
        (one,) = shapes
        return len(self.pieces[0]), len(self.pieces) * one[0], *one[1:]

    def share(self, share: Share, stored: dict[str, Tensor]) -> Tensor | None:
        """A layer's weight `[out, in]` or bias `[out]` as a view of one tensor of the files; None where it is none."""
        if len(self.pieces) == 1:
            return share.view(stored[self.pieces[0][share.expert]])
        return None if share.half is None else stored[self.pieces[share.half][share.expert]]


def stacks_in(empty: PreTrainedModel, stored: Iterable[str]) -> dict[str, Stack]:
    """The tensors of a model that transformers stacks of several tensors of the files.

    Names are matched as transformers matches them when it loads. Tensors that it makes in other ways are not in the result.

    Args:
        empty: the model on the meta device.
        stored: the names of the tensors in the files.

    Returns:
        The tensors stacked, by name in the model.
    """
    pieces: dict[str, dict[str, list[str]]] = {}
    for name, renamed, pattern in _renamed(empty, stored):
        if pattern is not None:
            pieces.setdefault(renamed, {}).setdefault(pattern, []).append(name)
    converters = [entry for entry in get_model_conversion_mapping(empty) if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    stacks = {}
    for name, sorts in pieces.items():
        converter = by_pattern[next(iter(sorts))]
        if _stacks(converter) and sorts.keys() == set(converter.source_patterns):
            stacks[name] = Stack(tuple(tuple(sorts[pattern]) for pattern in converter.source_patterns))
    return stacks


def taken_as_they_are(empty: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """The names in the files of the tensors that transformers takes unconverted, by their names in the model."""
    return {renamed: name for name, renamed, pattern in _renamed(empty, stored) if pattern is None}


def taken_of(empty: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """Those of these names in the files that the model uses, converted or not."""
    return [name for name, _, _ in _renamed(empty, stored)]


def _renamed(empty: PreTrainedModel, stored: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Each name in the files that the model uses, its name in the model, and the pattern of its converter, if it has one."""
    mapping = get_model_conversion_mapping(empty)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = empty.state_dict()
    for name in sorted(stored, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, empty.base_model_prefix, state)
        if renamed in state:
            yield name, renamed, pattern


def _stacks(converter: WeightConverter) -> bool:
    """Whether this stacks experts, at most concatenates two of their projections by rows, and does nothing else."""
    first, *rest = converter.operations
    if not isinstance(first, MergeModulelist) or first.dim != 0:
        return False
    sorts = len(converter.source_patterns)
    if not rest:
        return sorts == 1
    return sorts == 2 and len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1
