"""JSQ: its mask between Wanda's and the output's range, its smoothing, and by hand."""

import pytest
import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.chunks import pieces_of
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.parts.uniform import Uniform
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.mean_sample import MeanSample
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.core.statistics.peak_abs import PeakAbs
from slimlm.methods.joint.jsq import Jsq, capped, inverse_smoothing, ranges_without
from slimlm.methods.prune.wanda import Wanda
from slimlm.methods.quantize.absmax import AbsMax
from tests.methods.conftest import changed, draw, inputs, layer_of, stats_of

GROUPS: list[grid.GroupSize] = ["per-tensor", "per-channel", 128, 32]


def code_of(layer: Layer) -> Uniform:
    assert isinstance(layer.base, Uniform)
    return layer.base


def keep_of(layer: Layer) -> Tensor:
    assert layer.mask is not None
    return layer.mask


def inverse_of(layer: Layer) -> Tensor:
    inverse = code_of(layer).channel_scale
    assert inverse is not None
    return inverse.float()


def ranges_by_hand(weight: Tensor, window: Tensor) -> Tensor:
    """One input taken out at a time, in float64."""
    columns = []
    for i in range(weight.shape[1]):
        without = weight.double().clone()
        without[:, i] = 0
        output = window.double() @ without.T
        columns.append(output.amax(dim=0) - output.amin(dim=0))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", 0.5])
def test_without_the_range_and_the_caps_the_mask_is_wanda_s(pattern: str | float, alpha: float) -> None:  # law 7
    stats = stats_of(inputs(dead=3))
    ours = Jsq(pattern=pattern, rho=0.0, alpha=alpha, clip=0.0)(layer_of(), stats)
    theirs = Wanda(pattern)(layer_of(), stats)
    assert torch.equal(keep_of(ours), keep_of(theirs))
    assert ours.pattern == theirs.pattern


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
def test_where_all_inputs_peak_alike_smoothing_them_changes_no_code(group_size: grid.GroupSize, bits: int) -> None:
    stats = changed(stats_of(inputs()), {PeakAbs: torch.full((172,), 0.3)})
    ours = Jsq(bits, group_size, rho=0.0, alpha=1.0, clip=0.0)(layer_of(), stats)
    theirs = AbsMax(bits, group_size)(Wanda()(layer_of(), stats), stats)
    assert torch.equal(keep_of(ours), keep_of(theirs))
    assert torch.equal(code_of(ours).codes, code_of(theirs).codes)
    assert torch.equal(code_of(ours).scale, code_of(theirs).scale)
    assert bool((inverse_of(ours) == 1).all())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("group_size", GROUPS)
def test_the_codes_are_absmax_s_of_the_smoothed_weights(group_size: grid.GroupSize, alpha: float) -> None:
    stats = stats_of(inputs(dead=3))
    layer = Jsq(4, group_size, alpha=alpha)(layer_of(), stats)
    smoothed = layer.original * keep_of(layer) / inverse_of(layer)
    plain = code_of(AbsMax(4, group_size)(Layer.of("fc1", smoothed), stats))
    assert torch.equal(code_of(layer).codes, plain.codes)
    assert torch.equal(code_of(layer).scale, plain.scale)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
def test_smoothing_evens_out_weights_and_inputs_as_alpha_says(alpha: float) -> None:  # SmoothQuant, equation 4
    kept, peak = layer_of().original, stats_of(inputs())[PeakAbs]

    smoothing = 1 / inverse_smoothing(kept, peak, alpha=alpha).double()
    even = smoothing * kept.abs().amax(dim=0) ** (1 - alpha) / peak**alpha
    torch.testing.assert_close(even, even[:1].expand_as(even), rtol=2.0**-10, atol=0)  # two factors in float16
    torch.testing.assert_close(float(smoothing.log().mean()), 0.0, rtol=0, atol=2.0**-11)  # float16


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_smoothing_stays_in_the_normal_range_of_float16(size: float, alpha: float) -> None:
    peak = torch.ones(172).index_fill(0, torch.tensor([5]), size)
    weight = layer_of().original.index_fill(1, torch.tensor([7]), 1 / size)
    inverse = inverse_smoothing(weight, peak, alpha=alpha).float()
    assert float(inverse.min()) >= grid.FP16_SMALLEST_NORMAL
    assert float(inverse.max()) <= grid.FP16_LARGEST


def test_inputs_without_activations_or_weights_are_not_smoothed() -> None:
    kept = torch.tensor([[1.0, 0.0, 4.0, 2.0], [-2.0, 0.0, 1.0, 2.0]])
    # s = 2 and 1 for the two that are smoothed; their geometric mean is the root of 2.
    inverse = inverse_smoothing(kept, torch.tensor([8.0, 3.0, 0.0, 2.0]), alpha=0.5)
    torch.testing.assert_close(inverse.float(), torch.tensor([0.5**0.5, 1, 1, 2**0.5]), rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("pieces", [1, 40, 1000, 2**17])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 5), (9, 3, 8), (32, 12, 20)], ids=str)
def test_the_ranges_are_those_of_one_input_left_out_at_a_time(shape: tuple[int, int, int], pieces: int) -> None:
    length, out, width = shape
    weight, window = draw(out, width), draw(length, width, seed=1)
    with pieces_of(pieces):
        found = ranges_without(weight, window)
    assert found.shape == weight.shape
    # Float32 sums of up to 20 terms of size one.
    torch.testing.assert_close(found.double(), ranges_by_hand(weight, window), rtol=1e-5, atol=1e-5)


def test_the_size_of_the_pieces_changes_no_bit() -> None:
    weight, window = draw(24, 40), draw(16, 40, seed=1)
    whole = ranges_without(weight, window)
    with pieces_of(100):
        assert torch.equal(ranges_without(weight, window), whole)


def test_only_the_variation_of_an_input_over_positions_counts() -> None:
    weight, window = draw(24, 40), draw(16, 40, seed=1)
    # Float32 sums of 40 terms of size one.
    shifted = ranges_without(weight, window + draw(40, seed=2))
    torch.testing.assert_close(shifted, ranges_without(weight, window), rtol=1e-5, atol=1e-5)
    assert bool((ranges_without(weight, draw(1, 40).expand(16, 40)) < 1e-5).all())


def test_the_range_changes_the_choice() -> None:  # so that the tests with rho = 0 mean something
    stats = stats_of(inputs())
    with_range, without = (keep_of(Jsq(rho=rho)(layer_of(), stats)) for rho in (2.1, 0.0))
    assert int((with_range != without).sum()) > 100


@pytest.mark.parametrize("factor", [2.0**-10, 2.0**6])
def test_a_factor_on_all_activations_changes_neither_mask_nor_codes(factor: float) -> None:  # law 7
    # A power of four, so that scores and roots are scaled without rounding.
    plain, scaled = (Jsq()(layer_of(), stats_of(inputs() * by)) for by in (1.0, factor))
    assert torch.equal(keep_of(scaled), keep_of(plain))
    assert torch.equal(code_of(scaled).codes, code_of(plain).codes)
    assert torch.equal(code_of(scaled).scale, code_of(plain).scale)
    assert torch.equal(inverse_of(scaled), inverse_of(plain))


@pytest.mark.parametrize("factor", [2.0**-4, 2.0**4])
def test_a_factor_on_the_weights_changes_neither_mask_nor_codes(factor: float) -> None:
    stats = stats_of(inputs())
    plain, scaled = (Jsq()(Layer.of("fc1", layer_of().original * by), stats) for by in (1.0, factor))
    assert torch.equal(keep_of(scaled), keep_of(plain))
    assert torch.equal(code_of(scaled).codes, code_of(plain).codes)
    assert torch.equal(code_of(scaled).dense(), code_of(plain).dense() * factor)


def test_smoothing_spares_the_inputs_that_matter() -> None:
    stats = stats_of(inputs())
    smoothed = Jsq(rho=0.0, clip=0.0)(layer_of(), stats)
    plain = AbsMax()(Wanda()(layer_of(), stats), stats)
    assert torch.equal(keep_of(smoothed), keep_of(plain))
    lost = [float(((layer.residual * keep_of(layer)).square() * stats[MeanSquare]).sum()) for layer in (smoothed, plain)]
    assert lost[0] < 0.7 * lost[1]


def test_the_cap_is_the_least_of_the_largest_share() -> None:
    statistic = torch.tensor([[1.0, -9.0, 3.0], [8.0, -2.0, 0.5]])
    assert capped(statistic, 0.0) is statistic
    assert capped(statistic, 0.1) is statistic  # not one of six
    assert torch.equal(capped(statistic, 0.2), statistic)  # the one largest is its own cap
    assert capped(statistic, 0.5).tolist() == [[1, -3, 3], [3, -2, 0.5]]
    assert statistic.tolist() == [[1, -9, 3], [8, -2, 0.5]]


def test_the_caps_of_norms_and_peaks_and_positions_hold() -> None:
    stats = stats_of(inputs())
    # One far outlier of 172 inputs more or less changes nothing under caps of 2 % (three inputs, 110 entries).
    louder = changed(stats, {MeanSquare: stats[MeanSquare].clone(), PeakAbs: stats[PeakAbs].clone()})
    louder[MeanSquare][stats[MeanSquare].argmax()] *= 100
    louder[PeakAbs][stats[PeakAbs].argmax()] *= 100
    one, other = (Jsq(clip=0.02)(layer_of(), s) for s in (stats, louder))
    assert torch.equal(keep_of(one), keep_of(other))
    assert torch.equal(code_of(one).dense(), code_of(other).dense())
    window = stats[MeanSample].clone()
    window.view(-1)[window.abs().argmax()] *= 100
    other = Jsq(clip=0.02)(layer_of(), changed(stats, {MeanSample: window}))
    assert torch.equal(keep_of(one), keep_of(other))


def test_jsq_by_hand() -> None:
    # Three positions; the outputs are 2, -1 and 1 + 3 = 4. Without an input they span 5, 4, 4 (2, -1, 3) and 3 (2, -1, 1).
    # The norms over a window of three are 1, 1, 2, 1. Scores 2 + 10, 1 + 8, 2 + 8, 3 + 6; Wanda would keep the first and last.
    stats = Stats(
        3,
        {
            MeanSquare: torch.tensor([1.0, 1.0, 4.0, 1.0]) / 3,
            PeakAbs: torch.tensor([32.0, 1.0, 1.0, 1.0]),
            MeanSample: torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]),
        },
    )
    weight = torch.tensor([[2.0, -1.0, 1.0, 3.0]])
    step = Jsq(rho=2.0)
    torch.testing.assert_close(step.score(weight, stats), torch.tensor([[12.0, 9, 10, 9]]), rtol=1e-6, atol=0)  # a root
    layer = step(Layer.of("fc1", weight), stats)
    assert keep_of(layer).tolist() == [[True, False, True, False]]
    # s is 4 (the root of 32 / 2) and 1, of geometric mean 2: the weights become 2 x 2 = 4 and 1 / 2, the scale 4 / 7.
    assert inverse_of(layer).tolist() == [0.5, 1, 2, 1]
    assert code_of(layer).codes.tolist() == [[7, 0, 1, 0]]  # 0.5 / (4 / 7) is 0.875
    torch.testing.assert_close(layer.base_weight, torch.tensor([[2.0, 0, 8 / 7, 0]]), rtol=1e-6, atol=0)  # one float32 scale


@pytest.mark.parametrize(
    "options",
    [
        {"rho": -0.1},
        {"rho": float("inf")},
        {"rho": float("nan")},
        {"alpha": -0.1},
        {"alpha": 1.1},
        {"alpha": float("nan")},
        {"clip": -0.01},
        {"clip": 1.0},
        {"clip": float("nan")},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match=f"^{next(iter(options))} = "):
        Jsq(**options)  # type: ignore[arg-type]


def test_bits_groups_and_patterns_are_those_of_all_methods() -> None:
    for options in ({"bits": 9}, {"group_size": 0}, {"pattern": "5:4"}):
        with pytest.raises(RecipeError):
            Jsq(**options)  # type: ignore[arg-type]
