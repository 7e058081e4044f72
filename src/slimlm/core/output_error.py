"""How much of a layer's outputs is error, on the inputs that were measured."""

from torch import Tensor

from slimlm.core.solvers.linalg import weighted_square
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.covariance import Covariance

NEEDS: Needs = frozenset({Covariance})
"""The statistics that the error is computed from."""


def relative_output_error(weight: Tensor, made: Tensor, stats: Stats) -> float:
    """The mean square of the error of a layer's outputs over that of the outputs; 0 where these are all zero.

    Args:
        weight: `[out, in]`, the original.
        made: `[out, in]`, what stands for it.
        stats: of the layer's inputs.
    """
    covariance = stats[Covariance].to(weight)
    whole = weighted_square(weight, covariance)
    return 0.0 if whole == 0 else weighted_square(weight - made, covariance) / whole
