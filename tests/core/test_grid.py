"""The grid arithmetic: the values that codes stand for, groups, encoding, scales as they are stored."""

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import RecipeError
from slimlm.core.grid import (
    Grid,
    GroupSize,
    absmax_scale,
    check_bits,
    check_group_size,
    encode,
    nearest_code,
    scale_sets,
    scale_shape,
    spread,
    storable,
)
from slimlm.core.parts.uniform import Uniform

CODEBOOK = Grid(torch.tensor([-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0]), False)
ALL = [*map(Grid.of_bits, (2, 3, 4, 8)), CODEBOOK]
GROUPS: list[GroupSize] = ["per-tensor", "per-channel", 128, 40, 8, 1000]
SHAPES = [(48, 172), (3, 5), (1, 1), (96, 352)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student4(count: int) -> Tensor:
    return draw(count) / draw(4, count, seed=1).square().mean(dim=0).sqrt()


# The values that codes stand for


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_values_of_the_even_grid_are_its_codes(bits: int) -> None:
    grid = Grid.of_bits(bits)
    assert grid.values.tolist() == list(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
    assert (grid.bits, grid.largest, grid.largest_magnitude) == (bits, 2 ** (bits - 1) - 1, 2 ** (bits - 1))
    ratio = draw(1000) * 2**bits
    assert torch.equal(grid.nearest(ratio), nearest_code(ratio, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_with_zeros_the_value_is_the_nearest_that_the_zero_leaves(bits: int) -> None:  # law 2
    grid, top = Grid.of_bits(bits, zeros=True), 2**bits - 1
    weight, scale = 2 * draw(20, 50), 0.01 + draw(20, 50, seed=1).abs()
    zero = torch.randint(0, top + 1, (20, 50), generator=torch.Generator().manual_seed(2)).float()
    index, value = grid.round(weight, scale, zero)
    every = (torch.arange(top + 1) - zero[..., None]) * scale[..., None]
    assert torch.equal(value, every.gather(2, index.long()[..., None])[..., 0])
    nearest = (every - weight[..., None]).abs().amin(dim=2)
    torch.testing.assert_close((value - weight).abs(), nearest, rtol=1e-5, atol=1e-6)  # between two, rounding decides


def test_zeros_in_the_middle_are_the_even_grid() -> None:
    weight, scale = 2 * draw(500), torch.tensor(0.3)
    even, middle = Grid.of_bits(4).round(weight, scale), Grid.of_bits(4, zeros=True).round(weight, scale, torch.tensor(8.0))
    assert torch.equal(even[0], middle[0]) and torch.equal(even[1], middle[1])


def test_a_centred_grid_by_hand() -> None:
    assert Grid.centred(2).values.tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert Grid.centred(1).values.tolist() == [-0.5, 0.5] and not Grid.centred(1).even


def test_the_size_and_extremes_of_a_codebook_by_hand() -> None:
    assert (CODEBOOK.bits, CODEBOOK.largest, CODEBOOK.largest_magnitude) == (3, 3.0, 4.0)


@pytest.mark.parametrize("grid", ALL)
def test_the_nearest_value_is_the_nearest_of_all(grid: Grid) -> None:  # law 2
    ratio = draw(2000) * grid.largest_magnitude
    distance = (ratio[:, None] - grid.values).abs()
    found = grid.nearest(ratio)
    assert torch.equal((ratio - found).abs(), distance.amin(dim=1))
    assert torch.equal(grid.values[grid.index(ratio)], found)


@pytest.mark.parametrize("grid", ALL)
def test_a_grid_value_is_its_own_nearest(grid: Grid) -> None:  # law 1
    assert torch.equal(grid.nearest(grid.values), grid.values)
    assert grid.index(grid.values).tolist() == list(range(len(grid.values)))


@pytest.mark.parametrize("grid", ALL)
@pytest.mark.parametrize("scale", [-0.3, 0.3])
def test_rounding_twice_is_rounding_once_with_a_scale_of_either_sign(grid: Grid, scale: float) -> None:  # law 1
    index, value = grid.round(draw(500), torch.tensor(scale))
    again, same = grid.round(value, torch.tensor(scale))
    assert torch.equal(again, index)
    assert torch.equal(same, value)


@pytest.mark.parametrize("grid", ALL)
def test_a_scale_of_zero_means_zero(grid: Grid) -> None:
    _, value = grid.round(draw(500), torch.zeros(()))
    assert int((value != 0).sum()) == 0


def test_indices_keep_their_shape_and_take_views() -> None:
    ratio = draw(6, 8).T  # not contiguous
    for grid in ALL:
        assert grid.index(ratio).shape == grid.nearest(ratio).shape == (8, 6)


# Groups, codes and stored scales


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_encoding_what_was_decoded_changes_no_code(shape: tuple[int, int], group_size: GroupSize, bits: int) -> None:  # law 1
    weight = draw(*shape)
    scale = storable(absmax_scale(scale_sets(weight, group_size), bits).view(scale_shape(shape, group_size)) * 0.6)
    codes = encode(weight, scale, bits=bits, group_size=group_size)
    decoded = Uniform(codes, scale, bits, group_size).dense()
    assert torch.equal(encode(decoded, scale, bits=bits, group_size=group_size), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_lands_within_half_a_step_or_on_the_end_of_the_grid(  # law 2
    shape: tuple[int, int], group_size: GroupSize, bits: int
) -> None:
    weight = draw(*shape)
    scale = storable(absmax_scale(scale_sets(weight, group_size), bits).view(scale_shape(shape, group_size)) * 0.6)
    codes = encode(weight, scale, bits=bits, group_size=group_size)
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert lowest <= int(codes.min()) <= int(codes.max()) <= highest
    step = spread(scale, shape[1], group_size).expand(shape)
    miss = (Uniform(codes, scale, bits, group_size).dense() - weight).abs()
    inside = (weight <= highest * step) & (weight >= lowest * step)
    assert bool((miss <= step * (0.5 + 2.0**-15))[inside].all())  # 2^-15: float32 division and product of up to 128 steps
    assert bool((codes[weight > highest * step] == highest).all())
    assert bool((codes[weight < lowest * step] == lowest).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_has_the_code_zero_whatever_the_scale(bits: int) -> None:  # law 1
    weight = draw(6, 10)
    weight[:, 3] = 0
    for scale in (torch.full((6, 1), 0.1), torch.full((6, 1), 1e-30), torch.zeros(6, 1)):
        assert int(encode(weight, scale, bits=bits, group_size="per-channel")[:, 3].abs().max()) == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_sign_of_a_weight_on_the_symmetric_range_turns_its_code(bits: int) -> None:  # law 1
    weight = draw(6, 40)
    scale = absmax_scale(weight, bits).view(6, 1)  # AbsMax uses -top .. top only
    codes = encode(weight, scale, bits=bits, group_size="per-channel")
    assert torch.equal(encode(-weight, scale, bits=bits, group_size="per-channel"), -codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", ["per-tensor", "per-channel", 16])
def test_absmax_reproduces_the_largest_weight(bits: int, group_size: GroupSize) -> None:  # law 4
    weight = draw(8, 40)
    scale = absmax_scale(scale_sets(weight, group_size), bits).view(scale_shape((8, 40), group_size))
    decoded = Uniform(encode(weight, scale, bits=bits, group_size=group_size), scale, bits, group_size).dense()
    sets, back = scale_sets(weight, group_size), scale_sets(decoded, group_size)
    at = sets.abs().argmax(dim=1, keepdim=True)
    # One ulp (law 4): scale = max / top is rounded once, top x scale once more.
    torch.testing.assert_close(back.gather(1, at), sets.gather(1, at), rtol=2.0**-22, atol=0)


def test_finer_groups_err_less() -> None:  # law 4
    weight = student4(64 * 512).view(64, 512)

    def error(group_size: GroupSize) -> float:
        scale = absmax_scale(scale_sets(weight, group_size), 4).view(scale_shape((64, 512), group_size))
        return float(
            (Uniform(encode(weight, scale, bits=4, group_size=group_size), scale, 4, group_size).dense() - weight)
            .square()
            .mean()
        )

    errors = [error(group_size) for group_size in (16, 128, "per-channel", "per-tensor")]
    assert errors == sorted(errors)


@pytest.mark.parametrize("group_size", [172, 1000, "per-channel"])
def test_one_group_a_row_is_a_row(group_size: GroupSize) -> None:  # law 4
    weight = draw(48, 172)
    assert torch.equal(scale_sets(weight, group_size), weight)
    assert scale_shape((48, 172), group_size) == (48, 1)


def test_groups_run_along_the_inputs_and_the_last_may_be_shorter() -> None:  # law 4
    weight = torch.tensor([[1.0, 2.0, 30.0, 40.0, 5.0], [6.0, 7.0, 80.0, 90.0, 10.0]])
    assert scale_sets(weight, 2).tolist() == [[1, 2], [30, 40], [5, 0], [6, 7], [80, 90], [10, 0]]
    scale = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert spread(scale, 5, 2).tolist() == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]


@pytest.mark.parametrize("group_size", ["per-channel", 4])
def test_a_group_of_zeros_beside_others_gives_zeros(group_size: GroupSize) -> None:  # law 4
    weight = draw(4, 8)
    weight[2] = 0
    weight[0, :4] = 0
    scale = storable(absmax_scale(scale_sets(weight, group_size), 4).view(scale_shape((4, 8), group_size)))
    decoded = Uniform(encode(weight, scale, bits=4, group_size=group_size), scale, 4, group_size).dense()
    assert bool(decoded.isfinite().all())
    assert bool((decoded[weight == 0] == 0).all())
    assert bool((decoded[1] != 0).any())


@pytest.mark.parametrize("magnitude", [1e-9, 1e-6, 1.0, 1e6])
def test_storing_a_scale_costs_at_most_the_rounding_of_float16(magnitude: float) -> None:  # law 4
    scale = (draw(20, 3).abs() + 0.5) * magnitude
    # float16 rounds to 2^-11 within its normal range, and only there may it be used.
    torch.testing.assert_close(storable(scale).float(), scale, rtol=2.0**-11, atol=0)


def test_many_ordinary_scales_are_stored_in_float16_and_a_single_one_in_float32() -> None:
    assert storable(torch.full((20, 1), 0.01)).dtype == torch.float16
    assert storable(torch.full((1, 1), 0.01)).dtype == torch.float32
    assert storable(torch.tensor([[0.01], [1e-7]])).dtype == torch.float32


def test_two_bits_by_hand() -> None:
    weight = torch.tensor([[0.0, 0.4, 0.6, 5.0, -1.4, -1.6, -9.0]])
    # Codes -2 .. 1 with scale 1; 5 and -9 are clipped.
    assert encode(weight, torch.ones(1, 1), bits=2, group_size="per-tensor").tolist() == [[0, 0, 1, 1, -1, -2, -2]]


def test_a_tie_goes_to_the_even_code() -> None:  # law 5, of the reference
    ratio = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert nearest_code(ratio, 4).tolist() == [0, 2, 2, 0, -2, -2]


@pytest.mark.parametrize("bits", [-1, 0, 1, 9])
def test_bits_outside_two_to_eight_are_refused(bits: int) -> None:
    with pytest.raises(RecipeError, match="2 to 8"):
        check_bits(bits)


@pytest.mark.parametrize("group_size", [0, -128])
def test_a_group_of_no_inputs_is_refused(group_size: int) -> None:
    with pytest.raises(RecipeError, match="at least 1"):
        check_group_size(group_size)
