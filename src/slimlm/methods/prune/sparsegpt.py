"""SparseGPT: prune input by input, the later inputs repairing what each pruned weight did.

Frantar, Alistarh: SparseGPT, arXiv 2301.00774, equations 3 and 4, sections 3.3 and 3.4 (slimlm.core.solvers.sweep).

Of every m inputs (for a share of each row, of every 128 or so) the weights of least w^2 / [U]_jj^2 go, U the factor of the
inverse covariance, and the weights to come are moved. What stays is therefore not the original weight: later steps code
the moved weights. Departures: fours of inputs are taken by falling energy (`order`), and a share is dropped from each row
of a block, not from the block as a whole, because rows are stored with equally many weights.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from slimlm.core.layer import Layer, Need, Stats, measured
from slimlm.core.mask import Pattern
from slimlm.core.solvers.inverse import check_damp, inverse_in_order, shrunk
from slimlm.core.solvers.sweep import order_of, unrounded_sweep


@dataclass(frozen=True)
class SparseGpt:
    """Prune with error feedback under the covariance of the inputs."""

    pattern: str | float = "2:4"
    order: Literal["energy", "input"] = "energy"
    damp: float = 0.01
    needs: ClassVar[Need] = Need.GRAM
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Pattern.parse(self.pattern)
        check_damp(self.damp)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        gram, notes = shrunk(measured(stats.gram).to(layer.original), stats.tokens)
        pattern = Pattern.parse(self.pattern)
        energy = gram.diagonal() if self.order == "energy" else gram.new_zeros(len(gram))
        order = order_of(energy, group_size="per-channel", pattern=pattern)
        inverse = inverse_in_order(gram, order.inputs, damp=self.damp, known=stats.known)
        swept = unrounded_sweep(layer.base_weight, inverse, order, pattern=pattern)
        assert swept.mask is not None
        return (
            layer.with_mask(swept.mask, str(self.pattern)).with_updated_weight(swept.value).with_notes(*notes, *inverse.notes)
        )
