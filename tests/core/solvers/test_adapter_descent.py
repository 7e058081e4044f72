"""Coordinate descent on rounded factors: never worse, unchanged where nothing is to gain, as good as trying all codes."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers import linalg
from slimlm.core.solvers.adapter_descent import descend_adapter, descend_left, descend_right
from slimlm.core.solvers.low_rank import AdapterBits, AdapterFormat, low_rank_part
from tests.core.solvers.problems import draw, uneven_covariance


def rounded(error: Tensor, covariance: Tensor, *, bits: AdapterBits = 4, group_size: int = 16) -> LowRank:
    part = low_rank_part(error, covariance, AdapterFormat(0.2, bits, group_size, refit=True))
    assert part is not None
    return part


def left_over(error: Tensor, covariance: Tensor, part: LowRank) -> float:
    return linalg.weighted_square(error - part.dense(), covariance)


def tiny(seed: int) -> LowRank:
    """Three outputs and three inputs, rank 2, two bits: 4096 codes to try for each factor."""

    def factor(n: int, seed: int) -> Uniform:
        codes = torch.randint(-2, 2, (2, n), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
        return Uniform(codes, torch.full((2, 1), 0.75).half(), 2, "per-channel")

    return LowRank(factor(3, seed), factor(3, seed + 100))


def all_codes() -> list[Tensor]:
    """All codes of a factor of rank 2 and three numbers, at two bits."""
    return [torch.tensor(codes).view(2, 3).to(torch.int8) for codes in product(range(-2, 2), repeat=6)]


@pytest.mark.parametrize("kind", ["full", "singular", "dead"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("step", [descend_left, descend_right])
def test_no_pass_ever_leaves_more(step, bits: AdapterBits, kind: str) -> None:  # type: ignore[no-untyped-def]
    covariance = uneven_covariance(kind)
    for seed in range(3):
        error = draw(40, 60, seed=seed)
        part = rounded(error, covariance, bits=bits)
        moved = error + 0.2 * draw(40, 60, seed=seed + 50)
        for _ in range(3):
            found = step(moved, covariance, part)
            # float32 sums of 2400 terms
            assert left_over(moved, covariance, found) <= left_over(moved, covariance, part) * (1 + 1e-5)
            part = found


def test_an_adapter_follows_an_error_that_changed() -> None:
    error, covariance = draw(40, 60), uneven_covariance()
    part = rounded(error, covariance)
    moved = error + 0.3 * draw(40, 60, seed=50)
    assert left_over(moved, covariance, descend_adapter(moved, covariance, part)) < 0.98 * left_over(moved, covariance, part)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_error_that_the_part_stands_for_changes_nothing(bits: AdapterBits) -> None:
    covariance = uneven_covariance()
    part = rounded(draw(40, 60), covariance, bits=bits)
    found = descend_adapter(part.dense(), covariance, part)
    assert torch.equal(found.dense(), part.dense())


def test_more_inputs_than_are_taken_at_once_give_what_few_at_a_time_give() -> None:
    error, covariance = draw(40, 60), uneven_covariance()
    part = rounded(draw(40, 60, seed=1), covariance)
    whole = descend_right(error, covariance, part)
    pieces = descend_right(error, covariance, part, inputs_at_once=7)
    # Other orders of summation may flip a code that lies between two.
    assert left_over(error, covariance, pieces) == pytest.approx(left_over(error, covariance, whole), rel=1e-3)


def test_with_independent_components_the_left_codes_are_the_best_of_all() -> None:
    for seed in range(5):
        part, error = tiny(seed), draw(3, 3, seed=seed)
        # R H R^T without correlation: each component sees inputs of its own.
        right = replace(part.right, codes=torch.tensor([[1, -2, 0], [0, 0, 1]], dtype=torch.int8))  # type: ignore[type-var]
        covariance = torch.diag(torch.tensor([0.5, 2.0, 3.0]))
        part = replace(part, right=right)
        assert isinstance(part.left, Uniform)
        tried = [left_over(error, covariance, replace(part, left=replace(part.left, codes=codes))) for codes in all_codes()]
        assert left_over(error, covariance, descend_left(error, covariance, part)) == pytest.approx(min(tried), rel=1e-5)


def test_with_independent_inputs_and_components_the_right_codes_are_the_best_of_all() -> None:
    for seed in range(5):
        part, error = tiny(seed), draw(3, 3, seed=seed)
        left = replace(part.left, codes=torch.tensor([[1, -2, 0], [0, 0, 1]], dtype=torch.int8))  # type: ignore[type-var]
        covariance = torch.diag(torch.tensor([0.5, 2.0, 3.0]))
        part = replace(part, left=left)
        assert isinstance(part.right, Uniform)
        tried = [left_over(error, covariance, replace(part, right=replace(part.right, codes=codes))) for codes in all_codes()]
        assert left_over(error, covariance, descend_right(error, covariance, part)) == pytest.approx(min(tried), rel=1e-5)


def test_dead_inputs_keep_their_codes() -> None:
    error, covariance = draw(40, 60), uneven_covariance("dead")
    part = rounded(error, covariance)
    found = descend_right(error + draw(40, 60, seed=3), covariance, part)
    assert isinstance(part.right, Uniform) and isinstance(found.right, Uniform)
    dead = covariance.diagonal() == 0
    assert torch.equal(found.right.codes[:, dead], part.right.codes[:, dead])


def test_the_given_part_is_left_as_it_is() -> None:
    error, covariance = draw(40, 60), uneven_covariance()
    part = rounded(error, covariance)
    before = part.dense()
    descend_adapter(draw(40, 60, seed=7), covariance, part)
    assert torch.equal(part.dense(), before)


def test_where_all_inputs_are_dead_nothing_changes() -> None:
    part = rounded(draw(40, 60), uneven_covariance())
    assert torch.equal(descend_adapter(draw(40, 60, seed=1), torch.zeros(60, 60), part).dense(), part.dense())
