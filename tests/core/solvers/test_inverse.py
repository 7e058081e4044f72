"""The inverse of a covariance: its factor, its damping, its shrinkage, and what is refused."""

import pytest
import torch

from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.grid import Grid
from slimlm.core.solvers.inverse import check_damp, inverse_of, shrunk, tokens_needed
from slimlm.core.solvers.sweep import rounded_sweep
from tests.core.solvers.problems import by_input, covariance_of, draw


@pytest.mark.parametrize("kind", ["plain", "spread", "singular", "dead"])
@pytest.mark.parametrize("damp", [0.001, 0.01, 1.0])
def test_the_factor_is_that_of_the_damped_inverse(kind: str, damp: float) -> None:
    covariance = covariance_of(40, kind)
    inverse = inverse_of(covariance, damp=damp)
    square = covariance.double()
    expected = torch.linalg.inv(square + damp * square.diagonal().mean() * torch.eye(40, dtype=torch.float64))
    found = inverse.upper.double().T @ inverse.upper.double()
    # The factor is rounded to float32 once.
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert torch.equal(inverse.upper, inverse.upper.triu())
    assert (inverse.damped, inverse.notes) == (damp, ())


def test_what_the_later_inputs_do_not_explain_by_hand() -> None:
    inverse = inverse_of(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), damp=0)
    torch.testing.assert_close(inverse.conditional_variance, torch.tensor([1 - 0.36, 1.0]))


def test_damping_is_raised_until_it_does_and_that_is_noted() -> None:
    inverse = inverse_of(covariance_of(40, "dead"), damp=0)
    assert inverse.damped > 0
    assert len(inverse.notes) == 1 and f"{inverse.damped:g} instead of 0" in inverse.notes[0]
    assert bool(inverse.upper.isfinite().all())
    # One negative eigenvalue, as rounding may leave it, of a twentieth of the mean.
    covariance = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.15]))
    assert inverse_of(covariance, damp=0.01).damped == pytest.approx(1.0)


def test_a_matrix_that_is_no_covariance_is_refused() -> None:
    with pytest.raises(NumericsError, match="cannot be inverted"):
        inverse_of(torch.diag(torch.tensor([1.0, 1.0, 1.0, -2.0])), damp=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_covariance_with_nan_or_infinity_is_refused(bad: float) -> None:
    covariance = covariance_of(8)
    covariance[2, 3] = bad
    with pytest.raises(NumericsError, match="NaN or infinity"):
        inverse_of(covariance, damp=0.01)


def test_where_all_inputs_are_dead_everything_is_rounded_to_nearest_and_that_is_noted() -> None:
    weight = draw(6, 40)
    inverse = inverse_of(torch.zeros(40, 40), damp=0.01)
    assert "all inputs are dead" in inverse.notes[0]
    found = rounded_sweep(weight, inverse, by_input(40, 16), grid=Grid.of_bits(4))
    assert torch.equal(found.updated, weight)


@pytest.mark.parametrize("damp", [-0.01, 1.01, float("nan")])
def test_a_damping_outside_zero_to_one_is_refused(damp: float) -> None:
    with pytest.raises(RecipeError, match="damp"):
        check_damp(damp)


def test_a_covariance_of_few_tokens_is_shrunk_towards_its_diagonal_and_that_is_noted() -> None:
    covariance = covariance_of(40)
    kept = [float((shrunk(covariance, tokens)[0] / covariance)[0, 1]) for tokens in (1, 40, 79)]
    assert kept == [pytest.approx(tokens / (40 + tokens)) for tokens in (1, 40, 79)]
    for tokens in (1, 40, 79):
        found, notes = shrunk(covariance, tokens)
        torch.testing.assert_close(found.diagonal(), covariance.diagonal())
        assert torch.equal(found, found.T)
        assert len(notes) == 1 and f"{tokens} calibration tokens" in notes[0] and "needs 80" in notes[0]


@pytest.mark.parametrize("tokens", [80, 81, 100000])
def test_a_covariance_of_enough_tokens_is_left_alone(tokens: int) -> None:
    covariance = covariance_of(40)
    assert shrunk(covariance, tokens) == (covariance, ())
    assert tokens >= tokens_needed(40)
