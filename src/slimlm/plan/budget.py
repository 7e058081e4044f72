"""The multiple-choice knapsack: one option per group, least total loss within a budget.

Choosing per layer from measured losses by dynamic programming is HIGGS's allocation (Malinovskii et al., arXiv 2411.17525,
section 5), here over measured losses instead of its linear model.
"""

import math

import torch

_UNITS_PER_GROUP = 256


def choose_options(losses: list[list[float]], costs: list[list[float]], budget: float) -> list[int] | None:
    """For each group the number of its option, so that the losses' sum is least and the costs' within the budget.

    losses and costs: per group and option. Costs are rounded up to units of 1/256 of a group's share of what the budget
    leaves above the cheapest choice, so the budget is kept exactly and the optimum missed by little. None where even the
    cheapest options cost more than the budget.
    """
    least = [min(own) for own in costs]
    room = budget - sum(least)
    if room < 0:
        return None
    units = _UNITS_PER_GROUP * len(costs)
    unit = max(room / units, 1e-9)
    best = torch.zeros(units + 1, dtype=torch.float64)
    picked: list[torch.Tensor] = []
    for own_losses, own_costs, base in zip(losses, costs, least, strict=True):
        steps = [_steps(cost - base, unit) for cost in own_costs]
        rows = torch.full((len(steps), units + 1), float("inf"), dtype=torch.float64)
        for row, (loss, step) in enumerate(zip(own_losses, steps, strict=True)):
            if step <= units:
                rows[row, step:] = best[: units + 1 - step] + loss
        best, which = rows.min(dim=0)
        picked.append(which)
    chosen: list[int] = []
    at = units
    for which, own_costs, base in zip(reversed(picked), reversed(costs), reversed(least), strict=True):
        option = int(which[at])
        chosen.append(option)
        at -= _steps(own_costs[option] - base, unit)
    return chosen[::-1]


def _steps(cost: float, unit: float) -> int:
    return math.ceil(cost / unit)
