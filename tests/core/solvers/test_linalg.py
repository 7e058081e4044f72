"""Low-rank products in a weighted norm: optimal, and not disturbed by dead inputs."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from slimlm.core.solvers import linalg

SHAPES = [(24, 40), (40, 24), (32, 32)]
INPUT_WEIGHTS = ["ones", "spread", "dead", "one-alive", "nothing"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights_of(kind: str, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of the inputs `[width]`; "spread" covers four decades."""
    spread = 10 ** (2 * draw(width, seed=9, dtype=dtype).clamp(-1, 1))
    alive = torch.zeros(width, dtype=dtype)
    alive[3] = 2
    return {
        "ones": torch.ones(width, dtype=dtype),
        "spread": spread,
        "dead": spread * (torch.arange(width) % 3 != 0),
        "one-alive": alive,
        "nothing": torch.zeros(width, dtype=dtype),
    }[kind]


def tail(error: Tensor, weights: Tensor, rank: int) -> float:
    """The sum of all but the `rank` largest eigenvalues of E H E^T, by singular values in float64."""
    values = torch.linalg.svdvals(error.double() * weights.double().sqrt()).square()
    return float(values[rank:].sum())


def residual(error: Tensor, weights: Tensor, factors: tuple[Tensor, Tensor]) -> float:
    return linalg.weighted_square(error - factors[0] @ factors[1], weights)


@pytest.mark.parametrize("rank", [1, 4, 15])
@pytest.mark.parametrize("kind", INPUT_WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_residual_is_the_tail_of_the_spectrum(  # law 9, and its precisions
    shape: tuple[int, int], kind: str, rank: int, dtype: torch.dtype, precision: float
) -> None:
    error, weights = draw(*shape, dtype=dtype), weights_of(kind, shape[1], dtype)
    found = residual(error, weights, linalg.best_low_rank(error, weights, rank))
    # Where the tail is empty (one live input), what is left is rounding: relative to the whole, squared.
    whole = linalg.weighted_square(error, weights)
    assert found == pytest.approx(tail(error, weights, rank), rel=precision, abs=precision**2 * whole)


@pytest.mark.parametrize("kind", ["ones", "spread", "dead"])
def test_no_nearby_product_of_the_rank_is_better(kind: str) -> None:  # law 10
    error, weights = draw(24, 40), weights_of(kind, 40)
    left, right = linalg.best_low_rank(error, weights, 5)
    least = residual(error, weights, (left, right))
    for seed in range(100):
        size = 10.0 ** -(1 + seed % 3)
        other = left + size * draw(24, 5, seed=2 * seed), right + size * draw(5, 40, seed=2 * seed + 1)
        assert residual(error, weights, other) > least


@pytest.mark.parametrize("kind", ["ones", "spread", "dead"])
def test_the_gradient_vanishes_at_the_solution(kind: str) -> None:  # law 10
    error, weights = draw(24, 40, dtype=torch.float64), weights_of(kind, 40, torch.float64)
    left, right = (factor.requires_grad_() for factor in linalg.best_low_rank(error, weights, 5))
    loss = ((error - left @ right).square() * weights).sum()
    loss.backward()
    for factor in (left, right):
        assert factor.grad is not None
        assert float(factor.grad.norm()) <= 1e-10 * loss.item()  # float64 and sums of a thousand terms


def test_gradient_descent_from_the_solution_gains_nothing() -> None:  # law 10
    error, weights = draw(24, 40, dtype=torch.float64), weights_of("spread", 40, torch.float64)
    left, right = (factor.requires_grad_() for factor in linalg.best_low_rank(error, weights, 5))
    start = residual(error, weights, (left.detach(), right.detach()))
    descent = torch.optim.Adam([left, right], lr=1e-4)
    for _ in range(100):
        descent.zero_grad()
        ((error - left @ right).square() * weights).sum().backward()
        descent.step()
    assert residual(error, weights, (left.detach(), right.detach())) >= start * (1 - 1e-12)  # float64 sums


def test_equal_input_weights_give_the_plain_truncated_svd() -> None:  # law 11
    error = draw(24, 40)
    left, right = linalg.best_low_rank(error, torch.full((40,), 0.3), 6)
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(left @ right, u[:, :6] * s[:6] @ v[:6], rtol=1e-4, atol=1e-4)  # float32 SVD of unit entries


def test_the_weighted_solution_beats_the_plain_one_in_its_own_norm() -> None:  # law 11
    error, weights = draw(24, 40), weights_of("spread", 40)
    weighted = residual(error, weights, linalg.best_low_rank(error, weights, 5))
    naive = residual(error, weights, linalg.best_low_rank(error, torch.ones(40), 5))
    assert weighted < 0.99 * naive  # over weights that span four decades, more than a trifle


@pytest.mark.parametrize("kind", INPUT_WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_higher_rank_never_leaves_more_and_the_full_one_leaves_nothing(shape: tuple[int, int], kind: str) -> None:  # law 12
    error, weights = draw(*shape), weights_of(kind, shape[1])
    left = [residual(error, weights, linalg.best_low_rank(error, weights, rank)) for rank in range(min(shape) + 1)]
    whole = linalg.weighted_square(error, weights)
    assert left[0] == whole
    # Ranks that have nothing left to gain may differ by float32 rounding, which is squared: (1e-6)^2 of the whole.
    assert all(after <= before * (1 + 1e-6) + 1e-12 * whole for before, after in pairwise(left))
    assert left[-1] <= 1e-11 * whole


@pytest.mark.parametrize("kind", ["ones", "spread"])
def test_the_inverse_free_form_equals_the_whitened_svd(kind: str) -> None:  # laws 13 and 15
    error, weights = draw(24, 40, dtype=torch.float64), weights_of(kind, 40, torch.float64)
    left, right = linalg.best_low_rank(error, weights, 5)
    u, s, v = torch.linalg.svd(error * weights.sqrt(), full_matrices=False)
    whitened = (u[:, :5] * s[:5] @ v[:5]) / weights.sqrt()
    torch.testing.assert_close(left @ right, whitened, rtol=1e-9, atol=1e-9)  # float64 eigenproblem of squared values


def test_dead_inputs_change_nothing_for_the_live_ones() -> None:  # law 9, with dead channels
    error, weights = draw(24, 40), weights_of("dead", 40)
    left, right = linalg.best_low_rank(error, weights, 5)
    alive = weights > 0
    bare_left, bare_right = linalg.best_low_rank(error[:, alive], weights[alive], 5)
    torch.testing.assert_close((left @ right)[:, alive], bare_left @ bare_right, rtol=1e-4, atol=1e-5)  # float32 products
    assert bool((left @ right).isfinite().all())


@pytest.mark.parametrize("rank", [8, 100])
def test_the_iteration_for_large_weights_is_within_two_percent_of_the_optimum(rank: int) -> None:  # law 13
    error, weights = draw(1040, 1100), weights_of("spread", 1100)
    factors = linalg.best_low_rank(error, weights, rank)
    again = linalg.best_low_rank(error, weights, rank)
    assert torch.equal(factors[0], again[0])
    assert torch.equal(factors[1], again[1])
    scaled = error * weights.sqrt()
    least = float(torch.linalg.eigvalsh(scaled @ scaled.T)[:-rank].sum())
    assert residual(error, weights, factors) <= 1.02 * least


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1040, 1100)])
def test_the_left_factor_is_orthonormal(shape: tuple[int, int]) -> None:
    left, _ = linalg.best_low_rank(draw(*shape), weights_of("dead", shape[1]), 7)
    torch.testing.assert_close(left.T @ left, torch.eye(7), rtol=0, atol=1e-5)  # float32 inner products


@pytest.mark.parametrize("kind", ["ones", "spread", "dead"])
def test_balancing_keeps_the_product_and_evens_the_norms(kind: str) -> None:  # law 14
    error, weights = draw(24, 40), weights_of(kind, 40)
    factors = linalg.best_low_rank(error, weights, 6)
    left, right = linalg.balanced(*factors, weights)
    torch.testing.assert_close(left @ right, factors[0] @ factors[1], rtol=1e-5, atol=1e-5)  # a factor and its inverse
    norm_right = (right.square() * (weights / weights.mean())).sum(dim=1).sqrt()
    torch.testing.assert_close(left.norm(dim=0), norm_right, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", INPUT_WEIGHTS)
def test_balancing_makes_nothing_infinite(kind: str) -> None:
    for error in (torch.zeros(24, 40), draw(24, 40) * 1e-12, draw(24, 3) @ draw(3, 40)):
        weights = weights_of(kind, 40)
        left, right = linalg.balanced(*linalg.best_low_rank(error, weights, 6), weights)
        assert bool(left.isfinite().all())
        assert bool(right.isfinite().all())
        # 1e-5: float32; the left columns are orthonormal, so the products are of the size of the error.
        torch.testing.assert_close(left @ right, _product(error, weights), rtol=1e-4, atol=float(error.abs().max()) * 1e-5)


def _product(error: Tensor, weights: Tensor) -> Tensor:
    left, right = linalg.best_low_rank(error, weights, 6)
    return left @ right


def test_a_gauge_on_the_factors_does_not_change_the_refit_of_the_other() -> None:  # law 14
    error, weights = draw(24, 40, dtype=torch.float64), weights_of("spread", 40, torch.float64)
    left, gauge = draw(24, 5, seed=1, dtype=torch.float64), draw(5, 5, seed=2, dtype=torch.float64)
    plain = left @ linalg.refit_right(error, left)
    turned = left @ gauge @ linalg.refit_right(error, left @ gauge)
    torch.testing.assert_close(turned, plain, rtol=1e-8, atol=1e-8)  # float64 times the squared condition of the gauge
    right = draw(5, 40, seed=3, dtype=torch.float64)
    plain = linalg.refit_left(error, right, weights) @ right
    turned = linalg.refit_left(error, gauge @ right, weights) @ gauge @ right
    torch.testing.assert_close(turned, plain, rtol=1e-8, atol=1e-8)


def test_a_positive_factor_on_all_input_weights_changes_no_product() -> None:  # law 14
    error, weights = draw(24, 40), weights_of("spread", 40)
    torch.testing.assert_close(_product(error, weights * 1e4), _product(error, weights), rtol=1e-4, atol=1e-5)  # float32


def test_permuting_inputs_and_outputs_permutes_the_product() -> None:  # law 14
    error, weights = draw(24, 40), weights_of("spread", 40)
    rows = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    columns = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    permuted = _product(error[rows][:, columns], weights[columns])
    torch.testing.assert_close(permuted, _product(error, weights)[rows][:, columns], rtol=1e-4, atol=1e-5)  # float32


@pytest.mark.parametrize("kind", INPUT_WEIGHTS)
def test_a_refit_never_raises_the_error(kind: str) -> None:  # law 16
    error, weights = draw(24, 40), weights_of(kind, 40)
    whole = linalg.weighted_square(error, weights)
    for seed in range(5):
        left, right = draw(24, 5, seed=seed + 1), draw(5, 40, seed=seed + 50)
        before = residual(error, weights, (left, right))
        better = linalg.refit_left(error, right, weights)
        after_left = residual(error, weights, (better, right))
        after_both = residual(error, weights, (better, linalg.refit_right(error, better)))
        # (1e-6)^2 of the whole: what float32 factors leave where an exact fit is possible.
        assert after_left <= before + 1e-12 * whole
        assert after_both <= after_left * (1 + 1e-6) + 1e-12 * whole


def test_a_refit_with_a_repeated_component_stays_finite_and_optimal() -> None:
    error = draw(24, 40)
    left = draw(24, 3, seed=1)
    doubled = torch.cat([left, left], dim=1)
    once, twice = left @ linalg.refit_right(error, left), doubled @ linalg.refit_right(error, doubled)
    torch.testing.assert_close(twice, once, rtol=1e-4, atol=1e-5)  # float32 products


def test_the_weighted_error_is_the_error_of_the_outputs_when_inputs_are_uncorrelated() -> None:  # law 19
    basis, _ = torch.linalg.qr(draw(200, 40, dtype=torch.float64))
    x = basis * weights_of("spread", 40, torch.float64).sqrt() * 200**0.5  # [tokens, in], its Gram matrix diagonal
    error = draw(24, 40, seed=1, dtype=torch.float64)
    outputs = float((x @ error.T).square().sum()) / 200
    assert linalg.weighted_square(error, x.square().mean(dim=0)) == pytest.approx(outputs, rel=1e-10)  # float64


def test_the_weighted_error_by_hand() -> None:
    # 1 * 2 + 4 * 3 + 9 * 2 + 16 * 3
    assert linalg.weighted_square(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([2.0, 3.0])) == 80


def test_rank_one_by_hand() -> None:
    # The second input has nearly all the weight, so its column (0, 3) is kept whole and the first, (2, 0), is given up.
    left, right = linalg.best_low_rank(torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([1.0, 4.0]), 1)
    torch.testing.assert_close(left @ right, torch.tensor([[0.0, 0.0], [0.0, 3.0]]), rtol=0, atol=1e-6)  # float32


# The full covariance

COVARIANCES = ["ones", "spread", "full", "singular", "dead", "nothing"]


def covariance_of(kind: str, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """H `[width, width]`: of independent inputs, of correlated ones, of fewer tokens than inputs, of some that are dead."""
    if kind in ("ones", "spread", "nothing"):
        return torch.diag(weights_of(kind, width, dtype))
    tokens = width // 3 if kind == "singular" else 4 * width
    x = draw(tokens, width, seed=21, dtype=torch.float64) + 2 * draw(tokens, 1, seed=22, dtype=torch.float64)
    x = x * torch.exp(draw(width, seed=23, dtype=torch.float64)) * (1 if kind != "dead" else torch.arange(width) % 3 != 0)
    return (x.T @ x / tokens).to(dtype)


def tail_under(error: Tensor, covariance: Tensor, rank: int) -> float:
    """The sum of all but the `rank` largest eigenvalues of E H E^T, in float64."""
    values = torch.linalg.eigvalsh(error.double() @ covariance.double() @ error.double().T).flip(0)
    return float(values[rank:].clamp_min(0).sum())


@pytest.mark.parametrize("rank", [1, 4, 15])
@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_the_residual_under_a_covariance_is_the_tail_of_the_spectrum(  # law 9; E H E^T itself is in the caller's dtype
    shape: tuple[int, int], kind: str, rank: int, dtype: torch.dtype, precision: float
) -> None:
    error, covariance = draw(*shape, dtype=dtype), covariance_of(kind, shape[1], dtype)
    found = residual(
        error.double(), covariance.double(), tuple(f.double() for f in linalg.best_low_rank(error, covariance, rank))
    )  # type: ignore[arg-type]
    whole = linalg.weighted_square(error, covariance)
    # A singular covariance is singular but for its own rounding, whose eigenvalues have either sign.
    assert found == pytest.approx(tail_under(error, covariance, rank), rel=precision, abs=torch.finfo(dtype).eps * whole)


@pytest.mark.parametrize("kind", ["ones", "spread", "dead"])
def test_a_diagonal_covariance_is_the_vector_of_its_diagonal(kind: str) -> None:  # law 11
    error, weights = draw(24, 40), weights_of(kind, 40)
    covariance = torch.diag(weights)
    torch.testing.assert_close(_product(error, covariance), _product(error, weights), rtol=1e-4, atol=1e-5)  # float32 products
    right = draw(5, 40, seed=3)
    torch.testing.assert_close(linalg.weighted(right, covariance), linalg.weighted(right, weights), rtol=1e-6, atol=0)
    assert linalg.weighted_square(error, covariance) == pytest.approx(
        linalg.weighted_square(error, weights), rel=1e-6
    )  # float32
    for one, other in zip(
        linalg.balanced(error[:, :5], right, covariance), linalg.balanced(error[:, :5], right, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    one, other = linalg.refit_left(error, right, covariance), linalg.refit_left(error, right, weights)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # float32 sums over four decades of weights


@pytest.mark.parametrize("kind", ["full", "singular", "dead"])
def test_the_exact_norm_beats_the_diagonal_one_and_that_the_plain_one(kind: str) -> None:  # law 11
    covariance = covariance_of(kind, 40)
    exact = diagonal = plain = 0.0
    for seed in range(5):
        error = draw(24, 40, seed=seed)
        each = [
            residual(error, covariance, linalg.best_low_rank(error, h, 5))
            for h in (covariance, covariance.diagonal(), torch.ones(40))
        ]
        assert each[0] <= each[1] * (1 + 1e-5)  # a theorem; float32
        exact, diagonal, plain = exact + each[0], diagonal + each[1], plain + each[2]
    assert exact < 0.99 * diagonal < 0.99 * plain  # no theorem, but so it is for unequal, correlated inputs


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_higher_rank_never_leaves_more_under_a_covariance(shape: tuple[int, int], kind: str) -> None:  # law 12
    error, covariance = draw(*shape), covariance_of(kind, shape[1])
    left = [residual(error, covariance, linalg.best_low_rank(error, covariance, rank)) for rank in range(min(shape) + 1)]
    whole = linalg.weighted_square(error, covariance)
    assert left[0] == whole
    # Of a singular covariance nothing but its rounding is left from its rank on, which has either sign.
    assert all(after <= before + 1e-7 * whole for before, after in pairwise(left))
    assert abs(left[-1]) <= 1e-7 * whole


@pytest.mark.parametrize("kind", ["full", "singular", "dead"])
def test_no_nearby_product_is_better_under_a_covariance(kind: str) -> None:  # law 10
    error, covariance = draw(24, 40, dtype=torch.float64), covariance_of(kind, 40, torch.float64)
    left, right = linalg.best_low_rank(error, covariance, 5)
    least = residual(error, covariance, (left, right))
    for seed in range(100):
        size = 10.0 ** -(1 + seed % 3)
        moves = draw(24, 5, seed=2 * seed, dtype=torch.float64), draw(5, 40, seed=2 * seed + 1, dtype=torch.float64)
        assert residual(error, covariance, (left + size * moves[0], right + size * moves[1])) > least


def test_the_inverse_free_form_equals_the_whitened_svd_under_a_covariance() -> None:  # law 13
    error, covariance = draw(24, 40, dtype=torch.float64), covariance_of("full", 40, torch.float64)
    left, right = linalg.best_low_rank(error, covariance, 5)
    root = torch.linalg.cholesky(covariance)
    u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
    whitened = torch.linalg.solve_triangular(root, u[:, :5] * s[:5] @ v[:5], upper=False, left=False)
    torch.testing.assert_close(left @ right, whitened, rtol=1e-8, atol=1e-8)  # float64, the condition of H about 1e4


def test_permuting_and_scaling_inputs_does_so_to_the_product_under_a_covariance() -> None:  # law 14
    error, covariance = draw(24, 40, dtype=torch.float64), covariance_of("full", 40, torch.float64)
    columns = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    permuted = _product(error[:, columns], 100 * covariance[columns][:, columns])
    torch.testing.assert_close(permuted, _product(error, covariance)[:, columns], rtol=1e-8, atol=1e-8)  # float64


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ["full", "singular", "spread"])
@pytest.mark.parametrize("rank", [2, 20])
def test_the_iteration_under_a_covariance_is_within_two_percent_of_the_optimum(  # law 13
    rank: int, kind: str, warm: bool
) -> None:
    error, covariance = draw(200, 120), covariance_of(kind, 120)
    start = linalg.best_low_rank(error + 0.1 * draw(200, 120, seed=1), covariance, rank)[0] if warm else None
    factors = linalg.best_low_rank(error, covariance, rank, start=start, exact_up_to=16)
    again = linalg.best_low_rank(error, covariance, rank, start=start, exact_up_to=16)
    assert torch.equal(factors[0], again[0]) and torch.equal(factors[1], again[1])
    torch.testing.assert_close(factors[0].T @ factors[0], torch.eye(rank), rtol=0, atol=1e-5)  # float32 inner products
    assert residual(error, covariance, factors) <= 1.02 * tail_under(error, covariance, rank) + 1e-10 * linalg.weighted_square(
        error, covariance
    )


@pytest.mark.parametrize("columns", [3, 10, 26, 40])
def test_a_start_of_another_rank_does_no_harm(columns: int) -> None:
    error, covariance = draw(200, 120), covariance_of("full", 120)
    start = linalg.best_low_rank(error, covariance, columns)[0]
    factors = linalg.best_low_rank(error, covariance, 10, start=start, exact_up_to=16)
    assert residual(error, covariance, factors) <= 1.02 * tail_under(error, covariance, 10)


@pytest.mark.parametrize("kind", COVARIANCES)
def test_a_refit_never_raises_the_error_under_a_covariance(kind: str) -> None:  # law 16
    error, covariance = draw(24, 40), covariance_of(kind, 40)
    whole = linalg.weighted_square(error, covariance)
    for seed in range(5):
        left, right = draw(24, 5, seed=seed + 1), draw(5, 40, seed=seed + 50)
        before = residual(error, covariance, (left, right))
        better = linalg.refit_left(error, right, covariance)
        after_left = residual(error, covariance, (better, right))
        after_both = residual(error, covariance, (better, linalg.refit_right(error, better)))
        # float32 factors leave (1e-6)^2 of the whole where an exact fit is possible; a covariance adds up many of them.
        assert after_left <= before + 1e-10 * whole
        assert after_both <= after_left * (1 + 1e-6) + 1e-10 * whole


def test_the_weighted_error_is_the_error_of_the_outputs() -> None:  # law 19
    x = draw(300, 40, dtype=torch.float64) @ draw(40, 40, seed=1, dtype=torch.float64)
    error = draw(24, 40, seed=2, dtype=torch.float64)
    outputs = float((x @ error.T).square().sum()) / 300
    assert linalg.weighted_square(error, x.T @ x / 300) == pytest.approx(outputs, rel=1e-10)  # float64


@pytest.mark.parametrize("kind", COVARIANCES)
def test_balancing_keeps_the_product_and_evens_the_norms_under_a_covariance(kind: str) -> None:  # law 14
    error, covariance = draw(24, 40), covariance_of(kind, 40)
    factors = linalg.best_low_rank(error, covariance, 6)
    left, right = linalg.balanced(*factors, covariance)
    torch.testing.assert_close(left @ right, factors[0] @ factors[1], rtol=1e-4, atol=1e-5)  # a factor and its inverse
    if kind != "nothing":
        norm_right = (linalg.weighted(right, covariance / covariance.diagonal().mean()) * right).sum(dim=1).sqrt()
        torch.testing.assert_close(left.norm(dim=0), norm_right, rtol=1e-4, atol=0)


def test_rank_one_under_a_covariance_by_hand() -> None:
    # The inputs are one and the same, so only the sums of the rows matter, 3 and 1: the whole error is of rank one in H.
    left, right = linalg.best_low_rank(torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.ones(2, 2), 1)
    product = left @ right
    torch.testing.assert_close(product.sum(dim=1), torch.tensor([3.0, 1.0]), rtol=1e-6, atol=1e-6)
    assert residual(torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.ones(2, 2), (left, right)) == pytest.approx(0, abs=1e-10)
