"""How much is worked on at a time changes no result: a card is given larger pieces than a processor's cache holds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slimlm.core import bits, chunks, grid, mask
from slimlm.core.grid import Levels
from slimlm.core.mask import Pattern, choose
from tests.fake_gpu import FAR, far_device, near

SIZES = ((grid, "_POINTS_AT_ONCE"), (grid, "_POINTS_OF_CANDIDATES"), (mask, "_SCORES_AT_ONCE"), (bits, "_CODES_AT_ONCE"))
EVEN = Levels.of_bits(4)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def codes() -> Tensor:
    return torch.randint(16, (60, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


EXACT: dict[str, Callable[[], Tensor]] = {
    "codes": lambda: grid.encode(draw(60, 96), torch.full((60, 3), 0.2), bits=4, group_size=32),
    "packing": lambda: bits.pack(codes(), 3),
    "unpacking": lambda: bits.unpack(bits.pack(codes(), 4), 4, 96),
    "2:4": lambda: choose(draw(60, 96), Pattern.parse("2:4")),
    "4:8 of ties": lambda: choose((draw(60, 96) * 2).floor(), Pattern.parse("4:8")),
}
SUMMED: dict[str, Callable[[], Tensor]] = {
    "scales of rows": lambda: grid.searched(draw(60, 96), bits=4, group_size="per-channel"),
    "one scale": lambda: grid.searched(draw(60, 96), bits=4, group_size="per-tensor"),
    "scales of rows, both signs": lambda: grid.signed_scale(draw(60, 96), torch.ones(60, 96), EVEN),
}


@pytest.mark.parametrize("size", [50, 1000, 2**30])
@pytest.mark.parametrize("name", [*EXACT, *SUMMED])
def test_the_size_of_the_pieces_changes_no_result(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {**EXACT, **SUMMED}[name]
    before = call()
    monkeypatch.setattr(mask, "_COMPARED_AT_ONCE", 0)
    for module, constant in SIZES:
        monkeypatch.setattr(module, constant, size)
    if name in EXACT:
        assert torch.equal(call(), before)
    else:
        # float32 sums of another shape: of two scales that err alike one or the other may be found.
        points = grid.rows_of(draw(60, 96), "per-tensor" if before.numel() == 1 else "per-channel")
        errors = [grid.grid_error(points, torch.ones_like(points), scale.view(-1, 1), EVEN) for scale in (call(), before)]
        torch.testing.assert_close(*errors, rtol=1e-5, atol=0)


def test_a_card_is_given_larger_pieces_and_a_processor_what_its_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks.at_once(1000, torch.device("cpu")) == 1000
    assert chunks.at_once(1000, torch.device("cuda")) == 32_000
    operations = []
    for times in (32, 1):
        monkeypatch.setattr(chunks, "ON_A_CARD", times)
        with far_device() as counts:
            grid.best_scale(draw(4096, 64).to(FAR), torch.ones(4096, 64, device=FAR), EVEN)
        operations.append(counts.operations)
    assert operations[0] < 0.6 * operations[1]


def test_the_masses_of_a_histogram_are_added_on_a_card_in_any_order() -> None:
    values, weights = draw(40_000), draw(40_000).square()
    here = grid.distribution(values[None], weights[None])[1][0]
    with far_device():
        order = torch.randperm(40_000, generator=torch.Generator().manual_seed(1))
        found = [
            near(grid.distribution(v[None].to(FAR), w[None].to(FAR))[1][0])
            for v, w in ((values, weights), (values[order], weights[order]))
        ]
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], here, rtol=1e-6, atol=1e-12)  # 2^-47 of the largest weight, 40000 times
