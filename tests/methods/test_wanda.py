"""Wanda and magnitude pruning: which weights stay."""

import pytest
import torch

from slimlm.core.layer import Layer
from slimlm.core.parts.uniform import Uniform
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.methods.prune.magnitude import Magnitude
from slimlm.methods.prune.wanda import Wanda
from tests.methods.conftest import draw, inputs, layer_of, stats_of

PATTERNS: list[str | float] = ["2:4", "1:4", 0.5]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_is_magnitude_when_all_inputs_have_equal_energy(pattern: str | float) -> None:  # law 7
    even = Stats(1, {MeanSquare: torch.full((172,), 0.3)})
    wanda, magnitude = Wanda(pattern)(layer_of(), even), Magnitude(pattern)(layer_of(), even)
    assert wanda.mask is not None and magnitude.mask is not None
    assert torch.equal(wanda.mask, magnitude.mask)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_unequal_inputs_change_the_choice(pattern: str | float) -> None:  # law 7, so that the test above means something
    stats = stats_of(inputs())
    wanda, magnitude = Wanda(pattern)(layer_of(), stats), Magnitude(pattern)(layer_of(), stats)
    assert wanda.mask is not None and magnitude.mask is not None
    assert int((wanda.mask != magnitude.mask).sum()) > 100


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_factor_on_all_activations_changes_no_mask(pattern: str | float) -> None:  # law 7
    small, large = (Wanda(pattern)(layer_of(), stats_of(inputs() * factor)).mask for factor in (2.0**-6, 2.0**6))
    assert small is not None and large is not None
    assert torch.equal(small, large)


def test_wanda_loses_less_of_the_output_energy_than_magnitude() -> None:  # law 7
    stats = stats_of(inputs())
    # By construction the 2:4 mask of least sum of w^2 E[x^2] within each group of four.
    lost = [float((step(layer_of(), stats).error.square() * stats[MeanSquare]).sum()) for step in (Wanda(), Magnitude())]
    assert lost[0] < lost[1]


@pytest.mark.parametrize("step", [Wanda(), Magnitude()])
def test_after_a_quantizer_the_rounded_weight_is_scored(step: Wanda | Magnitude) -> None:
    original = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    rounded = Uniform(torch.tensor([[1, 2, 3, 4]], dtype=torch.int8), torch.ones(1, 1), 4, "per-tensor")
    after = step(Layer.of("fc1", original).with_base(rounded), Stats(1, {MeanSquare: torch.ones(4)}))
    assert after.mask is not None
    assert after.mask.tolist() == [[False, False, True, True]]


def test_a_channel_that_never_fires_goes_first() -> None:
    stats = Stats(1, {MeanSquare: torch.tensor([0.0, 1.0, 0.0, 1.0])})
    keep = Wanda()(Layer.of("fc1", torch.tensor([[100.0, 0.1, 50.0, 0.2]])), stats).mask
    assert keep is not None
    assert keep.tolist() == [[False, True, False, True]]


def test_wanda_by_hand() -> None:
    # Scores |w| x rms (equation 1): 1 x 2, 3 x 1, 2.5 x 1, 0.5 x 1; by energy instead of rms the first would stay.
    stats = Stats(1, {MeanSquare: torch.tensor([4.0, 1.0, 1.0, 1.0])})
    keep = Wanda()(Layer.of("fc1", torch.tensor([[-1.0, 3.0, -2.5, 0.5]])), stats).mask
    assert keep is not None
    assert keep.tolist() == [[False, True, True, False]]


def test_a_share_is_dropped_from_each_row_and_not_from_the_whole() -> None:  # law 6
    weight = draw(16, 40) * torch.logspace(-3, 3, 16)[:, None]
    keep = Magnitude(0.25)(Layer.of("fc1", weight), Stats(1)).mask
    assert keep is not None
    assert keep.sum(dim=1).tolist() == [30] * 16


def test_the_pattern_travels_with_the_mask() -> None:
    stats = stats_of(inputs())
    assert Wanda("1:4")(layer_of(), stats).pattern == "1:4"
    assert Magnitude(0.5)(layer_of(), stats).pattern == "0.5"
