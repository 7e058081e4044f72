"""Naive-LoRA: the plain truncated SVD of the error.

Mozaffari, Yazdanbakhsh, Mehri Dehnavi: SLiM: One-shot Quantization and Sparsity with Low-rank Approximation for LLM Weight
Compression, arXiv 2410.09615, section 3.2, where it is the baseline.

    L R = argmin || W - W^C - L R ||_F        W^C the compressed weight, whatever the activations

Departure: by Eckart and Young the leading eigenvectors of E E^T, E = W - W^C, give the same product, so no SVD is computed.
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
    """A low-rank adapter of least error in the weights, all inputs weighted equally (Naive-LoRA)."""

    needs: ClassVar[Needs] = frozenset()

    def second_moment(self, layer: Layer, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """Ones `[in]`."""
        return torch.ones_like(layer.original[0]), ()
