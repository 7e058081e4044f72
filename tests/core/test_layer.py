"""A layer's state between steps: sums that add up, masks that hold, arguments that stay."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import NumericsError, RecipeError
from slimlm.core.layer import Layer
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.low_rank import LowRank
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
    pruned = bare.with_mask(mask(), "2:4")
    coded = bare.with_base(codes_for(bare.masked_reference))
    return {
        "bare": bare,
        "pruned": pruned,
        "coded": coded,
        "repaired": bare.with_adapter(adapter()),
        "coded-pruned": coded.with_mask(mask(), "2:4"),
        "pruned-coded": pruned.with_base(codes_for(pruned.masked_reference)),
        "pruned-repaired": pruned.with_adapter(adapter()),
        "coded-repaired": coded.with_adapter(adapter()),
        "all": coded.with_mask(mask(), "2:4").with_adapter(adapter()),
    }


@pytest.mark.parametrize("state", states())
def test_the_error_is_the_original_less_what_the_parts_stand_for(state: str) -> None:
    layer = states()[state]
    # Float32 sums of the same few terms in another order: an ulp or two of entries up to 4.
    torch.testing.assert_close(layer.error, layer.original - layer.parts().dense(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("state", states())
def test_the_base_is_zero_wherever_the_mask_says_so(state: str) -> None:  # law 8
    layer = states()[state]
    if layer.mask is None:
        assert int((layer.parts().base.dense() == 0).sum()) < layer.original.numel() / 2
    else:
        for base in (layer.masked_reference, layer.base_weight, layer.parts().base.dense()):
            assert int((base[~layer.mask] != 0).sum()) == 0


def test_the_residual_is_that_of_rounding_where_weights_stay_and_of_pruning_where_they_go() -> None:  # law 15
    layer = states()["coded-pruned"]
    assert layer.base is not None and layer.mask is not None
    rounding, pruning = layer.original - layer.base.dense(), layer.original
    assert torch.equal(layer.residual, rounding * layer.mask + pruning * ~layer.mask)


def test_a_layer_on_which_nothing_was_decided_is_its_weight_again() -> None:
    weight = draw(8, 12).half()
    (part,) = Layer.of("fc1", weight).parts()
    assert isinstance(part, Plain)
    assert torch.equal(part.values, weight)
    assert part.values.dtype == torch.float16


def test_steps_return_new_layers_and_leave_the_old_alone() -> None:
    layer = Layer.of("fc1", draw(8, 12))
    layer.with_mask(mask(), "2:4")
    layer.with_base(codes_for(layer.masked_reference))
    layer.with_adapter(adapter())
    assert (layer.mask, layer.base, layer.adapter) == (None, None, None)
    assert torch.equal(layer.original, draw(8, 12))


def test_a_later_base_stands_for_what_the_adapter_leaves() -> None:
    layer = states()["all"]
    assert layer.mask is not None
    torch.testing.assert_close(layer.masked_reference, (layer.original - adapter().dense()) * layer.mask, rtol=0, atol=0)


def test_outliers_and_an_adapter_stand_beside_the_base_at_the_same_time() -> None:
    outliers = Plain(draw(8, 12, seed=11).half() / 4)
    layer = states()["coded-pruned"].with_outliers(outliers)
    assert layer.base is not None and layer.mask is not None
    masked = layer.base.dense() * layer.mask
    # What is left for an adapter, and for a base once there is one.
    assert torch.equal(layer.residual, layer.original - masked - outliers.dense())
    both = layer.with_adapter(adapter())
    assert torch.equal(both.residual, layer.residual)
    assert torch.equal(both.base_reference, both.original - outliers.dense() - adapter().dense())
    parts = both.parts()
    assert list(parts) == [parts.base, outliers, both.adapter] and parts.outliers is outliers
    torch.testing.assert_close(both.error, both.original - parts.dense(), rtol=0, atol=1e-6)


def test_a_step_may_put_another_reference_in_place_of_the_original() -> None:
    layer = states()["bare"]
    assert layer.reference is layer.original
    moved = replace(states()["all"], reference=draw(8, 12, seed=12))
    assert moved.mask is not None
    assert torch.equal(moved.masked_reference, (draw(8, 12, seed=12) - adapter().dense()) * moved.mask)
    assert torch.equal(moved.residual, draw(8, 12, seed=12) - moved.base_weight)
    assert torch.equal(moved.error, states()["all"].error)


def test_an_updated_weight_stands_for_the_base_until_something_codes_it() -> None:
    layer = states()["pruned"]
    assert layer.mask is not None
    updated = layer.with_updated_weight(draw(8, 12, seed=13) * layer.mask)
    assert torch.equal(updated.base_weight, updated.base_reference)
    assert torch.equal(updated.parts().base.dense(), draw(8, 12, seed=13) * layer.mask)
    coded = updated.with_base(codes_for(updated.masked_reference))
    assert coded.updated_weight is None and torch.equal(coded.base_reference, coded.original)


def test_a_later_adapter_takes_the_place_of_the_earlier() -> None:
    other = LowRank(Plain(draw(2, 8, seed=8)), Plain(draw(2, 12, seed=9)))
    layer = states()["all"].with_adapter(other)
    assert layer.adapter is other and list(layer.parts())[1:] == [other]


def test_pruning_twice_is_refused_by_the_name_of_the_layer() -> None:
    with pytest.raises(RecipeError, match="fc1"):
        states()["pruned"].with_mask(mask(), "2:4")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_with_its_count(bad: float) -> None:
    weight = draw(8, 12)
    weight[3, 4] = weight[5, 6] = bad
    with pytest.raises(NumericsError, match=r"fc1 holds 2 .* of 96"):
        Layer.of("fc1", weight)


def test_a_base_that_cannot_leave_elements_out_is_refused_under_a_mask() -> None:
    pruned = Layer.of("fc1", draw(8, 12)).with_mask(mask(), "2:4")
    with pytest.raises(RecipeError, match="a low_rank part cannot be stored under a mask; drop the prune step"):
        pruned.with_base(adapter()).parts()
