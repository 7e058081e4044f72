"""The multiple-choice knapsack: one option per group, with the least total loss within a budget.

Choosing per layer from measured losses by dynamic programming is HIGGS's allocation (Malinovskii et al., arXiv 2411.17525,
section 5), here over measured losses instead of its linear model.
"""

import math

import torch

_TRUST = 0.5
"""The exponent of a measured loss where later layers correct errors; 1 would take it as it is."""
_UNITS_PER_GROUP = 256
"""Units of cost per group of layers in the dynamic program."""


def choose_options(losses: list[list[float]], costs: list[list[float]], budget: float) -> list[int] | None:
    """Choose an option for each group, with the least sum of losses at a sum of costs within the budget.

    Costs are rounded up to units of 1/256 of a group's share of the budget beyond the cheapest choice, so the budget is never
    exceeded and the result is close to the optimum. An option of infinite loss is never chosen.

    Args:
        losses: Losses by group and option.
        costs: Costs by group and option.
        budget: The largest sum of costs.

    Returns:
        The number of each group's option; None where even the cheapest options cost more than the budget.
    """
    usable = [
        [cost if math.isfinite(loss) else math.inf for loss, cost in zip(own_losses, own_costs, strict=True)]
        for own_losses, own_costs in zip(losses, costs, strict=True)
    ]
    least = [min(own) for own in usable]
    room = budget - sum(least)
    if not room >= 0:
        return None
    units = _UNITS_PER_GROUP * len(costs)
    unit = max(room / units, 1e-9)
    steps = [[_steps(cost - base, unit) for cost in own] for own, base in zip(usable, least, strict=True)]
    best = torch.zeros(units + 1, dtype=torch.float64)
    picked: list[torch.Tensor] = []
    for own_losses, own_steps in zip(losses, steps, strict=True):
        rows = torch.full((len(own_steps), units + 1), float("inf"), dtype=torch.float64)
        for row, (loss, step) in enumerate(zip(own_losses, own_steps, strict=True)):
            if step <= units:
                rows[row, step:] = best[: units + 1 - step] + loss
        best, which = rows.min(dim=0)
        picked.append(which)
    chosen: list[int] = []
    at = units
    for which, own_steps in zip(reversed(picked), reversed(steps), strict=True):
        chosen.append(int(which[at]))
        at -= own_steps[chosen[-1]]
    return chosen[::-1]


def evened(losses: list[list[float]], measured: list[int], weights: list[int]) -> list[list[float]]:
    """The losses that choices are made by where later layers correct the errors of earlier ones.

    A loss is measured with all other layers unchanged. In a sequential recipe the layers after it are solved for the original's
    outputs from inputs that hold its errors, and take back more of a large loss than of a small one. So each group's loss per
    weight is replaced by its geometric mean with that of all groups; the proportions of its options stay.

    Args:
        losses: Losses by group and option.
        measured: The option of each group whose loss was measured.
        weights: The number of weights of each group.
    """
    per_weight = [own[i] / count for own, i, count in zip(losses, measured, weights, strict=True)]
    logarithms = [math.log(loss) for loss in per_weight if 0 < loss < math.inf]
    mean = math.exp(sum(logarithms) / len(logarithms)) if logarithms else 1.0
    factors = [(mean / loss) ** (1 - _TRUST) if 0 < loss < math.inf else 1.0 for loss in per_weight]
    return [[factor * loss for loss in own] for factor, own in zip(factors, losses, strict=True)]


def _steps(cost: float, unit: float) -> int:
    """A cost above the cheapest in units, rounded up; more than any budget for an option that is not allowed."""
    return 2**62 if math.isinf(cost) else math.ceil(cost / unit)
