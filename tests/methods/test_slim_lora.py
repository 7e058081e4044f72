"""SLiM-LoRA and the plain SVD: the closed form is the optimum of the norm that it claims."""

import pytest
import torch
from torch import Tensor

from slimlm.core.layer import Layer
from slimlm.core.solvers.linalg import weighted_square
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.mean_abs import MeanAbs
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.methods.compensate.slim_lora import SlimLora
from slimlm.methods.compensate.svd import Svd
from slimlm.methods.prune.wanda import Wanda
from slimlm.methods.quantize.slim_quant import SlimQuant
from tests.methods.conftest import draw, inputs, layer_of, stats_of

STATS = stats_of(inputs(dead=4))
SQUARE = STATS[MeanSquare]
ABSOLUTE = STATS[MeanAbs]


def damaged() -> Layer:
    """Quantized, then pruned, as SLiM does."""
    return Wanda()(SlimQuant(4)(layer_of(), STATS), STATS)


def tail(error: Tensor, energy: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(error.double() * energy.double().sqrt())[rank:].square().sum())


@pytest.mark.parametrize(("saliency", "energy"), [("rms", SQUARE), ("mean_abs", ABSOLUTE.square())])
def test_the_joint_error_left_is_the_tail_of_its_weighted_spectrum(saliency: str, energy: Tensor) -> None:  # law 9
    layer = damaged()
    after = SlimLora(0.2, 16, saliency=saliency)(layer, STATS)  # type: ignore[arg-type]
    # float16 factors are off by 2^-11, which the residual feels in the second order.
    assert weighted_square(after.error, energy) == pytest.approx(tail(layer.residual, energy, 9), rel=1e-4)


def test_the_output_error_falls_and_falls_more_than_with_the_plain_svd() -> None:  # laws 11 and 19
    layer, x = damaged(), inputs(dead=4).reshape(-1, 172)

    def output_error(one: Layer) -> float:
        return float((x @ one.error.T).square().mean())

    weighted, plain = (output_error(step(0.1, 16)(layer, STATS)) for step in (SlimLora, Svd))
    assert weighted < plain < output_error(layer)


def test_equal_saliency_is_the_plain_svd() -> None:  # law 11
    even = Stats(1, {MeanAbs: torch.full((172,), 0.7), MeanSquare: torch.full((172,), 0.49)})
    layer = damaged()
    weighted, plain = SlimLora(0.1, 16)(layer, even), Svd(0.1, 16)(layer, even)
    torch.testing.assert_close(weighted.error, plain.error, rtol=0, atol=2e-4)  # float16 factors of errors up to 0.2


@pytest.mark.parametrize("factor", [2.0**-8, 2.0**8])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_factor_on_all_activations_changes_nothing(bits: int, factor: float) -> None:  # law 14
    scaled = Stats(1, {MeanAbs: ABSOLUTE * factor, MeanSquare: SQUARE * factor**2})
    step = SlimLora(0.1, bits)  # type: ignore[arg-type]
    one, other = step(damaged(), STATS), step(damaged(), scaled)
    assert weighted_square(other.error, SQUARE) == pytest.approx(weighted_square(one.error, SQUARE), rel=1e-3)  # float32


def test_four_bit_factors_cost_little_and_refitting_gets_some_of_it_back() -> None:  # law 16
    layer = damaged()
    whole, refitted, rounded = (
        weighted_square(step(layer, STATS).error, SQUARE)
        for step in (SlimLora(0.1, 16), SlimLora(0.1, 4), SlimLora(0.1, 4, refit=False))
    )
    assert whole < refitted < rounded < weighted_square(layer.error, SQUARE)


def test_a_higher_rank_leaves_less_and_rank_zero_changes_nothing() -> None:  # law 12
    layer = damaged()
    left = [weighted_square(SlimLora(rank)(layer, STATS).error, SQUARE) for rank in (0.0, 0.1, 0.3, 1.0)]
    assert left == sorted(left, reverse=True)
    assert SlimLora(0.0)(layer, STATS) is layer


def test_the_full_rank_leaves_only_rounding() -> None:  # law 12
    after = SlimLora(1.0, 16)(damaged(), STATS)
    # Two float16 factors: (2 x 2^-11)^2 of the energy.
    assert weighted_square(after.error, SQUARE) <= 2.0**-20 * weighted_square(damaged().error, SQUARE)


def test_rounding_and_pruning_are_repaired_together() -> None:  # law 15
    layer = damaged()
    assert layer.mask is not None
    error = SlimLora(1.0, 16)(layer, STATS).error * (SQUARE > 0)
    # 2^-9: two float16 factors, and sums of 48 components, of the largest weight.
    largest = 2.0**-9 * float(layer.original.abs().max())
    for where in (layer.mask, ~layer.mask):
        assert float(error[where].abs().max()) <= largest


def test_repairing_again_is_repairing_once() -> None:
    step = SlimLora(0.1, 4)
    once = step(damaged(), STATS)
    assert torch.equal(step(once, STATS).error, once.error)


def test_quantizing_again_and_refitting_gains_on_one_shot() -> None:  # law 17: the end of the recipe `slim`
    once = SlimLora(0.1, 4)(damaged(), STATS)
    again = SlimLora(0.1, 4)(SlimQuant(4)(once, STATS), STATS)
    assert weighted_square(again.error, SQUARE) < weighted_square(once.error, SQUARE)


@pytest.mark.parametrize("saliency", ["rms", "mean_abs"])
def test_the_shift_is_not_needed_and_hardly_changes_the_result(saliency: str) -> None:  # law 13
    layer = damaged()
    energy, _ = SlimLora(saliency=saliency).second_moment(layer, STATS)  # type: ignore[arg-type]
    bare, shifted = (
        weighted_square(SlimLora(0.1, 16, saliency=saliency, shift=shift)(layer, STATS).error, energy)  # type: ignore[arg-type]
        for shift in (False, True)
    )
    # Unshifted is the optimum; 1e-4 for float16 factors. The shift adds the smallest of 168 log-normal channels.
    assert bare <= shifted * (1 + 1e-4)
    assert shifted <= 1.05 * bare


def test_the_shift_adds_the_smallest_positive_value_by_hand() -> None:
    stats = Stats(1, {MeanAbs: torch.tensor([0.0, 2.0, 3.0]), MeanSquare: torch.tensor([0.0, 5.0, 10.0])})
    moments = {
        step: step.second_moment(layer_of(4, 3), stats)[0].tolist()
        for step in (SlimLora(shift=True), SlimLora(shift=True, saliency="mean_abs"), SlimLora())
    }
    assert list(moments.values()) == [[5, 10, 15], [4, 16, 25], [0, 5, 10]]


def test_a_layer_without_damage_gets_an_adapter_of_zero() -> None:
    layer = Layer.of("fc1", draw(20, 30))
    after = SlimLora(0.2)(layer, Stats(1, {MeanAbs: torch.ones(30), MeanSquare: torch.ones(30)}))
    assert int((after.error != 0).sum()) == 0
