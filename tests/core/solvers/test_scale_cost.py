"""The cost of scales against the plain sum that it is, with few points and with so many that they are sorted."""

import pytest
import torch

from slimlm.core.grid import Grid
from slimlm.core.solvers.scale_cost import cost_of
from tests.core.solvers.point_sets import GRIDS, squared_error, uneven_weights
from tests.core.solvers.problems import draw


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [12, 2500], ids=["every-point", "sorted-points"])
def test_a_cost_is_the_error_of_trying_every_grid_value(grid: Grid, size: int) -> None:
    points, weights, scale = draw(20, size), uneven_weights(20, size), 0.2 * torch.exp(draw(20, seed=3))
    found = cost_of(points.T.contiguous(), weights.T.contiguous(), grid)(torch.stack([scale, -scale]))
    expected = torch.stack([squared_error(points, weights, sign * scale, grid) for sign in (1, -1)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)  # float32, differences of near numbers


def test_the_cost_of_a_scale_by_hand() -> None:
    # Points 1 and 3 at scale 2: 1 is a tie and goes to 0, 3 (1.5) to 4: 1 * 1 + 5 * 1.
    cost = cost_of(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [5.0]]), Grid.of_bits(4))
    assert cost(torch.tensor([[2.0]])).tolist() == [[6.0]]
