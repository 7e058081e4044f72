"""One linear layer between two steps: what was decided so far, and what a step may decide."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.parts import Elementwise, LowRank, Part, Plain, Pruned


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericsError, with the tensor's name and a count, where it holds NaN or infinity."""
    # The extremes tell, NaN being one of them, sixty times sooner than a test of every 16-bit weight.
    if tensor.numel() and not all(bool(extreme.isfinite()) for extreme in tensor.aminmax()):
        bad = int((~tensor.isfinite()).sum())
        raise NumericsError(
            f"{name} holds {bad} NaN or infinite weights of {tensor.numel()}; the model file is damaged or was "
            "saved in a dtype too narrow for it. Repair the model first; nothing was written"
        )


@dataclass(frozen=True)
class Layer:
    """The state of one weight between two steps. Steps return a new one; no tensor is changed in place."""

    name: str
    original: Tensor
    """float32 `[out, in]`; no step changes it"""
    dtype: torch.dtype
    """what the model stores the weight in"""
    keep: Tensor | None = None
    """bool `[out, in]`; True stays"""
    pattern: str = ""
    code: Elementwise | None = None
    extras: tuple[LowRank, ...] = field(default=())
    goal: Tensor | None = None
    """float32 `[out, in]`: what all parts together should stand for, where a step aims at something else than the original"""
    moved: Tensor | None = None
    """float32 `[out, in]`: the base where a pruner has moved the weights that stay and nothing has coded them yet"""
    notes: tuple[str, ...] = ()
    """what the user should know of how this layer was decided, such as a stronger damping"""

    @classmethod
    def of(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "Layer":
        """Start from a weight `[out, in]`; raises NumericsError where it holds NaN or infinity."""
        refuse_not_finite(name, weight)
        return cls(name, weight.detach().float(), dtype or weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.original.shape[0], self.original.shape[1]

    @property
    def aim(self) -> Tensor:
        """What all parts together should stand for: the original unless a step aims at something else."""
        return self.original if self.goal is None else self.goal

    @property
    def whole(self) -> Tensor:
        """What a code should stand for, before pruning takes its share: the aim less the extras, or the moved weights."""
        if self.moved is not None:
            return self.moved
        whole = self.aim
        for extra in self.extras:
            whole = whole - extra.dense()
        return whole

    @property
    def target(self) -> Tensor:
        """What a code should stand for: `whole`, zero where pruned."""
        return self.whole if self.keep is None else self.whole * self.keep

    @property
    def working(self) -> Tensor:
        """The base as decided so far: the code where there is one, else the target; zero where pruned."""
        if self.code is None:
            return self.target
        return self.code.dense() if self.keep is None else self.code.dense() * self.keep

    @property
    def damage(self) -> Tensor:
        """The aim less the base: what a repair should stand for."""
        return self.aim - self.working

    @property
    def error(self) -> Tensor:
        """The original less what all parts stand for."""
        error = self.original - self.working
        for extra in self.extras:
            error = error - extra.dense()
        return error

    def prune(self, keep: Tensor, pattern: str) -> "Layer":
        """Keep only these weights; raises RecipeError where there is a mask already."""
        if self.keep is not None:
            raise RecipeError(f"{self.name} would be pruned twice; a recipe has one prune step")
        return replace(self, keep=keep, pattern=pattern)

    def move(self, base: Tensor) -> "Layer":
        """Let the base be these weights `[out, in]`, zero where pruned, until something codes them."""
        return replace(self, moved=base, code=None)

    def encode(self, code: Elementwise) -> "Layer":
        """Let these codes stand for the target (in place of earlier ones)."""
        return replace(self, code=code, moved=None)

    def note(self, *texts: str) -> "Layer":
        """Add what the user should know."""
        return replace(self, notes=(*self.notes, *texts))

    def repair(self, extra: LowRank) -> "Layer":
        """Put a part beside the base, in place of an earlier one: a later repair is a refit."""
        return replace(self, extras=(extra,))

    def parts(self) -> tuple[Part, ...]:
        """The decided parts, the base first."""
        base = self.code if self.code is not None else Plain(self.target.to(self.dtype))
        first: Part = base if self.keep is None else Pruned(base, self.keep, self.pattern)
        return (first, *self.extras)
