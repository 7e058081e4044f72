"""Text from several sources: shares hold at every place, and what cannot be shared is refused."""

from pathlib import Path
from random import Random
from typing import Any

import pytest

from slimlm.core.errors import DataError
from slimlm.data.mixture import Mixture, each_at_least_once, interleaved, most_samples, portions_of, recorded_name
from slimlm.run.config import RunConfig


def drawn_shares(random: Random, count: int) -> list[float]:
    whole = [random.choice([1, 1, 2, 5, 40]) for _ in range(count)]
    return [part / sum(whole) for part in whole]


@pytest.mark.parametrize("sources", [1, 2, 3, 4, 7])
def test_shares_hold_for_every_prefix_within_one_sample(sources: int) -> None:
    # Law 32.
    random, bound = Random(sources), 1 - 1 / (2 * sources - 2) if sources > 1 else 0
    for _ in range(20):
        shares = drawn_shares(random, sources)
        order = interleaved(shares, 150)
        for k in range(1, 151):
            assert all(abs(order[:k].count(i) - share * k) <= bound + 1e-9 for i, share in enumerate(shares))


def test_shares_hold_for_every_part_from_any_place_within_two_samples() -> None:
    shares = [0.7, 0.2, 0.1]
    order = interleaved(shares, 100)
    parts = [order[begin:end] for begin in range(100) for end in range(begin + 1, 101)]
    assert all(abs(part.count(i) - share * len(part)) < 2 for part in parts for i, share in enumerate(shares))
    assert all(set(part) == {0, 1} for part in (interleaved([0.7, 0.3], 60)[at : at + 4] for at in range(57)))


def test_ten_samples_of_two_sources_by_hand() -> None:
    # Behind by (0.7, 0.3), (0.4, 0.6), (1.1, -0.1), (0.8, 0.2), (0.5, 0.5), ...: who is behind by a half is drawn.
    assert interleaved([0.7, 0.3], 10) == [0, 1, 0, 0, 0, 1, 0, 0, 1, 0]
    assert interleaved([0.5, 0.5], 4) == [0, 1, 0, 1]


def test_fewer_samples_are_the_first_of_more_and_another_order_of_the_sources_gives_the_same_counts() -> None:
    shares = [0.5, 0.3, 0.2]
    order = interleaved(shares, 40)
    assert interleaved(shares, 13) == order[:13]
    swapped = interleaved([shares[2], shares[0], shares[1]], 40)
    assert [order.count(i) for i in range(3)] == [swapped.count(i) for i in (1, 2, 0)] == [20, 12, 8]


def test_each_source_has_a_window_where_there_are_enough() -> None:
    assert each_at_least_once([1.0], 4) == [4]
    assert each_at_least_once([0.7, 0.3], 4) == [3, 1]
    assert each_at_least_once([0.98, 0.01, 0.01], 4) == [2, 1, 1]
    assert sum(each_at_least_once([0.2] * 5, 4)) == 4


@pytest.mark.parametrize(("available", "most"), [([7, 3], 10), ([7, 2], 8), ([0, 5], 0), ([100, 1], 5), ([3, 100], 4)])
def test_the_most_samples_are_those_before_a_source_is_empty(available: list[int], most: int) -> None:
    order = interleaved([0.7, 0.3], most + 1)
    assert most_samples([0.7, 0.3], available) == most
    assert all(order[:most].count(i) <= own for i, own in enumerate(available))
    assert any(order.count(i) > own for i, own in enumerate(available))


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({"a": 0.7, "b": 0.2}, r"`data`: the shares 0\.7 \+ 0\.2 add up to 0\.9, not to 1"),
        ({"a": 0.7}, r"the shares 0\.7 add up to 0\.7"),
        ({"a": 70, "b": 30}, r"the share of a is 70; give a part of the whole, above 0 and at most 1"),
        ({"a": 1, "b": 0}, "the share of b is 0; give"),
        ({"a": 1.5, "b": -0.5}, "the share of a is 1.5; give"),
        ({"a": float("nan"), "b": 0.5}, "share of a=nan`: give a number"),
        ({"a": "half", "b": 0.5}, "share of a='half'`: give a number, such as 0.5"),
        ({"self": 0.5, "b": 0.5}, "'self', text that the model writes, cannot be mixed"),
        ({1: 0.5, "b": 0.5}, "`data` is of type int"),
        ({"": 0.5, "b": 0.5}, "`data` is empty"),
        ({}, "`data` is empty"),
    ],
)
def test_what_are_no_shares_is_refused_when_it_is_asked_for(shares: dict[Any, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        RunConfig.of("m", data=shares)


def test_the_same_text_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    text = tmp_path / "set" / "a.txt"
    text.write_text("x")
    for other in (str(tmp_path / "set"), f"{tmp_path}/set/../set/a.txt"):
        with pytest.raises(DataError, match="hold the same text"):
            Mixture.of({str(text): 0.5, other: 0.5})


def test_one_source_with_the_whole_share_is_that_source_and_names_are_recorded_without_folders(tmp_path: Path) -> None:
    assert RunConfig.of("m", data={tmp_path / "a.txt": 1}).data == str(tmp_path / "a.txt")
    assert RunConfig.of("m", data={"self": 1.0}).data == "self"
    thirds = RunConfig.of("m", data={"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}).data
    assert thirds is not None and [portion.source for portion in portions_of(thirds)] == ["a", "b", "c"]
    (tmp_path / "a.txt").write_text("x")
    assert recorded_name(Mixture.of({str(tmp_path / "a.txt"): 0.75, "stdlib": 0.25})) == "a.txt (0.75), stdlib (0.25)"
