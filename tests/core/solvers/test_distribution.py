"""Histograms in place of very many numbers: what is measured under them is what it is under the numbers."""

import pytest
import torch

from slimlm.core.errors import NumericsError
from slimlm.core.grid import Grid
from slimlm.core.solvers.distribution import distribution
from slimlm.core.solvers.scale_cost import cost_of
from slimlm.core.solvers.scale_search import best_scale
from tests.core.solvers.point_sets import DISTRIBUTIONS, mean_square_error, one_outlier
from tests.core.solvers.problems import draw
from tests.fake_gpu import FAKE_GPU, fake_gpu, unwrapped

pytestmark = pytest.mark.usefixtures("form")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_error_under_the_histogram_is_the_error_itself(name: str, bits: int) -> None:  # law 3
    values = DISTRIBUTIONS[name](100_000)
    points, weights = distribution(values.view(1, -1))
    assert points.shape[1] < values.numel(), "this test is about the histogram branch"
    assert float(weights.sum()) == values.numel()
    grid = Grid.of_bits(bits)
    scale = best_scale(points, weights, grid)
    estimate = float(cost_of(points.T, weights.T, grid)(scale[None])) / values.numel()
    assert estimate == pytest.approx(mean_square_error(values, scale, bits), rel=0.02)  # the bound of law 3


def test_the_outermost_points_of_the_histogram_are_the_exact_extremes() -> None:
    values = one_outlier(40000)
    points, weights = distribution(values.view(1, -1))
    assert (float(points[0, 0]), float(points[0, -1])) == (-50, 50)
    assert float(weights[0, -1]) == 1


def test_few_numbers_stay_as_they_are() -> None:
    points, weights = distribution(draw(2, 32768))
    assert torch.equal(points, draw(2, 32768)) and bool((weights == 1).all())


def test_weights_by_hand() -> None:
    values = torch.tensor([-1.0, 1.0, 0.25]).repeat_interleave(20_000)
    weights = torch.tensor([1.0, 2.0, 4.0]).repeat_interleave(20_000)
    (points,), (totals,) = distribution(values[None], weights[None])
    taken = totals > 0
    assert totals[taken].tolist() == [20_000, 80_000, 40_000]
    assert points[taken].tolist() == pytest.approx([-1, 0.25, 1], abs=2 / 32768)


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(NumericsError, match="NaN or infinity"):
        distribution(torch.full((1, 40_000), float("inf")))


def test_the_weights_of_a_histogram_are_added_on_a_gpu_in_any_order() -> None:
    values, weights = draw(40_000), draw(40_000).square()
    here = distribution(values[None], weights[None])[1][0]
    with fake_gpu():
        order = torch.randperm(40_000, generator=torch.Generator().manual_seed(1))
        found = [
            unwrapped(distribution(v[None].to(FAKE_GPU), w[None].to(FAKE_GPU))[1][0])
            for v, w in ((values, weights), (values[order], weights[order]))
        ]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], here, rtol=1e-6, atol=1e-12)  # 2^-47 of the largest weight, 40000 times
