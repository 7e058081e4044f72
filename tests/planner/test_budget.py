"""The knapsack: as good as trying everything, and never over the budget."""

import math
from itertools import product

import pytest
import torch

from slimlm.planner.budget import choose_options, evened


def drawn(groups: int, options: int, seed: int) -> tuple[list[list[float]], list[list[float]]]:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(groups, options, generator=generator).tolist()
    costs = (torch.randint(1, 2000, (groups, options), generator=generator).float()).tolist()
    return losses, costs


@pytest.mark.parametrize("seed", range(12))
def test_it_finds_what_trying_everything_finds(seed: int) -> None:
    losses, costs = drawn(5, 4, seed)
    budget = 0.5 * (sum(map(min, costs)) + sum(map(max, costs)))
    chosen = choose_options(losses, costs, budget)
    assert chosen is not None
    ways = [way for way in product(range(4), repeat=5) if sum(c[i] for c, i in zip(costs, way, strict=True)) <= budget]
    best = min(sum(own[i] for own, i in zip(losses, way, strict=True)) for way in ways)
    # Costs are rounded up to 1/256 of a group's share, so a way that just fits may be passed over.
    assert sum(own[i] for own, i in zip(losses, chosen, strict=True)) <= best + 0.05


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_the_budget_is_never_exceeded(seed: int, share: float) -> None:
    losses, costs = drawn(20, 6, seed)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    budget = least + share * (most - least)
    chosen = choose_options(losses, costs, budget)
    assert chosen is not None
    assert sum(own[i] for own, i in zip(costs, chosen, strict=True)) <= budget + 1e-6


def test_more_budget_never_loses_more() -> None:
    losses, costs = drawn(10, 5, 3)
    least, most = sum(map(min, costs)), sum(map(max, costs))
    totals = []
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        chosen = choose_options(losses, costs, least + share * (most - least))
        assert chosen is not None
        totals.append(sum(own[i] for own, i in zip(losses, chosen, strict=True)))
    assert totals == sorted(totals, reverse=True)


def test_equal_groups_within_a_uniform_budget_get_the_uniform_option() -> None:
    losses, costs = [[1.0, 0.4, 0.1]] * 6, [[2.0, 3.0, 9.0]] * 6
    assert choose_options(losses, costs, 18.0) == [1] * 6


def test_an_option_that_a_group_cannot_take_is_never_chosen() -> None:
    losses, costs = [[float("inf"), 0.5], [0.1, 0.5]], [[1.0, 2.0], [1.0, 2.0]]
    assert choose_options(losses, costs, 4.0) == [1, 0]


def test_a_budget_below_the_cheapest_choice_gives_nothing() -> None:
    assert choose_options([[1.0]], [[5.0]], 4.9) is None


def test_a_refused_option_is_not_chosen_where_rounding_leaves_no_room() -> None:
    losses, costs = [[float("inf"), 1.0, 0.5]] * 7, [[0.0, 7.3, 10.95]] * 7
    assert choose_options(losses, costs, 7 * 7.3) == [1] * 7


def test_evened_losses_are_halfway_to_equal_ones_per_weight() -> None:
    # Measured losses per weight 4 and 1, whose geometric mean is 2: both come to sqrt(2) times and sqrt(1/2) times it.
    found = evened([[40.0, 10.0], [50.0, 100.0, 25.0]], [0, 1], [10, 100])
    assert found[0] == pytest.approx([10 * 2 * math.sqrt(2), 2.5 * 2 * math.sqrt(2)])
    assert found[1] == pytest.approx([50 * math.sqrt(2), 100 * math.sqrt(2), 25 * math.sqrt(2)])


def test_equal_losses_per_weight_stay_and_so_do_zero_and_infinity() -> None:
    same = [[20.0, 5.0], [2.0, 0.5]]
    assert evened(same, [0, 0], [10, 1]) == [pytest.approx(own) for own in same]
    assert evened([[0.0, 1.0], [math.inf, math.inf], [3.0, 1.0]], [0, 0, 0], [1, 1, 1]) == [
        [0.0, 1.0],
        [math.inf, math.inf],
        pytest.approx([3.0, 1.0]),
    ]
