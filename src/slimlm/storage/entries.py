"""The description of packed layers and embeddings in config.json: parsed once, and checked before it is used."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from slimlm.core.errors import CheckpointError
from slimlm.core.parts.fields import Json
from slimlm.core.parts.pack import EmbeddingEntry, LayerEntry, StoredEntry

T = TypeVar("T", bound=StoredEntry)


@dataclass(frozen=True)
class Description:
    """The compressed layers and embeddings of a checkpoint, by full name."""

    layers: Mapping[str, LayerEntry]
    """The entries of layers."""
    embeddings: Mapping[str, EmbeddingEntry] = field(default_factory=dict)
    """The entries of embeddings."""
    experts: tuple[str, ...] = ()
    """The modules whose experts are stored one by one, where the model's class has them in one tensor."""
    others: tuple[str, ...] = ()
    """The tensors that are stored as the original's files hold them, for which the model's class has no place."""

    def to_json(self) -> dict[str, Json]:
        """The inverse of `parse_description`, for a `quantization_config`."""
        found: dict[str, Json] = {"layers": {name: entry.to_json() for name, entry in self.layers.items()}}
        if self.embeddings:
            found["embeddings"] = {name: entry.to_json() for name, entry in self.embeddings.items()}
        if self.experts:
            found["experts"] = list(self.experts)
        if self.others:
            found["others"] = list(self.others)
        return found

    def own(self) -> dict[str, StoredEntry]:
        """The layers and embeddings under whose names packed tensors are stored."""
        return {name: entry for name, entry in self.layers.items() if entry.tied_to is None} | dict(self.embeddings)

    def packed_names(self) -> Iterator[str]:
        """The full names of all packed tensors."""
        return (f"{name}.{tensor}" for name, entry in self.own().items() for tensor in entry.tensors)


def parse_description(about: Mapping[str, object], where: object) -> Description:
    """Parse a `quantization_config`.

    Args:
        about: The `quantization_config`.
        where: The checkpoint, for messages.

    Raises:
        CheckpointError: It is malformed, or describes layers or embeddings that cannot exist.
    """
    embeddings = _parsed(about.get("embeddings", {}), "embeddings", EmbeddingEntry.parse, where)
    layers = _parsed(about.get("layers"), "layers", LayerEntry.parse, where)
    for name, layer in layers.items():
        if layer.tied_to is not None:
            _check_tie(name, layer, embeddings, where)
    experts, others = (_names(about.get(kind, []), kind, where) for kind in ("experts", "others"))
    if twice := sorted(set(layers) & set(embeddings)):
        raise CheckpointError(f"{where} describes {twice[0]!r} both as a layer and as an embedding; the checkpoint is damaged")
    return Description(layers, embeddings, experts, others)


def _names(listed: object, kind: str, where: object) -> tuple[str, ...]:
    if not isinstance(listed, list | tuple) or not all(isinstance(name, str) for name in listed):
        raise CheckpointError(f"{where} does not list {kind} by name; the checkpoint is damaged")
    return tuple(listed)


def _parsed(entries: object, kind: str, parse: Callable[[object], T], where: object) -> dict[str, T]:
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{where} has no {kind} by name in its quantization_config; the checkpoint is damaged")
    found = {}
    for name, data in entries.items():
        try:
            if not name or "" in name.split("."):
                raise CheckpointError("this is not a module's name")
            found[name] = parse(data)
            found[name].check()
        except CheckpointError as error:
            raise _unsound(name, error, where) from None
    return found


def _check_tie(name: str, layer: LayerEntry, embeddings: Mapping[str, EmbeddingEntry], where: object) -> None:
    owner = embeddings.get(layer.tied_to or "")
    if owner is None:
        raise _unsound(name, f"it is tied to {layer.tied_to!r}, which is no embedding here", where)
    if (layer.shape, layer.parts, layer.tensors) != (owner.shape, owner.parts, owner.tensors):
        raise _unsound(name, f"it is tied to {layer.tied_to}, but has another description", where)


def _unsound(name: str, reason: object, where: object) -> CheckpointError:
    return CheckpointError(f"{where} does not describe {name!r} soundly: {reason}; the checkpoint is damaged")
