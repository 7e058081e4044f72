"""SparseGPT: pruning that the later inputs answer to."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.solvers.linalg import weighted_square
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.methods.prune.magnitude import Magnitude
from slimlm.methods.prune.sparsegpt import SparseGpt
from slimlm.methods.prune.wanda import Wanda
from slimlm.methods.quantize.slim_quant import SlimQuant
from tests.methods.conftest import changed, draw, inputs, layer_of, stats_of

PATTERNS = ["2:4", "1:4", "4:8", 0.5, 0.37]


def gram_of(stats: Stats) -> Tensor:
    return stats[Covariance]


def correlated(width: int) -> Stats:
    """Statistics of inputs that share a direction."""
    return stats_of(inputs(width) + 2 * draw(4, 32, 1, seed=9))


def left(layer: Layer, stats: Stats) -> float:
    return weighted_square(layer.error, gram_of(stats))


def mask_of(layer: Layer) -> Tensor:
    assert layer.mask is not None
    return layer.mask


@pytest.mark.parametrize("order", ["energy", "input"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_uncorrelated_inputs_give_wanda_s_mask_and_move_nothing(pattern: str | float, order: str) -> None:  # law 7
    energy = torch.exp(draw(120, seed=2))
    stats, layer = Stats(10**6, {MeanSquare: energy, Covariance: torch.diag(energy)}), layer_of(16, 120)
    found, wanda = SparseGpt(pattern, order, damp=0)(layer, stats), Wanda(pattern)(layer, stats)  # type: ignore[arg-type]
    assert torch.equal(mask_of(found), mask_of(wanda))
    assert torch.equal(found.base_weight, wanda.base_weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_equal_uncorrelated_inputs_give_the_mask_of_magnitude(pattern: str | float) -> None:  # law 7
    stats, layer = Stats(10**6, {Covariance: torch.eye(120)}), layer_of(16, 120)
    assert torch.equal(mask_of(SparseGpt(pattern)(layer, stats)), mask_of(Magnitude(pattern)(layer, stats)))


@pytest.mark.parametrize("order", ["energy", "input"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("width", [120, 256, 352])
def test_as_many_weights_stay_as_the_pattern_says_and_can_be_stored(width: int, pattern: str | float, order: str) -> None:
    layer = SparseGpt(pattern, order)(layer_of(6, width), stats_of(inputs(width)))  # type: ignore[arg-type]
    keep = mask_of(layer)
    if isinstance(pattern, str):
        kept, of = map(int, pattern.split(":"))
        assert bool((keep.view(-1, of).sum(dim=1) == kept).all())  # law 6
    else:
        assert keep.sum(dim=1).tolist() == [width - int(pattern * width)] * 6
    parts = layer.parts()
    back = parts.describe().from_stored(parts.tensors(), layer.shape)
    assert torch.equal(back.base.dense(), parts.base.dense())
    assert int((parts.base.dense()[~keep] != 0).sum()) == 0


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_output_error_is_less_than_that_of_wanda_and_of_its_own_mask_alone(pattern: str | float) -> None:  # law 18
    for seed in range(3):
        stats, layer = correlated(64), layer_of(32, 64, seed)
        found = SparseGpt(pattern)(layer, stats)
        masked = layer.with_mask(mask_of(found), "own")
        assert left(found, stats) < left(masked, stats)
        assert left(found, stats) < 0.8 * left(Wanda(pattern)(layer, stats), stats)


def test_the_weights_that_stay_are_moved_and_stored_in_the_model_s_dtype() -> None:
    layer, stats = layer_of(32, 64), stats_of(inputs(64))
    found = SparseGpt()(layer, stats)
    assert not torch.equal(found.base_weight, layer.original * mask_of(found))
    base = found.parts().base
    assert isinstance(base, Pruned) and isinstance(base.inner, Plain)
    assert base.inner.values.dtype == torch.float16
    assert torch.equal(found.original, layer.original)


def test_a_quantizer_after_it_codes_the_moved_weights() -> None:
    stats = stats_of(inputs(64))
    found = SparseGpt()(layer_of(32, 64), stats)
    coded = SlimQuant(8, 32)(found, stats)
    assert torch.equal(mask_of(coded), mask_of(found))
    # Eight bits: half a step of the largest moved weight of a group, and nothing of how far the weights were moved.
    assert float((coded.base_weight - found.base_weight).abs().max()) < 0.6 / 127 * float(found.base_weight.abs().max())


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**10])
def test_a_factor_on_all_activations_changes_nothing(factor: float) -> None:  # law 7
    stats, layer = stats_of(inputs(64)), layer_of(32, 64)
    scaled = changed(stats, {Covariance: gram_of(stats) * factor})
    assert torch.equal(SparseGpt()(layer, stats).base_weight, SparseGpt()(layer, scaled).base_weight)  # powers of two


def test_a_weight_that_is_2_4_already_stays_as_it_is() -> None:  # law 21
    stats, layer = stats_of(inputs(64)), layer_of(32, 64)
    sparse = Layer.of("fc1", layer.original * mask_of(Magnitude()(layer, stats)))
    found = SparseGpt()(sparse, stats)
    assert torch.equal(found.base_weight, sparse.original)
    assert torch.equal(mask_of(found), sparse.original != 0)


def test_what_the_user_should_know_is_noted() -> None:
    layer, stats = layer_of(32, 64), stats_of(inputs(64, dead=5))
    assert SparseGpt()(layer, stats).notes == ()
    assert "100 calibration tokens" in SparseGpt()(layer, replace(stats, tokens=100)).notes[0]
    assert "damping" in SparseGpt(damp=0.0)(layer, stats).notes[0]


@pytest.mark.parametrize("options", [{"pattern": "4:2"}, {"pattern": 1.0}, {"damp": -1}])
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        SparseGpt(**options)  # type: ignore[arg-type]
