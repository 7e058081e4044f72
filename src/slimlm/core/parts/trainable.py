"""A part while it is tuned: float parameters for what gradients may change, and the conversion back to what is stored."""

from enum import Flag, auto
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slimlm.core import grid

if TYPE_CHECKING:
    from slimlm.core.parts.base import Part
    from slimlm.core.parts.elementwise import Elementwise


class Trains(Flag):
    """The values that gradients may change; masks and zeros are never among them."""

    SCALES = auto()
    """Scales of codes and indices, also in an adapter's factors."""
    CODEBOOKS = auto()
    """The values of codebooks, also in an adapter's factors."""
    CODES = auto()
    """Codes and indices outside adapters, through latent ones that are rounded on the way forward."""
    WEIGHTS = auto()
    """Floating-point weights outside adapters that are not quantized."""
    ADAPTERS = auto()
    """All values of low-rank parts, codes included."""
    NORMS = auto()
    """The weights of norms, and what other vectors there are outside linear layers."""
    BIASES = auto()
    """The biases of compressed layers."""


NOTHING = Trains(0)
EVERYTHING = ~NOTHING


class Trainable(nn.Module):
    """A part as float parameters, of which those that are trained require a gradient."""

    def dense(self) -> Tensor:
        """The matrix, float32 `[out, in]`, with gradients to the parameters."""
        raise NotImplementedError

    def part(self) -> "Part":
        """The part in its stored form: parameters rounded to what is stored."""
        raise NotImplementedError


class TrainableElements(Trainable):
    """An elementwise part as float parameters."""

    def part(self) -> "Elementwise":
        """The part in its stored form."""
        raise NotImplementedError


class Frozen(Trainable):
    """A part that is not trained."""

    def __init__(self, part: "Part") -> None:
        super().__init__()
        self.frozen = part
        self.matrix = part.dense()

    def dense(self) -> Tensor:
        """The matrix, float32 `[out, in]`; no gradients."""
        return self.matrix

    def part(self) -> "Part":
        """The part itself."""
        return self.frozen


class TrainableScale(nn.Module):
    """Scales as their first values times a trained factor, so that all change in proportion and none changes its sign."""

    def __init__(self, scale: Tensor, trains: Trains) -> None:
        super().__init__()
        self.original = scale
        self.start = scale.float()
        self.factor = nn.Parameter(torch.ones_like(self.start), requires_grad=Trains.SCALES in trains)
        # Scales in float16 stay in its normal range, where they keep their bits.
        half = scale.dtype == torch.float16
        self.least = grid.FP16_SMALLEST_NORMAL if half else torch.finfo(torch.float32).tiny
        self.most = grid.FP16_LARGEST if half else torch.finfo(torch.float32).max

    def forward(self) -> Tensor:
        """The scales `[rows, groups]`, float32."""
        return self.start.sign() * (self.start.abs() * self.factor).clamp(self.least, self.most)

    def stored(self) -> Tensor:
        """The scales in the dtype in which they are stored; the original ones where they are not trained."""
        return self().detach().to(self.original.dtype) if self.factor.requires_grad else self.original


def straight_through(latent: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of the latent ones (straight-through estimator, arXiv 1308.3432).

    Args:
        latent: `[out, in]`, or of any other shape.
        rounded: of the shape of `latent`.

    Returns:
        Of the shape of `latent`.
    """
    return latent + (rounded - latent).detach()
