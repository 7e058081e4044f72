"""QERA: the low-rank repair of least output error under the full covariance of the inputs.

Zhang, Wong, Xiao, Constantinides, Zhao: QERA, arXiv 2410.06040, theorem 1; the same optimum as EoRA (Liu et al., arXiv
2410.21271).

    L R = argmin tr((E - L R) H (E - L R)^T),     H = E[x^T x]

The papers take the SVD of E H^(1/2) and divide by H^(1/2); here the leading eigenvectors of E H E^T give the same product
without root or inverse (slimlm.core.solvers.linalg), by subspace iteration for wide layers. At 4 and 8 bits the factors are
rounded by a sweep under H and refitted in turn; the papers keep 16 bits.
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
    """Low-rank repair of least output error under the full covariance of the inputs (QERA-exact)."""

    needs: ClassVar[Needs] = frozenset({Covariance})

    def second_moment(self, layer: Layer, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """H `[in, in]`, shrunk where there are few tokens."""
        return shrunk(stats[Covariance].to(layer.original), stats.tokens)
