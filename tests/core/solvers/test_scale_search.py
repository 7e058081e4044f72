"""The search for scales against brute force: positive ones, those of either sign, those near an earlier one."""

import math

import pytest
import torch
from torch import Tensor

from slimlm.core.chunks import pieces_of
from slimlm.core.grid import Grid, absmax_scale, scale_sets
from slimlm.core.solvers.distribution import distribution
from slimlm.core.solvers.scale_search import best_scale, least_squares_scale, nearby_scale, signed_scale
from tests.core.solvers.point_sets import (
    CODEBOOK,
    DISTRIBUTIONS,
    GRIDS,
    laplace,
    mean_square_error,
    one_outlier,
    squared_error,
    student4,
    uneven_weights,
    uniform,
)
from tests.core.solvers.problems import draw

pytestmark = pytest.mark.usefixtures("form")

DEGENERATE = {
    "constant": torch.full((300,), 0.37),
    "negative-constant": torch.full((300,), -0.37),
    "all-zero": torch.zeros(300),
    "single-element": torch.tensor([0.7]),
    "single-negative-element": torch.tensor([-0.7]),
}
# Law 3. At 8 bits the law names no bound; that of 4 bits is the loosest that would still mean anything.
SLACK = {2: 1.06, 3: 1.03, 4: 1.015, 8: 1.015}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def searched(values: Tensor, bits: int) -> Tensor:
    """The scale `[1]` found for one set of values `[n]`."""
    points, weights = distribution(values.view(1, -1))
    return best_scale(points, weights, Grid.of_bits(bits))


def brute_force(values: Tensor, bits: int) -> float:
    """The least mean square error over 3000 scales, 0.3 % apart, from AbsMax x 1.5 down to AbsMax / 5000.

    Between two neighbouring rounding thresholds all weights have one code, so sorted weights and their running sums
    give each scale's error, exactly and without the grid's own code.
    """
    x = values.double().sort().values
    sums = torch.nn.functional.pad(x.cumsum(0), (1, 0))
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    scales = torch.logspace(math.log10(1 / 5000), math.log10(1.5), 3000, dtype=torch.float64)
    scales = scales[:, None] * x.abs().max() / codes[-1]
    ends = torch.searchsorted(x, scales * (codes[:-1] + 0.5))
    ends = torch.cat([torch.zeros_like(ends[:, :1]), ends, torch.full_like(ends[:, :1], len(x))], dim=1)
    count, total = ends.diff(dim=1), sums[ends].diff(dim=1)
    error = (
        x.square().sum() - 2 * scales[:, 0] * (codes * total).sum(1) + scales[:, 0].square() * (codes.square() * count).sum(1)
    )
    return float(error.min()) / len(x)


# One scale of least squared error


@pytest.mark.parametrize("bits", SLACK)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("count", [3000, 40000], ids=["every-weight", "histogram"])
def test_the_scale_found_errs_hardly_more_than_the_best_of_all(name: str, bits: int, count: int) -> None:  # law 3
    values = DISTRIBUTIONS[name](count)
    found = mean_square_error(values, searched(values, bits), bits)
    assert found <= SLACK[bits] * brute_force(values, bits)


@pytest.mark.parametrize("bits", SLACK)
@pytest.mark.parametrize("name", DEGENERATE)
def test_a_set_of_one_magnitude_is_represented_exactly(name: str, bits: int) -> None:  # law 3
    values = DEGENERATE[name]
    scale = searched(values, bits)
    assert scale.isfinite().all()
    # One rounding in scale = |w| / top, one in code x scale: two float32 ulps of w.
    assert mean_square_error(values, scale, bits) <= (2 * 2**-23 * float(values.abs().max())) ** 2


@pytest.mark.parametrize("bits", SLACK)
@pytest.mark.parametrize("count", [3000, 40000], ids=["every-weight", "histogram"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_the_scale_found_is_never_worse_than_absmax(name: str, bits: int, count: int) -> None:  # law 3
    values = DISTRIBUTIONS[name](count)
    absmax = float(absmax_scale(values.view(1, -1), bits))
    # 1e-4: the histogram and float32 may misjudge two nearly equal scales by so much, as at 8 bits on a uniform set.
    assert mean_square_error(values, searched(values, bits), bits) <= 1.0001 * mean_square_error(values, absmax, bits)


@pytest.mark.parametrize("count", [3000, 40000], ids=["every-weight", "histogram"])
@pytest.mark.parametrize("factor", [2.0**-20, 2.0**9])
def test_the_scale_found_follows_a_scaling_of_the_weights(factor: float, count: int) -> None:  # law 3
    values = student4(count)
    # Powers of two scale every float32 exactly; only powers with fractional exponents may differ in the last bits.
    torch.testing.assert_close(searched(values * factor, 4), searched(values, 4) * factor, rtol=1e-5, atol=0)


@pytest.mark.parametrize("count", [3000, 40000], ids=["every-weight", "histogram"])
def test_the_scale_found_does_not_depend_on_the_order_of_the_weights(count: int) -> None:  # law 3
    values = laplace(count)
    shuffled = values[torch.randperm(count, generator=generator(3))]
    # Sums in another order may flip two fine candidates of equal error, which lie within 1 % of each other.
    torch.testing.assert_close(searched(shuffled, 4), searched(values, 4), rtol=0.01, atol=0)
    found, again = (mean_square_error(values, searched(v, 4), 4) for v in (values, shuffled))
    assert found == pytest.approx(again, rel=1e-5)  # float32 sums of 40000 terms


def test_sets_are_searched_independently_of_one_another() -> None:
    sets = torch.stack([draw(128), laplace(128) * 100, torch.zeros(128), uniform(128) * 1e-3])
    points, weights = distribution(sets)
    together = best_scale(points, weights, Grid.of_bits(4))
    alone = torch.cat([searched(row, 4) for row in sets])
    # Sums of another shape round differently, so that of two scales that err alike one or the other may be found.
    errors = [squared_error(points, weights, scale, Grid.of_bits(4)) for scale in (together, alone)]
    torch.testing.assert_close(*errors, rtol=1e-6, atol=0)
    assert float(together[2]) == float(alone[2]) == 0


def test_more_sets_than_fit_at_once_are_searched_alike() -> None:
    sets = draw(3000, 64)  # 3000 x 64 x 48 candidates exceed the 2^23 elements taken at once
    points, weights = distribution(sets)
    whole = best_scale(points, weights, Grid.of_bits(4))
    torch.testing.assert_close(whole[-5:], best_scale(points[-5:], weights[-5:], Grid.of_bits(4)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("used", [1.0, 0.75], ids=["all-codes", "inner-codes"])
@pytest.mark.parametrize("count", [128, 40000])
def test_a_weight_on_a_grid_already_gets_an_exact_grid_back(bits: int, used: float, count: int) -> None:  # laws 1, 21
    most = math.ceil(used * (2 ** (bits - 1) - 1))
    codes = torch.randint(-most, most + 1, (1, count), generator=generator(bits))
    codes[0, 0] = most
    values = codes * 0.0123
    scale = least_squares_scale(values, searched(values[0], bits), bits)
    # Two float32 roundings of the largest value.
    assert mean_square_error(values, scale, bits) <= (2 * 2**-23 * float(values.abs().max())) ** 2


def test_least_squares_for_the_codes_never_raises_the_error() -> None:
    sets = torch.stack([draw(500), laplace(500), uniform(500), one_outlier(500)])
    for bits in SLACK:
        for factor in (0.3, 0.7, 1.0, 1.4):
            scale = absmax_scale(sets, bits) * factor
            fitted = least_squares_scale(sets, scale, bits)
            for values, before, after in zip(sets, scale, fitted, strict=True):
                # 1e-5: float32 sums decide which is better.
                assert mean_square_error(values, after, bits) <= mean_square_error(values, before, bits) * (1 + 1e-5)


def test_the_filling_of_a_short_group_does_not_change_its_scale() -> None:  # law 4
    weight = draw(5, 150)
    points, weights = distribution(scale_sets(weight, 128))
    filled = best_scale(points, weights, Grid.of_bits(4)).view(5, 2)[:, 1]
    bare = torch.cat([searched(row, 4) for row in weight[:, 128:]])
    torch.testing.assert_close(filled, bare, rtol=1e-6, atol=0)  # sums over 128 and over 22 terms


def test_no_search_changes_its_argument() -> None:
    values = draw(1, 40000)
    before = values.clone()
    least_squares_scale(values, searched(values[0], 4), 4)
    assert torch.equal(values, before)


# Scales that may be negative


@pytest.mark.parametrize("grid", GRIDS)
def test_a_scale_of_either_sign_is_the_better_of_the_two_searches(grid: Grid) -> None:  # law 3
    points, weights = draw(200, 24), uneven_weights(200, 24)
    scale = signed_scale(points, weights, grid)
    plain, turned = best_scale(points, weights, grid, coarse=24), -best_scale(-points, weights, grid, coarse=24)
    found, one, other = (squared_error(points, weights, each, grid) for each in (scale, plain, turned))
    assert bool((found <= torch.minimum(one, other) * (1 + 1e-4)).all())  # compared in float32, differences of near numbers
    # A negative scale is taken only where it errs less, and here it sometimes does and sometimes does not.
    assert torch.equal(scale, torch.where(scale < 0, turned, plain))
    assert bool((found[scale < 0] < one[scale < 0]).all())
    assert 0 < int((scale < 0).sum()) < 200
    assert float(found.sum()) < min(float(one.sum()), float(other.sum()))


@pytest.mark.parametrize("grid", GRIDS)
def test_turning_the_weights_round_changes_no_error_and_turns_the_scale_but_for_ties(grid: Grid) -> None:  # law 1
    points, weights = draw(50, 24), uneven_weights(50, 24)
    here, there = signed_scale(points, weights, grid), signed_scale(-points, weights, grid)
    one, other = squared_error(points, weights, here, grid), squared_error(-points, weights, there, grid)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)  # of a tie in float32 either may be taken
    untied = squared_error(points, weights, -here, grid) > one * (1 + 1e-4)
    assert torch.equal(there[untied], -here[untied])


def test_a_symmetric_codebook_needs_no_negative_scale() -> None:
    codebook = Grid(torch.tensor([-2.0, -0.5, 0.5, 2.0]), False)
    points, weights = draw(50, 24), uneven_weights(50, 24)
    assert torch.equal(signed_scale(points, weights, codebook), best_scale(points, weights, codebook, coarse=24))


def test_the_sign_of_a_scale_by_hand() -> None:
    # On -2, -1, 0, 1 these two are exact with the scale -1 and 1: the one that lies alone takes the longer side.
    points = torch.tensor([[2.0, -1.0], [-2.0, 1.0]])
    scale = signed_scale(points, torch.ones(2, 2), Grid.of_bits(2))
    assert scale.tolist() == pytest.approx([-1, 1], rel=2**-8)  # where the search ends


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_weights_on_a_grid_get_a_scale_that_loses_almost_nothing(bits: int) -> None:
    grid = Grid.of_bits(bits)
    codes = torch.randint(0, 2**bits, (50, 64), generator=torch.Generator().manual_seed(1)).float() + grid.values[0]
    scale = 0.01 * torch.exp(draw(50)) * torch.where(draw(50, seed=1) > 0, 1.0, -1.0)
    points, weights = codes * scale[:, None], torch.ones(50, 64)
    left = squared_error(points, weights, signed_scale(points, weights, grid), grid)
    # The search's last step is finer than 2^-9 of the scale, and an even spread of rounding errors would leave 1 / 12.
    assert float((left / scale.square() / 64).max()) < 0.01 / 12


def test_a_set_of_zeros_gets_the_scale_zero_and_one_without_weight_a_finite_one() -> None:
    for grid in GRIDS:
        points, weights = torch.stack([torch.zeros(8), draw(8)]), torch.stack([torch.ones(8), torch.zeros(8)])
        found = signed_scale(points, weights, grid)
        assert float(found[0]) == 0
        assert bool(found.isfinite().all())


def test_a_codebook_whose_largest_value_is_below_one_is_searched_like_any_other() -> None:
    points, weights = draw(50, 24), uneven_weights(50, 24)
    small = Grid(CODEBOOK.values / 4, False)
    here, there = (squared_error(points, weights, signed_scale(points, weights, each), each) for each in (small, CODEBOOK))
    # The two searches try other candidates, and some sets have two scales that are nearly as good.
    assert float(here.sum()) == pytest.approx(float(there.sum()), rel=0.03)


def test_weights_without_weight_do_not_move_the_scale() -> None:
    for grid in GRIDS:
        points, weights = draw(20, 12), uneven_weights(20, 12)
        loud = torch.where(weights > 0, points, 1e3)
        assert torch.equal(signed_scale(loud, weights, grid), signed_scale(points * (weights > 0), weights, grid))


# Scales near an earlier one


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_nearby_scale_errs_no_more_than_the_start(grid: Grid, sign: int) -> None:
    points, weights = draw(200, 24), uneven_weights(200, 24)
    start = sign * torch.exp(draw(200, seed=8)) / grid.largest
    found = nearby_scale(points, weights, grid, start)
    before, after = (squared_error(points, weights, scale, grid) for scale in (start, found))
    assert bool((after <= before * (1 + 1e-5)).all())  # float32 sums of 24 squares
    assert float(after.sum()) < 0.95 * float(before.sum())


def test_a_nearby_scale_finds_the_exact_grid_again() -> None:
    grid = Grid.of_bits(4)
    codes = torch.randint(-8, 8, (50, 24), generator=torch.Generator().manual_seed(1)).float()
    scale = 0.01 * torch.exp(draw(50)) * torch.where(draw(50, seed=1) > 0, 1.0, -1.0)
    found = nearby_scale(codes * scale[:, None], torch.ones(50, 24), grid, scale * 0.97)  # no code moves by half of one
    torch.testing.assert_close(found, scale, rtol=1e-6, atol=0)  # least squares of exact codes, float32


def test_a_nearby_scale_of_zero_stays_zero_and_nothing_becomes_infinite() -> None:
    for grid in GRIDS:
        points = torch.stack([draw(8), torch.zeros(8), draw(8, seed=1)])
        weights = torch.stack([torch.ones(8), torch.ones(8), torch.zeros(8)])
        found = nearby_scale(points, weights, grid, torch.tensor([0.0, 0.3, 0.3]))
        assert float(found[0]) == 0
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("grid", GRIDS)
def test_searching_many_sets_at_once_is_searching_each(grid: Grid) -> None:
    points, weights, start = draw(40, 24), uneven_weights(40, 24), 0.3 + draw(40, seed=4).abs()
    whole = signed_scale(points, weights, grid), nearby_scale(points, weights, grid, start)
    with pieces_of(24 * 3):
        pieces = signed_scale(points, weights, grid), nearby_scale(points, weights, grid, start)
    for one, other in zip(whole, pieces, strict=True):
        # float32 sums of another shape: of two scales that err alike one or the other may be found.
        errors = [squared_error(points, weights, scale, grid) for scale in (one, other)]
        torch.testing.assert_close(*errors, rtol=1e-5, atol=0)
