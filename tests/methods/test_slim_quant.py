"""SLiM-Quant and its activation-aware variant against AbsMax, against the paper and by hand."""

import pytest
import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.errors import RecipeError
from slimlm.core.layer import Layer
from slimlm.core.parts.uniform import Uniform
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.mean_abs import MeanAbs
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.methods.quantize.absmax import AbsMax
from slimlm.methods.quantize.slim_quant import SlimQuant, absolute_histogram, alpha_of_code, alpha_of_paper
from slimlm.methods.quantize.slim_quant_o import SlimQuantO
from tests.methods.conftest import draw, inputs, layer_of, stats_of, weight_of

NOTHING = Stats(0)
SEARCHES = ["grid", "paper", "code"]
GROUPS: list[grid.GroupSize] = ["per-tensor", "per-channel", 128, 32]


def code_of(layer: Layer) -> Uniform:
    assert isinstance(layer.base, Uniform)
    return layer.base


def loss(layer: Layer) -> float:
    return float(layer.error.double().square().mean())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape", [(48, 172), (200, 256)], ids=["every-weight", "histogram"])
def test_slim_quant_is_never_worse_than_absmax(shape: tuple[int, int], group_size: grid.GroupSize, bits: int) -> None:  # law 3
    layer = layer_of(*shape)
    # 0.1 %: the scales are chosen in float32 and then stored in float16, where each may land a little off.
    assert loss(SlimQuant(bits, group_size)(layer, NOTHING)) <= 1.001 * loss(AbsMax(bits, group_size)(layer, NOTHING))


def test_slim_quant_gains_what_a_single_scale_can() -> None:  # law 3; SLiM reports 3 to 19 times at 4 bits
    layer = layer_of(200, 256)
    assert loss(SlimQuant(4, "per-tensor")(layer, NOTHING)) < 0.5 * loss(AbsMax(4, "per-tensor")(layer, NOTHING))


@pytest.mark.parametrize("bits", [3, 4])
def test_finer_groups_err_less(bits: int) -> None:  # law 4
    layer = layer_of(64, 512)
    for method in (AbsMax, SlimQuant):
        losses = [loss(method(bits, group_size)(layer, NOTHING)) for group_size in (32, 128, "per-channel", "per-tensor")]
        assert losses == sorted(losses)


@pytest.mark.parametrize("method", [AbsMax, SlimQuant])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_group_a_row_is_the_row(method: type[AbsMax] | type[SlimQuant], bits: int) -> None:  # law 4
    layer = layer_of()
    by_row, by_group = (code_of(method(bits, group_size)(layer, NOTHING)) for group_size in ("per-channel", 172))
    assert torch.equal(by_row.codes, by_group.codes)
    assert torch.equal(by_row.scale, by_group.scale)


@pytest.mark.parametrize("method", [AbsMax, SlimQuant])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantizing_what_is_quantized_changes_no_weight(  # law 1
    method: type[AbsMax] | type[SlimQuant], group_size: grid.GroupSize, bits: int
) -> None:
    step = method(bits, group_size)
    once = step(layer_of(), NOTHING).parts().base.dense()
    twice = step(Layer.of("fc1", once), NOTHING).parts().base.dense()
    if method is AbsMax or group_size == "per-tensor":
        # Two float32 roundings; float16 scales come back exactly.
        torch.testing.assert_close(twice, once, rtol=2.0**-22, atol=0)
    else:
        # A refitted scale may fall next to the float16 that it came from: 2^-11.
        torch.testing.assert_close(twice, once, rtol=2.0**-11, atol=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_scale_follows_a_scaling_of_the_weights(search: str) -> None:  # law 3
    weight = weight_of(48, 172).float()
    step = SlimQuant(4, search=search)  # type: ignore[arg-type]
    small = step.scale_of(weight * 2.0**-20)
    torch.testing.assert_close(small, step.scale_of(weight) * 2.0**-20, rtol=1e-5, atol=0)  # float32 powers


@pytest.mark.parametrize("search", SEARCHES)
def test_the_scale_does_not_depend_on_the_order_of_the_weights(search: str) -> None:  # law 3
    weight = weight_of(200, 256).float()
    shuffled = weight.flatten()[torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(0))].view_as(weight)
    step = SlimQuant(4, search=search)  # type: ignore[arg-type]
    # Sums in another order may flip two fine candidates, which lie within 1 % of each other.
    torch.testing.assert_close(step.scale_of(shuffled), step.scale_of(weight), rtol=0.01, atol=0)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "weight", [torch.zeros(6, 8), torch.full((6, 8), 0.3), torch.tensor([[-2.0]])], ids=["zero", "constant", "one"]
)
def test_degenerate_weights_give_finite_codes(search: str, weight: Tensor) -> None:  # law 3
    step = SlimQuant(4, search=search)  # type: ignore[arg-type]
    layer = step(Layer.of("fc1", weight), NOTHING)
    largest = float(weight.abs().max())
    # The paper's and the program's top level lie an eighth below alpha, and alpha at most a tenth below the maximum.
    assert float(layer.error.abs().max()) <= (1e-6 if search == "grid" else 0.25) * largest


@pytest.mark.parametrize("size", [512_000, 515_000, 5_000_000])
def test_the_search_of_the_program_finds_a_scale_for_any_number_of_bins(size: int) -> None:  # law 3: multiples of ten too
    weight = (2 * torch.rand(size // 1000, 1000, generator=torch.Generator().manual_seed(0)) - 1) if size < 10**6 else None
    if weight is None:
        weight = 2 * torch.rand(5000, 1000, generator=torch.Generator().manual_seed(0)) - 1
    bins = len(absolute_histogram(weight)[0])
    assert bins == max(512, size // 1000)
    # On uniform weights the best cap is nearly the maximum; the program's empty bracket would send it to zero.
    assert 0.9 <= float(alpha_of_code(weight, 4)) <= 1


def test_the_histogram_of_the_paper_counts_every_weight() -> None:
    weight = weight_of(48, 172).float()
    centres, counts, largest = absolute_histogram(weight)
    assert float(counts.sum()) == weight.numel()
    assert largest == float(weight.abs().max())
    assert float(centres[0]) > 0
    assert float(centres[-1]) < largest


@pytest.mark.parametrize("bits", [3, 4])
def test_algorithm_one_finds_nearly_the_least_of_its_own_cost(bits: int) -> None:
    weight = draw(200, 256)
    steps = 2 ** (bits - 1)

    def cost(alpha: float) -> float:  # equations 5 to 7, on the weights themselves
        x = weight.abs().double()
        return float(torch.where(x <= alpha, (x / alpha * steps).round() * alpha / steps - x, alpha - x).square().mean())

    least = min(cost(float(alpha)) for alpha in torch.linspace(0.05, 1, 200) * weight.abs().max())
    # Ten fine samples over two coarse steps are 2.2 % of max|w| apart; at most half of that from the optimum.
    assert cost(float(alpha_of_paper(weight, bits))) <= 1.02 * least


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("search", ["paper", "code"])
def test_the_grid_that_is_applied_is_the_one_to_search(search: str, bits: int) -> None:
    layer = Layer.of("fc1", draw(200, 256))
    ours, theirs = (loss(SlimQuant(bits, search=s)(layer, NOTHING)) for s in ("grid", search))  # type: ignore[arg-type]
    assert ours <= theirs * (1 + 1e-4)  # the histogram may misjudge two nearly equal scales by so much


def test_pruned_weights_do_not_take_part_in_the_search() -> None:
    weight = draw(48, 172)
    keep = weight.abs() < 1
    layer = SlimQuant(4)(Layer.of("fc1", weight).with_mask(keep, "0.3"), NOTHING)
    direct = SlimQuant(4)(Layer.of("fc1", weight * keep), NOTHING)
    assert torch.equal(code_of(layer).codes, code_of(direct).codes)


def test_a_search_of_the_paper_by_group_is_refused_with_a_way_out() -> None:
    with pytest.raises(RecipeError, match="per-tensor"):
        SlimQuant(4, "per-channel", "paper")


def test_absmax_by_hand() -> None:
    layer = AbsMax(4, 2)(Layer.of("fc1", torch.tensor([[0.7, -0.31, 14.0, 3.0]])), NOTHING)
    assert code_of(layer).codes.tolist() == [[7, -3, 7, 2]]  # 3.1 and 1.5, the tie to even
    torch.testing.assert_close(code_of(layer).scale.float(), torch.tensor([[0.1, 2.0]]), rtol=2.0**-11, atol=0)  # float16


def test_slim_quant_by_hand() -> None:
    # Fifteen ones and a ten, at 2 bits (-2 .. 1): scale s < 2 puts all on s, at the cost 15 (1-s)^2 + (10-s)^2, least at
    # 25/16; a scale above 2 keeps the ten and loses the ones, at least 15. The first costs at least 75, so the ten stays.
    weight = torch.ones(1, 16)
    weight[0, 5] = 10
    layer = SlimQuant(2)(Layer.of("fc1", weight), NOTHING)
    torch.testing.assert_close(code_of(layer).scale, torch.tensor([[10.0]]), rtol=1e-6, atol=0)  # one float32 rounding
    assert code_of(layer).codes.tolist() == (weight == 10).int().tolist()


@pytest.mark.parametrize("boost", [2.0, 3.0, 10.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_salient_inputs_are_rounded_on_a_grid_finer_by_the_boost(bits: int, boost: float) -> None:  # law 2
    layer, stats = layer_of(), stats_of(inputs())
    code = code_of(SlimQuantO(bits, 0.05, boost)(layer, stats))
    assert code.channel_scale is not None
    salient = code.channel_scale < 1
    assert int(salient.sum()) == 8  # the integer part of 0.05 x 172
    step = code.scale.float() * code.channel_scale.float()
    inside = (code.codes < 2 ** (bits - 1) - 1) & (code.codes > -(2 ** (bits - 1)))
    miss = (code.dense() - layer.original).abs()
    assert bool((miss <= step * (0.5 + 2.0**-15))[inside].all())  # 2^-15: float32 quotients of up to 128 steps


def test_the_salient_inputs_are_those_of_largest_activation_times_weight() -> None:
    layer = Layer.of("fc1", torch.tensor([[1.0, 2.0, 3.0, 0.5], [1.0, 2.0, -3.0, 0.5]]))
    stats = Stats(1, {MeanAbs: torch.tensor([8.0, 3.0, 1.0, 1.0])})  # products 8, 6, 3, 0.5
    code = code_of(SlimQuantO(4, 0.5)(layer, stats))
    assert code.channel_scale is not None
    assert code.channel_scale.tolist() == [0.5, 0.5, 1, 1]


def test_the_scale_of_the_activation_aware_variant_is_the_plain_one() -> None:
    layer, stats = layer_of(), stats_of(inputs())
    plain, aware = code_of(SlimQuant(4)(layer, stats)), code_of(SlimQuantO(4)(layer, stats))
    torch.testing.assert_close(aware.scale, plain.scale, rtol=0.01, atol=0)  # the plain one is polished by least squares


@pytest.mark.parametrize(
    ("salient", "boost"), [(0.0, 2.0), (1.0, 2.0), (0.01, 1.0), (0.01, float("nan")), (0.01, float("inf"))]
)
def test_a_salience_that_makes_no_sense_is_refused(salient: float, boost: float) -> None:
    with pytest.raises(RecipeError, match="boost"):
        SlimQuantO(4, salient, boost)


@pytest.mark.parametrize("bits", [1, 9])
@pytest.mark.parametrize("method", [AbsMax, SlimQuant, SlimQuantO])
def test_a_quantizer_refuses_bits_that_no_grid_has(method: type[AbsMax], bits: int) -> None:
    with pytest.raises(RecipeError, match="2 to 8"):
        method(bits)


@pytest.mark.parametrize("group_size", ["per-tensor", "per-channel", 32])
def test_weighing_by_energy_errs_less_at_the_output_and_not_weighing_less_at_the_weight(group_size: grid.GroupSize) -> None:
    # 256 x 172 is more than 32768 weights, so one scale per tensor is searched on a weighted histogram.
    layer, stats = layer_of(256), stats_of(inputs())
    even, weighed = (SlimQuant(3, group_size, weigh=weigh)(layer, stats).error.square() for weigh in ("even", "energy"))
    # Both are searched on a grid of scales, so each is best up to its last step.
    assert float((weighed * stats[MeanSquare]).sum()) <= 1.001 * float((even * stats[MeanSquare]).sum())
    assert float(even.sum()) <= 1.001 * float(weighed.sum())
    assert float((weighed * stats[MeanSquare]).sum()) != float((even * stats[MeanSquare]).sum())


def test_equal_energies_weigh_nothing() -> None:
    layer = layer_of()
    stats = Stats(1, {MeanSquare: torch.full((172,), 0.3)})
    even, weighed = (code_of(SlimQuant(4, 32, weigh=weigh)(layer, stats)) for weigh in ("even", "energy"))
    assert torch.equal(even.codes, weighed.codes)


def test_the_searches_of_paper_and_program_refuse_weights() -> None:
    with pytest.raises(RecipeError, match="weigh"):
        SlimQuant(4, search="paper", weigh="energy")
