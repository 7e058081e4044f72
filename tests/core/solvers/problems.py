"""Weights, covariances and sweeps that the tests of several solvers share."""

import torch
from torch import Tensor

from slimlm.core.grid import Grid, GroupSize
from slimlm.core.mask import Pattern
from slimlm.core.solvers.inverse import inverse_of
from slimlm.core.solvers.order import Order, order_of
from slimlm.core.solvers.sweep import rounded_sweep
from slimlm.core.solvers.swept import Swept

CODEBOOK = Grid(
    torch.tensor([-1.0, -0.75, -0.5, -0.375, -0.25, -0.125, -0.0625, 0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1]), False
)
"""Sixteen uneven values that float16 holds exactly."""

COVARIANCES = ["plain", "spread", "singular", "dead", "nothing"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance_of(width: int, kind: str = "plain", seed: int = 7) -> Tensor:
    """Of correlated inputs: "spread" over six decades of second moments, "singular" with a third of the rank, or with some
    inputs "dead", or all ("nothing").
    """
    tokens = width // 3 if kind == "singular" else 4 * width
    x = draw(tokens, width, seed=seed) @ (torch.eye(width) + 0.5 * draw(width, width, seed=seed + 1) / width**0.5)
    x = x + draw(tokens, 1, seed=seed + 2)  # one direction that all inputs share
    if kind == "spread":
        x = x * 10 ** (3 * draw(width, seed=seed + 3).clamp(-1, 1) / 2)
    if kind == "dead":
        x = x * (torch.arange(width) % 5 != 2)
    return (x.T @ x / tokens) * (kind != "nothing")


def loss(weight: Tensor, base: Tensor, covariance: Tensor) -> float:
    """tr((W - B) H (W - B)^T), in float64."""
    error = weight.double() - base.double()
    return float((error @ covariance.double() * error).sum())


def by_input(width: int, group_size: GroupSize, pattern: Pattern | None = None) -> Order:
    """The inputs as they come."""
    return order_of(torch.zeros(width), group_size=group_size, pattern=pattern)


def swept(
    weight: Tensor,
    covariance: Tensor,
    *,
    grid: Grid | None = None,
    group_size: GroupSize = 16,
    pattern: str | float | None = None,
    mask: Tensor | None = None,
    damp: float = 0.01,
    ordered: bool = True,
) -> tuple[Swept, Order]:
    """A rounded sweep as the methods make it, and its order."""
    form = None if pattern is None else Pattern.parse(pattern)
    order = order_of(covariance.diagonal() * ordered, group_size=group_size, pattern=form)
    inverse = inverse_of(covariance[order.inputs][:, order.inputs], damp=damp)
    return rounded_sweep(weight, inverse, order, grid=grid or Grid.of_bits(4), pattern=form, mask=mask), order


def dense_of(found: Swept, group_size: GroupSize) -> Tensor:
    """The matrix that a sweep's codes, scales and mask stand for."""
    dense = found.part(group_size).dense()
    return dense if found.mask is None else dense * found.mask


def uneven_covariance(kind: str = "full", width: int = 60) -> Tensor:
    """H of correlated inputs of unequal second moment: "full", of too few tokens ("singular"), or with "dead" inputs."""
    tokens = width // 3 if kind == "singular" else 4 * width
    x = draw(tokens, width, seed=21) + draw(tokens, 1, seed=22)
    x = x * torch.exp(draw(width, seed=23)) * (1 if kind != "dead" else torch.arange(width) % 3 != 0)
    return x.T @ x / tokens
