"""How the inputs are divided: into all pieces, coarse ones first, near the middle."""

import pytest

from slimlm.core.solvers.recursion import divided, end_of, middle_of


def leaves_of(low: int, high: int, kinds: list[list[int]]) -> list[tuple[int, int]]:
    """The leaves from low up to high, in order."""
    middle = middle_of(low, high, kinds)
    return [(low, high)] if middle is None else leaves_of(low, middle, kinds) + leaves_of(middle, high, kinds)


@pytest.mark.parametrize("width", [1, 7, 40, 172])
@pytest.mark.parametrize("groups", [[0], [0, 3], [0, 16, 32]])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_the_recursion_comes_to_each_leaf_once_and_in_order(width: int, groups: list[int], size: int) -> None:
    groups = [place for place in groups if place < width]
    leaves = divided(groups, width, size)
    found = leaves_of(0, width, [groups, leaves])
    assert found == [(low, end_of(leaves, low, width)) for low in leaves]
    assert all(high - low <= size for low, high in found)
    assert set(groups) <= set(leaves)


def test_borders_by_hand() -> None:
    # Groups of 5 and 7 inputs, cut into fours.
    assert divided([0, 5], 12, 4) == [0, 4, 5, 9]
    assert [end_of([0, 4, 5, 9], low, 12) for low in (0, 4, 5, 9)] == [4, 5, 9, 12]


def test_coarse_borders_come_first_and_then_the_one_nearest_the_middle() -> None:
    groups, leaves = [0, 2], [0, 2, 6, 7]
    assert middle_of(0, 12, [groups, leaves]) == 2
    assert middle_of(2, 12, [groups, leaves]) == 7
    assert middle_of(7, 12, [groups, leaves]) is None
