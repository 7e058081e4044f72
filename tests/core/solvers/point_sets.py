"""Sets of numbers, weights and grids that the tests of the searches share."""

from collections.abc import Callable

import torch
from torch import Tensor

from slimlm.core.grid import Grid
from tests.core.solvers.problems import draw

CODEBOOK = Grid(torch.tensor([-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]), False)
GRIDS = [*map(Grid.of_bits, (2, 3, 4, 8)), CODEBOOK]


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def laplace(count: int) -> Tensor:
    half = uniform(count).clamp(-1 + 1e-6, 1 - 1e-6)
    return half.sign() * -torch.log1p(-half.abs())


def student4(count: int) -> Tensor:
    return draw(count) / draw(4, count, seed=1).square().mean(dim=0).sqrt()


def outlier_mixture(count: int) -> Tensor:
    return draw(count) * torch.where(uniform(count, seed=1) > 0.98, 20.0, 1.0)


def one_outlier(count: int) -> Tensor:
    values = draw(count)
    values[count // 2] = 50
    return values


DISTRIBUTIONS: dict[str, Callable[[int], Tensor]] = {
    "gaussian": draw,
    "laplace": laplace,
    "student-t4": student4,
    "outlier-mixture": outlier_mixture,
    "uniform": uniform,
    "one-outlier": one_outlier,
}
"""By name, what draws so many numbers."""


def uneven_weights(*shape: int, seed: int = 5) -> Tensor:
    """Uneven, a fifth of them zero."""
    return torch.exp(draw(*shape, seed=seed)) * (draw(*shape, seed=seed + 1) > -0.8)


def squared_error(points: Tensor, weights: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Weight x squared distance to the nearest of all grid values, tried one by one in float64: `[sets]`."""
    values = grid.values.double() * scale.double()[:, None]
    return ((points.double()[:, :, None] - values[:, None, :]).square().amin(dim=2) * weights.double()).sum(dim=1)


def mean_square_error(values: Tensor, scale: Tensor | float, bits: int) -> float:
    """An independent quantizer in float64; the scale 0 makes everything 0."""
    x, s = values.double(), float(scale)
    codes = (x / (s or 1.0)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return float((codes * s - x).square().mean())
