"""The search for a scale and a zero together: what it gains, exact grids, and scales and zeros near earlier ones."""

import pytest
import torch
from torch import Tensor

from slimlm.core.grid import Grid
from slimlm.core.solvers.affine_search import affine_scale, nearby_affine_scale, nearby_scale_and_zero, scale_and_zero
from slimlm.core.solvers.scale_search import best_scale, nearby_scale, signed_scale
from tests.core.solvers.point_sets import GRIDS, uneven_weights
from tests.core.solvers.problems import draw

pytestmark = pytest.mark.usefixtures("form")


def affine_error(points: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    _, value = Grid.of_bits(bits, zeros=True).round(points, scale[:, None], zero[:, None])
    return (weights * (value - points).square()).sum(dim=1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_zero_errs_no_more_than_the_even_grid_and_much_less_on_one_side(bits: int) -> None:
    points = draw(300, 64)
    weights = torch.ones_like(points)
    for numbers, gain in ((points, 1.0), (points.abs(), 0.5)):
        even = best_scale(numbers, weights, Grid.of_bits(bits))
        before = affine_error(numbers, weights, even, torch.full_like(even, 2 ** (bits - 1)), bits)
        after = affine_error(numbers, weights, *affine_scale(numbers, weights, bits=bits), bits)
        assert float(after.sum()) < gain * float(before.sum())


def test_a_scale_and_a_zero_by_hand() -> None:
    # Four values from -1 to 2: exact with the scale 1 and the zero 1.
    points = torch.tensor([[-1.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    scale, zero = affine_scale(points, torch.ones(2, 4), bits=2)
    assert scale.tolist() == pytest.approx([1, 0]) and zero.tolist() == [1, 0]


@pytest.mark.parametrize("bits", [2, 4])
def test_a_scale_and_a_zero_near_earlier_ones_are_no_worse_and_near(bits: int) -> None:
    points, weights = draw(50, 24) + 0.5, draw(50, 24, seed=1).square()
    scale = 0.1 + 2 ** (2 - bits) * draw(50, seed=2).abs()
    zero = torch.randint(0, 2**bits, (50,), generator=torch.Generator().manual_seed(3)).float()
    found, middle = nearby_affine_scale(points, weights, scale, zero, bits=bits)
    before, after = (affine_error(points, weights, *each, bits) for each in ((scale, zero), (found, middle)))
    assert bool((after <= before * (1 + 1e-5)).all()) and float(after.sum()) < 0.9 * float(before.sum())
    assert float((middle - zero).abs().max()) <= 1 and bool(((middle >= 0) & (middle < 2**bits)).all())


def test_near_a_scale_of_zero_there_is_no_other() -> None:
    found, middle = nearby_affine_scale(torch.zeros(1, 8), torch.ones(1, 8), torch.zeros(1), torch.zeros(1), bits=3)
    assert (float(found), float(middle)) == (0, 0)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_grid_without_zeros_is_given_scales_alone(grid: Grid) -> None:
    points, weights = draw(20, 24), uneven_weights(20, 24)
    scale, zero = scale_and_zero(points, weights, grid)
    assert zero is None and torch.equal(scale, signed_scale(points, weights, grid))
    near, zero = nearby_scale_and_zero(points, weights, grid, scale * 1.1, None)
    assert zero is None and torch.equal(near, nearby_scale(points, weights, grid, scale * 1.1))


def test_a_grid_with_zeros_is_given_both() -> None:
    points, weights, grid = draw(20, 24) + 1, uneven_weights(20, 24), Grid.of_bits(3, zeros=True)
    scale, zero = scale_and_zero(points, weights, grid)
    assert zero is not None and all(map(torch.equal, (scale, zero), affine_scale(points, weights, bits=3)))
    found = nearby_scale_and_zero(points, weights, grid, scale * 1.1, zero)
    assert found[1] is not None
    assert all(map(torch.equal, found, nearby_affine_scale(points, weights, scale * 1.1, zero, bits=3)))
