"""QERA: the repair of least output error under the full covariance."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimlm.core.layer import Layer
from slimlm.core.solvers.linalg import weighted_square
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.methods.compensate.qera import Qera
from slimlm.methods.compensate.slim_lora import SlimLora
from slimlm.methods.compensate.svd import Svd
from slimlm.methods.prune.wanda import Wanda
from slimlm.methods.quantize.slim_quant import SlimQuant
from tests.methods.conftest import changed, draw, inputs, layer_of, stats_of


def correlated(width: int = 64, *, dead: int = 0) -> Stats:
    """Statistics of inputs that share a direction."""
    return stats_of(inputs(width, dead=dead) + 2 * draw(4, 32, 1, seed=9) * (torch.arange(width) >= dead))


STATS = correlated(dead=4)
GRAM = STATS[Covariance]


def damaged(seed: int = 0) -> Layer:
    return Wanda()(SlimQuant(4)(layer_of(32, 64, seed), STATS), STATS)


def left(layer: Layer, gram: Tensor = GRAM) -> float:
    return weighted_square(layer.error, gram)


def test_the_output_error_left_is_the_tail_of_the_spectrum() -> None:  # law 9
    layer = damaged()
    error = layer.residual.double()
    values = torch.linalg.eigvalsh(error @ GRAM.double() @ error.T)
    after = Qera(0.2, 16)(layer, STATS)
    # float16 factors are off by 2^-11, which the residual feels in the second order.
    assert left(after) == pytest.approx(float(values[:-6].sum()), rel=1e-3)


@pytest.mark.parametrize("bits", [4, 16])
def test_the_output_error_falls_more_than_with_the_diagonal_norm_and_with_the_plain_svd(bits: int) -> None:  # law 11
    for seed in range(3):
        layer = damaged(seed)
        exact, diagonal, plain = (left(step(0.1, bits)(layer, STATS)) for step in (Qera, SlimLora, Svd))
        assert exact < diagonal < plain < left(layer)


def test_uncorrelated_inputs_make_it_slim_lora() -> None:  # law 11
    energy = torch.exp(draw(64, seed=2))
    stats, layer = Stats(10**6, {MeanSquare: energy, Covariance: torch.diag(energy)}), damaged()
    one, other = Qera(0.1, 16)(layer, stats), SlimLora(0.1, 16)(layer, stats)
    torch.testing.assert_close(one.error, other.error, rtol=0, atol=2e-4)  # float16 factors of errors up to 0.2


def test_four_bit_factors_cost_little_and_refitting_gets_some_of_it_back() -> None:  # law 16
    layer = damaged()
    whole, refitted, rounded = (left(step(layer, STATS)) for step in (Qera(0.1, 16), Qera(0.1, 4), Qera(0.1, 4, refit=False)))
    assert whole < refitted <= rounded < left(layer)
    assert left(layer) - refitted > 0.95 * (left(layer) - whole)  # of Gaussian factors 4 bits lose 1 % of the energy, each


def test_a_higher_rank_leaves_less_and_rank_zero_changes_nothing() -> None:  # law 12
    layer = damaged()
    by_rank = [left(Qera(rank)(layer, STATS)) for rank in (0.0, 0.1, 0.3, 1.0)]
    assert by_rank == sorted(by_rank, reverse=True)
    assert Qera(0.0)(layer, STATS) is layer


@pytest.mark.parametrize("factor", [2.0**-8, 2.0**8])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_factor_on_all_activations_changes_nothing(bits: int, factor: float) -> None:  # law 14
    step = Qera(0.1, bits)  # type: ignore[arg-type]
    one, other = step(damaged(), STATS), step(damaged(), changed(STATS, {Covariance: GRAM * factor}))
    assert left(other) == pytest.approx(left(one), rel=1e-3)  # float32


def test_repairing_again_is_repairing_once() -> None:
    once = Qera(0.1, 4)(damaged(), STATS)
    assert torch.equal(Qera(0.1, 4)(once, STATS).error, once.error)


def test_the_base_and_its_mask_are_left_alone() -> None:
    layer = damaged()
    after = Qera(0.1, 4)(layer, STATS)
    assert after.mask is layer.mask and after.base is layer.base
    assert after.adapter is not None and after.adapter is not layer.adapter


def test_few_tokens_are_noted_and_more_than_enough_are_not() -> None:
    assert Qera()(damaged(), STATS).notes == ()
    assert "100 calibration tokens" in Qera()(damaged(), replace(STATS, tokens=100)).notes[0]


def test_a_layer_without_damage_gets_an_adapter_of_zero() -> None:
    after = Qera(0.2)(Layer.of("fc1", draw(32, 64)), STATS)
    assert int((after.error != 0).sum()) == 0
