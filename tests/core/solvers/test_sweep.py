"""The column sweep: equal to the plain method that it speeds up; its codes, scales and masks."""

import pytest
import torch
from torch import Tensor

from slimlm.core.grid import Grid, GroupSize, scale_shape, spread
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers.base_descent import descend_base
from slimlm.core.solvers.inverse import inverse_of
from slimlm.core.solvers.order import Order, order_of
from slimlm.core.solvers.rounding import FixedScales
from slimlm.core.solvers.sweep import rounded_sweep, sweep, unrounded_sweep
from slimlm.core.solvers.swept import Swept
from tests.core.solvers.problems import CODEBOOK, by_input, covariance_of, dense_of, draw, loss, swept


def diagonal(width: int, seed: int = 3) -> Tensor:
    return torch.diag(torch.exp(draw(width, seed=seed)))


def by_conditional_least_squares(
    weight: Tensor,
    covariance: Tensor,
    order: Order,
    *,
    damp: float,
    found: Swept | None,
    group_size: GroupSize,
    pattern: Pattern | None,
) -> tuple[Tensor, Tensor]:
    """The sweep as its formula says it, column by column in float64: values and mask. Slow and independent of any factor.

    When input j's turn comes, j and all later ones minimise the error given what earlier ones lost; what an error in j
    then costs is 1 / [(H_RR)^-1]_jj, R = j and on. Scales are taken from `found`; without it nothing is rounded.
    """
    width = weight.shape[1]
    at = order.inputs
    reference = weight.double()[:, at]
    h = covariance.double()[at][:, at]
    h = h + damp * h.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    value, mask = reference.clone(), torch.ones_like(reference, dtype=torch.bool)
    if found is not None:
        assert found.scale is not None and found.grid is not None
        scale = spread(found.scale, width, group_size).expand_as(weight)[:, at].double()
    for j in range(width):
        inverse = torch.linalg.inv(h[j:, j:])
        updated = reference[:, j:] + (reference[:, :j] - value[:, :j]) @ h[:j, j:] @ inverse
        if pattern is not None and j % pattern.of == 0:
            few = range(j, j + pattern.of)
            cost = torch.stack([updated[:, k - j] ** 2 / torch.linalg.inv(h[k:, k:])[0, 0] for k in few], dim=1)
            mask[:, j : j + pattern.of] = choose(cost.float(), pattern)
        now = updated[:, 0]
        if found is not None and found.grid is not None:
            nearest = (now[:, None] / scale[:, j : j + 1] - found.grid.values.double()).abs().argmin(dim=1)
            now = found.grid.values.double()[nearest] * scale[:, j]
        value[:, j] = now * mask[:, j]
    return value[:, order.positions], mask[:, order.positions]


# The sweep against what it must equal


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("pattern", [None, "2:4", "1:4"])
@pytest.mark.parametrize(("group_size", "bits"), [(16, 4), (128, 3), ("per-channel", 2), ("per-tensor", 8)])
def test_the_sweep_is_obs_column_by_column(group_size: GroupSize, bits: int, pattern: str | None, ordered: bool) -> None:
    weight, covariance = draw(12, 40), covariance_of(40)
    found, order = swept(weight, covariance, grid=Grid.of_bits(bits), group_size=group_size, pattern=pattern, ordered=ordered)
    form = None if pattern is None else Pattern.parse(pattern)
    value, mask = by_conditional_least_squares(
        weight, covariance, order, damp=0.01, found=found, group_size=group_size, pattern=form
    )
    # float32 products of weights of size one; a code that fell otherwise would be a whole step off.
    torch.testing.assert_close(found.value.double(), value, rtol=0, atol=1e-5)
    assert found.mask is None if pattern is None else torch.equal(found.mask, mask)


def test_the_sweep_over_a_codebook_is_obs_column_by_column() -> None:
    weight, covariance = draw(12, 40), covariance_of(40)
    found, order = swept(weight, covariance, grid=CODEBOOK, pattern="2:4")
    value, _ = by_conditional_least_squares(
        weight, covariance, order, damp=0.01, found=found, group_size=16, pattern=Pattern.parse("2:4")
    )
    torch.testing.assert_close(found.value.double(), value, rtol=0, atol=1e-5)  # as above


def test_the_sweep_over_a_width_that_no_group_divides_is_obs_column_by_column() -> None:
    weight, covariance = draw(4, 172), covariance_of(172, seed=5)
    for group_size in (48, 128):
        found, order = swept(weight, covariance, group_size=group_size, pattern="2:4")
        value, _ = by_conditional_least_squares(
            weight, covariance, order, damp=0.01, found=found, group_size=group_size, pattern=Pattern.parse("2:4")
        )
        torch.testing.assert_close(found.value.double(), value, rtol=0, atol=2e-5)  # float32, sums of 172


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_an_unrounded_sweep_is_obs_column_by_column(pattern: str) -> None:
    weight, covariance, form = draw(12, 40), covariance_of(40), Pattern.parse(pattern)
    order = order_of(covariance.diagonal(), group_size="per-channel", pattern=form)
    found = unrounded_sweep(weight, inverse_of(covariance[order.inputs][:, order.inputs], damp=0.01), order, pattern=form)
    value, mask = by_conditional_least_squares(
        weight, covariance, order, damp=0.01, found=None, group_size="per-channel", pattern=form
    )
    torch.testing.assert_close(found.value.double(), value, rtol=0, atol=1e-5)  # float32
    assert found.mask is not None and torch.equal(found.mask, mask)


@pytest.mark.parametrize("grid", [Grid.of_bits(2), Grid.of_bits(3), Grid.of_bits(8), CODEBOOK])
@pytest.mark.parametrize("group_size", [4, 48, 1000, "per-channel", "per-tensor"])
def test_uncorrelated_inputs_are_rounded_to_nearest(group_size: GroupSize, grid: Grid) -> None:  # law 18
    weight = draw(8, 100)
    found, _ = swept(weight, diagonal(100), grid=grid, group_size=group_size)
    assert found.scale is not None
    index, value = grid.round(weight, spread(found.scale, 100, group_size).expand_as(weight))
    assert torch.equal(found.value, value)
    assert found.index is not None and torch.equal(found.index.long(), index.long())


def test_uncorrelated_inputs_lose_those_of_least_second_moment() -> None:  # law 7
    weight, covariance = draw(8, 100), diagonal(100)
    order = order_of(covariance.diagonal(), group_size="per-channel", pattern=Pattern.parse("2:4"))
    inverse = inverse_of(covariance[order.inputs][:, order.inputs], damp=0)
    for pattern in (Pattern.parse("2:4"), Pattern.parse(0.37)):
        found = unrounded_sweep(weight, inverse, order, pattern=pattern)
        mask = choose(weight.abs() * covariance.diagonal().sqrt(), pattern)
        assert found.mask is not None and torch.equal(found.mask, mask)
        assert torch.equal(found.value, weight * mask)  # and the others do not move


def test_dropping_first_leaves_the_exact_least_squares_answer() -> None:  # law 18
    weight, covariance = draw(10, 48), covariance_of(48)
    mask = (torch.arange(48) >= 20).expand(10, 48)
    found = unrounded_sweep(weight, inverse_of(covariance, damp=0), by_input(48, "per-channel"), mask=mask)
    slope = (found.value - weight) @ covariance  # H_II (w_I - w*_I) - H_IZ w_Z
    assert float(slope[:, 20:].abs().max()) < 1e-4 * float((weight @ covariance).abs().max())
    assert int((found.value[:, :20] != 0).sum()) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["plain", "spread", "dead"])
def test_a_sweep_s_error_lies_between_that_of_masking_and_of_the_exact_refit(kind: str, seed: int) -> None:  # law 18
    weight, covariance = draw(8, 40, seed=seed), covariance_of(40, kind, seed=seed + 20)
    mask = choose(weight.abs() * covariance.diagonal().sqrt(), Pattern.parse("2:4"))
    found = unrounded_sweep(weight, inverse_of(covariance, damp=1e-4), by_input(40, "per-channel"), mask=mask)
    least = 0.0
    for row in range(8):
        kept, gone = mask[row], ~mask[row]
        h = covariance.double()
        moved = weight[row].double() * kept
        moved[kept] += torch.linalg.pinv(h[kept][:, kept], hermitian=True) @ (h[kept][:, gone] @ weight[row, gone].double())
        least += loss(weight[row : row + 1], moved[None], covariance)
    swept_loss = loss(weight, found.value, covariance)
    assert least * (1 - 1e-9) <= swept_loss  # float64
    assert swept_loss < 0.9 * loss(weight, weight * mask, covariance)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("kind", ["plain", "spread", "singular", "dead"])
def test_the_sweep_loses_less_than_rounding_to_nearest(kind: str, pattern: str | None) -> None:
    for seed in range(3):
        weight, covariance = draw(16, 48, seed=seed), covariance_of(48, kind, seed=seed + 30)
        found, _ = swept(weight, covariance, grid=Grid.of_bits(3), pattern=pattern)
        alone, _ = swept(weight, torch.diag(covariance.diagonal()), grid=Grid.of_bits(3), pattern=pattern)
        assert loss(weight, found.value, covariance) < loss(weight, alone.value, covariance)


@pytest.mark.parametrize("group_size", [16, "per-channel", "per-tensor"])
def test_rows_do_not_know_one_another(group_size: GroupSize) -> None:
    weight, covariance = draw(12, 40), covariance_of(40)
    whole, _ = swept(weight, covariance, group_size=group_size, pattern="2:4")
    if group_size == "per-tensor":  # but for the scale that they share; the order of the rows still does not matter
        turned, _ = swept(weight.flip(0), covariance, group_size=group_size, pattern="2:4")
        torch.testing.assert_close(turned.value.flip(0), whole.value, rtol=0, atol=1e-5)  # float32
        return
    some, _ = swept(weight[3:7], covariance, group_size=group_size, pattern="2:4")
    torch.testing.assert_close(some.value, whole.value[3:7], rtol=0, atol=1e-5)  # float32, products of another shape


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_a_factor_on_all_inputs_changes_nothing(factor: float) -> None:  # law 14
    weight, covariance = draw(12, 40), covariance_of(40)
    one, other = (swept(weight, each, pattern="2:4")[0] for each in (covariance, covariance * factor))
    assert torch.equal(one.value, other.value)  # powers of two


def test_a_sweep_changes_none_of_its_arguments() -> None:
    weight, covariance = draw(12, 40), covariance_of(40)
    mask = choose(weight.abs(), Pattern.parse("2:4"))
    inverse, order = inverse_of(covariance, damp=0.01), by_input(40, 16)
    before = weight.clone(), covariance.clone(), mask.clone(), inverse.upper.clone()
    found = rounded_sweep(weight, inverse, order, grid=Grid.of_bits(4), mask=mask)
    values = found.value.clone(), found.scale.clone() if found.scale is not None else None
    descend_base(weight, covariance, found, group_size=16, pattern=None)
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, covariance, mask, inverse.upper), strict=True))
    assert torch.equal(found.value, values[0])
    assert found.scale is not None and values[1] is not None and torch.equal(found.scale, values[1])


# What a sweep leaves: codes, scales, masks


@pytest.mark.parametrize("width", [172, 352])
@pytest.mark.parametrize("group_size", [32, 48, 128, "per-channel", "per-tensor"])
@pytest.mark.parametrize("pattern", [None, "2:4", 0.5])
def test_codes_and_scales_mean_the_values_whatever_the_width(
    width: int, group_size: GroupSize, pattern: str | float | None
) -> None:
    weight, covariance = draw(6, width), covariance_of(width)
    found, _ = swept(weight, covariance, group_size=group_size, pattern=pattern)
    assert found.scale is not None and found.scale.shape == scale_shape((6, width), group_size)
    assert torch.equal(dense_of(found, group_size), found.value)
    if pattern is not None:
        assert found.mask is not None
        assert found.mask.sum(dim=1).tolist() == [width // 2] * 6
        assert int((found.value[~found.mask] != 0).sum()) == 0
    if pattern == "2:4":
        assert found.mask is not None and bool((found.mask.view(6, -1, 4).sum(dim=2) == 2).all())
    # Rounding 4-bit codes alone costs about 1 % of the objective, dropping half a few times ten while others compensate.
    assert loss(weight, found.value, covariance) < 0.5 * loss(weight, torch.zeros_like(weight), covariance)


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("width", [100, 128, 300])
def test_a_share_is_dropped_from_every_row_alike(width: int, share: float) -> None:  # law 6, and the bug that was
    weight, covariance, pattern = draw(5, width), covariance_of(width), Pattern.parse(share)
    kept = width - int(width * share + 1e-9)
    found = unrounded_sweep(weight, inverse_of(covariance, damp=0.01), by_input(width, "per-channel"), pattern=pattern)
    assert found.mask is not None and found.mask.sum(dim=1).tolist() == [kept] * 5
    for group_size in (32, "per-channel") if width > 128 else (48,):
        rounded, _ = swept(weight, covariance, group_size=group_size, pattern=share)
        assert rounded.mask is not None and rounded.mask.sum(dim=1).tolist() == [kept] * 5


@pytest.mark.parametrize("grid", [*map(Grid.of_bits, (2, 4)), CODEBOOK])
@pytest.mark.parametrize("shape", [(1, 64), (1, 8), (16, 8), (5, 4), (3, 1)])
def test_the_scale_that_is_stored_is_the_scale_that_was_used(shape: tuple[int, int], grid: Grid) -> None:
    weight, covariance = draw(*shape), covariance_of(shape[1])
    for group_size in (16, "per-channel", "per-tensor"):
        found, _ = swept(weight, covariance, grid=grid, group_size=group_size)
        assert torch.equal(dense_of(found, group_size), found.value)
        after = descend_base(weight, covariance, found, group_size=group_size, pattern=None)
        # A step of a scale moves the values by the ratio of two scales: float32 rounding, a few times.
        torch.testing.assert_close(dense_of(after, group_size), after.value, rtol=1e-5, atol=1e-7)


def test_a_scale_may_be_negative_and_then_the_longer_side_of_the_grid_serves_the_positive_weights() -> None:
    weight = torch.tensor([[0.8, -0.7, 0.1, 0.3]])
    found, _ = swept(weight, torch.eye(4), group_size="per-channel")
    assert found.scale is not None
    assert found.scale.tolist() == [[pytest.approx(-0.1, rel=1e-3)]]
    part = found.part("per-channel")
    assert isinstance(part, Uniform)
    assert part.codes.tolist() == [[-8, 7, -1, -3]]


def test_codes_stay_in_range_whatever_the_errors_that_reach_them() -> None:
    weight = draw(6, 40)
    covariance = covariance_of(40, "singular") + 1e-3 * torch.eye(40)  # so correlated that later inputs are changed wildly
    for bits in (2, 3, 8):
        part = swept(weight, covariance, grid=Grid.of_bits(bits), group_size=16, damp=1e-6)[0].part(16)
        assert isinstance(part, Uniform)
        assert -(2 ** (bits - 1)) <= int(part.codes.min()) and int(part.codes.max()) < 2 ** (bits - 1)


def test_a_given_mask_is_kept_and_no_pattern_chooses_beside_it() -> None:
    weight, covariance = draw(6, 40), covariance_of(40)
    mask = draw(6, 40, seed=4) > 0  # rows of different counts, as no pattern would give
    for pattern in (None, "2:4"):
        found, _ = swept(weight, covariance, mask=mask, pattern=pattern)
        assert found.mask is not None and torch.equal(found.mask, mask)


def test_dead_inputs_are_rounded_to_nearest_and_compensate_nothing() -> None:
    weight, covariance = draw(6, 40), covariance_of(40, "dead")
    found, _ = swept(weight, covariance, group_size=4)
    assert found.scale is not None
    dead = covariance.diagonal() == 0
    _, nearest = Grid.of_bits(4).round(weight, spread(found.scale, 40, 4))
    torch.testing.assert_close(found.updated[:, dead], weight[:, dead], rtol=1e-6, atol=1e-6)  # float64 inverse, float32 factor
    torch.testing.assert_close(found.value[:, dead], nearest[:, dead], rtol=0, atol=0)


def test_scales_that_start_from_earlier_ones_stay_near_them() -> None:
    weight, covariance, order = draw(6, 40), covariance_of(40), by_input(40, 16)
    inverse = inverse_of(covariance, damp=0.01)
    first = rounded_sweep(weight, inverse, order, grid=Grid.of_bits(4))
    again = rounded_sweep(weight, inverse, order, grid=Grid.of_bits(4), start=first)
    assert first.scale is not None and again.scale is not None
    ratio = again.scale / first.scale
    assert float(ratio.min()) > 0.8 and float(ratio.max()) < 1.25  # 12 % either way, and the least squares after


def test_zeros_that_start_from_earlier_ones_leave_no_more() -> None:
    # Without correlations a group's weights are the same in both sweeps, and so is what each costs.
    weight, covariance = draw(6, 40) + 1, torch.diag(draw(40, seed=4).exp())
    grid, order = Grid.of_bits(3, zeros=True), order_of(covariance.diagonal(), group_size=16, pattern=None)
    inverse = inverse_of(covariance[order.inputs][:, order.inputs], damp=0)
    first = rounded_sweep(weight, inverse, order, grid=grid)
    again = rounded_sweep(weight, inverse, order, grid=grid, start=first)
    assert first.zero is not None and again.zero is not None
    assert float((again.zero - first.zero).abs().max()) <= 1
    assert loss(weight, again.value, covariance) <= (1 + 1e-3) * loss(weight, first.value, covariance)  # scales are float16
    torch.testing.assert_close(again.part(16).dense(), again.value, rtol=1e-6, atol=0)


def test_earlier_scales_belong_to_their_groups_whatever_the_order() -> None:
    weight = draw(6, 40) * torch.tensor([1.0, 100.0, 10000.0]).repeat_interleave(16)[:40]
    covariance = torch.diag(torch.tensor([2.0, 1.0, 3.0]).repeat_interleave(16)[:40])
    order = order_of(covariance.diagonal(), group_size=16, pattern=None)
    assert order.sizes == [8, 16, 16]
    inverse = inverse_of(covariance[order.inputs][:, order.inputs], damp=0.01)
    first = rounded_sweep(weight, inverse, order, grid=Grid.of_bits(4))
    again = rounded_sweep(weight, inverse, order, grid=Grid.of_bits(4), start=first)
    assert first.scale is not None and again.scale is not None
    assert first.scale.abs().argsort(dim=1).tolist() == [[0, 1, 2]] * 6
    assert float((again.scale / first.scale - 1).abs().max()) < 0.25  # 12 % either way, and the least squares after


def test_two_inputs_by_hand() -> None:
    # 0.6 rounds up to 1, so the second input, which goes with the first, wants 0.6 - 0.9 x 0.4 = 0.24 and rounds down.
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    rounding = FixedScales(Grid.of_bits(4), torch.ones(2, 1))
    found = sweep(torch.tensor([[0.6, 0.6]]), inverse_of(covariance, damp=0), rounding=rounding)
    assert found.value.tolist() == [[1, 0]]
    torch.testing.assert_close(found.updated, torch.tensor([[0.6, 0.24]]))
    assert loss(torch.tensor([[0.6, 0.6]]), found.value, covariance) == pytest.approx(0.16 + 0.36 - 2 * 0.9 * 0.24)


def test_one_of_two_by_hand() -> None:
    # Alone the second weight is larger, but what it does the third does as well: H says that the first must stay.
    covariance = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0.99, 0], [0, 0.99, 1.0, 0], [0, 0, 0, 1.0]])
    weight = torch.tensor([[1.0, 2.0, 0.5, 0.1]])
    found = unrounded_sweep(weight, inverse_of(covariance, damp=0), by_input(4, "per-channel"), pattern=Pattern.parse("1:2"))
    assert found.mask is not None
    # 2^2 x (1 - 0.99^2) < 1; then the third stands for both: 0.5 + 0.99 x 2.
    assert found.mask.tolist() == [[True, False, True, False]]
    torch.testing.assert_close(found.value, torch.tensor([[1.0, 0, 2.48, 0]]))
