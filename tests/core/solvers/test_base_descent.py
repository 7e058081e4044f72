"""Coordinate descent on a rounded base: never worse, at convergence no single change would gain."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from slimlm.core.grid import Grid, GroupSize, spread
from slimlm.core.mask import Pattern, choose
from slimlm.core.solvers.base_descent import descend_base
from slimlm.core.solvers.swept import Swept
from tests.core.solvers.problems import CODEBOOK, COVARIANCES, covariance_of, dense_of, draw, loss, swept


def started(weight: Tensor, covariance: Tensor, group_size: GroupSize, pattern: str | float | None, grid: Grid) -> Swept:
    """A base to improve; "given" is a mask that no pattern would choose."""
    if pattern != "given":
        return swept(weight, covariance, group_size=group_size, pattern=pattern, grid=grid)[0]
    mask = draw(*weight.shape, seed=11) > 0.3
    return swept(weight, covariance, group_size=group_size, mask=mask, grid=grid)[0]


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", 0.5, "given"])
def test_no_pass_raises_the_objective_and_codes_and_mask_stay_lawful(kind: str, pattern: str | float | None) -> None:
    form = None if pattern in (None, "given") else Pattern.parse(pattern)  # type: ignore[arg-type]
    groups: dict[Any, list[GroupSize]] = {
        None: [4, 16, "per-tensor"],
        "2:4": [8, 48, "per-channel"],
        "1:4": [4, "per-tensor"],
        0.5: [16, "per-channel"],
    }
    for seed, group_size in enumerate(groups.get(pattern, [4, "per-tensor"])):
        weight, covariance = draw(12, 36, seed=seed), covariance_of(36, kind, seed=seed + 40)
        grid = (Grid.of_bits(3), CODEBOOK, Grid.of_bits(3, zeros=True))[seed % 3]
        found = started(weight, covariance, group_size, pattern, grid)
        losses = [loss(weight, dense_of(found, group_size), covariance)]
        for _ in range(2):
            before = found
            found = descend_base(weight, covariance, found, group_size=group_size, pattern=form)
            losses.append(loss(weight, dense_of(found, group_size), covariance))
            assert found.index is not None and int(found.index.max()) < 2**grid.bits
            torch.testing.assert_close(dense_of(found, group_size), found.value, rtol=1e-5, atol=1e-7)  # float32, several times
            if pattern is None:
                assert found.mask is None
            else:
                assert found.mask is not None and before.mask is not None
                if form is None or not form.of:
                    assert torch.equal(found.mask, before.mask)
                else:
                    assert bool((found.mask.view(12, -1, 4).sum(dim=2) == form.kept).all())
        # float32's rounding, relative to the terms that make up the objective.
        whole = loss(weight, torch.zeros_like(weight), covariance)
        assert all(after <= before + 1e-6 * whole for before, after in pairwise(losses)), (group_size, losses)


@pytest.mark.parametrize("pattern", [None, "2:4", 0.5])
def test_a_pass_gains_where_there_is_something_to_gain(pattern: str | float | None) -> None:
    weight, covariance = draw(16, 48), covariance_of(48)
    base, _ = swept(weight, covariance, grid=Grid.of_bits(3), pattern=pattern)
    form = None if pattern is None else Pattern.parse(pattern)
    after = descend_base(weight, covariance, base, group_size=16, pattern=form)
    assert loss(weight, after.value, covariance) < 0.97 * loss(weight, base.value, covariance)


def converged(weight: Tensor, covariance: Tensor, found: Swept, pattern: Pattern | None) -> Swept:
    for _ in range(60):
        after = descend_base(weight, covariance, found, group_size=16, pattern=pattern)
        if torch.equal(after.value, found.value):
            return after
        found = after
    raise AssertionError("did not converge")


def gains_of_single_codes(weight: Tensor, covariance: Tensor, found: Swept) -> Tensor:
    """What the objective would fall by for each kept weight and each of its grid, in float64: `[grid, out, in]`."""
    assert found.scale is not None and found.grid is not None
    scale = spread(found.scale, weight.shape[1], 16).double()
    values = found.grid.values.double()[:, None, None]
    if found.zero is not None:
        values = torch.arange(len(values))[:, None, None] - spread(found.zero, weight.shape[1], 16).double()
    change = values * scale - found.value.double()
    slope = (weight.double() - found.value.double()) @ covariance.double()
    gains = 2 * change * slope - change.square() * covariance.double().diagonal()
    return gains if found.mask is None else gains * found.mask


@pytest.mark.parametrize("pattern", [None, 0.5])
@pytest.mark.parametrize("grid", [Grid.of_bits(3), CODEBOOK, Grid.of_bits(3, zeros=True)])
def test_at_convergence_no_single_code_would_do_better(grid: Grid, pattern: float | None) -> None:
    weight, covariance = draw(12, 36), covariance_of(36)
    base, _ = swept(weight, covariance, grid=grid, pattern=pattern)
    found = converged(weight, covariance, base, None if pattern is None else Pattern.parse(pattern))
    # float32's rounding of one weight's share of the objective.
    assert float(gains_of_single_codes(weight, covariance, found).max()) <= 1e-6 * float(covariance.diagonal().max())


def test_at_convergence_no_other_pair_of_a_four_would_do_better_at_nearest() -> None:
    """Each way to keep two of four, rounded as the sweep would in order of the inputs, costs no less than the way taken."""
    weight, covariance, form = draw(6, 16), covariance_of(16), Pattern.parse("2:4")
    base, _ = swept(weight, covariance, grid=Grid.of_bits(3), pattern="2:4")
    found = converged(weight, covariance, base, form)
    assert found.scale is not None and found.grid is not None
    now = loss(weight, found.value, covariance)
    h = covariance.double()
    for low in range(0, 16, 4):
        for first, second in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
            for row in range(6):
                a, b, scale = low + first, low + second, found.scale[row, 0].double()
                trial = found.value[row].double().clone()
                trial[low : low + 4] = 0
                rest = (weight[row].double() - trial) @ h
                best = torch.linalg.solve(h[[a, b]][:, [a, b]], rest[[a, b]])
                trial[a] = (best[0] / scale).round().clamp(-4, 3) * scale
                other = best[1] + (best[0] - trial[a]) * h[a, b] / h[b, b]
                trial[b] = (other / scale).round().clamp(-4, 3) * scale
                other = found.value.double().clone()
                other[row] = trial
                # 1e-5: the ridge of 1e-6 on each pair's covariance, and the margin against float32's rounding.
                assert loss(weight, other, covariance) >= now * (1 - 1e-5)


def base_of(codes: list[list[float]], scale: float, mask: list[list[bool]] | None = None) -> Swept:
    """A base on the 4-bit grid by hand."""
    value = torch.tensor(codes)
    index = (value + 8).to(torch.uint8)
    kept = None if mask is None else torch.tensor(mask)
    value = value * scale * (1 if kept is None else kept)
    return Swept(value, value, kept, index, torch.full((len(codes), 1), scale), Grid.of_bits(4))


def test_a_scale_takes_its_best_step_by_hand() -> None:
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    after = descend_base(torch.tensor([[0.6, 0.6]]), covariance, base_of([[1, 1]], 1.0), group_size="per-channel", pattern=None)
    assert after.scale is not None
    assert float(after.scale) == pytest.approx(0.6)  # an only scale is stored in float32
    torch.testing.assert_close(after.value, torch.tensor([[0.6, 0.6]]))


def test_a_group_changes_what_it_keeps_by_hand() -> None:
    covariance = torch.diag(torch.tensor([1.0, 4.0]))
    base = base_of([[1, 0]], 1.0, [[True, False]])
    after = descend_base(torch.tensor([[1.0, 1.0]]), covariance, base, group_size="per-channel", pattern=Pattern.parse("1:2"))
    assert after.mask is not None and after.mask.tolist() == [[False, True]]
    assert after.value.tolist() == [[0, 1]]  # 1 is lost, not 4


def test_a_code_makes_up_for_another_that_is_at_its_end_by_hand() -> None:
    # 2.25 is beyond 7 x 0.25, and one scale for both can mend nothing; the second input always says what the first says.
    after = descend_base(
        torch.tensor([[2.25, -1.75]]), torch.ones(2, 2), base_of([[7, -7]], 0.25), group_size="per-channel", pattern=None
    )
    assert after.value.tolist() == [[1.75, -1.25]]


def test_a_base_that_is_exact_stays_as_it_is() -> None:
    codes = torch.randint(-8, 8, (6, 36), generator=torch.Generator().manual_seed(1)).float()
    weight = codes * 0.125
    mask = choose(codes.abs(), Pattern.parse("2:4"))
    for kept, pattern in ((None, None), (mask, Pattern.parse("2:4"))):
        value = weight if kept is None else weight * kept
        base = Swept(value, value, kept, (codes + 8).to(torch.uint8), torch.full((6, 3), 0.125), Grid.of_bits(4))
        after = descend_base(value, covariance_of(36), base, group_size=16, pattern=pattern)
        assert torch.equal(after.value, value)


def test_a_pattern_with_too_many_ways_keeps_its_mask() -> None:
    weight, covariance, pattern = draw(6, 36), covariance_of(36), Pattern.parse("6:12")  # 924 ways
    base, _ = swept(weight, covariance, group_size=12, pattern="6:12")
    after = descend_base(weight, covariance, base, group_size=12, pattern=pattern)
    assert base.mask is not None and after.mask is not None and torch.equal(after.mask, base.mask)
    assert loss(weight, after.value, covariance) < loss(weight, base.value, covariance)


def test_four_of_eight_is_improved_over_all_its_ways() -> None:
    weight, covariance, pattern = draw(6, 40), covariance_of(40), Pattern.parse("4:8")
    base, _ = swept(weight, covariance, group_size=8, pattern="4:8")
    after = descend_base(weight, covariance, base, group_size=8, pattern=pattern)
    assert base.mask is not None and after.mask is not None
    assert not torch.equal(after.mask, base.mask)
    assert bool((after.mask.view(6, -1, 8).sum(dim=2) == 4).all())
    assert loss(weight, after.value, covariance) < loss(weight, base.value, covariance)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_a_weight_of_zeros_stays_zero(pattern: str | None) -> None:
    weight, covariance = torch.zeros(6, 40), covariance_of(40)
    found, _ = swept(weight, covariance, pattern=pattern)
    after = descend_base(weight, covariance, found, group_size=16, pattern=None if pattern is None else Pattern.parse(pattern))
    assert int((dense_of(found, 16) != 0).sum()) == int((dense_of(after, 16) != 0).sum()) == 0
