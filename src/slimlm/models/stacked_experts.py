"""The tensors of a model's files that transformers stacks into one: the weights of single experts.

A model's files mostly hold one tensor per expert and projection, where its class has one for all experts; transformers
has a conversion mapping from the files to the class. Where it stacks experts, and gate above up, each linear layer that
`models.experts` takes out of the class's tensor is a tensor of the files, so nothing has to be concatenated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from slimlm.models.conversion import Conversion
from slimlm.models.experts import Share


@dataclass(frozen=True)
class Stack:
    """One tensor of a model, `[experts, out, ...]`, and the tensors of the files that it is made of."""

    pieces: tuple[tuple[str, ...], ...]
    """names in the files, expert by expert: of the tensors of the first half of the rows, then of the second; or of all"""

    def names(self) -> list[str]:
        """All names in the files."""
        return [name for half in self.pieces for name in half]

    def shape(self, stored: Mapping[str, Tensor]) -> tuple[int, ...] | None:
        """The shape `[experts, out, ...]` of the stacked tensor; None where the shapes of the pieces differ."""
        shapes = {stored[name].shape for name in self.names()}
        if len(shapes) > 1 or len({len(half) for half in self.pieces}) > 1:
            return None
        (one,) = shapes
        return len(self.pieces[0]), len(self.pieces) * one[0], *one[1:]

    def share(self, share: Share, stored: Mapping[str, Tensor]) -> Tensor | None:
        """A layer's weight `[out, in]` or bias `[out]` as a view of one tensor of the files; None where it is none."""
        if len(self.pieces) == 1:
            return share.view(stored[self.pieces[0][share.expert]])
        return None if share.half is None else stored[self.pieces[share.half][share.expert]]


def stack_of(conversion: Conversion) -> Stack | None:
    """How transformers stacks these tensors of the files into one of the model; None where it makes that in another way."""
    converter, sources = conversion.converter, conversion.sources
    if not _stacks(converter) or sources.keys() != set(converter.source_patterns):
        return None
    return Stack(tuple(sources[pattern] for pattern in converter.source_patterns))


def _stacks(converter: WeightConverter) -> bool:
    """Whether this stacks experts, at most concatenates two of their projections by rows, and does nothing else."""
    first, *rest = converter.operations
    if not isinstance(first, MergeModulelist) or first.dim != 0:
        return False
    sorts = len(converter.source_patterns)
    if not rest:
        return sorts == 1
    return sorts == 2 and len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1
