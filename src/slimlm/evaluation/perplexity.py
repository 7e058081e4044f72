"""Perplexity over non-overlapping windows, the protocol of the compression papers.

The exponential of the mean negative log-likelihood of every token except the first of each window, predicted from those before
it in the window. The windows are usually as long as the model's context; the last, incomplete one is dropped.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slimlm.core.errors import NumericsError
from slimlm.data.windows import refuse_unknown_tokens
from slimlm.models.structure import vocabulary_size
from slimlm.runtime.arguments import refuse_no_module, token_ids

_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 2**27
_LOGITS_IN_A_PIECE = 2**24


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity."""

    value: float
    tokens: int
    """number of tokens that were predicted"""
    length: int
    """tokens per window"""


def perplexity(model: nn.Module, windows: Tensor, *, progress: Callable[[int, int], None] | None = None) -> Perplexity:
    """Perplexity of a causal language model; losses are computed in float32.

    Args:
        model: called with token ids `[batch, length]`, gives an object with `logits` `[batch, length, vocabulary]`.
        windows: int64 `[count, length]`.
        progress: called after each batch with the number of batches done and of all.

    Raises:
        DataError: a token has no row in the model's embedding.
        NumericsError: the logits hold NaN.
    """
    refuse_no_module(model)
    windows = token_ids(windows, "windows")
    refuse_unknown_tokens(windows, model)
    device = next(model.parameters()).device
    total, predicted = 0.0, 0
    batches = windows.split(max(1, min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // vocabulary_size(model)) // windows.shape[1]))
    for done, batch in enumerate(batches, 1):
        ids = batch.to(device)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, :-1].float()
        total += _loss(logits.flatten(0, 1), ids[:, 1:].flatten())
        predicted += batch[:, 1:].numel()
        if progress:
            progress(done, len(batches))
    return _perplexity(total, predicted, windows.shape[1])


def few_of(windows: Tensor, vocabulary: int) -> Tensor:
    """The first of these windows, as many as `perplexity` runs in one batch.

    Args:
        windows: `[count, length]`.
        vocabulary: how many tokens the model's logits are for.

    Returns:
        `[at least 1, length]`; a single window is cut where it is too long.
    """
    tokens = max(2, min(_TOKENS_AT_ONCE, _LOGITS_AT_ONCE // vocabulary))
    return windows[: max(1, tokens // windows.shape[1]), :tokens]


Piece = tuple[slice, slice]
"""Rows and columns of windows `[count, length]`."""


def pieces_of(windows: Tensor, vocabulary: int) -> list[Piece]:
    """Windows divided so that the logits of each piece take little memory.

    Args:
        windows: `[count, length]`.
        vocabulary: how many tokens the model's logits are for.
    """
    count, length = windows.shape
    size = max(1, _LOGITS_IN_A_PIECE // vocabulary)
    rows = max(1, size // length)
    return [
        (slice(first, first + rows), slice(low, min(low + size, length)))
        for first in range(0, count, rows)
        for low in range(0, length, size)
    ]


def perplexity_of(logits: Iterable[Tensor], windows: Tensor, pieces: Iterable[Piece]) -> Perplexity:
    """Perplexity of logits that were computed piece by piece.

    Args:
        logits: for each piece `[windows, positions, vocabulary]`.
        windows: int64 `[count, length]`.
        pieces: as `pieces_of` divides the windows.

    Raises:
        NumericsError: the logits hold NaN.
    """
    total = 0.0
    for piece, (some, positions) in zip(logits, pieces, strict=True):
        later = windows[some, positions.start + 1 : positions.stop + 1]
        total += _loss(piece[:, : later.shape[1]].float().flatten(0, 1), later.flatten())
    return _perplexity(total, windows[:, 1:].numel(), windows.shape[1])


def _loss(logits: Tensor, tokens: Tensor) -> float:
    """Summed negative log-likelihood in nats of tokens `[count]` under logits `[count, vocabulary]`."""
    return float(nn.functional.cross_entropy(logits, tokens, reduction="sum"))


def _perplexity(total: float, predicted: int, length: int) -> Perplexity:
    if math.isnan(total):
        raise NumericsError("the model's logits hold NaN, so it has no perplexity; evaluate it in float32")
    return Perplexity(math.exp(min(total / predicted, 700.0)), predicted, length)
