"""A layer's state between steps: sums that add up, masks that hold, arguments that stay."""

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.layer import Layer
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.uniform import Uniform


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes_for(target: Tensor) -> Uniform:
    return Uniform((target * 2).round().clamp(-8, 7).to(torch.int8), torch.full((1, 1), 0.5), 4, "per-tensor")


def adapter(out: int = 8, width: int = 12) -> LowRank:
    return LowRank(Plain(draw(2, out, seed=5) / 4), Plain(draw(2, width, seed=6) / 4))


def mask() -> Tensor:
    return choose(draw(8, 12, seed=7), Pattern.parse("2:4"))


def states() -> dict[str, Layer]:
    """Every combination of a mask, codes and an adapter."""
    bare = Layer.of("fc1", draw(8, 12))
    pruned = bare.prune(mask(), "2:4")
    coded = bare.encode(codes_for(bare.target))
    return {
        "bare": bare,
        "pruned": pruned,
        "coded": coded,
        "repaired": bare.repair(adapter()),
        "coded-pruned": coded.prune(mask(), "2:4"),
        "pruned-coded": pruned.encode(codes_for(pruned.target)),
        "pruned-repaired": pruned.repair(adapter()),
        "coded-repaired": coded.repair(adapter()),
        "all": coded.prune(mask(), "2:4").repair(adapter()),
    }


@pytest.mark.parametrize("state", states())
def test_the_error_is_the_original_less_what_the_parts_stand_for(state: str) -> None:
    layer = states()[state]
    # Float32 sums of the same few terms in another order: an ulp or two of entries up to 4.
    torch.testing.assert_close(layer.error, layer.original - dense_of(layer.parts()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("state", states())
def test_the_base_is_zero_wherever_the_mask_says_so(state: str) -> None:  # law 8
    layer = states()[state]
    if layer.keep is None:
        assert int((layer.parts()[0].dense() == 0).sum()) < layer.original.numel() / 2
    else:
        for base in (layer.target, layer.working, layer.parts()[0].dense()):
            assert int((base[~layer.keep] != 0).sum()) == 0


def test_the_damage_is_that_of_rounding_where_weights_stay_and_of_pruning_where_they_go() -> None:  # law 15
    layer = states()["coded-pruned"]
    assert layer.code is not None and layer.keep is not None
    rounding, pruning = layer.original - layer.code.dense(), layer.original
    assert torch.equal(layer.damage, rounding * layer.keep + pruning * ~layer.keep)


def test_a_layer_on_which_nothing_was_decided_is_its_weight_again() -> None:
    weight = draw(8, 12).half()
    (part,) = Layer.of("fc1", weight).parts()
    assert isinstance(part, Plain)
    assert torch.equal(part.values, weight)
    assert part.values.dtype == torch.float16


def test_steps_return_new_layers_and_leave_the_old_alone() -> None:
    layer = Layer.of("fc1", draw(8, 12))
    layer.prune(mask(), "2:4")
    layer.encode(codes_for(layer.target))
    layer.repair(adapter())
    assert (layer.keep, layer.code, layer.extras) == (None, None, ())
    assert torch.equal(layer.original, draw(8, 12))


def test_later_codes_aim_at_what_the_adapter_leaves() -> None:
    layer = states()["all"]
    assert layer.keep is not None
    torch.testing.assert_close(layer.target, (layer.original - adapter().dense()) * layer.keep, rtol=0, atol=0)


def test_a_later_repair_takes_the_place_of_the_earlier() -> None:
    layer = states()["all"].repair(adapter())
    assert len(layer.extras) == 1


def test_pruning_twice_is_refused_by_the_name_of_the_layer() -> None:
    with pytest.raises(RecipeError, match="fc1"):
        states()["pruned"].prune(mask(), "2:4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_with_its_count(bad: float) -> None:
    weight = draw(8, 12)
    weight[3, 4] = weight[5, 6] = bad
    with pytest.raises(NumericsError, match=r"fc1 holds 2 .* of 96"):
        Layer.of("fc1", weight)
