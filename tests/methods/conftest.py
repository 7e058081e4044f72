"""Layers and input statistics without a model."""

import torch
from torch import Tensor

from slimlm.core.statistics.peak_abs import PeakAbs
from slimlm.core.statistics.mean_sample import MeanSample
from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Stats


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers of a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight_of(out: int, width: int, seed: int = 0) -> Tensor:
    """A weight with heavy tails (Student's t with five degrees of freedom), as trained ones have, in float16."""
    tails = draw(5, out, width, seed=seed + 100).square().mean(dim=0).sqrt()
    return (0.05 * draw(out, width, seed=seed) / tails).half()


def layer_of(out: int = 48, width: int = 172, seed: int = 0) -> Layer:
    return Layer.of("fc1", weight_of(out, width, seed))


def stats_of(x: Tensor) -> Stats:
    """All statistics of inputs `[windows, tokens, in]`."""
    flat = x.reshape(-1, x.shape[-1])
    gram = flat.T @ flat / len(flat)
    # As if the layers before this one had been left alone: the original inputs are the inputs.
    return Stats(
        len(flat), {flat.abs().mean(dim=0),
        flat.square().mean(dim=0),
        x.abs().mean(dim=1).amax(dim=0),
        gram,
        gram,
        PeakAbs: flat.abs().amax(dim=0),
        MeanSample: x.mean(dim=0),})


def inputs(width: int = 172, *, dead: int = 0) -> Tensor:
    """Inputs `[4, 32, width]` of very unequal channels, the first `dead` of them silent."""
    x = draw(4, 32, width, seed=1) * torch.exp(draw(width, seed=2))
    return x * (torch.arange(width) >= dead)
