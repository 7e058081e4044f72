"""Best low-rank products in a weighted norm, without an inverse, a shift or a full SVD.

For an error E `[out, in]` and a positive semidefinite H, the product left x right of rank r that minimises
||(E - left right) H^(1/2)||_F is left = U, right = U^T E, where U holds the r leading eigenvectors of E H E^T. Nothing is
inverted, so inputs that never fire do no harm. The residual squared is the sum of the remaining eigenvalues.

H is given as `energy`: a vector `[in]` stands for diag(energy), the mean squared inputs; a matrix `[in, in]` is H itself, the
covariance of the inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_EXACT_UP_TO = 1024
_OVERSAMPLE = 16
_SWEEPS = 4
_WARM_SWEEPS = 2


def weighed(matrix: Tensor, energy: Tensor) -> Tensor:
    """M H for M `[rows, in]`."""
    return matrix * energy if energy.ndim == 1 else matrix @ energy


def weighted_square(error: Tensor, energy: Tensor) -> float:
    """||E H^(1/2)||_F^2 for E `[out, in]`."""
    if energy.ndim == 1:
        return float(torch.mv(error.square(), energy).double().sum())
    # The product and each row's sum, which cancels next to nothing, in the caller's dtype; the sum over rows in float64.
    return float(torch.linalg.vecdot(weighed(error, energy), error).double().sum())


def best_low_rank(error: Tensor, energy: Tensor, rank: int, *, start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors `[out, rank]` and `[rank, in]` of the best product in the energy norm; the left one is orthonormal.

    Exact (one symmetric eigenproblem in float64 on the smaller side; on the outputs for a covariance) up to 1024 rows or
    columns or where the rank is over a third of them; above, block subspace iteration with a fixed seed, within 2 % of the
    optimal residual, from a basis `start` `[out, any]` of a nearby error where there is one.
    """
    if energy.ndim == 2:
        return _best_under_covariance(error, energy, rank, start)
    scaled = error * energy.clamp_min(0).sqrt()
    side = min(scaled.shape)
    if side <= _EXACT_UP_TO or rank > side // 3:
        basis = _leading_exactly(scaled.double(), rank).to(error.dtype)
    else:
        basis = _leading_by_iteration(scaled, rank)
    return basis, basis.T @ error


def _best_under_covariance(error: Tensor, gram: Tensor, rank: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
    out = len(error)
    if out <= _EXACT_UP_TO or rank > out // 3:
        basis = _leading_of((weighed(error, gram) @ error.T).double(), rank).to(error.dtype)
        return basis, basis.T @ error
    width = min(rank + _OVERSAMPLE, out)
    sweeps = _SWEEPS if start is None else _WARM_SWEEPS
    generator = torch.Generator().manual_seed(0)
    known = error.new_empty(out, 0) if start is None else start[:, :width]
    fresh = torch.randn(out, width - known.shape[1], generator=generator).to(error)
    basis = torch.cat([known, fresh], dim=1)
    for _ in range(sweeps):
        basis, _ = torch.linalg.qr(basis)
        basis = error @ (gram @ (error.T @ basis))
    basis, _ = torch.linalg.qr(basis)
    small = basis.T @ error
    basis = basis @ _leading_of((weighed(small, gram) @ small.T).double(), rank).to(error.dtype)
    return basis, basis.T @ error


def _leading_of(square: Tensor, rank: int) -> Tensor:
    """The leading eigenvectors of a symmetric matrix."""
    return torch.linalg.eigh((square + square.T) / 2).eigenvectors.flip(1)[:, :rank]


def _leading_exactly(matrix: Tensor, rank: int) -> Tensor:
    """The `rank` leading left singular vectors, from the Gram matrix of the smaller side."""
    if matrix.shape[0] <= matrix.shape[1]:
        _, vectors = torch.linalg.eigh(matrix @ matrix.T)
        return vectors.flip(1)[:, :rank]
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    # QR rather than a division by singular values: directions without energy get some orthonormal completion.
    basis, _ = torch.linalg.qr(matrix @ vectors.flip(1)[:, :rank])
    return basis


def _leading_by_iteration(matrix: Tensor, rank: int) -> Tensor:
    width = min(rank + _OVERSAMPLE, *matrix.shape)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], width, generator=generator).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ start)
    for _ in range(_SWEEPS):
        basis, _ = torch.linalg.qr(matrix @ (matrix.T @ basis))
    small = basis.T @ matrix
    _, vectors = torch.linalg.eigh((small @ small.T).double())
    return basis @ vectors.flip(1)[:, :rank].to(matrix.dtype)


def balanced(left: Tensor, right: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ||left_i|| = ||right_i||_H for each component, which suits rounding best.

    The norms of right are taken in the energy norm where there is energy at all, else plainly.
    """
    own = energy if energy.ndim == 1 else energy.diagonal()
    silent = not bool((own > 0).any())
    weight = torch.ones_like(own) if silent else energy / own.mean()
    norm_left = left.norm(dim=0)
    norm_right = (weighed(right, weight) * right).sum(dim=1).clamp_min(0).sqrt()
    dead = (norm_left == 0) | (norm_right == 0)
    factor = torch.where(dead, torch.ones_like(norm_left), (norm_right / norm_left.clamp_min(1e-30)).sqrt())
    return left * factor, right / factor[:, None]


@dataclass(frozen=True)
class Answer:
    """What a right factor R `[rank, in]` says of the left ones beside it, for an error E `[out, in]` under H."""

    inner: Tensor
    """R H R^T `[rank, rank]`, float64"""
    toward: Tensor
    """R H E^T `[rank, out]`"""

    def best(self) -> Tensor:
        """The left factor `[out, rank]` of least weighted error: E H R^T (R H R^T)^+."""
        return _solve(self.inner, self.toward.double()).T.to(self.toward.dtype)

    def gain(self, left: Tensor) -> float:
        """By how much a left factor's product with R lowers ||E H^(1/2)||_F^2, for a factor `[rank, out]`."""
        along = torch.linalg.vecdot(left, 2 * self.toward - self.inner.to(left.dtype) @ left)
        return float(along.double().sum())


def answer_to(error: Tensor, right: Tensor, energy: Tensor) -> Answer:
    """The products of a right factor with an error under H, all that is needed to choose and to judge a left factor."""
    weighted = weighed(right, energy)
    return Answer(weighted.double() @ right.double().T, weighted @ error.T)


def refit_left(error: Tensor, right: Tensor, energy: Tensor) -> Tensor:
    """The left factor `[out, rank]` of least weighted error for a given right one."""
    return answer_to(error, right, energy).best()


def refit_right(error: Tensor, left: Tensor) -> Tensor:
    """The right factor `[rank, in]` of least error for a given left one: (L^T L)^+ L^T E, whatever the energies."""
    gram = left.double().T @ left.double()
    return _solve(gram, (left.T @ error).double()).to(error.dtype)


def _solve(gram: Tensor, target: Tensor) -> Tensor:
    """Least-norm solution of a symmetric positive semidefinite system, for singular ones too; in float64.

    The system is rank x rank and cheap; the product with the whole error, which is not, stays in the caller's dtype.
    """
    values, vectors = torch.linalg.eigh(gram)
    cut = values[-1].clamp_min(0) * 1e-12
    inverse = torch.where(values > cut, 1 / values.clamp_min(1e-300), torch.zeros_like(values))
    return vectors @ (inverse[:, None] * (vectors.T @ target))
