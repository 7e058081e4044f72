"""Non-negative numbers in one byte each: logarithms in eighths of an octave.

For weights of errors, of which ratios matter and not the last digits: a large model's Fisher information would take as much as
the model in float32. 255 codes reach over 32 octaves below the largest value; what is smaller becomes zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.errors import NumericsError

_STEPS = 8
"""Codes per octave: a value is off by at most 2^(1/16) - 1, or 4.4 %."""
_CODES = 255


@dataclass(frozen=True)
class Octaves:
    """Rounded numbers of any shape `[...]`."""

    codes: Tensor
    """Uint8 `[...]`: the logarithm to base 2, in eighths, counted from the top; 0 stands for zero."""
    largest: float
    """The value that the code 255 stands for."""

    @classmethod
    def of(cls, values: Tensor) -> "Octaves":
        """Round numbers `[...]`; raises NumericsError where one is negative or not finite."""
        if not bool(values.isfinite().all()) or bool((values < 0).any()):
            raise NumericsError("only finite numbers that are not negative have logarithms in one byte")
        largest = float(values.max()) if values.numel() else 0.0
        if largest == 0:
            return cls(torch.zeros(values.shape, dtype=torch.uint8, device=values.device), 0.0)
        below = (values.double() / largest).log2().mul(_STEPS).round().add(_CODES)
        return cls(below.clamp(0, _CODES).to(torch.uint8), largest)

    def values(self) -> Tensor:
        """What they stand for, float32 `[...]`."""
        logarithms = (self.codes.double() - _CODES) / _STEPS
        return torch.where(self.codes > 0, self.largest * logarithms.exp2(), 0.0).float()
