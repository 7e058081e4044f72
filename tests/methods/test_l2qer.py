"""L2QER: its scale, its norm, and what it repairs."""

import pytest
import torch
from torch import Tensor

from slimlm.core.layer import Layer
from slimlm.core.solvers.linalg import weighted_square
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.mean_abs import MeanAbs
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.statistics.peak_mean_abs import PeakMeanAbs
from slimlm.methods.compensate.l2qer import L2qer
from slimlm.methods.compensate.slim_lora import SlimLora
from slimlm.methods.prune.wanda import Wanda
from slimlm.methods.quantize.absmax import AbsMax
from tests.methods.conftest import inputs, layer_of, stats_of

STATS = stats_of(inputs(dead=4))
PEAK = STATS[PeakMeanAbs]
ENERGY = PEAK.clamp_min(1e-4).square()


def damaged() -> Layer:
    """Pruned, then rounded, as SLiM's tables do before L2QER."""
    return AbsMax(4)(Wanda()(layer_of(), STATS), STATS)


def tail(error: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(error.double() * ENERGY.double().sqrt())[rank:].square().sum())


def test_the_error_left_is_the_tail_of_the_scaled_spectrum() -> None:  # law 9
    layer = damaged()
    # float16 factors, whose 2^-11 the residual feels in the second order.
    assert weighted_square(L2qer(0.2)(layer, STATS).error, ENERGY) == pytest.approx(tail(layer.residual, 9), rel=1e-4)


def test_it_is_slim_lora_with_another_saliency() -> None:  # law 13: the paper's scale by a constant does not matter
    peak = Stats(1, {MeanAbs: PEAK.clamp_min(1e-4), MeanSquare: ENERGY})
    ours, theirs = SlimLora(0.2, 16)(damaged(), peak).error, L2qer(0.2)(damaged(), STATS).error
    assert weighted_square(theirs, ENERGY) == pytest.approx(weighted_square(ours, ENERGY), rel=1e-4)  # float16 factors


def test_only_rounding_repairs_the_rounding_and_leaves_the_pruning() -> None:
    layer = damaged()
    assert layer.mask is not None
    rounding, pruning = layer.residual * layer.mask, layer.residual * ~layer.mask
    after = L2qer(0.2, only_rounding=True)(layer, STATS)
    left = after.error - pruning
    # float16 factors; a rounding error of a tenth of the whole is repaired to the tail of its own spectrum.
    assert weighted_square(left, ENERGY) == pytest.approx(tail(rounding, 9), rel=1e-4)


@pytest.mark.parametrize("only_rounding", [False, True])
def test_repairing_again_is_repairing_once(only_rounding: bool) -> None:
    step = L2qer(0.2, only_rounding=only_rounding)
    once = step(damaged(), STATS)
    assert torch.equal(step(once, STATS).error, once.error)


def test_only_rounding_does_nothing_where_nothing_is_rounded() -> None:
    layer = Wanda()(layer_of(), STATS)
    after = L2qer(0.2, only_rounding=True)(layer, STATS)
    assert torch.equal(after.error, layer.error)


@pytest.mark.parametrize("factor", [2.0**-4, 2.0**4])
def test_a_factor_on_all_activations_hardly_matters(factor: float) -> None:  # law 14, but for the floor of 1e-4
    alive = stats_of(inputs())
    energy = alive[PeakMeanAbs].square()
    scaled = Stats(1, {PeakMeanAbs: alive[PeakMeanAbs] * factor})
    layer = AbsMax(4)(layer_of(), alive)
    one, other = (weighted_square(L2qer(0.2)(layer, stats).error, energy) for stats in (alive, scaled))
    assert other == pytest.approx(one, rel=1e-4)  # float16 factors


def test_the_peak_is_over_windows_and_not_over_tokens() -> None:
    x = torch.tensor([[[1.0, 0.0], [-3.0, 0.0]], [[0.0, 8.0], [1.0, -2.0]]])  # [2 windows, 2 tokens, 2]
    peak = stats_of(x)[PeakMeanAbs]
    assert peak.tolist() == [2, 5]
