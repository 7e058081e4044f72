"""Perplexity over non-overlapping windows, the protocol of the compression papers.

exp of the mean negative log-likelihood of every token but the first of each window, each predicted from those before it
in the window; windows of the model's context length unless told otherwise; the last incomplete window is left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimlm.core.errors import NumericsError

_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 2**27


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity."""

    value: float
    tokens: int
    """tokens that were predicted"""
    length: int
    """tokens per window"""


def perplexity(model: nn.Module, windows: Tensor, *, progress: Callable[[int, int], None] | None = None) -> Perplexity:
    """Perplexity of a causal model (token ids to `.logits`) on windows `[count, length]`; float32 losses."""
    device = next(model.parameters()).device
    total, predicted = 0.0, 0
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    batches = windows.split(max(1, min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // vocabulary) // windows.shape[1]))
    for done, batch in enumerate(batches, 1):
        ids = batch.to(device)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, :-1].float()
        total += _loss(logits, ids)
        predicted += batch[:, 1:].numel()
        if progress:
            progress(done, len(batches))
    return _perplexity(total, predicted, windows.shape[1])


def few_of(windows: Tensor, vocabulary: int) -> Tensor:
    """So many of these windows `[count, length]`, or as much of the first, as `perplexity` runs at once."""
    tokens = max(2, min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // vocabulary))
    return windows[: max(1, tokens // windows.shape[1]), :tokens]


def perplexity_of(logits: Tensor, windows: Tensor) -> Perplexity:
    """Perplexity of logits `[count, length, vocabulary]` on their windows `[count, length]`."""
    return _perplexity(_loss(logits[:, :-1].float(), windows), windows[:, 1:].numel(), windows.shape[1])


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Summed negative log-likelihood in nats of all tokens but each window's first."""
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))


def _perplexity(total: float, predicted: int, length: int) -> Perplexity:
    if math.isnan(total):
        raise NumericsError("the model's logits hold NaN, so it has no perplexity; evaluate it in float32")
    return Perplexity(math.exp(min(total / predicted, 700.0)), predicted, length)
