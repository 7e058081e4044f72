"""The errors of a layer are what their names say, and the quality check is about perplexity."""

import pytest
import torch

from slimlm.record import output_error, relative_error


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_output_error_is_that_of_the_outputs() -> None:
    weight, found, mixing = random(8, 6), random(8, 6, seed=1), random(6, 6, seed=2)
    inputs = random(1000, 6, seed=3) @ mixing
    covariance = inputs.T @ inputs / 1000
    measured = ((weight - found) @ inputs.T).norm() / (weight @ inputs.T).norm()
    assert output_error(weight, weight - found, covariance) == pytest.approx(float(measured), rel=1e-5)
    assert output_error(weight, torch.zeros(8, 6), covariance) == 0.0 == output_error(torch.zeros(8, 6), weight, covariance)


def test_the_diagonal_error_is_the_output_error_of_uncorrelated_inputs() -> None:
    weight, found, second_moment = random(8, 6), random(8, 6, seed=1), random(6, seed=2).square()
    expected = output_error(weight, weight - found, second_moment.diag())
    assert relative_error(weight, found, second_moment) == pytest.approx(expected, rel=1e-5)
