"""The library's functions for compression agree with torch, for every variant, and threads change no byte."""

from collections.abc import Iterator

import pytest
import torch

from slimlm.core import grid
from slimlm.kernels import compression
from tests.conftest import needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures("variant")]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each number of threads, in use."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("shape", "group"), [((37, 300), 128), ((5, 1), 1), ((1, 40_000), 40_000), ((300, 77), 32), ((0, 8), 4)])
def test_codes_are_those_that_torch_rounds_to(bits: int, shape: tuple[int, int], group: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits))
    scale = torch.rand(shape[0], -(-shape[1] // group)) / 2**bits - 0.01
    scale[:, ::3] = 0
    wide = grid.spread(scale, shape[1], group)
    expected = torch.where(wide == 0, torch.tensor(0.0), grid.nearest_code(weight / wide, bits)).to(torch.int8)
    assert torch.equal(compression.encode(weight, scale, bits=bits, group=group), expected)


def test_ties_are_rounded_to_even_and_numbers_beyond_the_grid_to_its_ends() -> None:
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, 7.4]])
    codes = compression.encode(weight, torch.ones(1, 1), bits=4, group=8)
    assert codes.tolist() == [[0, 2, 2, 0, -2, 7, -8, 7]]
