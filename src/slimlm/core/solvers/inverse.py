"""The inverse covariance that error feedback needs: shrinkage, damping, triangular inversion.

For the covariance H `[in, in]` (the mean of x^T x; nothing is centred) a sweep needs U, upper triangular, with
(H + damping)^-1 = U^T U. With few tokens, what lies off the diagonal of H is mostly noise, so it is shrunk first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.cache import Cache
from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.profiling import profiled

_INVERTED_AT_ONCE = 128
"""Rows of a triangular matrix up to which torch inverts it; larger ones are halved."""


@dataclass(frozen=True)
class Inverse:
    """The factor of the inverse covariance that a sweep needs, and how it was obtained."""

    upper: Tensor
    """U `[in, in]`, upper triangular, float32, (H + damping)^-1 = U^T U"""
    damped: float
    """what was added to the diagonal of H, as a share of its mean"""
    notes: tuple[str, ...] = ()
    """for the user, such as a stronger damping than was asked for"""

    @property
    def conditional_variance(self) -> Tensor:
        """`[in]`: the mean square of the part of each input that the later inputs do not explain, 1 / U_jj^2."""
        return self.upper.diagonal().square().reciprocal()


@profiled("inverse")
def inverse_of(covariance: Tensor, *, damp: float) -> Inverse:
    """Damp a covariance and factor its inverse, in float64.

    Dead inputs (always zero) have only the damping, so their weights are rounded and compensate nothing.

    Args:
        covariance: H `[in, in]`, float32.
        damp: a share, from 0 to 1, of the mean of the diagonal, which is added to the diagonal; ten times more as long as the
            factorization fails, which is noted.

    Returns:
        The factor on the device of `covariance`. Where all inputs are dead it is the identity.

    Raises:
        NumericsError: the covariance holds NaN or infinity, or cannot be factored with as much damping as itself.
    """
    width = len(covariance)
    if not bool(covariance.isfinite().all()):
        raise NumericsError("the covariance of the inputs holds NaN or infinity; the model overflows on the calibration text")
    diagonal = covariance.diagonal().double()
    mean = float(diagonal.mean())
    if mean == 0:
        return Inverse(
            torch.eye(width, device=covariance.device), 0.0, ("all inputs are dead (always zero); weights rounded to nearest",)
        )
    # From the last input to the first: the factor of H then is upper triangular in the order of the inputs, and U its inverse.
    square = covariance.flip(0, 1).double()
    used = damp
    while used <= 1:
        square.diagonal().copy_(diagonal.flip(0) + used * mean)
        lower, failed = torch.linalg.cholesky_ex(square)
        if not int(failed):
            upper = inverse_of_lower(lower).flip(0, 1).float()
            if bool(upper.isfinite().all()):
                notes = (
                    () if used == damp else (f"covariance could be inverted only with damping {used:g} instead of {damp:g}",)
                )
                return Inverse(upper, used, notes)
        used = max(10 * used, 1e-6)
    raise NumericsError("the covariance of the inputs cannot be inverted even with damping as large as its mean diagonal")


def inverse_in_order(covariance: Tensor, inputs: Tensor, *, damp: float, cache: Cache) -> Inverse:
    """`inverse_of` a covariance whose inputs are taken in another order.

    Args:
        covariance: H `[in, in]`.
        inputs: int64 `[in]`, the inputs in that order.
        damp: see `inverse_of`.
        cache: of the covariance's statistics; an inverse in it is used, a new one is added.

    Returns:
        The factor, its rows and columns in that order.
    """
    key = damp, tuple(inputs.tolist())
    return cache.get(Inverse, key, lambda: inverse_of(covariance.index_select(0, inputs).index_select(1, inputs), damp=damp))


def check_damp(damp: float) -> None:
    """Raise RecipeError for a damping outside 0 to 1."""
    if not 0 <= damp <= 1:
        raise RecipeError(f"damp = {damp}: give a share of the mean diagonal of the covariance, from 0 to 1")


def tokens_needed(width: int) -> int:
    """From this many tokens on a covariance of so many inputs is not shrunk: two per input."""
    return 2 * width


def shrunk(covariance: Tensor, tokens: int) -> tuple[Tensor, tuple[str, ...]]:
    """A covariance of few tokens shrunk toward its diagonal.

    Under two tokens per input what is measured between two inputs is multiplied by tokens / (in + tokens): in / (in + tokens)
    is roughly the share of noise in it. The diagonal does not change.

    Args:
        covariance: H `[in, in]`.
        tokens: how many tokens it is the mean of.

    Returns:
        `[in, in]`, the same tensor where the tokens suffice, and notes for the user, none in that case.
    """
    width = len(covariance)
    if tokens >= tokens_needed(width):
        return covariance, ()
    share = width / (width + tokens)
    note = (
        f"{tokens} calibration tokens for the covariance of {width} inputs, which needs {tokens_needed(width)}: "
        f"what lies off its diagonal was shrunk by {share:.0%}"
    )
    return covariance * (1 - share) + torch.diag(covariance.diagonal() * share), (note,)


def inverse_of_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix `[n, n]`, half by half: nearly all of it products of matrices."""
    inverse = lower.clone()
    _invert(inverse)
    return inverse


def _invert(lower: Tensor) -> None:
    """Put the inverse of a lower triangular matrix `[n, n]` in its place."""
    width = len(lower)
    if width <= _INVERTED_AT_ONCE:
        identity = torch.eye(width, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = width // 2
    first, corner, last = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert(first)
    _invert(last)
    corner.copy_(_times_lower(-_lower_times(last, corner), first))


def _lower_times(lower: Tensor, other: Tensor) -> Tensor:
    """A lower triangular matrix times another, without the half that is zero."""
    half = len(lower) // 2
    if half < _INVERTED_AT_ONCE:
        return lower @ other
    below = lower[half:, :half] @ other[:half]
    return torch.cat(
        [_lower_times(lower[:half, :half], other[:half]), below.add_(_lower_times(lower[half:, half:], other[half:]))]
    )


def _times_lower(other: Tensor, lower: Tensor) -> Tensor:
    """A matrix times a lower triangular one, without the half that is zero."""
    half = len(lower) // 2
    if half < _INVERTED_AT_ONCE:
        return other @ lower
    left = (other[:, half:] @ lower[half:, :half]).add_(_times_lower(other[:, :half], lower[:half, :half]))
    return torch.cat([left, _times_lower(other[:, half:], lower[half:, half:])], dim=1)
