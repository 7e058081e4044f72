"""The pieces of the sweep and of coordinate descent against their laws, written with torch, for every variant."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimlm.core.cache import Cache
from slimlm.core.grid import Grid, GroupSize
from slimlm.core.mask import Pattern
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.solvers.adapter_descent import descend_adapter
from slimlm.core.solvers.base_descent import descend_base
from slimlm.core.solvers.inverse import inverse_in_order
from slimlm.core.solvers.low_rank import AdapterFormat, low_rank_part
from slimlm.core.solvers.order import activation_order, order_of
from slimlm.core.solvers.rounding import OutputGroups
from slimlm.core.solvers.sweep import rounded_sweep, sweep, unrounded_sweep
from slimlm.core.solvers.swept import Swept
from slimlm.kernels import compression
from slimlm.kernels import sweep as kernel
from tests.conftest import needs_kernels
from tests.core.solvers.problems import covariance_of, draw

pytestmark = [needs_kernels, pytest.mark.usefixtures("variant")]

SIXTEEN = Grid((torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).square() * 5).half().float(), False)
GRIDS = {
    "1-bit": Grid(torch.tensor([-1.0, 1.0]), False),
    "3-bit": Grid.of_bits(3),
    "8-bit": Grid.of_bits(8),
    "2-bit, zeros": Grid.of_bits(2, zeros=True),
    "4-bit, zeros": Grid.of_bits(4, zeros=True),
    "sixteen": SIXTEEN,
}
SHAPES = [(1, 8), (37, 200), (96, 128)]
"""Weights with fewer outputs than a vector has lanes, with a short block at the end, and with whole ones."""
PATTERNS = [None, "2:4", "1:2", "4:8", "3:4", 0.5]
GROUPS: list[GroupSize] = [8, 48, 128, "per-channel", "per-tensor"]


def with_torch(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Swept]) -> Swept:
    """The result of the form written with torch; scales are searched in the library as before."""
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "takes", lambda *_: False)
        return run()


def problem(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A weight and a covariance of which one input is always zero."""
    covariance = covariance_of(shape[1])
    covariance[3], covariance[:, 3] = 0, 0
    return draw(*shape), covariance


def swept(
    shape: tuple[int, int], grid: Grid | None, group_size: GroupSize, pattern: str | float | None, *, given: bool = False
) -> Swept:
    """A sweep; `given`: under a mask that is not chosen."""
    weight, covariance = problem(shape)
    form = None if pattern is None else Pattern.parse(pattern)
    order = order_of(covariance.diagonal(), group_size=group_size, pattern=form)
    inverse = inverse_in_order(covariance, order.inputs, damp=0.01, cache=Cache())
    mask = draw(*shape, seed=9) > 0 if given else None
    if given:
        form = None
    if grid is None:
        return unrounded_sweep(weight, inverse, order, pattern=form, mask=mask)
    return rounded_sweep(weight, inverse, order, grid=grid, pattern=form, mask=mask)


def objective(weight: Tensor, covariance: Tensor, base: Swept) -> float:
    error = (weight - base.value).double()
    return float((error @ covariance.double() * error).sum())


def assert_alike(found: Swept, law: Swept, shape: tuple[int, int], slack: float) -> None:
    """Nearly all weights alike: where a ratio lies between two codes, rounding of float32 decides, and what follows differs."""
    weight, covariance = problem(shape)
    assert objective(weight, covariance, found) == pytest.approx(objective(weight, covariance, law), rel=slack)
    alike = (found.value - law.value).abs() <= 1e-4 * law.value.abs().max()
    assert float(alike.float().mean()) > 1 - slack
    if found.mask is not None:
        assert law.mask is not None
        assert torch.equal(found.mask.sum(dim=1), law.mask.sum(dim=1))
    if found.index is not None:
        assert found.grid is not None and found.scale is not None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", [*GRIDS.values(), None], ids=[*GRIDS, "unrounded"])
def test_a_sweep_decides_as_with_torch(
    shape: tuple[int, int], grid: Grid | None, pattern: str | float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Swept:
        return swept(shape, grid, 8, pattern)

    assert_alike(run(), with_torch(monkeypatch, run), shape, slack=0.03)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("given", [False, True])
def test_a_sweep_decides_as_with_torch_in_every_group_and_under_a_given_mask(
    group_size: GroupSize, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Swept:
        return swept((37, 200), Grid.of_bits(4), group_size, "2:4", given=given)

    assert_alike(run(), with_torch(monkeypatch, run), (37, 200), slack=0.03)


def test_scales_of_every_input_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = draw(70, 40)
    inverse = inverse_in_order(covariance_of(40), torch.arange(40), damp=0.01, cache=Cache())

    def run() -> Swept:
        rounding = OutputGroups(factor, Grid.of_bits(4), 32)
        return replace(sweep(factor, inverse, rounding=rounding), index=rounding.index)

    found, law = run(), with_torch(monkeypatch, run)
    torch.testing.assert_close(found.value, law.value)
    assert found.index is not None and law.index is not None
    assert torch.equal(found.index, law.index)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("given", [False, True])
def test_inputs_in_activation_order_are_decided_as_with_torch(
    grid: Grid, group_size: GroupSize, given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, covariance = problem((37, 200))
    order = activation_order(covariance.diagonal(), group_size=group_size)
    inverse = inverse_in_order(covariance, order.inputs, damp=0.01, cache=Cache())
    mask = draw(37, 200, seed=9) > 0 if given else None

    def run() -> Swept:
        return rounded_sweep(weight, inverse, order, grid=grid, mask=mask)

    found = run()
    assert_alike(found, with_torch(monkeypatch, run), (37, 200), slack=0.03)
    dense = found.part(group_size).dense()
    torch.testing.assert_close(dense if mask is None else dense * mask, found.value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_descent_decides_as_with_torch(
    shape: tuple[int, int], grid: Grid, pattern: str | float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, covariance = problem(shape)
    start = with_torch(monkeypatch, lambda: swept(shape, grid, 8, pattern))

    def run() -> Swept:
        form = None if pattern is None else Pattern.parse(pattern)
        return descend_base(weight, covariance, start, group_size=8, pattern=form)

    found = run()
    assert objective(weight, covariance, found) < objective(weight, covariance, start)
    assert_alike(found, with_torch(monkeypatch, run), shape, slack=0.03)


@pytest.mark.parametrize("group_size", GROUPS)
def test_descent_decides_as_with_torch_in_every_group(group_size: GroupSize, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, covariance = problem((37, 200))
    start = with_torch(monkeypatch, lambda: swept((37, 200), Grid.of_bits(4), group_size, None))

    def run() -> Swept:
        return descend_base(weight, covariance, start, group_size=group_size, pattern=None)

    found = run()
    assert objective(weight, covariance, found) < objective(weight, covariance, start)
    assert_alike(found, with_torch(monkeypatch, run), (37, 200), slack=0.03)


@pytest.mark.parametrize(("out", "width", "rank"), [(1, 8, 1), (37, 200, 20), (96, 150, 70)])
@pytest.mark.parametrize("group_size", [16, 128])
def test_descent_on_an_adapter_decides_as_with_torch(
    out: int, width: int, rank: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, covariance = problem((out, width))
    form = AdapterFormat(rank / min(out, width), 4, group_size, True)
    part = low_rank_part(error, covariance, form)
    assert part is not None

    def objective_of(adapter: LowRank) -> float:
        left = (error - adapter.dense()).double()
        return float((left @ covariance.double() * left).sum())

    def law() -> LowRank:
        with monkeypatch.context() as patch:
            patch.setattr(kernel, "takes", lambda *_: False)
            return descend_adapter(error, covariance, part)

    found, expected = descend_adapter(error, covariance, part), law()
    assert objective_of(found) <= objective_of(part) * (1 + 1e-6)
    assert objective_of(found) == pytest.approx(objective_of(expected), rel=1e-2)
    for one, other in ((found.left, expected.left), (found.right, expected.right)):
        assert float((one.dense() == other.dense()).float().mean()) > 0.97


def test_threads_change_no_byte() -> None:
    weight, covariance = problem((96, 128))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        base = swept((96, 128), SIXTEEN, 32, "2:4")
        results.append((base, descend_base(weight, covariance, base, group_size=32, pattern=Pattern.parse("2:4"))))
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one.value, two.value)
        assert torch.equal(one.index, two.index)  # type: ignore[arg-type]


def test_what_the_library_cannot_take_it_refuses_in_words() -> None:
    with pytest.raises(compression.CompressionKernelError, match="an argument that it does not take"):
        compression.called("slimlm_sweep", None, 0, 4)
