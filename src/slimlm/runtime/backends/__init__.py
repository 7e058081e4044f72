"""Ways to multiply by a sum of parts. `reference` is always right; faster ones answer for it or say why not."""

from typing import Any, Protocol

import torch
from torch import Tensor

from slimlm.core.parts import Part


class Backend(Protocol):
    """One way to multiply activations by a layer's parts."""

    def refuses(self, parts: tuple[Part, ...], device: torch.device) -> str | None:
        """None when it can; otherwise the reason, in words for the user."""

    def prepare(self, parts: tuple[Part, ...], dtype: torch.dtype) -> Any:
        """Repack once, at load or first use, for activations of this dtype."""

    def matmul(self, x: Tensor, prepared: Any) -> Tensor:
        """`[..., in]` to `[..., out]`."""
