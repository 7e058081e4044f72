"""Naive-LoRA: the plain truncated SVD of the error.

The baseline of SLiM (arXiv 2410.09615, section 3.2): L R = argmin ||W - W^C - L R||_F, blind to the activations. By
Eckart and Young the leading eigenvectors of E E^T give it; no SVD is computed.

At 16 bits `group_size` and `refit` have nothing to act on: they concern rounded factors.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from slimlm.core.layer import Layer, Need, Stats
from slimlm.core.solvers.low_rank import AdapterBits, AdapterFormat, low_rank_part


@dataclass(frozen=True)
class Svd:
    """Low-rank repair that treats all inputs alike (Naive-LoRA)."""

    rank: float = 0.1
    bits: AdapterBits = 4
    group_size: int = 128
    refit: bool = True
    needs: ClassVar[Need] = Need.NOTHING

    def __post_init__(self) -> None:
        AdapterFormat(self.rank, self.bits, self.group_size, self.refit)

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        del stats
        form = AdapterFormat(self.rank, self.bits, self.group_size, self.refit)
        part = low_rank_part(layer.residual, torch.ones_like(layer.original[0]), form)
        return layer if part is None else layer.with_adapter(part)
