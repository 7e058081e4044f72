"""Coordinate descent on rounded factors: never worse, at rest where nothing is to gain, as good as trying all codes."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers import linalg
from slimlm.core.solvers.low_rank import AdapterBits, AdapterFormat, low_rank_part
from slimlm.core.solvers.low_rank_descent import descend, descend_left, descend_right


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(kind: str = "full", width: int = 60) -> Tensor:
    """H of correlated inputs of unequal energy: as measured, of too few tokens, or with inputs that never fire."""
    tokens = width // 3 if kind == "singular" else 4 * width
    x = draw(tokens, width, seed=21) + draw(tokens, 1, seed=22)
    x = x * torch.exp(draw(width, seed=23)) * (1 if kind != "dead" else torch.arange(width) % 3 != 0)
    return x.T @ x / tokens


def rounded(error: Tensor, gram: Tensor, *, bits: AdapterBits = 4, group_size: int = 16) -> LowRank:
    part = low_rank_part(error, gram, AdapterFormat(0.2, bits, group_size, refit=True))
    assert part is not None
    return part


def left_over(error: Tensor, gram: Tensor, part: LowRank) -> float:
    return linalg.weighted_square(error - part.dense(), gram)


def tiny(seed: int) -> LowRank:
    """Three outputs and three inputs, rank 2, two bits: 64 codes to try for each factor."""

    def factor(n: int, seed: int) -> Uniform:
        codes = torch.randint(-2, 2, (2, n), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
        return Uniform(codes, torch.full((2, 1), 0.75).half(), 2, "per-channel")

    return LowRank(factor(3, seed), factor(3, seed + 100))


@pytest.mark.parametrize("kind", ["full", "singular", "dead"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("step", [descend_left, descend_right])
def test_no_pass_ever_leaves_more(step, bits: AdapterBits, kind: str) -> None:  # type: ignore[no-untyped-def]
    gram = covariance(kind)
    for seed in range(3):
        error = draw(40, 60, seed=seed)
        part = rounded(error, gram, bits=bits)
        moved = error + 0.2 * draw(40, 60, seed=seed + 50)
        for _ in range(3):
            found = step(moved, gram, part)
            # float32 sums of 2400 terms
            assert left_over(moved, gram, found) <= left_over(moved, gram, part) * (1 + 1e-5)
            part = found


def test_an_adapter_follows_an_error_that_changed() -> None:
    error, gram = draw(40, 60), covariance()
    part = rounded(error, gram)
    moved = error + 0.3 * draw(40, 60, seed=50)
    assert left_over(moved, gram, descend(moved, gram, part)) < 0.98 * left_over(moved, gram, part)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_error_that_the_part_stands_for_changes_nothing(bits: AdapterBits) -> None:
    gram = covariance()
    part = rounded(draw(40, 60), gram, bits=bits)
    found = descend(part.dense(), gram, part)
    assert torch.equal(found.dense(), part.dense())


def test_more_inputs_than_are_taken_at_once_give_what_few_at_a_time_give(monkeypatch: pytest.MonkeyPatch) -> None:
    error, gram = draw(40, 60), covariance()
    part = rounded(draw(40, 60, seed=1), gram)
    whole = descend_right(error, gram, part)
    monkeypatch.setattr("slimlm.core.solvers.low_rank_descent._INPUTS_AT_ONCE", 7)
    # Other orders of summation may flip a code that lies between two.
    assert left_over(error, gram, descend_right(error, gram, part)) == pytest.approx(left_over(error, gram, whole), rel=1e-3)


def test_with_independent_components_the_left_codes_are_the_best_of_all() -> None:
    for seed in range(5):
        part, error = tiny(seed), draw(3, 3, seed=seed)
        # An inner Gram R H R^T without correlation: each component sees inputs of its own.
        right = replace(part.right, codes=torch.tensor([[1, -2, 0], [0, 0, 1]], dtype=torch.int8))  # type: ignore[type-var]
        gram = torch.diag(torch.tensor([0.5, 2.0, 3.0]))
        part = replace(part, right=right)
        assert isinstance(part.left, Uniform)
        tried = [
            left_over(error, gram, replace(part, left=replace(part.left, codes=torch.tensor(codes).view(2, 3).to(torch.int8))))
            for codes in product(range(-2, 2), repeat=6)
        ]
        assert left_over(error, gram, descend_left(error, gram, part)) == pytest.approx(min(tried), rel=1e-5)


def test_with_independent_inputs_and_components_the_right_codes_are_the_best_of_all() -> None:
    for seed in range(5):
        part, error = tiny(seed), draw(3, 3, seed=seed)
        left = replace(part.left, codes=torch.tensor([[1, -2, 0], [0, 0, 1]], dtype=torch.int8))  # type: ignore[type-var]
        gram = torch.diag(torch.tensor([0.5, 2.0, 3.0]))
        part = replace(part, left=left)
        assert isinstance(part.right, Uniform)
        tried = [
            left_over(
                error, gram, replace(part, right=replace(part.right, codes=torch.tensor(codes).view(2, 3).to(torch.int8)))
            )
            for codes in product(range(-2, 2), repeat=6)
        ]
        assert left_over(error, gram, descend_right(error, gram, part)) == pytest.approx(min(tried), rel=1e-5)


def test_inputs_that_never_fire_keep_their_codes() -> None:
    error, gram = draw(40, 60), covariance("dead")
    part = rounded(error, gram)
    found = descend_right(error + draw(40, 60, seed=3), gram, part)
    assert isinstance(part.right, Uniform) and isinstance(found.right, Uniform)
    silent = gram.diagonal() == 0
    assert torch.equal(found.right.codes[:, silent], part.right.codes[:, silent])


def test_the_given_part_is_left_as_it_is() -> None:
    error, gram = draw(40, 60), covariance()
    part = rounded(error, gram)
    before = part.dense()
    descend(draw(40, 60, seed=7), gram, part)
    assert torch.equal(part.dense(), before)


def test_without_any_energy_nothing_changes() -> None:
    part = rounded(draw(40, 60), covariance())
    assert torch.equal(descend(draw(40, 60, seed=1), torch.zeros(60, 60), part).dense(), part.dense())
