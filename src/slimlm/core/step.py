"""A step of a recipe: a quantizer, a pruner, a compensator or a joint solver, and what it declares of itself.

A step is a frozen dataclass whose fields are its options. Other modules never read a field by name: what a recipe, an estimate
or a plan needs is declared in `Step`. `StepDefaults` has the values of most steps, so that a simple quantizer is its options,
`needs` and a call:

    @dataclass(frozen=True)
    class AbsMax(StepDefaults):
        bits: int = 4
        needs: ClassVar[Needs] = frozenset()

        def __call__(self, layer: Layer, stats: Stats) -> Layer: ...
"""

from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol, Self

from slimlm.core.layer import Layer
from slimlm.core.mask import Pattern
from slimlm.core.objective import Objective
from slimlm.core.solvers.low_rank import AdapterFormat
from slimlm.core.statistics.base import Needs, Stats


class Step(Protocol):
    """What a step declares and does."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    """as every dataclass has it"""

    @property
    def needs(self) -> Needs:
        """The statistics that its call reads, and no others; calibration measures these. A class variable suffices."""
        ...

    @property
    def sparsity(self) -> Pattern | None:
        """The pattern of the mask that it chooses; None: it does not change the mask."""
        ...

    @property
    def adapter(self) -> AdapterFormat | None:
        """The size and format of the adapter that it fits; None: it does not change adapters."""
        ...

    @property
    def moves_weights(self) -> bool:
        """Whether it changes weights without coding them, so that it cannot come after a step that codes."""
        ...

    @property
    def may_fit_codebook(self) -> bool:
        """Whether its call may fit a codebook to the base, whose bits an estimate then counts."""
        ...

    @property
    def weight_copies(self) -> int:
        """Float32 copies of a layer's weight that its call holds at most, for estimates of memory; a class variable will do."""
        ...

    @property
    def covariance_copies(self) -> int:
        """Float32 matrices `[in, in]` that its call holds at most where the recipe measures the covariance."""
        ...

    @property
    def needs_plan(self) -> bool:
        """Whether an option is left to a plan ("auto"); the step cannot be called before."""
        ...

    def resolved(self) -> Self:
        """The step with the value whose cost a plan may spend, in place of "auto"."""
        ...

    def with_rank(self, rank: float) -> Self:
        """The step with an adapter of another rank, a share of min(out, in); itself where it fits none."""
        ...

    def brief(self) -> Self:
        """The step for a trial: few rounds, and no asymmetric calibration."""
        ...

    def options(self, bits: float | None, objective: Objective) -> tuple[Self, ...]:
        """What a plan may choose from for a layer: this step with other values of its options.

        Args:
            bits: The budget per weight, which the options should lie around; None: only what the step leaves to a plan.
            objective: What the budget counts.

        Returns:
            The choices; empty where there is nothing to plan.
        """
        ...

    def __call__(self, layer: Layer, stats: Stats) -> Layer:
        """The layer with the mask, parts or weight that the step decides; no tensor of either argument is changed."""
        ...


@dataclass(frozen=True)
class StepDefaults:
    """What a step without mask, adapter, rounds and options for a plan declares; `needs` and the call are left to it."""

    moves_weights: ClassVar[bool] = False
    weight_copies: ClassVar[int] = 8
    covariance_copies: ClassVar[int] = 8

    @property
    def sparsity(self) -> Pattern | None:
        """No mask."""
        return None

    @property
    def adapter(self) -> AdapterFormat | None:
        """No adapter."""
        return None

    @property
    def may_fit_codebook(self) -> bool:
        """No codebook."""
        return False

    @property
    def needs_plan(self) -> bool:
        """No option is left to a plan."""
        return False

    def resolved(self) -> Self:
        """Itself."""
        return self

    def with_rank(self, rank: float) -> Self:
        """Itself."""
        return self

    def brief(self) -> Self:
        """Itself."""
        return self

    def options(self, bits: float | None, objective: Objective) -> tuple[Self, ...]:
        """None."""
        return ()


def widths_around(bits: float) -> list[int]:
    """Widths of codes, in bits, that a plan may choose from for this budget per weight: some below it, some above."""
    return [width for width in (2, 3, 4, 5, 6, 8) if bits - 2.2 < width <= max(3.0, bits + 2)]
