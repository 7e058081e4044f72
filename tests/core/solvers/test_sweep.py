"""The column sweep and its polish: equal to the plain method that they speed up, and never worse for going on."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.grid import GroupSize, Levels
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers.coordinate_descent import polish
from slimlm.core.solvers.sweep import (
    Across,
    Order,
    Swept,
    check_damp,
    check_grouping,
    coded,
    conditioned,
    inverse_of,
    order_of,
    rounded_sweep,
    sweep,
    tokens_needed,
    unrounded_sweep,
)

TABLE = Levels(
    torch.tensor([-1.0, -0.75, -0.5, -0.375, -0.25, -0.125, -0.0625, 0, 0.0625, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1]), False
)
"""Sixteen uneven levels that float16 holds exactly."""

COVARIANCES = ["plain", "spread", "singular", "dead", "nothing"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def covariance(width: int, kind: str = "plain", seed: int = 7) -> Tensor:
    """Of correlated inputs: "spread" over energies of six decades, "singular" with a third of the rank, some or all "dead"."""
    tokens = width // 3 if kind == "singular" else 4 * width
    x = draw(tokens, width, seed=seed) @ (torch.eye(width) + 0.5 * draw(width, width, seed=seed + 1) / width**0.5)
    x = x + draw(tokens, 1, seed=seed + 2)  # one direction that all inputs share
    if kind == "spread":
        x = x * 10 ** (3 * draw(width, seed=seed + 3).clamp(-1, 1) / 2)
    if kind == "dead":
        x = x * (torch.arange(width) % 5 != 2)
    return (x.T @ x / tokens) * (kind != "nothing")


def diagonal(width: int, seed: int = 3) -> Tensor:
    return torch.diag(torch.exp(draw(width, seed=seed)))


def loss(weight: Tensor, base: Tensor, gram: Tensor) -> float:
    """tr((W - B) H (W - B)^T), in float64."""
    error = weight.double() - base.double()
    return float((error @ gram.double() * error).sum())


def by_input(width: int, group_size: GroupSize, pattern: Pattern | None = None) -> Order:
    """The inputs as they come."""
    return order_of(torch.zeros(width), group_size=group_size, pattern=pattern)


def swept(
    weight: Tensor,
    gram: Tensor,
    *,
    levels: Levels | None = None,
    group_size: GroupSize = 16,
    pattern: str | float | None = None,
    keep: Tensor | None = None,
    damp: float = 0.01,
    ordered: bool = True,
) -> tuple[Swept, Order]:
    """A rounded sweep as the methods make it, and its order."""
    form = None if pattern is None else Pattern.parse(pattern)
    order = order_of(gram.diagonal() * ordered, group_size=group_size, pattern=form)
    inverse = inverse_of(gram[order.inputs][:, order.inputs], damp=damp)
    levels = levels or Levels.of_bits(4)
    return rounded_sweep(weight, inverse, order, levels=levels, group_size=group_size, pattern=form, keep=keep), order


def meaning(found: Swept, group_size: GroupSize) -> Tensor:
    dense = found.code(group_size).dense()
    return dense if found.keep is None else dense * found.keep


def by_conditional_least_squares(
    weight: Tensor,
    gram: Tensor,
    order: Order,
    *,
    damp: float,
    found: Swept | None,
    group_size: GroupSize,
    pattern: Pattern | None,
) -> tuple[Tensor, Tensor]:
    """The sweep as its formula says it, column by column in float64: values and mask. Slow and independent of any factor.

    When input j's turn comes, j and all later ones are the least-squares answer to the errors made so far; what an error in
    j costs then is 1 / [(H_RR)^-1]_jj, R = j and on. Scales are taken from `found`; without it nothing is rounded.
    """
    width = weight.shape[1]
    at = order.inputs
    target = weight.double()[:, at]
    h = gram.double()[at][:, at]
    h = h + damp * h.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    value, keep = target.clone(), torch.ones_like(target, dtype=torch.bool)
    if found is not None:
        assert found.scale is not None and found.levels is not None
        scale = grid.spread(found.scale, width, group_size).expand_as(weight)[:, at].double()
    for j in range(width):
        inverse = torch.linalg.inv(h[j:, j:])
        answer = target[:, j:] + (target[:, :j] - value[:, :j]) @ h[:j, j:] @ inverse
        if pattern is not None and j % pattern.of == 0:
            few = range(j, j + pattern.of)
            cost = torch.stack([answer[:, k - j] ** 2 / torch.linalg.inv(h[k:, k:])[0, 0] for k in few], dim=1)
            keep[:, j : j + pattern.of] = choose(cost.float(), pattern)
        now = answer[:, 0]
        if found is not None and found.levels is not None:
            nearest = (now[:, None] / scale[:, j : j + 1] - found.levels.values.double()).abs().argmin(dim=1)
            now = found.levels.values.double()[nearest] * scale[:, j]
        value[:, j] = now * keep[:, j]
    return value[:, order.back], keep[:, order.back]


# The sweep against what it must equal


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("pattern", [None, "2:4", "1:4"])
@pytest.mark.parametrize(("group_size", "bits"), [(16, 4), (128, 3), ("per-channel", 2), ("per-tensor", 8)])
def test_the_sweep_is_obs_column_by_column(group_size: GroupSize, bits: int, pattern: str | None, ordered: bool) -> None:
    weight, gram = draw(12, 40), covariance(40)
    found, order = swept(weight, gram, levels=Levels.of_bits(bits), group_size=group_size, pattern=pattern, ordered=ordered)
    form = None if pattern is None else Pattern.parse(pattern)
    value, keep = by_conditional_least_squares(weight, gram, order, damp=0.01, found=found, group_size=group_size, pattern=form)
    # float32 products of weights of size one; a code that fell otherwise would be a whole step off.
    torch.testing.assert_close(found.value.double(), value, rtol=0, atol=1e-5)
    assert found.keep is None if pattern is None else torch.equal(found.keep, keep)


def test_the_sweep_over_a_table_is_obs_column_by_column() -> None:
    weight, gram = draw(12, 40), covariance(40)
    found, order = swept(weight, gram, levels=TABLE, pattern="2:4")
    value, _ = by_conditional_least_squares(
        weight, gram, order, damp=0.01, found=found, group_size=16, pattern=Pattern.parse("2:4")
    )
    torch.testing.assert_close(found.value.double(), value, rtol=0, atol=1e-5)  # as above


def test_the_sweep_over_a_width_that_no_group_divides_is_obs_column_by_column() -> None:
    weight, gram = draw(4, 172), covariance(172, seed=5)
    for group_size in (48, 128):
        found, order = swept(weight, gram, group_size=group_size, pattern="2:4")
        value, _ = by_conditional_least_squares(
            weight, gram, order, damp=0.01, found=found, group_size=group_size, pattern=Pattern.parse("2:4")
        )
        torch.testing.assert_close(found.value.double(), value, rtol=0, atol=2e-5)  # float32, sums of 172


@pytest.mark.parametrize("pattern", ["2:4", "1:2"])
def test_an_unrounded_sweep_is_obs_column_by_column(pattern: str) -> None:
    weight, gram, form = draw(12, 40), covariance(40), Pattern.parse(pattern)
    order = order_of(gram.diagonal(), group_size="per-channel", pattern=form)
    found = unrounded_sweep(weight, inverse_of(gram[order.inputs][:, order.inputs], damp=0.01), order, pattern=form)
    value, keep = by_conditional_least_squares(
        weight, gram, order, damp=0.01, found=None, group_size="per-channel", pattern=form
    )
    torch.testing.assert_close(found.value.double(), value, rtol=0, atol=1e-5)  # float32
    assert found.keep is not None and torch.equal(found.keep, keep)


@pytest.mark.parametrize("levels", [Levels.of_bits(2), Levels.of_bits(3), Levels.of_bits(8), TABLE])
@pytest.mark.parametrize("group_size", [4, 48, 1000, "per-channel", "per-tensor"])
def test_uncorrelated_inputs_are_rounded_to_nearest(group_size: GroupSize, levels: Levels) -> None:  # law 18
    weight = draw(8, 100)
    found, _ = swept(weight, diagonal(100), levels=levels, group_size=group_size)
    assert found.scale is not None
    index, value = levels.rounded(weight, grid.spread(found.scale, 100, group_size).expand_as(weight))
    assert torch.equal(found.value, value)
    assert found.index is not None and torch.equal(found.index.long(), index.long())


def test_uncorrelated_inputs_lose_those_of_least_energy() -> None:  # law 7
    weight, gram = draw(8, 100), diagonal(100)
    order = order_of(gram.diagonal(), group_size="per-channel", pattern=Pattern.parse("2:4"))
    inverse = inverse_of(gram[order.inputs][:, order.inputs], damp=0)
    for pattern in (Pattern.parse("2:4"), Pattern.parse(0.37)):
        found = unrounded_sweep(weight, inverse, order, pattern=pattern)
        keep = choose(weight.abs() * gram.diagonal().sqrt(), pattern)
        assert found.keep is not None and torch.equal(found.keep, keep)
        assert torch.equal(found.value, weight * keep)  # and the others do not move


def test_dropping_first_leaves_the_exact_least_squares_answer() -> None:  # law 18
    weight, gram = draw(10, 48), covariance(48)
    keep = (torch.arange(48) >= 20).expand(10, 48)
    found = unrounded_sweep(weight, inverse_of(gram, damp=0), by_input(48, "per-channel"), keep=keep)
    slope = (found.value - weight) @ gram  # H_II (w_I - w*_I) - H_IZ w_Z
    assert float(slope[:, 20:].abs().max()) < 1e-4 * float((weight @ gram).abs().max())
    assert int((found.value[:, :20] != 0).sum()) == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["plain", "spread", "dead"])
def test_a_sweep_s_error_lies_between_that_of_masking_and_of_the_exact_refit(kind: str, seed: int) -> None:  # law 18
    weight, gram = draw(8, 40, seed=seed), covariance(40, kind, seed=seed + 20)
    keep = choose(weight.abs() * gram.diagonal().sqrt(), Pattern.parse("2:4"))
    found = unrounded_sweep(weight, inverse_of(gram, damp=1e-4), by_input(40, "per-channel"), keep=keep)
    least = 0.0
    for row in range(8):
        kept, gone = keep[row], ~keep[row]
        h = gram.double()
        moved = weight[row].double() * kept
        moved[kept] += torch.linalg.pinv(h[kept][:, kept], hermitian=True) @ (h[kept][:, gone] @ weight[row, gone].double())
        least += loss(weight[row : row + 1], moved[None], gram)
    swept_loss = loss(weight, found.value, gram)
    assert least * (1 - 1e-9) <= swept_loss  # float64
    assert swept_loss < 0.9 * loss(weight, weight * keep, gram)


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("kind", ["plain", "spread", "singular", "dead"])
def test_the_sweep_loses_less_than_rounding_to_nearest(kind: str, pattern: str | None) -> None:
    for seed in range(3):
        weight, gram = draw(16, 48, seed=seed), covariance(48, kind, seed=seed + 30)
        found, _ = swept(weight, gram, levels=Levels.of_bits(3), pattern=pattern)
        alone, _ = swept(weight, torch.diag(gram.diagonal()), levels=Levels.of_bits(3), pattern=pattern)
        assert loss(weight, found.value, gram) < loss(weight, alone.value, gram)


@pytest.mark.parametrize("group_size", [16, "per-channel", "per-tensor"])
def test_rows_do_not_know_one_another(group_size: GroupSize) -> None:
    weight, gram = draw(12, 40), covariance(40)
    whole, _ = swept(weight, gram, group_size=group_size, pattern="2:4")
    if group_size == "per-tensor":  # but for the scale that they share; the order of the rows still does not matter
        turned, _ = swept(weight.flip(0), gram, group_size=group_size, pattern="2:4")
        torch.testing.assert_close(turned.value.flip(0), whole.value, rtol=0, atol=1e-5)  # float32
        return
    some, _ = swept(weight[3:7], gram, group_size=group_size, pattern="2:4")
    torch.testing.assert_close(some.value, whole.value[3:7], rtol=0, atol=1e-5)  # float32, products of another shape


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**20])
def test_a_factor_on_all_inputs_changes_nothing(factor: float) -> None:  # law 14
    weight, gram = draw(12, 40), covariance(40)
    one, other = (swept(weight, each, pattern="2:4")[0] for each in (gram, gram * factor))
    assert torch.equal(one.value, other.value)  # powers of two


def test_a_sweep_changes_none_of_its_arguments() -> None:
    weight, gram = draw(12, 40), covariance(40)
    keep = choose(weight.abs(), Pattern.parse("2:4"))
    inverse, order = inverse_of(gram, damp=0.01), by_input(40, 16)
    before = weight.clone(), gram.clone(), keep.clone(), inverse.upper.clone()
    found = rounded_sweep(weight, inverse, order, levels=Levels.of_bits(4), group_size=16, keep=keep)
    values = found.value.clone(), found.scale.clone() if found.scale is not None else None
    polish(weight, gram, found, group_size=16, pattern=None)
    assert all(torch.equal(one, other) for one, other in zip(before, (weight, gram, keep, inverse.upper), strict=True))
    assert torch.equal(found.value, values[0])
    assert found.scale is not None and values[1] is not None and torch.equal(found.scale, values[1])


# What a sweep leaves: codes, scales, masks


@pytest.mark.parametrize("width", [172, 352])
@pytest.mark.parametrize("group_size", [32, 48, 128, "per-channel", "per-tensor"])
@pytest.mark.parametrize("pattern", [None, "2:4", 0.5])
def test_codes_and_scales_mean_the_values_whatever_the_width(
    width: int, group_size: GroupSize, pattern: str | float | None
) -> None:
    weight, gram = draw(6, width), covariance(width)
    found, _ = swept(weight, gram, group_size=group_size, pattern=pattern)
    assert found.scale is not None and found.scale.shape == grid.scale_shape((6, width), group_size)
    assert torch.equal(meaning(found, group_size), found.value)
    if pattern is not None:
        assert found.keep is not None
        assert found.keep.sum(dim=1).tolist() == [width // 2] * 6
        assert int((found.value[~found.keep] != 0).sum()) == 0
    if pattern == "2:4":
        assert found.keep is not None and bool((found.keep.view(6, -1, 4).sum(dim=2) == 2).all())
    # Rounding 4-bit codes alone costs about 1 % of the energy, and dropping half a few times ten with the others answering.
    assert loss(weight, found.value, gram) < 0.5 * loss(weight, torch.zeros_like(weight), gram)


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("width", [100, 128, 300])
def test_a_share_is_dropped_from_every_row_alike(width: int, share: float) -> None:  # law 6, and the bug that was
    weight, gram, pattern = draw(5, width), covariance(width), Pattern.parse(share)
    kept = width - int(width * share + 1e-9)
    found = unrounded_sweep(weight, inverse_of(gram, damp=0.01), by_input(width, "per-channel"), pattern=pattern)
    assert found.keep is not None and found.keep.sum(dim=1).tolist() == [kept] * 5
    for group_size in (32, "per-channel") if width > 128 else (48,):
        rounded, _ = swept(weight, gram, group_size=group_size, pattern=share)
        assert rounded.keep is not None and rounded.keep.sum(dim=1).tolist() == [kept] * 5


@pytest.mark.parametrize("levels", [*map(Levels.of_bits, (2, 4)), TABLE])
@pytest.mark.parametrize("shape", [(1, 64), (1, 8), (16, 8), (5, 4), (3, 1)])
def test_the_scale_that_is_stored_is_the_scale_that_was_used(shape: tuple[int, int], levels: Levels) -> None:
    weight, gram = draw(*shape), covariance(shape[1])
    for group_size in (16, "per-channel", "per-tensor"):
        found, _ = swept(weight, gram, levels=levels, group_size=group_size)
        assert torch.equal(meaning(found, group_size), found.value)
        polished = polish(weight, gram, found, group_size=group_size, pattern=None)
        # Polishing moves the values by the ratio of two scales: float32 rounding, a few times.
        torch.testing.assert_close(meaning(polished, group_size), polished.value, rtol=1e-5, atol=1e-7)


def test_a_scale_may_be_negative_and_then_the_longer_side_of_the_grid_serves_the_positive_weights() -> None:
    weight = torch.tensor([[0.8, -0.7, 0.1, 0.3]])
    found, _ = swept(weight, torch.eye(4), group_size="per-channel")
    assert found.scale is not None
    assert found.scale.tolist() == [[pytest.approx(-0.1, rel=1e-3)]]
    code = found.code("per-channel")
    assert isinstance(code, Uniform)
    assert code.codes.tolist() == [[-8, 7, -1, -3]]


def test_codes_stay_in_range_whatever_the_errors_that_reach_them() -> None:
    weight = draw(6, 40)
    gram = covariance(40, "singular") + 1e-3 * torch.eye(40)  # so correlated that later inputs answer wildly
    for bits in (2, 3, 8):
        code = swept(weight, gram, levels=Levels.of_bits(bits), group_size=16, damp=1e-6)[0].code(16)
        assert isinstance(code, Uniform)
        assert -(2 ** (bits - 1)) <= int(code.codes.min()) and int(code.codes.max()) < 2 ** (bits - 1)


def test_a_table_gives_a_codebook_and_the_even_grid_plain_codes() -> None:
    weight, gram = draw(6, 40), covariance(40)
    assert isinstance(swept(weight, gram, levels=TABLE)[0].code(16), Codebook)
    assert isinstance(swept(weight, gram)[0].code(16), Uniform)


def test_scales_beyond_float16_are_stored_in_float32() -> None:
    index, scale = torch.zeros(2, 4, dtype=torch.uint8), torch.tensor([[1e-9], [1.0]])
    part = coded(index, scale, Levels.of_bits(4), "per-channel")
    assert part.scale.dtype == torch.float32
    assert torch.equal(part.dense(), scale.expand(2, 4) * -8)


def test_a_given_mask_is_kept_and_no_pattern_chooses_beside_it() -> None:
    weight, gram = draw(6, 40), covariance(40)
    keep = draw(6, 40, seed=4) > 0  # rows of different counts, as no pattern would give
    for pattern in (None, "2:4"):
        found, _ = swept(weight, gram, keep=keep, pattern=pattern)
        assert found.keep is not None and torch.equal(found.keep, keep)


def test_dead_inputs_are_rounded_to_nearest_and_repair_nothing() -> None:
    weight, gram = draw(6, 40), covariance(40, "dead")
    found, _ = swept(weight, gram, group_size=4)
    assert found.scale is not None
    dead = gram.diagonal() == 0
    _, nearest = Levels.of_bits(4).rounded(weight, grid.spread(found.scale, 40, 4))
    torch.testing.assert_close(found.moved[:, dead], weight[:, dead], rtol=1e-6, atol=1e-6)  # float64 inverse, float32 factor
    torch.testing.assert_close(found.value[:, dead], nearest[:, dead], rtol=0, atol=0)


def test_earlier_scales_are_followed_closely() -> None:
    weight, gram, order = draw(6, 40), covariance(40), by_input(40, 16)
    inverse = inverse_of(gram, damp=0.01)
    first = rounded_sweep(weight, inverse, order, levels=Levels.of_bits(4), group_size=16)
    again = rounded_sweep(weight, inverse, order, levels=Levels.of_bits(4), group_size=16, start=first.scale)
    assert first.scale is not None and again.scale is not None
    ratio = again.scale / first.scale
    assert float(ratio.min()) > 0.8 and float(ratio.max()) < 1.25  # 12 % either way, and the least squares after


def test_earlier_scales_belong_to_their_groups_whatever_the_order() -> None:
    weight = draw(6, 40) * torch.tensor([1.0, 100.0, 10000.0]).repeat_interleave(16)[:40]
    gram = torch.diag(torch.tensor([2.0, 1.0, 3.0]).repeat_interleave(16)[:40])
    order = order_of(gram.diagonal(), group_size=16, pattern=None)
    assert order.sizes == [8, 16, 16]
    inverse = inverse_of(gram[order.inputs][:, order.inputs], damp=0.01)
    first = rounded_sweep(weight, inverse, order, levels=Levels.of_bits(4), group_size=16)
    again = rounded_sweep(weight, inverse, order, levels=Levels.of_bits(4), group_size=16, start=first.scale)
    assert first.scale is not None and again.scale is not None
    assert first.scale.abs().argsort(dim=1).tolist() == [[0, 1, 2]] * 6
    assert float((again.scale / first.scale - 1).abs().max()) < 0.25  # 12 % either way, and the least squares after


def test_two_inputs_by_hand() -> None:
    # 0.6 rounds up to 1, so the second input, which goes with the first, wants 0.6 - 0.9 x 0.4 = 0.24 and rounds down.
    class Whole:
        starts = (0,)

        def begin(self, group: int, rows: Tensor, mass: Tensor) -> None: ...

        def round(self, place: int, group: int, column: Tensor) -> Tensor:
            return column.round()

    gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    found = sweep(torch.tensor([[0.6, 0.6]]), inverse_of(gram, damp=0), rounding=Whole())  # type: ignore[arg-type]
    assert found.value.tolist() == [[1, 0]]
    torch.testing.assert_close(found.moved, torch.tensor([[0.6, 0.24]]))
    assert loss(torch.tensor([[0.6, 0.6]]), found.value, gram) == pytest.approx(0.16 + 0.36 - 2 * 0.9 * 0.24)


def test_one_of_two_by_hand() -> None:
    # Alone the second weight is larger, but what it does the third does as well: H says that the first must stay.
    gram = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0.99, 0], [0, 0.99, 1.0, 0], [0, 0, 0, 1.0]])
    weight = torch.tensor([[1.0, 2.0, 0.5, 0.1]])
    found = unrounded_sweep(weight, inverse_of(gram, damp=0), by_input(4, "per-channel"), pattern=Pattern.parse("1:2"))
    assert found.keep is not None
    # 2^2 x (1 - 0.99^2) < 1; then the third stands for both: 0.5 + 0.99 x 2.
    assert found.keep.tolist() == [[True, False, True, False]]
    torch.testing.assert_close(found.value, torch.tensor([[1.0, 0, 2.48, 0]]))


@pytest.mark.parametrize("group_size", [5, 16, 64])
@pytest.mark.parametrize("rank", [1, 6])
def test_groups_across_outputs_mean_what_was_rounded(rank: int, group_size: int) -> None:
    factor = draw(24, rank)
    across = Across(factor, Levels.of_bits(4), group_size)
    found = sweep(factor, inverse_of(covariance(rank) + torch.eye(rank), damp=0.01), rounding=across)
    part = coded(across.index, across.scale, Levels.of_bits(4), group_size)
    assert torch.equal(part.dense(), found.value.T)


# The order


@pytest.mark.parametrize("width", [8, 40, 172, 352])
@pytest.mark.parametrize("group_size", [4, 32, 48, 128, "per-channel", "per-tensor"])
@pytest.mark.parametrize("pattern", [None, "2:4", "2:8", 0.5])
def test_an_order_is_a_permutation_that_tears_no_group_and_no_four(
    width: int, group_size: GroupSize, pattern: str | float | None
) -> None:
    form = None if pattern is None else Pattern.parse(pattern)
    if isinstance(group_size, int) and form is not None and form.of and (group_size % form.of or width % form.of):
        return  # refused
    energy = torch.exp(draw(width))
    order = order_of(energy, group_size=group_size, pattern=form)
    assert sorted(order.inputs.tolist()) == list(range(width))
    assert sum(order.sizes) == width
    assert order.inputs[order.back].tolist() == list(range(width))
    size = width if isinstance(group_size, str) else min(group_size, width)
    groups = list(order.inputs.split(order.sizes))
    for own in groups:
        assert len(set((own // size).tolist())) == 1
        chunks = own.split(8 if pattern == "2:8" else 4)
        # Only the last four of the matrix may be short, and then it is short wherever it comes.
        means = [float(energy[few].mean()) for few in chunks]
        if width % 8 == 0:
            assert all((few == few[0] + torch.arange(len(few))).all() for few in chunks)
            assert means == sorted(means, reverse=True)
    means = [float(energy[own].mean()) for own in groups]
    assert means == sorted(means, reverse=True)


def test_equal_energies_leave_the_inputs_as_they_are() -> None:
    assert order_of(torch.zeros(40), group_size=16, pattern=None).inputs.tolist() == list(range(40))


def test_an_order_by_hand() -> None:
    energy = torch.tensor([1.0] * 4 + [2.0] * 4 + [9.0] * 4 + [3.0] * 4)
    order = order_of(energy, group_size=8, pattern=Pattern.parse("2:4"))
    assert order.inputs.tolist() == [8, 9, 10, 11, 12, 13, 14, 15, 4, 5, 6, 7, 0, 1, 2, 3]
    assert order.sizes == [8, 8]


def test_a_group_that_cuts_through_fours_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"group_size = 6: .* multiple of 4"):
        check_grouping(6, Pattern.parse("2:4"))
    check_grouping(6, Pattern.parse(0.5))
    check_grouping("per-channel", Pattern.parse("2:4"))
    check_grouping(6, None)


# The covariance


@pytest.mark.parametrize("kind", ["plain", "spread", "singular", "dead"])
@pytest.mark.parametrize("damp", [0.001, 0.01, 1.0])
def test_the_factor_is_that_of_the_damped_inverse(kind: str, damp: float) -> None:
    gram = covariance(40, kind)
    inverse = inverse_of(gram, damp=damp)
    square = gram.double()
    expected = torch.linalg.inv(square + damp * square.diagonal().mean() * torch.eye(40, dtype=torch.float64))
    found = inverse.upper.double().T @ inverse.upper.double()
    # The factor is rounded to float32 once.
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    assert torch.equal(inverse.upper, inverse.upper.triu())
    assert (inverse.damped, inverse.notes) == (damp, ())


def test_what_the_later_inputs_do_not_explain_by_hand() -> None:
    inverse = inverse_of(torch.tensor([[1.0, 0.6], [0.6, 1.0]]), damp=0)
    torch.testing.assert_close(inverse.conditional, torch.tensor([1 - 0.36, 1.0]))


def test_damping_is_raised_until_it_does_and_that_is_noted() -> None:
    inverse = inverse_of(covariance(40, "dead"), damp=0)
    assert inverse.damped > 0
    assert len(inverse.notes) == 1 and f"{inverse.damped:g} instead of 0" in inverse.notes[0]
    assert bool(inverse.upper.isfinite().all())
    # One negative eigenvalue, as rounding may leave it, of a twentieth of the mean.
    gram = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.15]))
    assert inverse_of(gram, damp=0.01).damped == pytest.approx(1.0)


def test_a_covariance_that_is_none_is_refused() -> None:
    with pytest.raises(NumericsError, match="cannot be inverted"):
        inverse_of(torch.diag(torch.tensor([1.0, 1.0, 1.0, -2.0])), damp=0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_covariance_with_nan_or_infinity_is_refused(bad: float) -> None:
    gram = covariance(8)
    gram[2, 3] = bad
    with pytest.raises(NumericsError, match="NaN or infinity"):
        inverse_of(gram, damp=0.01)


def test_without_any_input_that_fires_everything_is_rounded_to_nearest_and_that_is_noted() -> None:
    weight = draw(6, 40)
    inverse = inverse_of(torch.zeros(40, 40), damp=0.01)
    assert "no input ever fires" in inverse.notes[0]
    found = rounded_sweep(weight, inverse, by_input(40, 16), levels=Levels.of_bits(4), group_size=16)
    assert torch.equal(found.moved, weight)


@pytest.mark.parametrize("damp", [-0.01, 1.01, float("nan")])
def test_a_damping_outside_zero_to_one_is_refused(damp: float) -> None:
    with pytest.raises(RecipeError, match="damp"):
        check_damp(damp)


def test_a_covariance_of_few_tokens_is_shrunk_towards_its_diagonal_and_that_is_noted() -> None:
    gram = covariance(40)
    kept = [float((conditioned(gram, tokens)[0] / gram)[0, 1]) for tokens in (1, 40, 79)]
    assert kept == [pytest.approx(tokens / (40 + tokens)) for tokens in (1, 40, 79)]
    for tokens in (1, 40, 79):
        found, notes = conditioned(gram, tokens)
        torch.testing.assert_close(found.diagonal(), gram.diagonal())
        assert torch.equal(found, found.T)
        assert len(notes) == 1 and f"{tokens} calibration tokens" in notes[0] and "needs 80" in notes[0]


@pytest.mark.parametrize("tokens", [80, 81, 100000])
def test_a_covariance_of_enough_tokens_is_left_alone(tokens: int) -> None:
    gram = covariance(40)
    assert conditioned(gram, tokens) == (gram, ())
    assert tokens >= tokens_needed(40)


# Polishing


def started(weight: Tensor, gram: Tensor, group_size: GroupSize, pattern: str | float | None, levels: Levels) -> Swept:
    """A base to polish; "given" is a mask that no pattern would choose."""
    if pattern != "given":
        return swept(weight, gram, group_size=group_size, pattern=pattern, levels=levels)[0]
    keep = draw(*weight.shape, seed=11) > 0.3
    return swept(weight, gram, group_size=group_size, keep=keep, levels=levels)[0]


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", 0.5, "given"])
def test_polishing_never_raises_the_objective_and_keeps_codes_and_mask_lawful(kind: str, pattern: str | float | None) -> None:
    form = None if pattern in (None, "given") else Pattern.parse(pattern)  # type: ignore[arg-type]
    groups: dict[Any, list[GroupSize]] = {
        None: [4, 16, "per-tensor"],
        "2:4": [8, 48, "per-channel"],
        "1:4": [4, "per-tensor"],
        0.5: [16, "per-channel"],
    }
    for seed, group_size in enumerate(groups.get(pattern, [4, "per-tensor"])):
        weight, gram = draw(12, 36, seed=seed), covariance(36, kind, seed=seed + 40)
        levels = (Levels.of_bits(3), TABLE)[seed % 2]
        found = started(weight, gram, group_size, pattern, levels)
        losses = [loss(weight, meaning(found, group_size), gram)]
        for _ in range(2):
            before = found
            found = polish(weight, gram, found, group_size=group_size, pattern=form)
            losses.append(loss(weight, meaning(found, group_size), gram))
            assert found.index is not None and int(found.index.max()) < 2**levels.bits
            torch.testing.assert_close(meaning(found, group_size), found.value, rtol=1e-5, atol=1e-7)  # float32, several times
            if pattern is None:
                assert found.keep is None
            else:
                assert found.keep is not None and before.keep is not None
                if form is None or not form.of:
                    assert torch.equal(found.keep, before.keep)
                else:
                    assert bool((found.keep.view(12, -1, 4).sum(dim=2) == form.kept).all())
        # float32's rounding, relative to the terms that make up the objective.
        whole = loss(weight, torch.zeros_like(weight), gram)
        assert all(after <= before + 1e-6 * whole for before, after in pairwise(losses)), (group_size, losses)


@pytest.mark.parametrize("pattern", [None, "2:4", 0.5])
def test_polishing_gains_where_there_is_something_to_gain(pattern: str | float | None) -> None:
    weight, gram = draw(16, 48), covariance(48)
    base, _ = swept(weight, gram, levels=Levels.of_bits(3), pattern=pattern)
    form = None if pattern is None else Pattern.parse(pattern)
    after = polish(weight, gram, base, group_size=16, pattern=form)
    assert loss(weight, after.value, gram) < 0.97 * loss(weight, base.value, gram)


def settled(weight: Tensor, gram: Tensor, found: Swept, pattern: Pattern | None) -> Swept:
    for _ in range(60):
        after = polish(weight, gram, found, group_size=16, pattern=pattern)
        if torch.equal(after.value, found.value):
            return after
        found = after
    raise AssertionError("did not settle")


def gains_of_single_codes(weight: Tensor, gram: Tensor, found: Swept) -> Tensor:
    """What the objective would fall by for each kept weight and each of its levels, in float64: `[levels, out, in]`."""
    assert found.scale is not None and found.levels is not None
    scale = grid.spread(found.scale, weight.shape[1], 16).double()
    change = found.levels.values.double()[:, None, None] * scale - found.value.double()
    slope = (weight.double() - found.value.double()) @ gram.double()
    gains = 2 * change * slope - change.square() * gram.double().diagonal()
    return gains if found.keep is None else gains * found.keep


@pytest.mark.parametrize("pattern", [None, 0.5])
@pytest.mark.parametrize("levels", [Levels.of_bits(3), TABLE])
def test_where_polishing_settles_no_single_code_would_do_better(levels: Levels, pattern: float | None) -> None:
    weight, gram = draw(12, 36), covariance(36)
    base, _ = swept(weight, gram, levels=levels, pattern=pattern)
    found = settled(weight, gram, base, None if pattern is None else Pattern.parse(pattern))
    # float32's rounding of one weight's share of the objective.
    assert float(gains_of_single_codes(weight, gram, found).max()) <= 1e-6 * float(gram.diagonal().max())


def test_where_polishing_settles_no_other_pair_of_a_four_would_do_better_at_nearest() -> None:
    """Each way to keep two of four, rounded as the sweep would in order of the inputs, costs no less than the way taken."""
    weight, gram, form = draw(6, 16), covariance(16), Pattern.parse("2:4")
    base, _ = swept(weight, gram, levels=Levels.of_bits(3), pattern="2:4")
    found = settled(weight, gram, base, form)
    assert found.scale is not None and found.levels is not None
    now = loss(weight, found.value, gram)
    h = gram.double()
    for low in range(0, 16, 4):
        for first, second in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
            for row in range(6):
                a, b, scale = low + first, low + second, found.scale[row, 0].double()
                trial = found.value[row].double().clone()
                trial[low : low + 4] = 0
                rest = (weight[row].double() - trial) @ h
                best = torch.linalg.solve(h[[a, b]][:, [a, b]], rest[[a, b]])
                trial[a] = (best[0] / scale).round().clamp(-4, 3) * scale
                answer = best[1] + (best[0] - trial[a]) * h[a, b] / h[b, b]
                trial[b] = (answer / scale).round().clamp(-4, 3) * scale
                other = found.value.double().clone()
                other[row] = trial
                # 1e-5: the ridge of 1e-6 on each pair's covariance, and the margin against float32's rounding.
                assert loss(weight, other, gram) >= now * (1 - 1e-5)


def base_of(codes: list[list[float]], scale: float, keep: list[list[bool]] | None = None) -> Swept:
    """A base on the 4-bit grid by hand."""
    value = torch.tensor(codes)
    index = (value + 8).to(torch.uint8)
    kept = None if keep is None else torch.tensor(keep)
    value = value * scale * (1 if kept is None else kept)
    return Swept(value, value, kept, index, torch.full((len(codes), 1), scale), Levels.of_bits(4))


def test_a_scale_takes_its_best_step_by_hand() -> None:
    gram = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    after = polish(torch.tensor([[0.6, 0.6]]), gram, base_of([[1, 1]], 1.0), group_size="per-channel", pattern=None)
    assert after.scale is not None
    assert float(after.scale) == pytest.approx(0.6)  # an only scale is stored in float32
    torch.testing.assert_close(after.value, torch.tensor([[0.6, 0.6]]))


def test_a_group_changes_what_it_keeps_by_hand() -> None:
    gram = torch.diag(torch.tensor([1.0, 4.0]))
    base = base_of([[1, 0]], 1.0, [[True, False]])
    after = polish(torch.tensor([[1.0, 1.0]]), gram, base, group_size="per-channel", pattern=Pattern.parse("1:2"))
    assert after.keep is not None and after.keep.tolist() == [[False, True]]
    assert after.value.tolist() == [[0, 1]]  # 1 is lost, not 4


def test_a_code_makes_up_for_another_that_is_at_its_end_by_hand() -> None:
    # 2.25 is beyond 7 x 0.25, and one scale for both can mend nothing; the second input always says what the first says.
    after = polish(
        torch.tensor([[2.25, -1.75]]), torch.ones(2, 2), base_of([[7, -7]], 0.25), group_size="per-channel", pattern=None
    )
    assert after.value.tolist() == [[1.75, -1.25]]


def test_a_base_that_is_exact_stays_as_it_is() -> None:
    codes = torch.randint(-8, 8, (6, 36), generator=torch.Generator().manual_seed(1)).float()
    weight = codes * 0.125
    keep = choose(codes.abs(), Pattern.parse("2:4"))
    for kept, pattern in ((None, None), (keep, Pattern.parse("2:4"))):
        value = weight if kept is None else weight * kept
        base = Swept(value, value, kept, (codes + 8).to(torch.uint8), torch.full((6, 3), 0.125), Levels.of_bits(4))
        after = polish(value, covariance(36), base, group_size=16, pattern=pattern)
        assert torch.equal(after.value, value)


def test_a_pattern_with_too_many_ways_keeps_its_mask() -> None:
    weight, gram, pattern = draw(6, 36), covariance(36), Pattern.parse("6:12")  # 924 ways
    base, _ = swept(weight, gram, group_size=12, pattern="6:12")
    after = polish(weight, gram, base, group_size=12, pattern=pattern)
    assert base.keep is not None and after.keep is not None and torch.equal(after.keep, base.keep)
    assert loss(weight, after.value, gram) < loss(weight, base.value, gram)


def test_four_of_eight_is_polished_by_all_its_ways() -> None:
    weight, gram, pattern = draw(6, 40), covariance(40), Pattern.parse("4:8")
    base, _ = swept(weight, gram, group_size=8, pattern="4:8")
    after = polish(weight, gram, base, group_size=8, pattern=pattern)
    assert base.keep is not None and after.keep is not None
    assert not torch.equal(after.keep, base.keep)
    assert bool((after.keep.view(6, -1, 8).sum(dim=2) == 4).all())
    assert loss(weight, after.value, gram) < loss(weight, base.value, gram)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_weight_of_zeros_stays_zero(pattern: str | None) -> None:
    weight, gram = torch.zeros(6, 40), covariance(40)
    found, _ = swept(weight, gram, pattern=pattern)
    after = polish(weight, gram, found, group_size=16, pattern=None if pattern is None else Pattern.parse(pattern))
    assert int((meaning(found, 16) != 0).sum()) == int((meaning(after, 16) != 0).sum()) == 0
