"""GPTQ: rounding that the later inputs answer to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers.linalg import weighted_square
from slimlm.core.solvers.order import activation_order
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.methods.prune.sparsegpt import SparseGpt
from slimlm.methods.prune.wanda import Wanda
from slimlm.methods.quantize.gptq import Gptq
from slimlm.methods.quantize.slim_quant import SlimQuant
from tests.methods.conftest import changed, draw, inputs, layer_of, stats_of


def gram_of(stats: Stats) -> Tensor:
    return stats[Covariance]


def correlated(width: int, *, dead: int = 0) -> Stats:
    """Statistics of inputs that share a direction."""
    return stats_of(inputs(width, dead=dead) + 2 * draw(4, 32, 1, seed=9) * (torch.arange(width) >= dead))


def uncorrelated(width: int) -> Stats:
    energy = torch.exp(draw(width, seed=2))
    return Stats(10**6, {MeanSquare: energy, Covariance: torch.diag(energy)})


def left(layer: Layer, stats: Stats) -> float:
    return weighted_square(layer.error, gram_of(stats))


def code_of(layer: Layer) -> Uniform:
    assert isinstance(layer.base, Uniform)
    return layer.base


@pytest.mark.parametrize("order", ["energy", "input"])
@pytest.mark.parametrize(("group_size", "bits"), [(32, 4), (48, 3), ("per-channel", 2), ("per-tensor", 8)])
def test_uncorrelated_inputs_are_rounded_to_nearest(group_size: grid.GroupSize, bits: int, order: str) -> None:  # law 18
    layer = layer_of()
    code = code_of(Gptq(bits, group_size, order=order)(layer, uncorrelated(172)))  # type: ignore[arg-type]
    scale = grid.spread(code.scale, 172, group_size).expand_as(layer.original)
    _, nearest = grid.Grid.of_bits(bits).round(layer.original, scale)
    assert torch.equal(code.dense(), nearest)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_output_error_is_less_than_that_of_the_best_scales_alone(bits: int) -> None:
    for seed in range(3):
        stats, layer = stats_of(inputs(64)), layer_of(32, 64, seed)
        gptq, alone = Gptq(bits, 32)(layer, stats), SlimQuant(bits, 32)(layer, stats)
        assert sum(p.storage_bits() for p in gptq.parts()) == sum(p.storage_bits() for p in alone.parts())
        assert left(gptq, stats) < 0.9 * left(alone, stats)


def test_more_bits_and_smaller_groups_leave_less() -> None:
    stats, layer = stats_of(inputs(64)), layer_of(32, 64)
    by_bits = [left(Gptq(bits, 32)(layer, stats), stats) for bits in (2, 3, 4, 8)]
    by_group = [left(Gptq(3, group_size)(layer, stats), stats) for group_size in ("per-tensor", "per-channel", 16)]  # type: ignore[arg-type]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group, reverse=True)


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
def test_a_factor_on_all_activations_changes_nothing(factor: float) -> None:  # law 14
    stats, layer = stats_of(inputs(64)), layer_of(32, 64)
    scaled = changed(stats, {Covariance: gram_of(stats) * factor})
    assert torch.equal(Gptq(4, 32)(layer, stats).error, Gptq(4, 32)(layer, scaled).error)  # powers of two


@pytest.mark.parametrize("pruner", [Wanda(), SparseGpt(), Wanda(0.6)], ids=["wanda", "sparsegpt", "share"])
def test_after_a_pruner_the_mask_stays_and_what_stays_repairs(pruner: Wanda | SparseGpt) -> None:  # law 8
    stats = correlated(64)
    pruned = pruner(layer_of(32, 64), stats)
    after = Gptq(4, 32)(pruned, stats)
    assert after.mask is pruned.mask and after.mask is not None
    base = after.parts().base
    assert isinstance(base, Pruned) and isinstance(base.inner, Uniform)
    assert int((base.dense()[~after.mask] != 0).sum()) == 0
    assert left(after, stats) < left(SlimQuant(4, 32)(pruned, stats), stats)
    if isinstance(pruner, Wanda):  # which moves nothing itself: rounding with repair beats the unrounded mask
        assert left(after, stats) < left(pruned, stats)


def test_inputs_that_never_fire_are_rounded_and_few_tokens_are_noted() -> None:
    stats = stats_of(inputs(64, dead=5))
    assert Gptq(4, 32)(layer_of(32, 64), stats).notes == ()
    few = replace(stats, tokens=100)
    assert "100 calibration tokens" in Gptq(4, 32)(layer_of(32, 64), few).notes[0]
    silent = Gptq(4, 32)(layer_of(32, 64), changed(stats, {Covariance: torch.zeros(64, 64)}))
    assert silent.notes == ("all inputs are dead (always zero); weights rounded to nearest",)


def test_damping_that_was_not_enough_is_noted() -> None:
    stats = replace(stats_of(inputs(64, dead=5)), tokens=10**6)
    assert "damping" in Gptq(4, 32, damp=0.0)(layer_of(32, 64), stats).notes[0]


def test_a_weight_on_the_grid_comes_back() -> None:  # law 21
    codes = torch.randint(-8, 8, (32, 64), generator=torch.Generator().manual_seed(3)).float()
    codes[:, ::32] = -8  # so that every group spans its grid
    weight = codes * 0.03125
    after = Gptq(4, 32)(Layer.of("fc1", weight), stats_of(draw(4, 32, 64)))
    # The search ends within 2^-9 or so of a scale; a code of 8 is then off by 8 / 512 of a step.
    torch.testing.assert_close(after.base_weight, weight, rtol=0, atol=0.03125 * 8 / 512)
    assert torch.equal(code_of(after).codes, codes.to(torch.int8))


def outputs_left(layer: Layer, stats: Stats) -> float:
    return left(layer, stats) / weighted_square(layer.original, gram_of(stats))


def shifted(out: int = 32, width: int = 64) -> Layer:
    """A layer whose groups of 16 inputs lie on one side of zero, or nearly."""
    return Layer.of("fc1", draw(out, width, seed=5) + 2 * draw(out, width // 16, seed=6).repeat_interleave(16, dim=1))


@pytest.mark.parametrize("order", ["energy", "activation", "input"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zeros_leave_less_where_groups_lie_off_zero(order: str, bits: int) -> None:
    stats, layer = stats_of(inputs(64)), shifted()
    symmetric = Gptq(bits, 16, order=order)(layer, stats)  # type: ignore[arg-type]
    zeros = Gptq(bits, 16, order=order, zero=True)(layer, stats)  # type: ignore[arg-type]
    assert left(zeros, stats) < 0.7 * left(symmetric, stats)
    # They cost their bits and no more: 32 rows of 4 groups.
    more = zeros.parts().storage_bits() - symmetric.parts().storage_bits()
    assert more == 32 * 4 * bits


@pytest.mark.parametrize("group_size", [16, 32, 24, "per-channel", "per-tensor"])
@pytest.mark.parametrize("order", ["energy", "activation"])
def test_zeros_with_uncorrelated_inputs_are_rounding_to_nearest(group_size: grid.GroupSize, order: str) -> None:  # law 18
    layer = shifted(48, 64)
    code = code_of(Gptq(3, group_size, order=order, zero=True)(layer, uncorrelated(64)))  # type: ignore[arg-type]
    assert code.zero is not None
    scale, zero = (grid.spread(t, 64, group_size).expand_as(layer.original) for t in (code.scale, code.zero))
    _, nearest = grid.Grid.of_bits(3, zeros=True).round(layer.original, scale, zero + 4)
    assert torch.equal(code.dense(), nearest)


def test_a_zero_by_hand() -> None:
    # Points 1, 2, 3 and 4 on a 2-bit grid that must hold zero: 0, 1, 2, 3 steps of 4 / 3 or so; the zero is the lowest code.
    layer = Layer.of("fc1", torch.tensor([[1.0, 2, 3, 4], [-1, -2, -3, -4], [-1, 1, 2, 0]]))
    code = code_of(Gptq(2, 4, zero=True)(layer, Stats(100, {Covariance: torch.eye(4)})))
    assert code.zero is not None and code.zero[:, 0].tolist() == [-2, 1, -1]
    assert code.codes[1].tolist() == [1 - int(c) - 2 for c in code.codes[0]]
    torch.testing.assert_close(code.dense()[2], layer.original[2], rtol=2e-3, atol=0)


def test_each_input_by_its_own_second_moment_comes_in_order_with_scales_found_before() -> None:
    stats = correlated(64)
    second_moment = gram_of(stats).diagonal()
    order = activation_order(second_moment, group_size=16)
    assert order.inputs.tolist() == sorted(range(64), key=lambda i: -float(second_moment[i]))
    found = code_of(Gptq(4, 16, order="activation")(layer_of(32, 64), stats))
    # Scales are those of the original weights, whatever the correlations.
    alone = Stats(stats.tokens, {Covariance: torch.diag(second_moment)})
    assert torch.equal(found.scale, code_of(Gptq(4, 16, order="activation")(layer_of(32, 64), alone)).scale)
    assert left(Gptq(4, 16, order="activation")(layer_of(32, 64), stats), stats) < 0.9 * left(
        SlimQuant(4, 16)(layer_of(32, 64), stats), stats
    )


def test_activation_order_after_a_pruner_keeps_the_mask_and_rounds_dead_inputs() -> None:  # law 8
    stats = correlated(64, dead=5)
    pruned = Wanda()(layer_of(32, 64), stats)
    after = Gptq(4, 16, order="activation", zero=True)(pruned, stats)
    assert after.mask is not None and int((after.parts().base.dense()[~after.mask] != 0).sum()) == 0
    assert left(after, stats) < left(pruned, stats)
    dense = Gptq(4, 16, order="activation")(layer_of(32, 64), stats)
    assert outputs_left(dense, stats) < 0.02 and float((dense.error[:, :5]).abs().max()) < 0.5


def test_a_centred_grid_has_its_four_values_and_the_error_that_is_known_for_gaussian_weights() -> None:
    # The least mean squared error of evenly spaced levels for Gaussian numbers (Max, Quantizing for minimum distortion, 1960,
    # table 2): 0.1188 of their variance with four. An even grid, which holds zero, cannot reach it.
    layer, stats = Layer.of("fc1", draw(64, 512)), Stats(10**6, {Covariance: torch.eye(512)})
    centred, even = Gptq(2, "per-channel", centred=True)(layer, stats), Gptq(2, "per-channel")(layer, stats)
    assert isinstance(centred.base, Codebook) and centred.base.values.tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert outputs_left(centred, stats) == pytest.approx(0.1188, rel=0.03)
    assert outputs_left(centred, stats) < 0.9 * outputs_left(even, stats)
    assert centred.parts().storage_bits() == even.parts().storage_bits() + 4 * 16


@pytest.mark.parametrize(("bits", "zero"), [(5, False), (2, True)])
def test_a_centred_grid_of_many_bits_or_with_zeros_is_refused(bits: int, zero: bool) -> None:
    with pytest.raises(RecipeError, match="a centred grid has up to 4 bits and no zeros"):
        Gptq(bits, centred=True, zero=zero)


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"group_size": 0}, {"damp": -1}, {"damp": 2}])
def test_options_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        Gptq(**options)  # type: ignore[arg-type]


def test_replaced_statistics_forget_what_was_computed_of_the_old_ones() -> None:
    stats = Stats(64, {Covariance: torch.eye(32)})
    Gptq(group_size=16)(Layer.of("fc1", draw(8, 32)), stats)
    assert len(stats.cache)
    assert not len(replace(stats, values={Covariance: torch.zeros(32, 32)}).cache)
    assert stats.restricted_to(Gptq.needs).cache is stats.cache
