"""The tensors of a model at one moment, to find out later whether graphs that were captured then still compute the model."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from slimlm.runtime.linear import Source
from slimlm.runtime.whole_model import packed_layers


@dataclass(frozen=True)
class ModelSnapshot:
    """A model's tensors, where they lay, and how often its layers were prepared for their backends."""

    tensors: tuple[Source, ...]
    vectors: Tensor | None
    """The values of norms and biases, of which decoders hold copies; writing to `.data` is not visible otherwise."""
    preparations: tuple[int, ...]
    """The number of preparations of each packed layer; 0: it is not prepared."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelSnapshot":
        """The model now."""
        return cls(tuple(Source.of(tensor) for tensor in _tensors(model)), _vectors(model), _preparations(model))

    def is_still(self, model: PreTrainedModel) -> bool:
        """Whether the model is as it was."""
        now = _tensors(model)
        if len(now) != len(self.tensors) or not all(old.is_still(t) for old, t in zip(self.tensors, now, strict=True)):
            return False
        vectors = _vectors(model)
        same = vectors is self.vectors if vectors is None or self.vectors is None else torch.equal(vectors, self.vectors)
        return same and self.preparations == _preparations(model)


def _tensors(model: PreTrainedModel) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _vectors(model: PreTrainedModel) -> Tensor | None:
    """All parameters with one dimension in one tensor; None where there are none."""
    with torch.no_grad():
        found = [p.float() for p in model.parameters() if p.ndim == 1]
        return torch.cat(found) if found else None


def _preparations(model: PreTrainedModel) -> tuple[int, ...]:
    return tuple(0 if layer.prepared() is None else layer.preparations for layer in packed_layers(model).values())
