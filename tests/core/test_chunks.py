"""How much is worked on at a time changes no result: a GPU is given larger pieces than a CPU's cache holds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimlm.core import bits
from slimlm.core.chunks import at_once, pieces_of
from slimlm.core.grid import Grid, encode, scale_sets
from slimlm.core.mask import Pattern, choose
from slimlm.core.solvers.scale_search import best_scale, search_scales, signed_scale
from tests.core.solvers.point_sets import squared_error
from tests.fake_gpu import FAKE_GPU, fake_gpu

EVEN = Grid.of_bits(4)
CODEBOOK = Grid(torch.tensor([-2.0, -0.5, 0.25, 1.0]), False)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def codes() -> Tensor:
    return torch.randint(16, (60, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


EXACT: dict[str, Callable[[], Tensor]] = {
    "codes": lambda: encode(draw(60, 96), torch.full((60, 3), 0.2), bits=4, group_size=32),
    "packing": lambda: bits.pack(codes(), 3),
    "unpacking": lambda: bits.unpack(bits.pack(codes(), 4), 4, 96),
    "2:4": lambda: choose(draw(60, 96), Pattern.parse("2:4")),
    "values of a codebook": lambda: CODEBOOK.nearest(draw(60, 96)),
    "4:8 of ties": lambda: choose((draw(60, 96) * 2).floor(), Pattern.parse("4:8")),
}
SUMMED: dict[str, Callable[[], Tensor]] = {
    "scales of rows": lambda: search_scales(draw(60, 96), bits=4, group_size="per-channel"),
    "one scale": lambda: search_scales(draw(60, 96), bits=4, group_size="per-tensor"),
    "scales of rows, both signs": lambda: signed_scale(draw(60, 96), torch.ones(60, 96), EVEN),
}


@pytest.mark.parametrize("size", [50, 1000, 2**30])
@pytest.mark.parametrize("name", [*EXACT, *SUMMED])
def test_the_size_of_the_pieces_changes_no_result(name: str, size: int) -> None:
    call = {**EXACT, **SUMMED}[name]
    before = call()
    with pieces_of(size):
        after = call()
    if name in EXACT:
        assert torch.equal(after, before)
    else:
        # float32 sums of another shape: of two scales that err alike one or the other may be found.
        points = scale_sets(draw(60, 96), "per-tensor" if before.numel() == 1 else "per-channel")
        errors = [squared_error(points, torch.ones_like(points), scale.flatten(), EVEN) for scale in (after, before)]
        torch.testing.assert_close(*errors, rtol=1e-5, atol=0)


def test_a_gpu_is_given_larger_pieces_and_a_cpu_what_its_cache_holds() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert at_once(1000, cpu) == 1000
    assert at_once(1000, gpu) == 32_000
    with pieces_of(7):
        assert at_once(1000, cpu) == at_once(1000, gpu) == 7
    assert at_once(1000, cpu) == 1000


def test_larger_pieces_take_fewer_operations() -> None:
    points = draw(4096, 64)
    operations = []
    for pieces in (2**22, 2**17):
        with fake_gpu() as counts, pieces_of(pieces):
            best_scale(points.to(FAKE_GPU), torch.ones(4096, 64, device=FAKE_GPU), EVEN)
        operations.append(counts.operations)
    assert operations[0] < 0.6 * operations[1]
