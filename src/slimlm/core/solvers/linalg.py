"""Best low-rank products in a weighted norm, without an inverse, a shift or a full SVD.

For an error E `[out, in]` and a positive semidefinite H, the product left x right of rank r that minimises
||(E - left right) H^(1/2)||_F is left = U, right = U^T E, where U holds the r leading eigenvectors of E H E^T (Eckart and
Young; the optimum of QERA, Zhang et al., arXiv 2410.06040, theorem 1). Nothing is inverted, so dead inputs (always zero)
are no special case. The squared residual is the sum of the remaining eigenvalues.

H is given as `input_weights`: a vector `[in]` stands for diag(input_weights), the inputs' mean squares as a rule; a matrix
`[in, in]` is H itself, the covariance of the inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.profiling import profiled

EXACT_UP_TO = 1024
"""Rows or columns up to which the leading eigenvectors are found by a symmetric eigenproblem, above by iteration."""
ITERATIONS = 4
"""Steps of block subspace iteration from a random basis."""
WARM_ITERATIONS = 2
"""The same from the basis of a nearby error."""
_OVERSAMPLE = 16


def weighted(matrix: Tensor, input_weights: Tensor) -> Tensor:
    """M H `[rows, in]` for M `[rows, in]`."""
    return matrix * input_weights if input_weights.ndim == 1 else matrix @ input_weights


@profiled("objective")
def weighted_square(error: Tensor, input_weights: Tensor) -> float:
    """||E H^(1/2)||_F^2 = tr(E H E^T) for E `[out, in]`: the mean squared error of a token's outputs, summed over outputs."""
    if input_weights.ndim == 1:
        return float(torch.mv(error.square(), input_weights).double().sum())
    # The product and each row's sum, in which little cancels, in the caller's dtype; the sum over rows in float64.
    return float(torch.linalg.vecdot(weighted(error, input_weights), error).double().sum())


@profiled("low-rank solve")
def best_low_rank(
    error: Tensor,
    input_weights: Tensor,
    rank: int,
    *,
    start: Tensor | None = None,
    exact_up_to: int = EXACT_UP_TO,
) -> tuple[Tensor, Tensor]:
    """The factors of the best product in the norm of H.

    Exact (one symmetric eigenproblem in float64 on the smaller side; on the outputs for a covariance) up to 1024 rows or
    columns or where the rank is over a third of them; above, and from the basis of a nearby error, block subspace iteration
    with a fixed seed, within 2 % of the optimal residual.

    Args:
        error: E `[out, in]`.
        input_weights: H, `[in]` or `[in, in]`.
        rank: components of the product.
        start: a basis `[out, any]` of a nearby error, for the iteration under a covariance.
        exact_up_to: rows or columns up to which the solution is exact without a start.

    Returns:
        The left factor `[out, rank]`, orthonormal, and the right one `[rank, in]`.
    """
    if input_weights.ndim == 2:
        return _best_under_covariance(error, input_weights, rank, start, exact_up_to)
    scaled = error * input_weights.clamp_min(0).sqrt()
    side = min(scaled.shape)
    if side <= exact_up_to or rank > side // 3:
        basis = _leading_exactly(scaled.double(), rank).to(error.dtype)
    else:
        basis = _leading_by_iteration(scaled, rank)
    return basis, basis.T @ error


def _best_under_covariance(
    error: Tensor, covariance: Tensor, rank: int, start: Tensor | None, exact_up_to: int
) -> tuple[Tensor, Tensor]:
    out = len(error)
    if rank > out // 3 or (start is None and out <= exact_up_to):
        basis = _leading_of((weighted(error, covariance) @ error.T).double(), rank).to(error.dtype)
        return basis, basis.T @ error
    width = min(rank + _OVERSAMPLE, out)
    iterations = ITERATIONS if start is None else WARM_ITERATIONS
    generator = torch.Generator().manual_seed(0)
    given = error.new_empty(out, 0) if start is None else start[:, :width]
    random = torch.randn(out, width - given.shape[1], generator=generator).to(error)
    basis = torch.cat([given, random], dim=1)
    for _ in range(iterations):
        basis, _ = torch.linalg.qr(basis)
        basis = error @ (covariance @ (error.T @ basis))
    basis, _ = torch.linalg.qr(basis)
    small = basis.T @ error
    basis = basis @ _leading_of((weighted(small, covariance) @ small.T).double(), rank).to(error.dtype)
    return basis, basis.T @ error


def _leading_of(square: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of a symmetric matrix."""
    return torch.linalg.eigh((square + square.T) / 2).eigenvectors.flip(1)[:, :rank]


def _leading_exactly(matrix: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors, from the products of the rows or columns, whichever are fewer."""
    if matrix.shape[0] <= matrix.shape[1]:
        _, vectors = torch.linalg.eigh(matrix @ matrix.T)
        return vectors.flip(1)[:, :rank]
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    # QR rather than a division by singular values: directions of singular value zero get some orthonormal completion.
    basis, _ = torch.linalg.qr(matrix @ vectors.flip(1)[:, :rank])
    return basis


def _leading_by_iteration(matrix: Tensor, rank: int) -> Tensor:
    width = min(rank + _OVERSAMPLE, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(ITERATIONS):
        basis, _ = torch.linalg.qr(matrix @ (matrix.T @ basis))
    small = basis.T @ matrix
    _, vectors = torch.linalg.eigh((small @ small.T).double())
    return basis @ vectors.flip(1)[:, :rank].to(matrix.dtype)


def balanced(left: Tensor, right: Tensor, input_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ||left_i|| = ||right_i||_H for each component, for which rounding errs least.

    Args:
        left: `[out, rank]`.
        right: `[rank, in]`; its norms are taken under H divided by its mean diagonal, or unweighted where all of H is zero.
        input_weights: H, `[in]` or `[in, in]`.

    Returns:
        Factors of the same shapes.
    """
    second_moment = input_weights if input_weights.ndim == 1 else input_weights.diagonal()
    all_dead = not bool((second_moment > 0).any())
    relative = torch.ones_like(second_moment) if all_dead else input_weights / second_moment.mean()
    norm_left = left.norm(dim=0)
    norm_right = (weighted(right, relative) * right).sum(dim=1).clamp_min(0).sqrt()
    empty = (norm_left == 0) | (norm_right == 0)
    factor = torch.where(empty, torch.ones_like(norm_left), (norm_right / norm_left.clamp_min(1e-30)).sqrt())
    return left * factor, right / factor[:, None]


@dataclass(frozen=True)
class NormalEquations:
    """The least-squares problem of a left factor with a right one R `[rank, in]`, for an error E `[out, in]` under H."""

    inner: Tensor
    """R H R^T `[rank, rank]`, float64"""
    right_side: Tensor
    """R H E^T `[rank, out]`"""

    def solve(self) -> Tensor:
        """The left factor `[out, rank]` of least weighted error: E H R^T (R H R^T)^+."""
        return _solve(self.inner, self.right_side.double()).T.to(self.right_side.dtype)

    def gain(self, left: Tensor) -> float:
        """By how much a left factor's product with R lowers ||E H^(1/2)||_F^2, for a factor `[rank, out]`."""
        along = torch.linalg.vecdot(left, 2 * self.right_side - self.inner.to(left.dtype) @ left)
        return float(along.double().sum())


def normal_equations(error: Tensor, right: Tensor, input_weights: Tensor) -> NormalEquations:
    """The products of a right factor with an error under H, from which a left factor can be solved for and evaluated.

    Args:
        error: E `[out, in]`.
        right: R `[rank, in]`.
        input_weights: H, `[in]` or `[in, in]`.
    """
    weighted_right = weighted(right, input_weights)
    return NormalEquations(weighted_right.double() @ right.double().T, weighted_right @ error.T)


def refit_left(error: Tensor, right: Tensor, input_weights: Tensor) -> Tensor:
    """The left factor of least weighted error for a given right one.

    Args:
        error: E `[out, in]`.
        right: R `[rank, in]`.
        input_weights: H, `[in]` or `[in, in]`.

    Returns:
        `[out, rank]`.
    """
    return normal_equations(error, right, input_weights).solve()


def refit_right(error: Tensor, left: Tensor) -> Tensor:
    """The right factor of least error for a left one: (L^T L)^+ L^T E, whatever the input weights.

    Args:
        error: E `[out, in]`.
        left: L `[out, rank]`.

    Returns:
        `[rank, in]`.
    """
    inner = left.double().T @ left.double()
    return _solve(inner, (left.T @ error).double()).to(error.dtype)


def _solve(system: Tensor, right_side: Tensor) -> Tensor:
    """Least-norm solution of a symmetric positive semidefinite system, for singular ones too; in float64.

    The system is rank x rank and cheap; the product with the error, which is not, is computed in the caller's dtype.
    """
    values, vectors = torch.linalg.eigh(system)
    cut = values[-1].clamp_min(0) * 1e-12
    inverse = torch.where(values > cut, 1 / values.clamp_min(1e-300), torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ right_side))
