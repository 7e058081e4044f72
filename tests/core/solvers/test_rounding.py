"""How a sweep rounds an input's weights: the scales that it searches or is given, and when the library does it."""

import pytest
import torch

from slimlm.core.grid import Grid
from slimlm.core.mask import Pattern
from slimlm.core.solvers.affine_search import scale_and_zero
from slimlm.core.solvers.inverse import inverse_of
from slimlm.core.solvers.rounding import FixedScales, InputGroups, OutputGroups, Unrounded, as_stored, in_library
from slimlm.core.solvers.sweep import sweep
from slimlm.core.solvers.swept import part_of
from tests.conftest import needs_kernels
from tests.core.solvers.problems import CODEBOOK, covariance_of, draw


@pytest.mark.parametrize("grid", [Grid.of_bits(3), Grid.of_bits(3, zeros=True), CODEBOOK])
def test_a_group_is_rounded_under_the_scales_that_are_found_for_it(grid: Grid) -> None:
    rows, weights = draw(8, 5), draw(8, 5, seed=1).square()
    rounding = InputGroups(grid, [4, 8], 5, one=False, start=None, device=rows.device)
    rounding.begin(1, rows, weights)
    scale, zero = scale_and_zero(rows.T, weights.T, grid)
    assert torch.equal(rounding.scale[1], as_stored(scale, 10))
    index, value = grid.round(rows[2], rounding.scale[1], zero)
    assert torch.equal(rounding.round(6, 1, rows[2]), value)
    assert torch.equal(rounding.index[6].long(), index.long())
    assert rounding.starts == [0, 4] and not bool(rounding.scale[0].any())


def test_scales_that_are_given_round_each_input_by_its_own() -> None:
    grid = Grid.of_bits(2, zeros=True)
    rounding = FixedScales(grid, torch.tensor([[1.0, 2.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [3.0, 3.0]]))
    # (index - zero) x scale: from 0 to 3, from -2 to 4 in twos, from -1.5 to 0.
    assert rounding.round(0, 0, torch.tensor([2.2, 9.0])).tolist() == [2, 4]
    assert rounding.round(1, 0, torch.tensor([-0.6, 1.0])).tolist() == [-0.5, 0]
    assert rounding.index.tolist() == [[2, 3], [2, 3]]


@pytest.mark.parametrize("group_size", [5, 16, 64])
@pytest.mark.parametrize("rank", [1, 6])
def test_groups_across_outputs_mean_what_was_rounded(rank: int, group_size: int) -> None:
    factor = draw(24, rank)
    rounding = OutputGroups(factor, Grid.of_bits(4), group_size)
    found = sweep(factor, inverse_of(covariance_of(rank) + torch.eye(rank), damp=0.01), rounding=rounding)
    part = part_of(rounding.index, rounding.scale, Grid.of_bits(4), group_size)
    assert torch.equal(part.dense(), found.value.T)


def test_without_rounding_weights_stay() -> None:
    assert torch.equal(Unrounded().round(0, 0, draw(5)), draw(5))


def test_a_single_scale_is_stored_in_float32_and_one_of_many_in_float16() -> None:
    scale = torch.tensor([0.1])
    assert torch.equal(as_stored(scale, 1), scale)
    assert torch.equal(as_stored(scale, 2), scale.half().float())
    assert torch.equal(as_stored(torch.tensor([1e-9]), 2), torch.tensor([1e-9]))  # too small for float16


@needs_kernels
def test_the_library_decides_even_grids_small_codebooks_and_short_units() -> None:
    matrix = torch.zeros(4, 4)
    assert in_library(None, None, matrix) and in_library(Grid.of_bits(8), Pattern.parse("2:4"), matrix)
    assert in_library(CODEBOOK, Pattern.parse(0.5), matrix)
    assert not in_library(Grid.centred(5), None, matrix)
    assert not in_library(CODEBOOK, Pattern.parse("16:32"), matrix)
    assert not in_library(CODEBOOK, None, matrix.double())
