"""What an option would store and cost, said before anything is computed."""

from dataclasses import replace

import pytest
import torch

from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.methods.joint.alternation import Alternation
from slimlm.planner.options import Budget, Option, budget_of, options_for
from slimlm.planner.plan import refuse_budget

LIKE = Option(4, 32, "2:4", 0.1)
SHAPES = [(48, 172), (88, 48), (352, 128)]
OPTIONS = [
    Option(2, 64, "", 0.0),
    Option(3, 128, "", 0.05),
    Option(5, 32, "", 0.1),
    Option(8, "row", "", 0.0),
    Option(4, 32, "2:4", 0.1),
    Option(3, 64, "2:4", 0.2),
    Option(4, 32, 0.5, 0.0),
    Option(4, 32, "2:4", 0.1, adapter_bits=16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_the_bits_foretold_are_those_of_the_parts(option: Option, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * shape[1], shape[1], generator=generator)
    stats = Stats(len(x), {Covariance: x.T @ x / len(x)})
    step = Alternation(rounds=1, descent_rounds=0, asymmetric=0.0)
    layer = replace(step, **{**option.overrides(), "levels": "even"})(
        Layer.of("fc1", torch.randn(shape, generator=generator)), stats
    )
    stored = sum(part.storage_bits() for part in layer.parts())
    assert stored == replace(option, table=False).stored_bits(shape)
    assert stored <= option.stored_bits(shape) <= stored + 16 * 16


def test_by_size_two_of_four_never_costs_less_than_its_bits_and_by_speed_it_does_less() -> None:
    dense, sparse = Option(4, 128, "", 0.0), Option(4, 128, "2:4", 0.0)
    shape = (512, 512)
    assert sparse.operations(shape) * 2 == dense.operations(shape)
    assert sparse.stored_bits(shape) == 512 * 512 * (2 + 1) + 16 * 512 * 4 + 16 * 16
    assert sparse.cost(shape, "speed") < dense.cost(shape, "speed")


def test_an_adapter_costs_operations_as_well_as_bits() -> None:
    plain, repaired = Option(4, 128, "", 0.0), Option(4, 128, "", 0.1)
    for objective in ("size", "speed"):
        assert repaired.cost((512, 512), objective) > plain.cost((512, 512), objective)


@pytest.mark.parametrize("objective", ["size", "speed"])
def test_a_budget_grows_with_its_bits(objective: str) -> None:
    costs = [budget_of(SHAPES, bits, objective) for bits in (2.0, 3.0, 4.5, 8.0)]  # type: ignore[arg-type]
    assert costs == sorted(costs)
    assert costs[0] < costs[-1]


@pytest.mark.parametrize("bits", [2.3, 3.0, 3.5, 4.0, 4.5, 5.0, 6.5, 7.9])
def test_around_every_budget_there_are_options_on_both_sides(bits: float) -> None:
    stored = [option.stored_bits((4096, 4096)) / 4096**2 for option in options_for(LIKE, bits, "size")]
    assert min(stored) <= bits <= max(stored)


def test_a_budget_that_cannot_be_met_names_the_smallest_that_can() -> None:
    options = options_for(LIKE, 2.0, "size")
    shapes = {"a": (64, 64), "b": (64, 128)}
    with pytest.raises(RecipeError, match="smallest") as caught:
        refuse_budget(shapes, Budget(options, 1.5, "size"))
    named = float(str(caught.value).split("model is ")[1].split(" bits")[0])
    refuse_budget(shapes, Budget(options, named + 0.001, "size"))
    with pytest.raises(RecipeError):
        refuse_budget(shapes, Budget(options, named - 0.01, "size"))


def test_an_option_carries_the_adapters_and_tables_of_the_recipe() -> None:
    like = Option(4, 32, "2:4", 0.1, adapter_bits=16, adapter_group=64, table=False)
    for option in options_for(like, 4.0, "size"):
        said = option.overrides()
        assert (said["adapter_bits"], said["adapter_group"], said["levels"]) == (16, 64, "even")


def test_no_table_is_asked_for_above_four_bits() -> None:
    assert {option.bits for option in options_for(LIKE, 4.5, "size") if option.overrides()["levels"] == "auto"} <= {2, 3, 4}
