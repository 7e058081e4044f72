"""How far a model's predictions are from the original's: KL divergence, and agreement about the most probable token.

For every token except the first of each window both models give a distribution over the vocabulary. The figures are the
mean, median, 99th percentile and maximum over tokens of KL(original || compressed) = sum_v p(v) (log p(v) - log q(v)) in nats,
and the share of tokens whose most probable successor is the same. Log-probabilities are float32, sums over them float64.

Standard errors take a window as the unit, because tokens within one are correlated: that of a mean is the standard deviation of
the windows' means over the square root of their number. That of a percentile is Woodruff's (Journal of the American Statistical
Association 47, 1952): the standard error of the share of tokens below it, carried over to values by the
percentiles at its ends.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.errors import NumericsError
from slimlm.evaluation.perplexity import Piece
from slimlm.record import Divergence, Measured


@dataclass(frozen=True)
class Predictions:
    """What one model, or two, predict for every token but each window's first; tensors are float64 `[windows, length - 1]`."""

    losses: Tensor
    """The negative log-likelihood of each token under the model, in nats."""
    original_losses: Tensor | None = None
    """The same under the original; None: the model was measured alone."""
    divergences: Tensor | None = None
    """KL(original || model) for each token, in nats."""
    same_top: Tensor | None = None
    """1 where the most probable token is the same, else 0."""

    @classmethod
    def joined(cls, parts: "list[Predictions]") -> "Predictions":
        """Those of several batches of windows."""
        losses = torch.cat([part.losses for part in parts])
        pairs = (_both([part.original_losses for part in parts]), _both([part.divergences for part in parts]))
        return cls(losses, *pairs, _both([part.same_top for part in parts]))


def _both(parts: "list[Tensor | None]") -> Tensor | None:
    """The joined tensors of models that were measured against an original; None where they were not."""
    given = [part for part in parts if part is not None]
    return torch.cat(given) if given else None


def predictions_of(
    logits: Iterable[Tensor], windows: Tensor, pieces: Iterable[Piece], original: Iterable[Tensor] | None = None
) -> Predictions:
    """What logits that are computed piece by piece predict.

    Args:
        logits: The model's, for each piece `[windows, positions, vocabulary]`.
        windows: int64 `[count, length]`.
        pieces: As `pieces_of` divides the windows.
        original: The original model's logits for the same pieces; None: the model is measured alone.
    """
    count, length = windows.shape
    losses = torch.zeros(count, length - 1, dtype=torch.float64)
    others = [torch.zeros_like(losses) for _ in range(3)]
    pairs = ((own, None) for own in logits) if original is None else zip(logits, original, strict=True)
    for (some, positions), (own, theirs) in zip(pieces, pairs, strict=True):
        later = windows[some, positions.start + 1 : positions.stop + 1]
        place = (some, slice(positions.start, positions.start + later.shape[1]))
        q = _log_probabilities(own, later)
        losses[place] = _losses(q, later)
        if theirs is not None:
            p = _log_probabilities(theirs, later)
            found = _losses(p, later), kl_divergence(p, q).cpu(), (p.argmax(-1) == q.argmax(-1)).double().cpu()
            for tensor, values in zip(others, found, strict=True):
                tensor[place] = values
    return Predictions(losses) if original is None else Predictions(losses, *others)


def _log_probabilities(logits: Tensor, later: Tensor) -> Tensor:
    """Float32 log-probabilities of the positions `[windows, positions, vocabulary]` that have a token after them."""
    return logits[:, : later.shape[1]].float().log_softmax(dim=-1)


def _losses(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, tokens[..., None].to(log_probabilities.device))[..., 0].double().cpu()


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension, in nats, summed in float64.

    Args:
        log_p: Log-probabilities `[..., vocabulary]`; a token of probability 0 (minus infinity) contributes nothing.
        log_q: The same of the other distribution.

    Returns:
        float64 `[...]`; infinity where q excludes a token that p does not.
    """
    terms = (log_p - log_q).mul_(log_p.exp())
    return terms.masked_fill_(log_p == -math.inf, 0.0).sum(dim=-1, dtype=torch.float64)


def mean_of(values: Tensor) -> Measured:
    """The mean of values `[windows, tokens]`, with the standard error over windows."""
    means = values.double().mean(dim=1)
    return Measured(float(means.mean()), _standard_error(means))


def percentile_of(values: Tensor, share: float) -> Measured:
    """What a share of values `[windows, tokens]` is not above, linear between neighbours, and Woodruff's standard error."""
    ordered = values.double().flatten().sort().values
    found = _at(ordered, share)
    error = _standard_error((values <= found).double().mean(dim=1))
    if error is None:
        return Measured(found, None)
    return Measured(found, (_at(ordered, min(1.0, share + error)) - _at(ordered, max(0.0, share - error))) / 2)


def _at(ordered: Tensor, share: float) -> float:
    """The value at a share of the way through values `[count]` in order."""
    place = share * (len(ordered) - 1)
    low, high = float(ordered[math.floor(place)]), float(ordered[math.ceil(place)])
    return low if low == high else low + (high - low) * (place - math.floor(place))


def _standard_error(means: Tensor) -> float | None:
    return float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else None


def perplexity_from(losses: Tensor) -> Measured:
    """The perplexity of losses `[windows, tokens]` in nats; its relative standard error is that of the mean loss.

    Raises:
        NumericsError: A loss is NaN.
    """
    if bool(losses.isnan().any()):
        raise NumericsError("the model's logits hold NaN, so it has no perplexity; evaluate it in float32")
    found = mean_of(losses)
    value = math.exp(min(found.value, 700.0))
    return Measured(value, None if found.standard_error is None else value * found.standard_error)


def rise_of(found: Predictions) -> Measured | None:
    """The rise of the mean loss (the logarithm of the perplexity) over the original's, in nats; windows are paired."""
    return None if found.original_losses is None else mean_of(found.losses - found.original_losses)


def divergence_of(found: Predictions) -> Divergence | None:
    """The divergence of a model from the original; None where it was measured alone.

    Raises:
        NumericsError: A divergence is NaN.
    """
    values, same = found.divergences, found.same_top
    if values is None or same is None:
        return None
    if bool(values.isnan().any()):
        raise NumericsError("the logits of one of the models hold NaN, so there is no divergence; evaluate it in float32")
    return Divergence(
        mean=mean_of(values),
        median=percentile_of(values, 0.5),
        percentile_99=percentile_of(values, 0.99),
        maximum=float(values.max()),
        same_top=mean_of(same),
        windows=values.shape[0],
        length=values.shape[1] + 1,
    )
