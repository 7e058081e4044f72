"""Layers and input statistics without a model."""

from dataclasses import replace

import torch
from torch import Tensor

from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Statistic, Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.cross_covariance import CrossCovariance
from slimlm.core.statistics.mean_abs import MeanAbs
from slimlm.core.statistics.mean_sample import MeanSample
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.statistics.output_residual_covariance import OutputResidualCovariance
from slimlm.core.statistics.peak_abs import PeakAbs
from slimlm.core.statistics.peak_mean_abs import PeakMeanAbs


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
    """All statistics of inputs `[samples, tokens, in]`, but those that take a block's outputs."""
    flat = x.reshape(-1, x.shape[-1])
    covariance = flat.T @ flat / len(flat)
    values: dict[type[Statistic], Tensor | None] = {
        MeanAbs: flat.abs().mean(dim=0),
        MeanSquare: flat.square().mean(dim=0),
        PeakMeanAbs: x.abs().mean(dim=1).amax(dim=0),
        Covariance: covariance,
        # As if the layers before this one had been left alone: the original inputs are the inputs.
        CrossCovariance: covariance,
        OutputResidualCovariance: None,
        PeakAbs: flat.abs().amax(dim=0),
        MeanSample: x.mean(dim=0),
    }
    return Stats(len(flat), values)


def changed(stats: Stats, values: dict[type[Statistic], Tensor | None]) -> Stats:
    """The statistics with other values for some of them."""
    return replace(stats, values={**stats.values, **values})


def inputs(width: int = 172, *, dead: int = 0) -> Tensor:
    """Inputs `[4, 32, width]` of very unequal channels, the first `dead` of them silent."""
    x = draw(4, 32, width, seed=1) * torch.exp(draw(width, seed=2))
    return x * (torch.arange(width) >= dead)
