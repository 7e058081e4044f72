"""The loops of compression against their laws, written with torch, for every variant; threads change no byte."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.grid import Grid
from slimlm.core.parts.plain import Plain
from slimlm.core.solvers import affine_search, scale_search
from slimlm.kernels import compression
from tests.conftest import needs_kernels
from tests.core.solvers.problems import draw

pytestmark = [needs_kernels, pytest.mark.usefixtures("variant")]

CODEBOOK = Grid(torch.tensor([-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]), False)
SIXTEEN = Grid(torch.linspace(-1, 1, 16).sign() * torch.linspace(-1, 1, 16).square() * 5, False)
GRIDS = {"2-bit": Grid.of_bits(2), "4-bit": Grid.of_bits(4), "8-bit": Grid.of_bits(8), "eight": CODEBOOK, "sixteen": SIXTEEN}
SHAPES = [(1, 1), (37, 24), (16, 33), (3, 700), (1, 40_000), (70, 128)]
"""Sets searched together and one by one (above 512), some of them not filling a vector."""


@pytest.fixture(params=GRIDS)
def values(request: pytest.FixtureRequest) -> Grid:
    """Even grids and codebooks in turn."""
    return GRIDS[request.param]


def with_torch(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Tensor]) -> Tensor:
    """The result of the form written with torch."""
    with monkeypatch.context() as patch:
        patch.setattr(compression, "available", lambda: False)
        return run()


def on_threads(count: int, run: Callable[[], Tensor]) -> Tensor:
    """The result with this many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)


def sets_of(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Numbers and weights, a fifth of the weights zero; one set of zeros where there are many, and one without weight."""
    points, weights = draw(*shape), torch.exp(draw(*shape, seed=5)) * (draw(*shape, seed=6) > -0.8)
    if shape[0] > 16:
        points[3], weights[5] = 0, 0
    return points, weights


def error(points: Tensor, weights: Tensor, scale: Tensor, values: Grid) -> Tensor:
    """`[sets]`, in float64; a scale of zero makes everything zero."""
    wide = scale.double()[:, None]
    ratio = (points / torch.where(wide == 0, torch.inf, wide)).float()
    return ((values.nearest(ratio) * wide * (wide != 0) - points).square() * weights).sum(dim=1)


def assert_as_good(found: Tensor, law: Tensor, slack: float = 1e-3) -> None:
    """Errors `[sets]` that agree in the sum, and hardly differ in any set, where two scales may err alike."""
    torch.testing.assert_close(found.sum(), law.sum(), rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(found, law, rtol=slack, atol=1e-10)


# Codes


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("shape", "group"), [((37, 300), 128), ((5, 1), 1), ((1, 40_000), 40_000), ((300, 77), 32), ((0, 8), 4)]
)
def test_codes_are_those_that_torch_rounds_to(bits: int, shape: tuple[int, int], group: int) -> None:
    weight = draw(*shape)
    scale = torch.rand(shape[0], -(-shape[1] // group), generator=torch.Generator().manual_seed(bits)) / 2**bits - 0.01
    scale[:, 1::3] = 0
    wide = grid.spread(scale, shape[1], group)
    expected = torch.where(wide == 0, torch.tensor(0.0), grid.nearest_code(weight / wide, bits)).to(torch.int8)
    for threads in (1, 2):
        found = on_threads(threads, lambda: compression.encode(weight, scale, bits=bits, group=group))
        assert torch.equal(found, expected)


def test_ties_are_rounded_to_even_and_numbers_beyond_the_grid_to_its_ends() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, 7.4]])
    codes = compression.encode(weight, torch.ones(1, 1), bits=4, group=8)
    assert codes.tolist() == [[0, 2, 2, 0, -2, 7, -8, 7]]


def test_a_histogram_takes_no_infinity_and_stays_in_its_bins() -> None:
    numbers = torch.tensor([0.5] * 33 + [float("nan"), -3.0, 3.0])
    assert compression.histogram(numbers, None, low=-1.0, width=0.5, bins=4).tolist() == [2, 0, 0, 34]
    for low, width in ((float("-inf"), 1.0), (0.0, float("inf"))):
        with pytest.raises(compression.CompressionKernelError):
            compression.histogram(numbers, None, low=low, width=width, bins=4)


# Scales


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_err_as_those_that_torch_finds(shape: tuple[int, int], values: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    points, weights = sets_of(shape)

    def best() -> Tensor:
        return scale_search.best_scale(points, weights, values)

    def signed() -> Tensor:
        return scale_search.signed_scale(points, weights, values)

    start = signed() * 1.1

    def nearby() -> Tensor:
        return scale_search.nearby_scale(points, weights, values, start)

    for search in (best, signed, nearby):
        found, law = search(), with_torch(monkeypatch, search)
        assert bool(found.isfinite().all())
        assert_as_good(*(error(points, weights, scale, values) for scale in (found, law)))
        assert torch.equal(found == 0, law == 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_and_strides_change_no_byte_of_a_scale(shape: tuple[int, int], values: Grid) -> None:
    points, weights = sets_of(shape)
    start = scale_search.best_scale(points, weights, values) * 1.1
    columns, shared = points.T.contiguous().T, weights[:1].contiguous().expand_as(points)
    for search in (
        lambda p, w: scale_search.signed_scale(p, w, values),
        lambda p, w: scale_search.nearby_scale(p, w, values, start),
        lambda p, w: torch.stack(affine_search.affine_scale(p, w, bits=4)),
        lambda p, w: scale_search.least_squares_scale(p, start, 4, w),
    ):
        one, two = (on_threads(count, lambda: search(points, weights)) for count in (1, 2))  # noqa: B023
        assert torch.equal(one, two)
        assert torch.equal(search(columns, weights), one)
        assert torch.equal(search(points, shared), search(points, shared.contiguous()))


def test_a_scale_by_hand() -> None:
    # On -2, -1, 0, 1 these are exact with the scale -1, 1 and 0. One number alone is exact on the codes 7, 6, 5 and 4.
    points = torch.tensor([[2.0, -1.0], [-2.0, 1.0], [0.0, 0.0]])
    scale = compression.best_scale(points, torch.ones(3, 2), Grid.of_bits(2).values, even=True, coarse=24, either_sign=True)
    assert scale.tolist() == pytest.approx([-1, 1, 0], rel=2**-8)
    alone = compression.best_scale(torch.tensor([[0.7]]), torch.ones(1, 1), Grid.of_bits(4).values, even=True, coarse=48)
    code = 0.7 / float(alone)
    assert code == pytest.approx(round(code)) and 4 <= round(code) <= 7


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_least_squares_scales_err_as_those_of_torch(
    shape: tuple[int, int], bits: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, weights = sets_of(shape)
    given = weights if weighted else None
    start = grid.absmax_scale(points, bits) * 0.8

    def fit() -> Tensor:
        return scale_search.least_squares_scale(points, start, bits, given)

    found, law = fit(), with_torch(monkeypatch, fit)
    counted = torch.ones_like(points) if given is None else given
    assert_as_good(*(error(points, counted, scale, Grid.of_bits(bits)) for scale in (found, law)))


# Scales with a zero


def affine_error(points: Tensor, weights: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """`[sets]`, in float64, by the definition."""
    wide, shift = scale.double()[:, None], zero.double()[:, None]
    codes = (points / torch.where(wide == 0, torch.inf, wide)).round() + shift
    return (((codes.clamp(0, 2**bits - 1) - shift) * wide - points).square() * weights).sum(dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, 1.5])
def test_scales_and_zeros_err_as_those_that_torch_finds(
    shape: tuple[int, int], bits: int, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    points, weights = sets_of(shape)
    points = points + shift * (points != 0)

    def search() -> Tensor:
        return torch.stack(affine_search.affine_scale(points, weights, bits=bits))

    found, law = search(), with_torch(monkeypatch, search)
    assert bool((found[1] == found[1].round()).all()) and float(found[1].min()) >= 0 and float(found[1].max()) <= 2**bits - 1
    # Of two candidates that err alike in float32 either may be refined, and the refinements then end elsewhere: 1 %.
    assert_as_good(*(affine_error(points, weights, each[0], each[1], bits) for each in (found, law)), slack=0.01)


# Histograms


@pytest.mark.parametrize("weighted", [False, True])
def test_a_histogram_is_that_of_torch(weighted: bool) -> None:
    numbers = draw(700_000)
    weights = torch.rand(700_000, generator=torch.Generator().manual_seed(1)) if weighted else None
    width = 2 * 6 / 1000
    bins = ((numbers + 6) / width).long().clamp(0, 999)
    expected = torch.bincount(bins, None if weights is None else weights.double(), minlength=1000).double()
    one, two = (on_threads(n, lambda: compression.histogram(numbers, weights, low=-6, width=width, bins=1000)) for n in (1, 2))
    assert torch.equal(one, two)
    # The division by the width in float32 may put a number that lies on a border on its other side.
    torch.testing.assert_close(one.cumsum(0), expected.cumsum(0), rtol=1e-5, atol=20)
    assert float(one.sum()) == pytest.approx(float(expected.sum()), rel=1e-9)


def test_numbers_beyond_the_bins_join_the_outermost() -> None:
    numbers = torch.tensor([-9.0, 0.5, 1.0, 1.5, 9.0])
    assert compression.histogram(numbers, None, low=0, width=1, bins=2).tolist() == [2, 3]


# Storing


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 130, 3000])
def test_packed_codes_are_those_of_torch(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(0, 2**bits, (11, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    law = with_torch(monkeypatch, lambda: bitstream.pack(codes, bits))
    for threads in (1, 2):
        packed = on_threads(threads, lambda: bitstream.pack(codes, bits))
        assert torch.equal(packed, law)
        assert torch.equal(on_threads(threads, lambda: bitstream.unpack(packed, bits, count)), codes)  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kept", [0, 1, 50, 99, 100])
def test_what_a_mask_keeps_is_what_torch_selects(dtype: torch.dtype, kept: int) -> None:
    mask = draw(300, 100).argsort(dim=1) < kept
    elements = (100 * draw(300, 100, seed=2)).clamp(-120, 120).abs().to(dtype)
    for threads in (1, 2):
        some = on_threads(threads, lambda: compression.gather(elements, mask, kept))
        assert torch.equal(some.flatten(), elements[mask])
        assert torch.equal(on_threads(threads, lambda: compression.scatter(some, mask)), elements * mask)  # noqa: B023


def test_a_pruned_part_is_stored_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    mask, part = draw(40, 24).argsort(dim=1) < 9, Plain(draw(40, 24, seed=1).half())
    found = part.tensors(mask=mask)[""]
    assert torch.equal(found, with_torch(monkeypatch, lambda: part.tensors(mask=mask)[""]))


# What it refuses


def test_what_the_library_does_not_take_is_left_to_torch() -> None:
    assert compression.takes(torch.zeros(2)) and compression.takes_bytes(torch.zeros(2, dtype=torch.int8))
    for other in (torch.zeros(2, dtype=torch.float64), torch.zeros(2, device="meta"), torch.zeros(2, dtype=torch.int32)):
        assert not compression.takes(torch.zeros(2), other) and not compression.takes_bytes(other)


def test_a_wrong_argument_is_an_error_with_the_name_of_the_function() -> None:
    with pytest.raises(compression.CompressionKernelError, match="slimlm_best_scale found an argument"):
        compression.best_scale(torch.ones(2, 3), torch.ones(2, 3), torch.tensor([-2.0, -1.0]), even=False, coarse=24)
