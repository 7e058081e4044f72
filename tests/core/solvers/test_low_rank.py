"""From an error to a stored low-rank part: true ranks, honest rounding, refits that only help."""

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import RecipeError
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers import linalg
from slimlm.core.solvers.inverse import inverse_of
from slimlm.core.solvers.low_rank import REFITS, AdapterBits, AdapterFormat, half, low_rank_part
from tests.core.solvers.problems import draw, uneven_covariance


def weights_of(kind: str, width: int = 60) -> Tensor:
    spread = 10 ** (2 * draw(width, seed=9).clamp(-1, 1))
    return {"ones": torch.ones(width), "spread": spread, "dead": spread * (torch.arange(width) % 3 != 0)}[kind]


def form(rank: float = 0.2, bits: AdapterBits = 4, *, group_size: int = 16, refit: bool = True) -> AdapterFormat:
    return AdapterFormat(rank, bits, group_size, refit)


def part_for(error: Tensor, weights: Tensor, how: AdapterFormat, *, refits: int = REFITS) -> LowRank:
    part = low_rank_part(error, weights, how, refits=refits)
    assert part is not None
    return part


def left_over(error: Tensor, weights: Tensor, how: AdapterFormat, *, refits: int = REFITS) -> float:
    return linalg.weighted_square(error - part_for(error, weights, how, refits=refits).dense(), weights)


@pytest.mark.parametrize("kind", ["ones", "spread", "dead"])
@pytest.mark.parametrize("bits", [4, 8])
def test_refitting_never_leaves_more_than_rounding_once(kind: str, bits: AdapterBits) -> None:  # law 16
    for seed in range(4):
        error, weights = draw(40, 60, seed=seed), weights_of(kind)
        assert left_over(error, weights, form(bits=bits)) <= left_over(error, weights, form(bits=bits, refit=False))


def test_refitting_four_bit_factors_gains_something() -> None:  # law 16, so that it is not met by doing nothing
    error, weights = draw(40, 4) @ draw(4, 60, seed=1) + 0.1 * draw(40, 60, seed=2), weights_of("spread")
    assert left_over(error, weights, form()) < 0.98 * left_over(error, weights, form(refit=False))


@pytest.mark.parametrize("kind", ["ones", "spread", "dead"])
def test_sixteen_bit_factors_leave_what_the_best_product_leaves(kind: str) -> None:  # law 9, as stored
    error, weights = draw(40, 60), weights_of(kind)
    left, right = linalg.best_low_rank(error, weights, 8)
    least = linalg.weighted_square(error - left @ right, weights)
    # float16 factors are off by 2^-11 each; their effect on the residual is of second order plus that of the noise.
    assert left_over(error, weights, form(bits=16)) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("kind", ["ones", "spread", "dead"])
def test_more_bits_never_leave_more(kind: str) -> None:
    error, weights = draw(40, 60), weights_of(kind)
    at4, at8, at16 = (left_over(error, weights, form(bits=bits)) for bits in (4, 8, 16))
    assert at16 < at8 < at4


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_higher_rank_leaves_less(bits: AdapterBits) -> None:  # law 12
    error, weights = draw(40, 60), weights_of("spread")
    left = [left_over(error, weights, form(rank, bits)) for rank in (0.1, 0.3, 0.6, 1.0)]
    assert left == sorted(left, reverse=True)


def test_the_full_rank_at_sixteen_bits_leaves_only_rounding() -> None:  # law 12
    error, weights = draw(40, 60), weights_of("spread")
    # Relative error of a product of two float16 factors, squared: (2 x 2^-11)^2.
    assert left_over(error, weights, form(1.0, 16)) <= 2.0**-20 * linalg.weighted_square(error, weights)


def test_rank_zero_is_no_part() -> None:  # law 12
    assert low_rank_part(draw(8, 12), torch.ones(12), form(0.0)) is None
    assert low_rank_part(draw(8, 12), torch.ones(12), form(0.1)) is None  # 0.1 x 8 is less than one component


@pytest.mark.parametrize(
    ("share", "shape", "rank"), [(0.1, (48, 172), 4), (0.3, (10, 90), 3), (0.07, (100, 200), 7), (1.0, (9, 5), 5)]
)
def test_the_rank_is_the_integer_part_of_the_share_and_is_never_padded(
    share: float, shape: tuple[int, int], rank: int
) -> None:  # law 29
    assert form(share).rank_of(shape) == rank
    assert part_for(draw(*shape), torch.ones(shape[1]), form(share)).rank == rank


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("shape", [(48, 172), (7, 5), (172, 48)])
def test_groups_that_do_not_divide_cost_one_short_group(shape: tuple[int, int], bits: AdapterBits) -> None:  # law 29
    part = part_for(draw(*shape), torch.ones(shape[1]), form(0.5, bits, group_size=32))
    scales = sum(-(-n // 32) for n in shape)
    size = sum(-(-n * bits // 8) for n in shape) * 8 + (0 if bits == 16 else 16 * scales)
    assert part.storage_bits() == part.rank * size


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", ["ones", "dead"])
def test_an_error_of_zero_gives_a_part_of_zero(kind: str, bits: AdapterBits) -> None:
    assert int((part_for(torch.zeros(40, 60), weights_of(kind), form(bits=bits)).dense() != 0).sum()) == 0


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("size", [1e-8, 1.0, 1e6])
def test_the_size_of_the_error_does_not_change_how_well_the_part_stands_for_it(size: float, bits: AdapterBits) -> None:
    error, weights = draw(40, 60), weights_of("spread")
    share = left_over(error * size, weights, form(bits=bits)) / size**2
    # Scales and factors round at other places: 2^-11 of the factors, and at 4 bits some codes flip.
    assert share == pytest.approx(left_over(error, weights, form(bits=bits)), rel=0.03)


def test_where_all_inputs_are_dead_the_part_is_still_finite() -> None:
    for bits in (4, 8, 16):
        part = low_rank_part(draw(40, 60), torch.zeros(60), form(bits=bits))
        assert part is not None
        assert bool(part.dense().isfinite().all())


def test_the_same_error_gives_the_same_part() -> None:  # law 28
    first, second = (part_for(draw(40, 60), weights_of("spread"), form()) for _ in range(2))
    assert torch.equal(first.dense(), second.dense())


def test_factors_are_stored_as_asked() -> None:
    rounded = part_for(draw(40, 60), torch.ones(60), form(bits=4))
    assert isinstance(rounded.left, Uniform) and isinstance(rounded.right, Uniform)
    assert (rounded.left.bits, rounded.right.bits, rounded.left.group_size) == (4, 4, 16)
    whole = part_for(draw(40, 60), torch.ones(60), form(bits=16))
    assert isinstance(whole.left, Plain) and isinstance(whole.right, Plain)
    assert whole.left.values.dtype == whole.right.values.dtype == torch.float16


def test_sixteen_bit_values_beyond_float16_are_kept_finite() -> None:
    wide = half(torch.tensor([[1.0, 1e6]]))
    assert wide.values.dtype == torch.bfloat16
    # bfloat16 has eight significant bits.
    torch.testing.assert_close(wide.dense(), torch.tensor([[1.0, 1e6]]), rtol=2.0**-8, atol=0)
    assert half(torch.tensor([[1.0, 65504.0]])).values.dtype == torch.float16


@pytest.mark.parametrize(
    ("rank", "bits", "group_size"), [(-0.1, 4, 128), (1.5, 4, 128), (float("nan"), 4, 128), (0.1, 5, 128), (0.1, 4, 0)]
)
def test_a_format_that_makes_no_sense_is_refused(rank: float, bits: AdapterBits, group_size: int) -> None:
    with pytest.raises(RecipeError):
        AdapterFormat(rank, bits, group_size, refit=True)


# The full covariance


@pytest.mark.parametrize("kind", ["full", "singular", "dead"])
@pytest.mark.parametrize("bits", [4, 8])
def test_refitting_under_a_covariance_never_leaves_more_than_rounding_once(kind: str, bits: AdapterBits) -> None:  # law 16
    covariance = uneven_covariance(kind)
    for seed in range(2):
        error = draw(40, 60, seed=seed)
        assert left_over(error, covariance, form(bits=bits)) <= left_over(error, covariance, form(bits=bits, refit=False))


def test_more_refits_never_leave_more() -> None:  # law 16
    error, covariance = draw(40, 60), uneven_covariance()
    left = [left_over(error, covariance, form(), refits=refits) for refits in range(3)]
    assert left == sorted(left, reverse=True)
    assert left[1] < left[0]


@pytest.mark.parametrize("kind", ["full", "singular", "dead"])
def test_sixteen_bit_factors_leave_what_the_best_product_leaves_under_a_covariance(kind: str) -> None:  # law 9, as stored
    error, covariance = draw(40, 60), uneven_covariance(kind)
    left, right = linalg.best_low_rank(error, covariance, 8)
    # float16 factors are off by 2^-11 each; their effect on the residual is of second order plus that of the noise.
    assert left_over(error, covariance, form(bits=16)) == pytest.approx(
        linalg.weighted_square(error - left @ right, covariance), rel=1e-3
    )


@pytest.mark.parametrize("kind", ["full", "singular", "dead"])
def test_four_bits_lose_little_of_what_the_best_product_gains(kind: str) -> None:
    covariance = uneven_covariance(kind)
    for seed in range(2):
        error = draw(40, 60, seed=seed)
        nothing = linalg.weighted_square(error, covariance)
        at4, at8, at16 = (left_over(error, covariance, form(bits=bits)) for bits in (4, 8, 16))
        assert at16 < at8 < at4 < nothing
        assert nothing - at4 > 0.95 * (nothing - at16)  # of Gaussian factors 4 bits lose 1 % of the square, each
        assert nothing - at8 > 0.999 * (nothing - at16)


def test_rounding_by_a_sweep_beats_rounding_each_number_alone() -> None:
    error, covariance = draw(40, 60), uneven_covariance()
    alone = low_rank_part(error, covariance.diagonal(), form(refit=False))
    assert alone is not None
    swept = left_over(error, covariance, form(refit=False))
    assert swept < linalg.weighted_square(error - alone.dense(), covariance)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_higher_rank_leaves_less_under_a_covariance(bits: AdapterBits) -> None:  # law 12
    error, covariance = draw(40, 60), uneven_covariance()
    left = [left_over(error, covariance, form(rank, bits)) for rank in (0.1, 0.3, 0.6)]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("shape", [(20, 172), (7, 5), (2, 2)])
def test_a_part_under_a_covariance_weighs_what_the_other_norms_do(shape: tuple[int, int], bits: AdapterBits) -> None:  # law 29
    parts = [
        part_for(draw(*shape), weights, form(0.5, bits, group_size=32))
        for weights in (uneven_covariance(width=shape[1]), torch.ones(shape[1]))
    ]
    assert parts[0].storage_bits() == parts[1].storage_bits()
    assert bool(parts[0].dense().isfinite().all())


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", ["full", "singular", "dead", "nothing"])
def test_an_error_of_zero_gives_a_part_of_zero_under_a_covariance(kind: str, bits: AdapterBits) -> None:
    covariance = uneven_covariance("full" if kind == "nothing" else kind) * (kind != "nothing")
    assert int((part_for(torch.zeros(40, 60), covariance, form(bits=bits)).dense() != 0).sum()) == 0
    assert bool(part_for(draw(40, 60), covariance, form(bits=bits)).dense().isfinite().all())


@pytest.mark.parametrize("bits", [4, 8])
def test_the_inverse_at_hand_is_the_one_that_would_be_made(bits: AdapterBits) -> None:
    error, covariance = draw(40, 60), uneven_covariance()
    given = low_rank_part(error, covariance, form(bits=bits), inverse=inverse_of(covariance, damp=0.01))
    assert given is not None
    assert torch.equal(given.dense(), part_for(error, covariance, form(bits=bits)).dense())
