"""The model that is tuned: it stays packed in its files, its trained values are parameters in memory.

A block is made of both when it is run. So in memory are, besides one block, the trained values alone: scales, codebooks,
adapters, norms.
"""

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from slimlm.core.parts.trainable import Trains
from slimlm.evaluation.stored_model import StoredModel
from slimlm.models.structure import blocks_of, swap
from slimlm.runtime.linear import CompressedLinear
from slimlm.tuning.trainable import TunedLinear, vectors_of


class Student:
    """A stored model, some of whose values are trained."""

    def __init__(self, stored: StoredModel, trains: Trains, device: torch.device, *, keep_blocks: bool = False) -> None:
        """Make the parameters, which have the stored values.

        Args:
            stored: The model.
            trains: The kinds of values that are trained.
            device: Where its blocks are run.
            keep_blocks: Whether blocks stay in memory once they are made.
        """
        self.stored, self.device = stored, device
        self.names = list(blocks_of(stored.meta_model))
        self._trains = trains
        self._kept: dict[str, nn.Module] | None = {} if keep_blocks else None
        self.parameters: dict[str, nn.Parameter] = {}
        for name in self.names:
            block = self._made(name)
            self.parameters |= {f"{name}.{key}": own for key, own in _trained(block)}
            self._keep(name, block)

    def block(self, name: str) -> nn.Module:
        """A block of this name, in float32 on the device, with the parameters in it."""
        if self._kept and name in self._kept:
            return self._kept[name]
        block = self._made(name)
        for key, _ in _trained(block):
            owner, _, leaf = key.rpartition(".")
            setattr(block.get_submodule(owner), leaf, self.parameters[f"{name}.{key}"])
        self._keep(name, block)
        return block

    def changed(self) -> dict[str, Tensor]:
        """The parameters in their stored form: the tensors of the files that are others now, by full name."""
        given, found = self.stored.tensors, {}
        for name in self.names:
            for key, tensor in _stored(self.block(name)):
                full = f"{name}.{key}"
                new = tensor.detach().to(device="cpu", dtype=given[full].dtype)
                if not torch.equal(new, given[full]):
                    found[full] = new.clone()
        return found

    def with_changed(self, changed: dict[str, Tensor]) -> StoredModel:
        """The stored model with other values `[...]` of some tensors, by full name."""
        return dataclasses.replace(self.stored, tensors={**self.stored.tensors, **changed})

    def _made(self, name: str) -> nn.Module:
        block = self.stored.block(name, self.device)
        vectors = vectors_of(block) if Trains.NORMS in self._trains else []
        for layer, module in list(block.named_modules()):
            if isinstance(module, CompressedLinear):
                swap(block, layer, TunedLinear(module, self._trains))
        for key in vectors:
            owner, _, leaf = key.rpartition(".")
            # Copied, because what is stored in float32 is a view of the file.
            setattr(block.get_submodule(owner), leaf, nn.Parameter(block.get_parameter(key).detach().clone()))
        self.stored.release(tensor for full, tensor in self.stored.tensors.items() if full.startswith(f"{name}."))
        return block

    def _keep(self, name: str, block: nn.Module) -> None:
        if self._kept is not None:
            self._kept[name] = block


def _trained(block: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(key, own) for key, own in block.named_parameters() if own.requires_grad]


def _stored(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors of what is trained in a block, by their names within it; some of them are the original ones."""
    layers = {name: module for name, module in block.named_modules() if isinstance(module, TunedLinear)}
    for name, layer in layers.items():
        if layer.bias is not None and layer.bias.requires_grad:
            yield f"{name}.bias", layer.bias
        if any(own.requires_grad for own in layer.parts.parameters()):
            yield from ((f"{name}.{key}", tensor) for key, tensor in layer.stored().tensors().items())
    inside = tuple(f"{name}." for name in layers)
    yield from ((key, own) for key, own in _trained(block) if not key.startswith(inside))
