"""Levels of a grid or a table, tables fitted to weights, and searches for a scale that may be negative."""

import pytest
import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.grid import Levels, best_scale, fitted, grid_error, nearby_scale, signed_scale

TABLE = Levels(torch.tensor([-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]), False)
ALL = [*map(Levels.of_bits, (2, 3, 4, 8)), TABLE]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masses(*shape: int, seed: int = 5) -> Tensor:
    """Uneven, a fifth of them zero."""
    return torch.exp(draw(*shape, seed=seed)) * (draw(*shape, seed=seed + 1) > -0.8)


def error(points: Tensor, mass: Tensor, scale: Tensor, levels: Levels) -> Tensor:
    """Mass x squared distance to the nearest of all grid values, tried one by one in float64: `[sets]`."""
    values = levels.values.double() * scale.double()[:, None]
    return ((points.double()[:, :, None] - values[:, None, :]).square().amin(dim=2) * mass.double()).sum(dim=1)


# Levels


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_even_grid_s_levels_are_its_codes(bits: int) -> None:
    levels = Levels.of_bits(bits)
    assert levels.values.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert (levels.bits, levels.top, levels.reach) == (bits, 2 ** (bits - 1) - 1, 2 ** (bits - 1))
    ratio = draw(1000) * 2**bits
    assert torch.equal(levels.nearest(ratio), grid.nearest(ratio, bits))


def test_a_table_s_size_top_and_reach_by_hand() -> None:
    assert (TABLE.bits, TABLE.top, TABLE.reach) == (3, 3.0, 4.0)


@pytest.mark.parametrize("levels", ALL)
def test_the_nearest_level_is_the_nearest_of_all(levels: Levels) -> None:  # law 2
    ratio = draw(2000) * levels.reach
    distance = (ratio[:, None] - levels.values).abs()
    found = levels.nearest(ratio)
    assert torch.equal((ratio - found).abs(), distance.amin(dim=1))
    assert torch.equal(levels.values[levels.index(ratio)], found)


@pytest.mark.parametrize("levels", ALL)
def test_a_level_is_its_own_nearest(levels: Levels) -> None:  # law 1
    assert torch.equal(levels.nearest(levels.values), levels.values)
    assert levels.index(levels.values).tolist() == list(range(len(levels.values)))


@pytest.mark.parametrize("levels", ALL)
@pytest.mark.parametrize("scale", [-0.3, 0.3])
def test_rounding_twice_is_rounding_once_with_a_scale_of_either_sign(levels: Levels, scale: float) -> None:  # law 1
    index, value = levels.rounded(draw(500), torch.tensor(scale))
    again, same = levels.rounded(value, torch.tensor(scale))
    assert torch.equal(again, index)
    assert torch.equal(same, value)


@pytest.mark.parametrize("levels", ALL)
def test_a_scale_of_zero_means_zero(levels: Levels) -> None:
    _, value = levels.rounded(draw(500), torch.zeros(()))
    assert int((value != 0).sum()) == 0


def test_indices_keep_their_shape_and_take_views() -> None:
    ratio = draw(6, 8).T  # not contiguous
    for levels in ALL:
        assert levels.index(ratio).shape == levels.nearest(ratio).shape == (8, 6)


# Fitted tables


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_a_fitted_table_errs_no_more_than_the_grid_it_started_from(bits: int, seed: int) -> None:
    start = Levels.of_bits(bits)
    ratio, mass = draw(3000, seed=seed) * start.top / 2, masses(3000, seed=seed)
    table = fitted(ratio, mass, start)

    def left(levels: Levels) -> float:
        return float(error(ratio[None], mass[None], torch.ones(1), levels))

    assert len(table.values) == 2**bits and not table.even
    assert table.values.tolist() == sorted(table.values.tolist())
    assert left(table) < 0.99 * left(start)  # Gaussian numbers on an even grid of a few levels leave more than that
    assert left(fitted(ratio, mass, table)) <= left(table) * (1 + 1e-6)  # float16 rounds where Lloyd stood still


def test_a_fitted_table_s_levels_are_the_means_of_what_is_nearest_to_them() -> None:
    ratio, mass = draw(400) * 2, masses(400)
    table = Levels.of_bits(2)
    for _ in range(10):  # ten of Lloyd's steps at a time, until it stands still
        table = fitted(ratio, mass, table)
    index = table.index(ratio)
    means = [float((mass * ratio)[index == i].sum() / mass[index == i].sum()) for i in range(4)]
    # Levels are rounded to float16 (2^-11), and points near a border may lie on either side of it for that.
    assert table.values.tolist() == pytest.approx(means, rel=5e-3, abs=5e-3)


def test_a_table_fitted_to_points_on_its_levels_is_the_table() -> None:
    start = Levels.of_bits(4)
    points = start.values[torch.randint(16, (500,), generator=torch.Generator().manual_seed(2))]
    assert torch.equal(fitted(points, torch.ones(500), start).values, start.values)


def test_levels_without_points_stay_and_points_without_mass_count_nothing() -> None:
    table = fitted(torch.tensor([0.3, 0.3, 9.0]), torch.tensor([1.0, 3.0, 0.0]), Levels.of_bits(2))
    assert table.values.tolist() == [-2, -1, pytest.approx(0.3, rel=2**-11), 1]


def test_a_fitted_table_by_hand() -> None:
    # The nearest of 0.2 and 0.4 is 0; 0.2 counts three times. That of 1.4 and the far 5 is 1.
    ratio, mass = torch.tensor([0.2, 0.4, 1.4, 5.0]), torch.tensor([3.0, 1.0, 1.0, 1.0])
    table = fitted(ratio, mass, Levels.of_bits(2))
    # (0.2 x 3 + 0.4) / 4 = 0.25; (1.4 + 5) / 2 = 3.2, from which 1.4 goes to 0.25: (3 x 0.2 + 0.4 + 1.4) / 5 = 0.48 and 5.
    assert table.values.tolist() == [-2, -1, pytest.approx(0.48, rel=2**-11), 5]


# Scales that may be negative


@pytest.mark.parametrize("levels", ALL)
def test_a_scale_of_either_sign_is_the_better_of_the_two_searches(levels: Levels) -> None:  # law 3
    points, mass = draw(200, 24), masses(200, 24)
    scale = signed_scale(points, mass, levels)
    plain, turned = best_scale(points, mass, levels, coarse=24), -best_scale(-points, mass, levels, coarse=24)
    found, one, other = (error(points, mass, each, levels) for each in (scale, plain, turned))
    assert bool((found <= torch.minimum(one, other) * (1 + 1e-4)).all())  # compared in float32, differences of near numbers
    # A negative scale is taken only where it errs less, and here it sometimes does and sometimes does not.
    assert torch.equal(scale, torch.where(scale < 0, turned, plain))
    assert bool((found[scale < 0] < one[scale < 0]).all())
    assert 0 < int((scale < 0).sum()) < 200
    assert float(found.sum()) < min(float(one.sum()), float(other.sum()))


@pytest.mark.parametrize("levels", ALL)
def test_turning_the_weights_round_changes_no_error_and_turns_the_scale_but_for_ties(levels: Levels) -> None:  # law 1
    points, mass = draw(50, 24), masses(50, 24)
    here, there = signed_scale(points, mass, levels), signed_scale(-points, mass, levels)
    one, other = error(points, mass, here, levels), error(-points, mass, there, levels)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)  # of a tie in float32 either may be taken
    untied = error(points, mass, -here, levels) > one * (1 + 1e-4)
    assert torch.equal(there[untied], -here[untied])


def test_a_symmetric_table_needs_no_negative_scale() -> None:
    table = Levels(torch.tensor([-2.0, -0.5, 0.5, 2.0]), False)
    points, mass = draw(50, 24), masses(50, 24)
    assert torch.equal(signed_scale(points, mass, table), best_scale(points, mass, table, coarse=24))


def test_the_sign_of_a_scale_by_hand() -> None:
    # On -2, -1, 0, 1 these two are exact with the scale -1 and 1: the one that lies alone takes the longer side.
    points = torch.tensor([[2.0, -1.0], [-2.0, 1.0]])
    scale = signed_scale(points, torch.ones(2, 2), Levels.of_bits(2))
    assert scale.tolist() == pytest.approx([-1, 1], rel=2**-8)  # where the search ends


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_on_a_grid_get_a_scale_that_loses_almost_nothing(bits: int) -> None:
    levels = Levels.of_bits(bits)
    codes = torch.randint(0, 2**bits, (50, 64), generator=torch.Generator().manual_seed(1)).float() + levels.values[0]
    scale = 0.01 * torch.exp(draw(50)) * torch.where(draw(50, seed=1) > 0, 1.0, -1.0)
    points, mass = codes * scale[:, None], torch.ones(50, 64)
    left = error(points, mass, signed_scale(points, mass, levels), levels)
    # The search's last step is finer than 2^-9 of the scale, and an even spread of rounding errors would leave 1 / 12.
    assert float((left / scale.square() / 64).max()) < 0.01 / 12


def test_a_set_of_zeros_gets_the_scale_zero_and_one_without_mass_a_finite_one() -> None:
    for levels in ALL:
        points, mass = torch.stack([torch.zeros(8), draw(8)]), torch.stack([torch.ones(8), torch.zeros(8)])
        found = signed_scale(points, mass, levels)
        assert float(found[0]) == 0
        assert bool(found.isfinite().all())


def test_a_table_whose_largest_level_is_below_one_is_searched_like_any_other() -> None:
    points, mass = draw(50, 24), masses(50, 24)
    small = Levels(TABLE.values / 4, False)
    here, there = (error(points, mass, signed_scale(points, mass, each), each) for each in (small, TABLE))
    # The two searches try other candidates, and some sets have two scales that are nearly as good.
    assert float(here.sum()) == pytest.approx(float(there.sum()), rel=0.03)


def test_weights_without_mass_do_not_move_the_scale() -> None:
    for levels in ALL:
        points, mass = draw(20, 12), masses(20, 12)
        loud = torch.where(mass > 0, points, 1e3)
        assert torch.equal(signed_scale(loud, mass, levels), signed_scale(points * (mass > 0), mass, levels))


# Scales near an earlier one


@pytest.mark.parametrize("levels", ALL)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_nearby_scale_errs_no_more_than_the_start(levels: Levels, sign: int) -> None:
    points, mass = draw(200, 24), masses(200, 24)
    start = sign * torch.exp(draw(200, seed=8)) / levels.top
    found = nearby_scale(points, mass, levels, start)
    before, after = (error(points, mass, scale, levels) for scale in (start, found))
    assert bool((after <= before * (1 + 1e-5)).all())  # float32 sums of 24 squares
    assert float(after.sum()) < 0.95 * float(before.sum())


def test_a_nearby_scale_finds_the_exact_grid_again() -> None:
    levels = Levels.of_bits(4)
    codes = torch.randint(-8, 8, (50, 24), generator=torch.Generator().manual_seed(1)).float()
    scale = 0.01 * torch.exp(draw(50)) * torch.where(draw(50, seed=1) > 0, 1.0, -1.0)
    found = nearby_scale(codes * scale[:, None], torch.ones(50, 24), levels, scale * 0.97)  # no code moves by half of one
    torch.testing.assert_close(found, scale, rtol=1e-6, atol=0)  # least squares of exact codes, float32


def test_a_nearby_scale_of_zero_stays_zero_and_nothing_becomes_infinite() -> None:
    for levels in ALL:
        points = torch.stack([draw(8), torch.zeros(8), draw(8, seed=1)])
        mass = torch.stack([torch.ones(8), torch.ones(8), torch.zeros(8)])
        found = nearby_scale(points, mass, levels, torch.tensor([0.0, 0.3, 0.3]))
        assert float(found[0]) == 0
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("levels", ALL)
def test_searching_many_sets_at_once_is_searching_each(levels: Levels, monkeypatch: pytest.MonkeyPatch) -> None:
    points, mass, start = draw(40, 24), masses(40, 24), 0.3 + draw(40, seed=4).abs()
    whole = signed_scale(points, mass, levels), nearby_scale(points, mass, levels, start)
    monkeypatch.setattr(grid, "_POINTS_AT_ONCE", 24 * 3)
    pieces = signed_scale(points, mass, levels), nearby_scale(points, mass, levels, start)
    for one, other in zip(whole, pieces, strict=True):
        # float32 sums of another shape: of two scales that err alike one or the other may be found.
        errors = [grid_error(points, mass, scale[:, None], levels) for scale in (one, other)]
        torch.testing.assert_close(*errors, rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", ALL)
def test_the_error_of_a_search_is_that_of_trying_every_level(levels: Levels) -> None:
    points, mass, scale = draw(20, 12), masses(20, 12), 0.2 * torch.exp(draw(20, seed=3))
    found = grid_error(points, mass, torch.stack([scale, -scale], dim=1), levels)
    expected = torch.stack([error(points, mass, sign * scale, levels) for sign in (1, -1)], dim=1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)  # float32, differences of near numbers
