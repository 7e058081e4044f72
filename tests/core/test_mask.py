"""Masks: exact counts always, the best scores kept, ties resolved."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import RecipeError
from slimlm.core.mask import Pattern, choose


def scores(kind: str, out: int = 16, width: int = 48) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(out, width, generator=generator).abs()
    return {
        "random": drawn,
        "zero": torch.zeros(out, width),
        "tied": (drawn * 2).floor(),
        "dead-channels": drawn * (torch.arange(width) % 3 == 0),
    }[kind]


KINDS = ["random", "zero", "tied", "dead-channels"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 2), (1, 4), (4, 8), (3, 4), (4, 4), (5, 16)])
def test_every_aligned_group_keeps_exactly_n_of_m(kind: str, kept: int, of: int) -> None:  # law 6
    mask = choose(scores(kind), Pattern.parse(f"{kept}:{of}"))
    assert mask.dtype == torch.bool
    assert bool((mask.view(-1, of).sum(dim=1) == kept).all())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (0.5, 50), (0.29, 29), (0.57, 57), (0.07, 7), (0.999, 99)])
def test_a_share_drops_exactly_its_integer_part_of_every_row(kind: str, share: float, dropped: int) -> None:  # law 6
    # 100 x 0.29, 100 x 0.57 and 100 x 0.07 are not whole in floating point.
    mask = choose(scores(kind, width=100), Pattern.parse(share))
    assert (~mask).sum(dim=1).tolist() == [dropped] * 16


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_two_of_four_have_a_larger_score(kind: str) -> None:  # law 7
    score = scores(kind)
    groups = score.view(-1, 4)
    kept = (groups * choose(score, Pattern.parse("2:4")).view(-1, 4)).sum(dim=1)
    pairs = torch.stack([groups[:, a] + groups[:, b] for a, b in combinations(range(4), 2)])
    assert torch.equal(kept, pairs.amax(dim=0))


def test_a_share_keeps_no_weight_that_scores_below_a_dropped_one() -> None:  # law 7
    score = scores("random")
    mask = choose(score, Pattern.parse(0.6))
    least_kept = score.masked_fill(~mask, float("inf")).amin(dim=1)
    most_dropped = score.masked_fill(mask, float("-inf")).amax(dim=1)
    assert bool((least_kept >= most_dropped).all())


@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_a_positive_factor_on_all_scores_changes_no_mask(pattern: str | float) -> None:  # law 7
    score = scores("tied")
    assert torch.equal(choose(score * 2.0**-30, Pattern.parse(pattern)), choose(score, Pattern.parse(pattern)))


def test_permuting_the_rows_permutes_the_mask() -> None:
    score = scores("random")
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose(score[order], Pattern.parse(0.5)), choose(score, Pattern.parse(0.5))[order])


def test_of_equal_scores_the_earlier_input_stays() -> None:
    mask = choose(torch.tensor([[1.0, 1, 1, 1, 0, 5, 0, 0], [0, 2, 2, 2, 3, 3, 3, 9]]), Pattern.parse("2:4"))
    assert mask.int().tolist() == [[1, 1, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0, 0, 1]]


def test_choosing_leaves_the_scores_alone() -> None:
    score = scores("random")
    before = score.clone()
    choose(score, Pattern.parse("2:4"))
    assert torch.equal(score, before)


@pytest.mark.parametrize("text", ["4:2", "0:4", "2-4", "2:4 ", "", "a:b", 1.0, -0.1, 2, float("nan")])
def test_a_pattern_that_makes_no_sense_is_refused_with_one_that_does(text: str | float) -> None:
    with pytest.raises(RecipeError, match="2:4"):
        Pattern.parse(text)


def test_a_width_that_the_pattern_does_not_divide_is_refused_by_name() -> None:
    said = Pattern.parse("2:4").refuses("model.layers.0.fc1", 770)
    assert said is not None
    assert all(word in said for word in ("2:4", "multiple of 4", "model.layers.0.fc1", "770"))
    assert Pattern.parse("2:4").refuses("fc1", 772) is None
    assert Pattern.parse(0.5).refuses("fc1", 771) is None


def test_what_a_pattern_drops_by_hand() -> None:
    assert Pattern.parse("1:4").dropped == 0.75
    assert str(Pattern.parse("2:4")) == "2:4"
    assert str(Pattern.parse(0.5)) == "0.5 of each row"
