"""The windows of a text that a model is tuned on, and those that are held back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.errors import DataError
from slimlm.data.windows import choose_windows

HELD_BACK_TOKENS = 8192
"""The most tokens that are held back."""
_LEAST_SHARE = 8
"""At most one in so many windows is held back, but at least one."""


@dataclass(frozen=True)
class Windows:
    """Token ids."""

    train: Tensor
    """int64 `[count, length]`, in the order in which they are first used."""
    held_back: Tensor
    """`[count, length]`."""
    batch: int
    """Windows per step."""
    seed: int
    """The seed by which their order is drawn."""

    @classmethod
    def drawn(cls, windows: Tensor, steps: int, batch: int, seed: int) -> "Windows":
        """Some windows of a text `[count, length]`: as many as the steps use, each once where the text has so many.

        Raises:
            DataError: There is only one.
        """
        if len(windows) < 2:
            raise DataError(
                f"the text fills one window of {windows.shape[1]} tokens, and tuning needs two, one of them held back; give "
                "more text or a smaller `length`"
            )
        most = max(1, HELD_BACK_TOKENS // windows.shape[1])
        held = max(1, min(most, len(windows) // _LEAST_SHARE))
        chosen = choose_windows(windows, held + steps * batch, seed)
        return cls(chosen[held:], chosen[:held], batch, seed)

    def numbers(self, step: int) -> list[int]:
        """The numbers of the windows of a step, which depend on seed and step alone; each is used once before any is again."""
        count = len(self.train)
        places = range(step * self.batch, (step + 1) * self.batch)
        orders = {epoch: self._order(epoch) for epoch in {place // count for place in places}}
        return [orders[place // count][place % count] for place in places]

    def _order(self, epoch: int) -> list[int]:
        if epoch == 0:
            return list(range(len(self.train)))
        generator = torch.Generator().manual_seed((self.seed + epoch) % 2**63)
        return torch.randperm(len(self.train), generator=generator).tolist()
