"""The base of all statistics: how batches are added, how ranks are merged, how many bytes it takes, and its result.

A file of this folder derives one class from `Mean` or `Largest` and writes the formula of one batch:

    class MeanAbs(Mean):
        def of(self, batch): return batch.inputs.abs().sum(dim=0, dtype=torch.float64)

What a statistic needs of a batch besides the inputs, and so for which layers it exists, is its `Source`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from slimlm.core.cache import Cache
from slimlm.core.errors import StatisticError

Reduction = Literal["sum", "max"]


class Source(Enum):
    """What a statistic is made of, and so for which layers it exists."""

    TOKENS = "tokens"
    """the inputs of any tokens; each expert has those routed to it, and experts can be pooled"""
    SAMPLES = "samples"
    """inputs of whole calibration samples; not for experts, which have only some of the tokens"""
    ORIGINAL_INPUTS = "original inputs"
    """inputs, and the layer's inputs in the original model for the same tokens; not for experts, to which the router may have
    assigned other tokens there, nor where there are output residuals, which say more"""
    OUTPUT_RESIDUALS = "output residuals"
    """inputs, and the original block's outputs less the block's; only for layers whose output is added to the block's
    output as it is"""
    GRADIENTS = "gradients"
    """inputs, and the gradient of a loss at the layer's outputs for the same tokens; measured in a backward pass through the
    whole model (slimlm.calibration.gradients)"""

    @property
    def compares(self) -> bool:
        """Whether the original block has to run as well, on the inputs that it has in the original model."""
        return self in (Source.ORIGINAL_INPUTS, Source.OUTPUT_RESIDUALS)


@dataclass(frozen=True)
class Batch:
    """The inputs of one linear layer in one batch of calibration samples."""

    inputs: Tensor
    """`[tokens, in]`, sample after sample"""
    length: int
    """tokens per sample"""
    original_inputs: Tensor | None = None
    """`[tokens, in]`: the layer's inputs in the original model for the same tokens, where they can be paired"""
    output_residuals: Tensor | None = None
    """`[tokens, out]`: the original block's outputs less those of the block, for the same tokens"""
    output_gradients: Tensor | None = None
    """`[tokens, out]`: the gradient of the samples' losses at the layer's outputs for the same tokens"""
    samples: int | None = None
    """the samples that the tokens are of, where they have gradients"""


@dataclass(frozen=True)
class Sizes:
    """What determines the size of a statistic."""

    outputs: int
    """of the layer"""
    inputs: int
    """of the layer"""
    length: int
    """tokens per sample"""


class Statistic(ABC):
    """One statistic of one layer's inputs while it is measured; steps name the class."""

    source: ClassVar[Source] = Source.TOKENS
    reduction: ClassVar[Reduction]
    """how `total` is formed over batches, pooled layers and ranks"""
    total_dtype: ClassVar[torch.dtype]

    def __init__(self) -> None:
        self.total: Tensor | None = None
        """the sum or maximum over the batches so far; None: there were none"""
        self.available = True
        """False once a batch lacked what the statistic is made of: then the layer does not have the statistic"""

    @classmethod
    @abstractmethod
    def shape(cls, sizes: Sizes) -> tuple[int, ...]:
        """The shape of the statistic."""

    @abstractmethod
    def of(self, batch: Batch) -> Tensor:
        """The sum or maximum over one batch: a new tensor of the statistic's shape."""

    @abstractmethod
    def count(self, tokens: int, length: int) -> int:
        """What `total` is divided by at the end, for so many tokens in samples of `length`."""

    @classmethod
    def operations(cls, sizes: Sizes) -> float:
        """Multiplications and additions per token; 0 where they are few compared with those of the layer."""
        del sizes
        return 0.0

    @classmethod
    def total_bytes(cls, sizes: Sizes) -> int:
        """Bytes of `total`."""
        return cls.total_dtype.itemsize * prod(cls.shape(sizes))

    @classmethod
    def result_bytes(cls, sizes: Sizes) -> int:
        """Bytes of the finished statistic, which is float32."""
        return 4 * prod(cls.shape(sizes))

    def add(self, batch: Batch) -> None:
        """Add a batch."""
        if self.source is Source.ORIGINAL_INPUTS and batch.original_inputs is None:
            self.withdraw()
        if self.available:
            self._include(self.of(batch))

    def merge(self, other: Self) -> None:
        """Add what another instance has measured, on other tokens."""
        if not other.available:
            self.withdraw()
        if self.available and other.total is not None:
            self._include(other.total.clone())

    def withdraw(self) -> None:
        """Drop the statistic for this layer."""
        self.available, self.total = False, None

    def result(self, tokens: int, length: int) -> Tensor | None:
        """The statistic, float32, for so many tokens in samples of `length`; None where the layer does not have it."""
        return None if self.total is None else (self.total / self.count(tokens, length)).float()

    @abstractmethod
    def _include(self, term: Tensor) -> None:
        """Add a batch's or another instance's term to `total`; the tensor may be changed afterwards."""


class Mean(Statistic):
    """A mean over tokens, summed in float64, so that the division into batches changes nothing but its last bits."""

    reduction = "sum"
    total_dtype = torch.float64

    def count(self, tokens: int, length: int) -> int:
        return tokens

    def _include(self, term: Tensor) -> None:
        self.total = term.double() if self.total is None else self.total.add_(term)


class Largest(Statistic):
    """A maximum of magnitudes."""

    reduction = "max"
    total_dtype = torch.float32

    def count(self, tokens: int, length: int) -> int:
        return 1

    def _include(self, term: Tensor) -> None:
        self.total = term if self.total is None else torch.maximum(self.total, term)


Needs = frozenset[type[Statistic]]
"""The statistics that a step needs from calibration."""


def in_order(needs: Iterable[type[Statistic]]) -> list[type[Statistic]]:
    """Sorted by name: the order of a set of classes differs from process to process, and ranks must agree on one."""
    return sorted(needs, key=lambda statistic: statistic.__name__)


@dataclass(frozen=True)
class Stats:
    """The statistics of one linear layer's inputs, by their classes: `stats[Covariance]`."""

    tokens: int
    """that were measured"""
    values: Mapping[type[Statistic], Tensor | None] = field(default_factory=dict)
    """float32; None: asked for, but this layer has none"""
    note: str | None = None
    """for the user, where these are not exactly this layer's inputs"""
    cache: Cache = field(init=False, default_factory=Cache, compare=False, repr=False)
    """what steps have computed from these statistics alone; layers that share an input share it, `replace` empties it"""

    def __getitem__(self, statistic: type[Statistic]) -> Tensor:
        """The statistic, float32, in its class's shape.

        Raises:
            StatisticError: it was not declared, or the layer does not have it.
        """
        value = self.get(statistic)
        if value is None:
            raise StatisticError(
                f"this layer has no {statistic.__name__}, which is made of {statistic.source.value}; a step that can do "
                f"without calls stats.get({statistic.__name__})"
            )
        return value

    def get(self, statistic: type[Statistic]) -> Tensor | None:
        """As `stats[statistic]`, but None where the layer does not have it.

        Raises:
            StatisticError: it was not declared.
        """
        if statistic not in self.values:
            declared = ", ".join(each.__name__ for each in in_order(self.values)) or "none"
            raise StatisticError(
                f"a step read {statistic.__name__}, which its `needs` do not declare (declared and measured: {declared}); "
                "add the class to `needs`"
            )
        return self.values[statistic]

    def restricted_to(self, needs: Needs) -> "Stats":
        """The same statistics as a step with these needs may see them; the cache is shared."""
        view = Stats(self.tokens, {s: value for s, value in self.values.items() if s in needs}, self.note)
        object.__setattr__(view, "cache", self.cache)  # the values are the same, so the cache holds for them
        return view
