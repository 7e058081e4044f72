"""QERA: the low-rank adapter of least output error under the full covariance of the inputs.

Zhang, Wong, Xiao, Constantinides, Zhao: QERA: an Analytical Framework for Quantization Error Reconstruction, arXiv 2410.06040,
theorem 1 (QERA-exact); the same optimum as EoRA (Liu et al.: EoRA: Training-free Compensation for Compressed LLM with
Eigenspace Low-Rank Approximation, arXiv 2410.21271).

    L R = argmin tr((E - L R) H (E - L R)^T),     H = mean of x^T x over tokens, E the error `[out, in]`

Departures: the papers take the SVD of E H^(1/2) and divide by H^(1/2); here the leading eigenvectors of E H E^T give the same
product without root or inverse (slimlm.core.solvers.linalg), so that a singular H needs no shift; by subspace iteration for
wide layers. At 4 and 8 bits the factors are rounded by a sweep under H and refitted in turn; the papers keep 16 bits. H of few
tokens is shrunk toward its diagonal (slimlm.core.solvers.inverse).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from slimlm.core.compensator import Compensator
from slimlm.core.layer import Layer
from slimlm.core.solvers.inverse import shrunk
from slimlm.core.statistics.base import Needs, Stats
from slimlm.core.statistics.covariance import Covariance


@dataclass(frozen=True)
class Qera(Compensator):
    """The low-rank adapter of least output error under the full covariance of the inputs (QERA-exact)."""

    needs: ClassVar[Needs] = frozenset({Covariance})

    def second_moment(self, layer: Layer, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """H `[in, in]`, shrunk where there are few tokens."""
        return shrunk(stats[Covariance].to(layer.original), stats.tokens)
