"""What a sweep gives, as a part."""

import torch

from slimlm.core.grid import Grid
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers.swept import Swept, part_of
from tests.core.solvers.problems import CODEBOOK, covariance_of, draw, swept


def test_a_codebook_gives_a_codebook_part_and_the_even_grid_a_uniform_one() -> None:
    weight, covariance = draw(6, 40), covariance_of(40)
    assert isinstance(swept(weight, covariance, grid=CODEBOOK)[0].part(16), Codebook)
    assert isinstance(swept(weight, covariance)[0].part(16), Uniform)


def test_scales_beyond_float16_are_stored_in_float32() -> None:
    index, scale = torch.zeros(2, 4, dtype=torch.uint8), torch.tensor([[1e-9], [1.0]])
    part = part_of(index, scale, Grid.of_bits(4), "per-channel")
    assert part.scale.dtype == torch.float32
    assert torch.equal(part.dense(), scale.expand(2, 4) * -8)


def test_a_part_with_zeros_by_hand() -> None:
    # 2 bits: indices 0 to 3 are codes -2 to 1; (index - zero) x scale.
    index, scale = torch.tensor([[0, 1, 3], [2, 0, 1]], dtype=torch.uint8), torch.tensor([[0.5], [2.0]])
    zero, value = torch.tensor([[1.0], [0.0]]), torch.tensor([[-0.5, 0.0, 1.0], [4.0, 0.0, 2.0]])
    part = Swept(value, value, None, index, scale, Grid.of_bits(2, zeros=True), zero).part("per-channel")
    assert isinstance(part, Uniform) and part.zero is not None
    assert part.codes.tolist() == [[-2, -1, 1], [0, -2, -1]]
    assert part.zero.tolist() == [[-1], [-2]]
    assert torch.equal(part.dense(), value)
