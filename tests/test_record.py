"""The errors of a layer are what their names say, and the quality check is about perplexity."""

import pytest
import torch

from slimlm.record import output_error, output_error_operations, relative_error


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_output_error_is_that_of_the_outputs() -> None:
    weight, found, mixing = random(8, 6), random(8, 6, seed=1), random(6, 6, seed=2)
    inputs = random(1000, 6, seed=3) @ mixing
    covariance = inputs.T @ inputs / 1000
    measured = ((weight - found) @ inputs.T).norm() / (weight @ inputs.T).norm()
    assert output_error(weight, weight - found, covariance) == pytest.approx(float(measured), rel=1e-5)
    assert output_error(weight, torch.zeros(8, 6), covariance) == 0.0 == output_error(torch.zeros(8, 6), weight, covariance)


def test_the_output_error_of_many_outputs_is_estimated_from_random_sums_of_them() -> None:
    weight, mixing = random(5000, 24), random(24, 24, seed=2)
    # Rows of very different sizes, whose errors are different shares of them.
    weight *= torch.linspace(0.1, 3, 5000)[:, None]
    error = 0.1 * random(5000, 24, seed=1) * torch.linspace(2, 1, 5000)[:, None]
    inputs = random(1000, 24, seed=3) @ mixing
    covariance = inputs.T @ inputs / 1000
    exact = float((error @ inputs.T).norm() / (weight @ inputs.T).norm())
    found = output_error(weight, error, covariance)
    assert found == pytest.approx(exact, rel=0.05) and found != pytest.approx(exact, rel=1e-6)
    assert found == output_error(weight, error, covariance)
    assert output_error(weight[:512], error[:512], covariance) == pytest.approx(
        float((error[:512] @ inputs.T).norm() / (weight[:512] @ inputs.T).norm()), rel=1e-5
    )


def test_the_operations_of_an_output_error_grow_slowly_with_the_outputs() -> None:
    assert output_error_operations((512, 1000)) == 4 * 512 * 1000**2
    assert output_error_operations((1024, 1000)) < output_error_operations((512, 1000)) * 1.1


def test_the_diagonal_error_is_the_output_error_of_uncorrelated_inputs() -> None:
    weight, found, second_moment = random(8, 6), random(8, 6, seed=1), random(6, seed=2).square()
    expected = output_error(weight, weight - found, second_moment.diag())
    assert relative_error(weight, found, second_moment) == pytest.approx(expected, rel=1e-5)
