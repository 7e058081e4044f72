"""GPTQ: rounding that the later inputs answer to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.core.solvers.linalg import weighted_square
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
