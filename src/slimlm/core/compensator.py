"""What compensators share: they differ in the norm in which the residual is approximated, and sometimes in the residual."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from slimlm.core.layer import Layer
from slimlm.core.solvers.low_rank import AdapterBits, AdapterFormat, low_rank_part
from slimlm.core.statistics.base import Stats
from slimlm.core.step import StepDefaults


@dataclass(frozen=True)
class Compensator(StepDefaults, ABC):
    """L R = argmin ||(E - L R) H^(1/2)||_F for the residual E of a layer; a method's file gives H.

    At 16 bits `group_size` and `refit` have nothing to act on: they concern rounded factors.
    """

    rank: float = 0.1
    """a share of min(out, in)"""
    bits: AdapterBits = 4
    """per value of the factors"""
    group_size: int = 128
    """values of a factor that share a scale"""
    refit: bool = True
    """alternate rounding and least squares after the first rounding"""

    def __post_init__(self) -> None:
        _ = self.adapter  # refuses what makes no sense

    @property
    def adapter(self) -> AdapterFormat:
        """The size and format of the adapter."""
        return AdapterFormat(self.rank, self.bits, self.group_size, self.refit)

    def with_rank(self, rank: float) -> Self:
        """The same with another rank, a share of min(out, in)."""
        return replace(self, rank=rank)

    @abstractmethod
    def second_moment(self, layer: Layer, stats: Stats) -> tuple[Tensor, tuple[str, ...]]:
        """The norm's H.

        Args:
            layer: whose adapter is fitted.
            stats: those that `needs` declares.

        Returns:
            H `[in, in]`, or its diagonal `[in]`, on the device of the layer's weight, and notes for the user.
        """

    def residual(self, layer: Layer) -> Tensor:
        """What the adapter should approximate, `[out, in]`."""
        return layer.residual

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        """The layer with the adapter fitted, in place of an earlier one; as it is at rank 0."""
        moment, notes = self.second_moment(layer, stats)
        part = low_rank_part(self.residual(layer), moment, self.adapter)
        return layer if part is None else layer.with_adapter(part).with_notes(*notes)
