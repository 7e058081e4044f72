"""Costs fitted to trials give the trials back, and grow as the work does."""

import pytest
import torch

from slimlm.preflight.rates import StepCost, fitted_cost, measured_rates, measured_steps
from slimlm.recipe import open_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("cost", [StepCost(0.1, 0, 0, 0), StepCost(0.01, 1e-3, 0, 1e-9), StepCost(0, 1e-4, 2e-7, 3e-10)])
def test_a_cost_is_found_again_from_its_trials(cost: StepCost) -> None:
    found = fitted_cost([(side, cost.seconds((side, side))) for side in (64, 128, 256, 512)])
    for shape in ((64, 64), (256, 768), (4096, 4096)):
        assert found.seconds(shape) == pytest.approx(cost.seconds(shape), rel=1e-3)


def test_no_trial_makes_a_larger_layer_cheaper() -> None:
    found = fitted_cost([(64, 0.3), (128, 0.1), (256, 0.2)])
    seconds = [found.seconds((side, side)) for side in (64, 512, 4096)]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_rates_are_measured_where_the_clock_says() -> None:
    times = iter(range(1, 100))
    rates = measured_rates(None, CPU, lambda: float(next(times)))
    # One call takes one second of this clock, and so does writing.
    assert rates.products == 2 * 2048 * 512 * 1024 and rates.passes == 8 * 2**22 and rates.written == 2**25


@pytest.mark.parametrize("recipe", ["slim", "gptq", "jsq", "best-24"])
def test_the_steps_are_tried_no_larger_than_the_largest_layer(recipe: str) -> None:
    times = iter(range(1, 100))
    cost = measured_steps(open_recipe(recipe).steps, 48, length=16, device=CPU, clock=lambda: float(next(times)))
    # Every trial takes one second of this clock, in full or in few rounds.
    assert cost.seconds((48, 48)) == pytest.approx(1.0)
