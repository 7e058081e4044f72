"""The order in which a sweep takes the inputs: those of large second moment first, while many others can still compensate.

Deciding inputs by falling second moment is GPTQ's act-order (the option of the authors' code for Frantar et al., arXiv
2210.17323).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from slimlm.core.errors import RecipeError
from slimlm.core.grid import GroupSize
from slimlm.core.mask import Pattern
from slimlm.core.profiling import profiled
from slimlm.core.solvers.recursion import LEAF

_LEAST_WEIGHT = 1e-6
"""What an input counts at least in a search of scales before the sweep, as a share of the mean: a dead one is rounded, too."""


@dataclass(frozen=True)
class Order:
    """The order in which a sweep takes the inputs."""

    inputs: Tensor
    """int64 `[in]`, the inputs in that order"""
    sizes: list[int]
    """inputs in each group, in that order"""
    group_size: GroupSize
    """how many weights share a scale"""
    second_moment: Tensor | None = None
    """float32 `[in]`, of the inputs, where those of a group are not next to each other in the order: scales are then searched
    before the sweep, squared errors multiplied by these; None: they are searched when the sweep reaches their group"""

    @property
    def positions(self) -> Tensor:
        """Where in the order each input is, int64 `[in]`."""
        return self.inputs.argsort()


@profiled("order")
def order_of(second_moment: Tensor, *, group_size: GroupSize, pattern: Pattern | None) -> Order:
    """The inputs in order of falling second moment, without dividing groups that share a scale or those of n:m.

    Groups are sorted by their mean second moment, and inside a group fours (or the m of n:m) by theirs. So the inputs of a
    scale remain contiguous, scales can be searched when their group is reached, and no index of groups has to be stored, which
    GPTQ's act-order needs.

    Args:
        second_moment: `[in]`, the inputs' mean squares; zeros give the order of the inputs.
        group_size: how many weights share a scale.
        pattern: what is dropped, or None.
    """
    width = len(second_moment)
    size = width if isinstance(group_size, str) else min(group_size, width)
    device, second_moment = second_moment.device, second_moment.cpu()
    chunk = pattern.of if pattern is not None and pattern.of else LEAF
    groups = sorted(torch.arange(width).split(size), key=lambda group: -float(second_moment[group].mean()))
    chunks = [sorted(group.split(chunk), key=lambda few: -float(second_moment[few].mean())) for group in groups]
    return Order(torch.cat([few for group in chunks for few in group]).to(device), [len(group) for group in groups], group_size)


@profiled("order")
def activation_order(second_moment: Tensor, *, group_size: GroupSize) -> Order:
    """The inputs in order of falling second moment `[in]`, each by itself: GPTQ's act-order with its static groups.

    Groups are those of consecutive inputs as ever, so no index of groups has to be stored; their scales are found before the
    sweep, since it comes to the inputs of a group at different times.
    """
    mean = second_moment.mean()
    weights = (second_moment / mean).clamp_min(_LEAST_WEIGHT) if float(mean) > 0 else torch.ones_like(second_moment)
    inputs = second_moment.argsort(descending=True, stable=True)
    return Order(inputs, [len(second_moment)], group_size, weights)


def check_grouping(group_size: GroupSize, pattern: Pattern | None) -> None:
    """Raise RecipeError where a group would cut through the n:m groups of a mask."""
    if pattern is not None and pattern.of and isinstance(group_size, int) and group_size % pattern.of:
        raise RecipeError(f"group_size = {group_size}: under the pattern {pattern} give a multiple of {pattern.of}")
