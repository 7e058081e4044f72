"""The input embedding and the lm_head of a model, as far as they can be stored in few bits."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

GROUP_SIZE = 32
"""Consecutive weights of a row that share a scale."""
_TRIED_TOKENS = 8


@dataclass(frozen=True)
class Embeddings:
    """The embedding and lm_head of a model that are to be compressed."""

    bits: int
    """Bits per weight, without scales."""
    embedding: str | None = None
    """The full name of the embedding; None where it is not compressed."""
    head: str | None = None
    """The full name of the lm_head; None where it is not compressed."""
    tied: bool = False
    """Whether the two are one matrix."""
    skipped: dict[str, str] = field(default_factory=dict)
    """What is not compressed, and why."""

    @property
    def names(self) -> list[str]:
        """The full names of the modules that are compressed."""
        return [name for name in (self.embedding, self.head) if name is not None]

    @property
    def stored_names(self) -> list[str]:
        """The full names of the modules whose matrices are stored: of tied ones, one."""
        return self.names[:1] if self.tied else self.names


def embeddings_of(model: PreTrainedModel, bits: int | None) -> Embeddings:
    """Which of embedding and lm_head can be stored in so many bits (None: neither); the model is not changed."""
    if bits is None:
        return Embeddings(0)
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:
        return Embeddings(bits, skipped={"embedding and head": "transformers does not say which this model's are"})
    head = model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    reasons = {names[id(embedding)]: _refuse_embedding(embedding) or _shared(model, embedding, head)}
    if head is None:
        return _without_skipped(bits, names[id(embedding)], None, False, {**reasons, "output head": "transformers names none"})
    reasons[names[id(head)]] = _refuse_head(head) or _shared(model, head, embedding)
    weights = [getattr(module, "weight", None) for module in (embedding, head)]
    tied = weights[0] is not None and weights[0] is weights[1]
    if tied and any(reasons.values()):
        reasons = {name: reason or "tied to one that is not compressed" for name, reason in reasons.items()}
    return _without_skipped(bits, names[id(embedding)], names[id(head)], tied, reasons)


def _without_skipped(bits: int, embedding: str, head: str | None, tied: bool, reasons: dict[str, str | None]) -> Embeddings:
    skipped = {name: reason for name, reason in reasons.items() if reason is not None}
    return Embeddings(bits, None if embedding in skipped else embedding, None if head in skipped else head, tied, skipped)


def _refuse_embedding(module: nn.Module) -> str | None:
    """Why an embedding cannot be a `CompressedEmbedding`; None where it can."""
    if not isinstance(module, nn.Embedding):
        return f"a {type(module).__name__}, not an nn.Embedding"
    if module.max_norm is not None:
        return "its rows change while they are looked up (max_norm)"
    if type(module) is nn.Embedding:
        return None
    if (factor := output_factor(module)) is not None:
        ids = torch.arange(min(_TRIED_TOKENS, module.num_embeddings), device=module.weight.device)
        with torch.no_grad():
            if torch.equal(module(ids), F.embedding(ids, module.weight) * factor):
                return None
    return f"a {type(module).__name__}, which may do more than look up"


def output_factor(module: nn.Module) -> float | None:
    """The number by which an embedding of a class like Gemma's multiplies its outputs; None where it has none."""
    scale = getattr(module, "embed_scale", None)
    return float(scale) if isinstance(scale, Tensor) and scale.numel() == 1 else None


def _refuse_head(module: nn.Module) -> str | None:
    return None if type(module) is nn.Linear else f"a {type(module).__name__}, not an nn.Linear"


def _shared(model: nn.Module, module: nn.Module, counterpart: nn.Module | None) -> str | None:
    """Why a matrix is shared with a module other than its counterpart, embedding or lm_head; None where it is not."""
    for name, other in model.named_modules():
        if other is module or other is counterpart:
            continue
        if any(parameter is module.weight for parameter in other.parameters(recurse=False)):
            return f"{name} has the same weight"
    return None
