"""Fitted codebooks: Lloyd's conditions, and examples by hand."""

import pytest
import torch

from slimlm.core.grid import Grid
from slimlm.core.solvers.codebook_fit import fitted_codebook
from tests.core.solvers.point_sets import squared_error, uneven_weights
from tests.core.solvers.problems import draw


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_fitted_codebook_errs_no_more_than_the_grid_it_started_from(bits: int, seed: int) -> None:
    start = Grid.of_bits(bits)
    ratio, weights = draw(3000, seed=seed) * start.largest / 2, uneven_weights(3000, seed=seed)
    codebook = fitted_codebook(ratio, weights, start)

    def left(grid: Grid) -> float:
        return float(squared_error(ratio[None], weights[None], torch.ones(1), grid))

    assert len(codebook.values) == 2**bits and not codebook.even
    assert codebook.values.tolist() == sorted(codebook.values.tolist())
    assert left(codebook) < 0.99 * left(start)  # Gaussian numbers on an even grid of a few values leave more than that
    again = fitted_codebook(ratio, weights, codebook)
    assert left(again) <= left(codebook) * (1 + 1e-6)  # float16 rounds where Lloyd stood still


def test_the_values_of_a_fitted_codebook_are_the_means_of_what_is_nearest_to_them() -> None:
    ratio, weights = draw(400) * 2, uneven_weights(400)
    codebook = Grid.of_bits(2)
    for _ in range(10):  # ten of Lloyd's steps at a time, until it stands still
        codebook = fitted_codebook(ratio, weights, codebook)
    index = codebook.index(ratio)
    means = [float((weights * ratio)[index == i].sum() / weights[index == i].sum()) for i in range(4)]
    # Values are rounded to float16 (2^-11), and points near a border may lie on either side of it for that.
    assert codebook.values.tolist() == pytest.approx(means, rel=5e-3, abs=5e-3)


def test_a_codebook_fitted_to_points_on_its_values_is_the_same() -> None:
    start = Grid.of_bits(4)
    points = start.values[torch.randint(16, (500,), generator=torch.Generator().manual_seed(2))]
    assert torch.equal(fitted_codebook(points, torch.ones(500), start).values, start.values)


def test_values_without_points_stay_and_points_without_weight_count_nothing() -> None:
    codebook = fitted_codebook(torch.tensor([0.3, 0.3, 9.0]), torch.tensor([1.0, 3.0, 0.0]), Grid.of_bits(2))
    assert codebook.values.tolist() == [-2, -1, pytest.approx(0.3, rel=2**-11), 1]


def test_a_fitted_codebook_by_hand() -> None:
    # The nearest of 0.2 and 0.4 is 0; 0.2 counts three times. That of 1.4 and the far 5 is 1.
    ratio, weights = torch.tensor([0.2, 0.4, 1.4, 5.0]), torch.tensor([3.0, 1.0, 1.0, 1.0])
    codebook = fitted_codebook(ratio, weights, Grid.of_bits(2))
    # (0.2 x 3 + 0.4) / 4 = 0.25; (1.4 + 5) / 2 = 3.2, from which 1.4 goes to 0.25: (3 x 0.2 + 0.4 + 1.4) / 5 = 0.48 and 5.
    assert codebook.values.tolist() == [-2, -1, pytest.approx(0.48, rel=2**-11), 5]
