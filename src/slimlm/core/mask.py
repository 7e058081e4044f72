"""Sparsity masks: n of every m consecutive inputs are kept, or a share of each row. True: the weight is kept."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.chunks import at_once
from slimlm.core.errors import RecipeError
from slimlm.core.profiling import profiled

_COMPARED = 16
"""Largest group whose members are compared by pairs; sorting such short rows takes several times as long."""
_SCORES_AT_ONCE = 2**16
_COMPARED_AT_ONCE = 2**11
"""Scores up to which all pairs are compared at once."""


@dataclass(frozen=True)
class Pattern:
    """A sparsity pattern: `kept` of every `of` inputs, or (where `of` is 0) a `dropped` share of each row."""

    kept: int
    of: int
    dropped: float

    @classmethod
    def parse(cls, text: str | float) -> "Pattern":
        """Read "2:4" (two kept of four) or a share of each row to drop, such as 0.5.

        Raises:
            RecipeError: it is neither.
        """
        if isinstance(text, int | float) and 0 <= text < 1:
            return cls(0, 0, float(text))
        match = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
        if match and 0 < int(match[1]) <= int(match[2]):
            return cls(int(match[1]), int(match[2]), 1 - int(match[1]) / int(match[2]))
        raise RecipeError(
            f'pattern = {text!r}: give "n:m" with 1 <= n <= m (such as "2:4", two kept of four inputs) '
            "or a share of each row to drop, from 0 up to but not including 1"
        )

    def refuses(self, name: str, width: int) -> str | None:
        """Why the layer of this name, with this many inputs, cannot have the pattern, or None."""
        if self.of and width % self.of:
            return f"{self} needs in_features to be a multiple of {self.of}; {name} has {width}"
        return None

    def kept_of(self, width: int) -> int:
        """How many weights of a row of this width stay; 1e-9 prevents that 0.29 x 100 becomes 28."""
        return width * self.kept // self.of if self.of else width - int(width * self.dropped + 1e-9)

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}" if self.of else f"{self.dropped:g} of each row"


@profiled("mask")
def choose(score: Tensor, pattern: Pattern) -> Tensor:
    """The mask that keeps the highest scores; of equal scores the earlier input stays.

    Args:
        score: `[out, in]`; the highest stay.
        pattern: how many weights stay; the width must suit it (see `Pattern.refuses`).

    Returns:
        bool `[out, in]`, True where a weight stays.
    """
    out, width = score.shape
    size, kept = (pattern.of, pattern.kept) if pattern.of else (width, pattern.kept_of(width))
    if pattern.of and size <= _COMPARED:
        return _choose_by_comparing(score, size, kept)
    groups = score.reshape(-1, size)
    order = groups.argsort(dim=1, descending=True, stable=True)[:, :kept]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True)
    return mask.view(out, width)


def _choose_by_comparing(score: Tensor, size: int, kept: int) -> Tensor:
    """`choose` among each `size` consecutive inputs, every member's rank found by comparing it with the others."""
    if score.numel() <= at_once(_COMPARED_AT_ONCE, score.device):
        # Few scores, so few operations count more than the memory of all pairs.
        members = score.reshape(len(score), -1, size)
        wins = (members[..., :, None] >= members[..., None, :]).triu(1).to(torch.uint8)
        later = torch.arange(size - 1, -1, -1, device=score.device)
        beaten_by = later - wins.sum(dim=3) + wins.sum(dim=2)
        return (beaten_by < kept).view(score.shape)
    mask = torch.empty_like(score, dtype=torch.bool)
    rows = max(1, at_once(_SCORES_AT_ONCE, score.device) // max(1, score.shape[1]))
    for piece, into in zip(score.split(rows), mask.split(rows), strict=True):
        members = piece.view(len(piece), -1, size).unbind(dim=2)
        # How many of its group beat each member, at first as if every later one did.
        beaten = [torch.full_like(member, size - 1 - i, dtype=torch.uint8) for i, member in enumerate(members)]
        for i, earlier in enumerate(members):
            for j in range(i + 1, size):
                wins = (earlier >= members[j]).view(torch.uint8)
                beaten[i] -= wins
                beaten[j] += wins
        chosen = into.view(len(piece), -1, size)
        for i, by in enumerate(beaten):
            torch.lt(by, kept, out=chosen[..., i])
    return mask
