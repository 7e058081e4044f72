"""The loss of a model's logits per predicted token, and its gradient at the last block's outputs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlm.evaluation.perplexity import Piece, pieces_of
from slimlm.evaluation.stored_model import Head, LossGradient
from slimlm.tuning.tuner import Loss

_ARRAYS = 6
"""Arrays as large as its logits that a piece takes, about: logits, log-probabilities and gradients, of two models."""


def summed(loss: Loss, logits: Tensor, later: Tensor, original: Tensor | None) -> Tensor:
    """A loss, summed over tokens.

    Args:
        loss: The mixture.
        logits: `[samples, positions, vocabulary]`.
        later: The token after each position, `[samples, positions]`.
        original: The original model's logits, where the loss needs them.

    Returns:
        A scalar.
    """
    log_q = logits.float().log_softmax(dim=-1).flatten(0, 1)
    total = log_q.new_zeros(())
    if loss.divergence:
        assert original is not None, "a divergence is one from the original"
        log_p = original.float().log_softmax(dim=-1).flatten(0, 1)
        total = total + loss.divergence * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if loss.next_token:
        total = total + loss.next_token * F.nll_loss(log_q, later.flatten(), reduction="sum")
    return total


@dataclass(frozen=True)
class Objective:
    """A loss of the logits that two models' heads give, piece by piece."""

    loss: Loss
    """The mixture."""
    head: Head
    """The head of the model that is tuned."""
    original: Head | None
    """The original's; None where the loss does not need it."""
    vocabulary: int
    """The number of tokens that logits are for."""

    def gradient(self, tokens: Tensor, hidden: Tensor, original: Tensor | None, share: float) -> LossGradient:
        """A share of the loss, summed over tokens, and its gradient.

        Args:
            tokens: Token ids `[samples, length]`.
            hidden: The last block's outputs, `[samples, length, width]`.
            original: Those of the original model.
            share: The factor.
        """
        value, gradient = 0.0, torch.zeros_like(hidden)
        for piece in self._pieces(tokens):
            some, positions = piece
            later = tokens[some, positions.start + 1 : positions.stop + 1]
            given = hidden[piece].detach().requires_grad_()
            theirs = self._original_logits(tokens, original, piece, later.shape[1])
            with torch.enable_grad():
                logits = self.head(tokens[piece], given)[:, : later.shape[1]]
                total = share * summed(self.loss, logits, later.to(logits.device), theirs)
                (gradient[piece],) = torch.autograd.grad(total, given)
            value += float(total.detach())
        return LossGradient(value, gradient)

    def _pieces(self, tokens: Tensor) -> Sequence[Piece]:
        return pieces_of(tokens, _ARRAYS * self.vocabulary)

    def _original_logits(self, tokens: Tensor, hidden: Tensor | None, piece: Piece, positions: int) -> Tensor | None:
        if self.original is None or hidden is None:
            return None
        with torch.no_grad():
            return self.original(tokens[piece], hidden[piece])[:, :positions]
