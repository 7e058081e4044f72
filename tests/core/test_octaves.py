"""Numbers in one byte: their ratios stay, zero is exact, what cannot be is refused."""

import pytest
import torch

from slimlm.core.errors import NumericsError
from slimlm.core.octaves import Octaves


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_value_is_off_by_at_most_a_sixteenth_of_an_octave(size: float) -> None:
    values = size * torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).square()
    found = Octaves.of(values)
    assert found.codes.dtype == torch.uint8 and found.codes.shape == values.shape
    large = values > values.max() * 2.0**-31
    ratios = (found.values()[large].double() / values[large].double()).log2().abs()
    assert float(ratios.max()) <= 1 / 16 + 1e-6
    assert (found.values().flatten()[values.flatten().argsort()].diff() >= 0).all(), "the order stays"


def test_by_hand() -> None:
    found = Octaves.of(torch.tensor([8.0, 4.0, 0.0, 8 * 2.0**-40]))
    assert found.codes.tolist() == [255, 247, 0, 0]
    assert found.values().tolist() == [8.0, 4.0, 0.0, 0.0]


def test_zeros_and_nothing_stay_what_they_are() -> None:
    assert Octaves.of(torch.zeros(3)).values().tolist() == [0.0, 0.0, 0.0]
    assert Octaves.of(torch.zeros(0, 2)).values().shape == (0, 2)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_what_has_no_logarithm_is_refused(bad: float) -> None:
    with pytest.raises(NumericsError, match="not negative"):
        Octaves.of(torch.tensor([1.0, bad]))
