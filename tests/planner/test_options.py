"""What an option would store and cost, said before anything is computed."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.methods.joint.alternation import Alternation
from slimlm.methods.quantize.gptq import Gptq
from slimlm.planner.options import Budget, Option, budget_of, methods_with_options, options_of
from slimlm.planner.plan import refuse_budget
from slimlm.recipe import NamedStep, recipe_from_dict

SHAPES = [(48, 172), (88, 48), (352, 128)]


def option(bits: int, group_size: int | str, pattern: str | float, rank: float, **others: Any) -> Option:
    """An option of the joint solver: base and adapter."""
    values = {"bits": bits, "group_size": group_size, "pattern": pattern, "rank": rank, **others}
    return Option((NamedStep("joint", "alternation", Alternation(**values)),), tuple(values.items()), 0)


def offered(bits: float, objective: str = "size", step: dict[str, Any] | None = None) -> tuple[Option, ...]:
    """What a recipe of this one step lets a plan choose from."""
    recipe = recipe_from_dict({"steps": [step or {"joint": "alternation"}]}, source="test")
    return options_of(recipe, bits, objective)  # type: ignore[arg-type]


OPTIONS = [
    option(2, 64, "", 0.0),
    option(3, 128, "", 0.05),
    option(5, 32, "", 0.1),
    option(8, "per-channel", "", 0.0),
    option(4, 32, "2:4", 0.1),
    option(3, 64, "2:4", 0.2),
    option(4, 32, 0.5, 0.0),
    option(4, 32, "2:4", 0.1, adapter_bits=16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("number", range(len(OPTIONS)), ids=lambda number: str(OPTIONS[number]))
def test_the_bits_foretold_are_those_of_the_parts(number: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * shape[1], shape[1], generator=generator)
    stats = Stats(len(x), {Covariance: x.T @ x / len(x)})
    values = dict(OPTIONS[number].overrides)
    step = Alternation(rounds=1, descent_rounds=0, asymmetric=0.0, codebook="none")
    layer = replace(step, **values)(Layer.of("fc1", torch.randn(shape, generator=generator)), stats)
    stored = sum(part.storage_bits() for part in layer.parts())
    assert stored == option(**values, codebook="none").stored_bits(shape)
    assert stored <= OPTIONS[number].stored_bits(shape) <= stored + 16 * 16


def test_by_size_two_of_four_never_costs_less_than_its_bits_and_by_speed_it_does_less() -> None:
    dense, sparse = option(4, 128, "", 0.0), option(4, 128, "2:4", 0.0)
    shape = (512, 512)
    assert sparse.operations(shape) * 2 == dense.operations(shape)
    assert sparse.stored_bits(shape) == 512 * 512 * (2 + 1) + 16 * 512 * 4 + 16 * 16
    assert sparse.cost(shape, "speed") < dense.cost(shape, "speed")


def test_an_adapter_costs_operations_as_well_as_bits() -> None:
    plain, repaired = option(4, 128, "", 0.0), option(4, 128, "", 0.1)
    for objective in ("size", "speed"):
        assert repaired.cost((512, 512), objective) > plain.cost((512, 512), objective)


@pytest.mark.parametrize("objective", ["size", "speed"])
def test_a_budget_grows_with_its_bits(objective: str) -> None:
    costs = [budget_of(SHAPES, bits, objective) for bits in (2.0, 3.0, 4.5, 8.0)]  # type: ignore[arg-type]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


@pytest.mark.parametrize("step", [{"joint": "alternation"}, {"quantize": "gptq"}], ids=["alternation", "gptq"])
@pytest.mark.parametrize("bits", [2.3, 3.0, 3.5, 4.0, 4.5, 5.0, 6.5, 7.9])
def test_around_every_budget_there_are_options_on_both_sides(bits: float, step: dict[str, Any]) -> None:
    stored = [one.stored_bits((4096, 4096)) / 4096**2 for one in offered(bits, step=step)]
    assert min(stored) <= bits <= max(stored)


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can() -> None:
    options = offered(2.0)
    shapes = {"a": (64, 64), "b": (64, 128)}
    with pytest.raises(RecipeError, match="smallest") as caught:
        refuse_budget(shapes, Budget(options, 1.5, "size"))
    named = float(str(caught.value).split("model is ")[1].split(" bits")[0])
    refuse_budget(shapes, Budget(options, named + 0.001, "size"))
    with pytest.raises(RecipeError):
        refuse_budget(shapes, Budget(options, named - 0.01, "size"))


def test_an_option_carries_the_adapters_and_tables_of_the_recipe() -> None:
    own = {"joint": "alternation", "adapter_bits": 16, "adapter_group_size": 64, "codebook": "none"}
    for one in offered(4.0, step=own):
        ((_, _, step),) = [(named.kind, named.method, named.step) for named in one.steps]
        assert isinstance(step, Alternation)
        assert (step.adapter_bits, step.adapter_group_size, step.codebook) == (16, 64, "none")
        # The recipe says these already.
        assert {"adapter_bits", "adapter_group_size", "codebook"}.isdisjoint(dict(one.overrides))


def test_no_table_is_asked_for_above_four_bits() -> None:
    tables = {dict(one.overrides)["bits"] for one in offered(4.5) if dict(one.overrides)["codebook"] == "auto"}
    assert tables == {3, 4}


@pytest.mark.parametrize("objective", ["size", "speed"])
def test_what_is_chosen_for_a_layer_is_what_a_rule_says(objective: str) -> None:
    base = recipe_from_dict({"steps": [{"prune": "wanda"}, {"quantize": "gptq", "damp": 0.02}]}, source="test")
    for one in options_of(base, 4.0, objective):  # type: ignore[arg-type]
        rule = {"layers": ["*"], **dict(one.overrides)}
        planned = recipe_from_dict({**base.to_dict(), "rules": [rule]}, source="test")
        assert planned.steps_for("a") == one.steps
        assert rule["quantize"] == "gptq"  # so that another step with bits of its own keeps them


def test_a_method_offers_its_options_itself() -> None:
    assert sorted(methods_with_options()) == ["alternation", "gptq"]
    steps = Gptq(order="input").options(4.0, "size")
    expected = {(bits, group_size) for bits in (2, 3, 4, 5, 6) for group_size in (128, 32)}
    assert {(step.bits, step.group_size) for step in steps} == expected
    assert all(step.order == "input" for step in steps)
    assert Gptq().options(None, "size") == ()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([{"quantize": "absmax"}, {"prune": "wanda"}], ["quantize absmax, prune wanda", "alternation", "gptq"]),
        ([{"quantize": "gptq"}, {"prune": "wanda"}, {"quantize": "gptq"}], ["several of its steps"]),
    ],
)
def test_a_recipe_without_exactly_one_step_to_choose_for_is_refused(steps: list[dict[str, Any]], said: list[str]) -> None:
    with pytest.raises(RecipeError, match="cannot be planned") as caught:
        options_of(recipe_from_dict({"name": "mine", "steps": steps}, source="test"), 4.0, "size")
    assert all(word in str(caught.value) for word in said)
