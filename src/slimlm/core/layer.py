"""What a step sees of one linear layer and what it may decide."""

from dataclasses import dataclass, field, replace
from enum import Flag, auto
from typing import Protocol

import torch
from torch import Tensor

from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.parts import LowRank, Part, Plain, Pruned, Uniform


class Need(Flag):
    """Statistics of a layer's inputs that a step asks calibration for."""

    NOTHING = 0
    MEAN_ABS = auto()
    MEAN_SQUARE = auto()
    PEAK_MEAN_ABS = auto()


@dataclass(frozen=True)
class Stats:
    """Of one linear layer's inputs x `[tokens, in]`."""

    tokens: int
    mean_abs: Tensor | None = None
    """`[in]`, mean of |x_j|"""
    mean_square: Tensor | None = None
    """`[in]`, mean of x_j^2"""
    peak_mean_abs: Tensor | None = None
    """`[in]`, the largest over the calibration windows of a window's mean |x_j|"""


def measured(statistic: Tensor | None) -> Tensor:
    """A statistic that the step declared it needs."""
    assert statistic is not None, "a step used a statistic that its `needs` does not declare"
    return statistic


def refuse_not_finite(name: str, tensor: Tensor) -> None:
    """Raise NumericsError, with the tensor's name and a count, where it holds NaN or infinity."""
    bad = int((~tensor.isfinite()).sum())
    if bad:
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
    code: Plain | Uniform | None = None
    extras: tuple[LowRank, ...] = field(default=())

    @classmethod
    def of(cls, name: str, weight: Tensor, dtype: torch.dtype | None = None) -> "Layer":
        """Start from a weight `[out, in]`; raises NumericsError where it holds NaN or infinity."""
        refuse_not_finite(name, weight)
        return cls(name, weight.detach().float(), dtype or weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        return self.original.shape[0], self.original.shape[1]

    @property
    def target(self) -> Tensor:
        """What a code should stand for: the original less what the extras carry, zero where pruned."""
        target = self.original
        for extra in self.extras:
            target = target - extra.dense()
        return target if self.keep is None else target * self.keep

    @property
    def working(self) -> Tensor:
        """The base as decided so far: the code where there is one, else the target; zero where pruned."""
        if self.code is None:
            return self.target
        return self.code.dense() if self.keep is None else self.code.dense() * self.keep

    @property
    def damage(self) -> Tensor:
        """The original less the base: what a repair should stand for."""
        return self.original - self.working

    @property
    def error(self) -> Tensor:
        """The original less what all parts stand for."""
        error = self.damage
        for extra in self.extras:
            error = error - extra.dense()
        return error

    def prune(self, keep: Tensor, pattern: str) -> "Layer":
        """Keep only these weights (and of an earlier mask only what both keep)."""
        if self.keep is not None:
            raise RecipeError(f"{self.name} would be pruned twice; a recipe has one prune step")
        return replace(self, keep=keep, pattern=pattern)

    def encode(self, code: Plain | Uniform) -> "Layer":
        """Let these codes stand for the target (in place of earlier ones)."""
        return replace(self, code=code)

    def repair(self, extra: LowRank) -> "Layer":
        """Put a part beside the base, in place of an earlier one: a later repair is a refit."""
        return replace(self, extras=(extra,))

    def parts(self) -> tuple[Part, ...]:
        """The decided parts, the base first."""
        base = self.code if self.code is not None else Plain(self.target.to(self.dtype))
        first: Part = base if self.keep is None else Pruned(base, self.keep, self.pattern)
        return (first, *self.extras)


class Step(Protocol):
    """A quantizer, a pruner or a compensator: a frozen dataclass whose fields are its options."""

    @property
    def needs(self) -> Need:
        """What calibration must measure for it; a class variable will do."""
        ...

    def __call__(self, layer: Layer, stats: Stats) -> Layer: ...
