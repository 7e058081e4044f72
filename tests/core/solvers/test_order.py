"""The order of the inputs in a sweep: by falling second moment, in groups and fours or each by itself."""

import pytest
import torch

from slimlm.core.errors import RecipeError
from slimlm.core.grid import GroupSize
from slimlm.core.mask import Pattern
from slimlm.core.solvers.order import activation_order, check_grouping, order_of
from tests.core.solvers.problems import draw


@pytest.mark.parametrize("width", [8, 40, 172, 352])
@pytest.mark.parametrize("group_size", [4, 32, 48, 128, "per-channel", "per-tensor"])
@pytest.mark.parametrize("pattern", [None, "2:4", "2:8", 0.5])
def test_an_order_is_a_permutation_that_tears_no_group_and_no_four(
    width: int, group_size: GroupSize, pattern: str | float | None
) -> None:
    form = None if pattern is None else Pattern.parse(pattern)
    if isinstance(group_size, int) and form is not None and form.of and (group_size % form.of or width % form.of):
        return  # refused
    second_moment = torch.exp(draw(width))
    order = order_of(second_moment, group_size=group_size, pattern=form)
    assert sorted(order.inputs.tolist()) == list(range(width))
    assert sum(order.sizes) == width
    assert order.inputs[order.positions].tolist() == list(range(width))
    size = width if isinstance(group_size, str) else min(group_size, width)
    groups = list(order.inputs.split(order.sizes))
    for own in groups:
        assert len(set((own // size).tolist())) == 1
        chunks = own.split(8 if pattern == "2:8" else 4)
        # Only the last four of the matrix may be short, and then it is short wherever it comes.
        means = [float(second_moment[few].mean()) for few in chunks]
        if width % 8 == 0:
            assert all((few == few[0] + torch.arange(len(few))).all() for few in chunks)
            assert means == sorted(means, reverse=True)
    means = [float(second_moment[own].mean()) for own in groups]
    assert means == sorted(means, reverse=True)


def test_equal_second_moments_leave_the_inputs_as_they_are() -> None:
    assert order_of(torch.zeros(40), group_size=16, pattern=None).inputs.tolist() == list(range(40))


def test_an_order_by_hand() -> None:
    second_moment = torch.tensor([1.0] * 4 + [2.0] * 4 + [9.0] * 4 + [3.0] * 4)
    order = order_of(second_moment, group_size=8, pattern=Pattern.parse("2:4"))
    assert order.inputs.tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 4, 5, 6, 7, 0, 1, 2, 3]
    assert order.sizes == [8, 8]


def test_an_activation_order_by_hand() -> None:
    order = activation_order(torch.tensor([1.0, 4.0, 0.0, 3.0]), group_size=2)
    assert order.inputs.tolist() == [1, 3, 0, 2]
    assert order.sizes == [4] and order.group_size == 2
    # As shares of the mean, 2; the dead input still counts a millionth.
    assert order.second_moment is not None
    assert order.second_moment.tolist() == pytest.approx([0.5, 2, 1e-6, 1.5])


def test_in_an_activation_order_dead_inputs_alone_count_alike() -> None:
    order = activation_order(torch.zeros(3), group_size="per-channel")
    assert order.inputs.tolist() == [0, 1, 2]
    assert order.second_moment is not None and order.second_moment.tolist() == [1, 1, 1]


def test_a_group_that_cuts_through_fours_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"group_size = 6: .* multiple of 4"):
        check_grouping(6, Pattern.parse("2:4"))
    check_grouping(6, Pattern.parse(0.5))
    check_grouping("per-channel", Pattern.parse("2:4"))
    check_grouping(6, None)
