"""Naive-LoRA: the plain truncated SVD of the error.

The baseline of SLiM (arXiv 2410.09615, section 3.2): L R = argmin ||W - W^C - L R||_F, blind to the activations. By
Eckart and Young the leading eigenvectors of E E^T give it; no SVD is computed.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from slimlm.core.compensator import Compensator
from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Needs, Stats


@dataclass(frozen=True)
class Svd(Compensator):
    """Low-rank repair that treats all inputs alike (Naive-LoRA)."""

    needs: ClassVar[Needs] = frozenset()

    def second_moment(self, layer: Layer, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """Ones `[in]`."""
        return torch.ones_like(layer.original[0]), ()
