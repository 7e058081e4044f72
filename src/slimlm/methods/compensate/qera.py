"""QERA: the low-rank repair of least output error under the full covariance of the inputs.

Zhang, Wong, Xiao, Constantinides, Zhao: QERA, arXiv 2410.06040, theorem 1; the same optimum as EoRA (Liu et al., arXiv
2410.21271).

    L R = argmin tr((E - L R) H (E - L R)^T),     H = E[x^T x]

The papers take the SVD of E H^(1/2) and divide by H^(1/2); here the leading eigenvectors of E H E^T give the same product
without root or inverse (slimlm.core.solvers.linalg), by subspace iteration for wide layers. At 4 and 8 bits the factors are
rounded by a sweep under H and refitted in turn; the papers keep 16 bits, where `group_size` and `refit` have nothing to act on.
"""

from dataclasses import dataclass
from typing import ClassVar

from slimlm.core.layer import Layer, Need, Stats, measured
from slimlm.core.solvers.inverse import shrunk
from slimlm.core.solvers.low_rank import AdapterBits, AdapterFormat, low_rank_part


@dataclass(frozen=True)
class Qera:
    """Low-rank repair of least output error under the full covariance of the inputs (QERA-exact)."""

    rank: float = 0.1
    bits: AdapterBits = 4
    group_size: int = 128
    refit: bool = True
    needs: ClassVar[Need] = Need.GRAM

    def __post_init__(self) -> None:
        AdapterFormat(self.rank, self.bits, self.group_size, self.refit)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        gram, notes = shrunk(measured(stats.gram).to(layer.original), stats.tokens)
        form = AdapterFormat(self.rank, self.bits, self.group_size, self.refit)
        part = low_rank_part(layer.residual, gram, form)
        return layer if part is None else layer.with_adapter(part).with_notes(*notes)
