"""A compressed layer multiplies as the matrix that its parts stand for, and no cast touches what is stored."""

import json

import pytest
import torch
from torch import Tensor

from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.base import Part
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import LayerEntry, Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.runtime.linear import CompressedLinear

OUT, WIDTH = 24, 44


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def codes(shape: tuple[int, int], groups: int, group_size: int, bits: int = 4, seed: int = 0) -> Uniform:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator).to(torch.int8)
    return Uniform(drawn, (0.02 + 0.02 * torch.rand(shape[0], groups, generator=generator)).half(), bits, group_size)


def combinations() -> dict[str, tuple[Part, ...]]:
    base = codes((OUT, WIDTH), 3, 20)
    keep = choose(draw(OUT, WIDTH, seed=3), Pattern.parse("2:4"))
    single = Uniform(base.codes, torch.tensor([[0.0312345]]), 4, "per-tensor", (0.5 + torch.rand(WIDTH) * 0).half())
    adapter = LowRank(codes((5, OUT), 1, 32, seed=1), codes((5, WIDTH), 2, 32, seed=2))
    half = LowRank(Plain(draw(5, OUT).half() / 8), Plain(draw(5, WIDTH).half() / 8))
    return {
        "plain": (Plain(draw(OUT, WIDTH).half() / 8),),
        "groups": (base,),
        "one-scale-and-input-scales": (single,),
        "pruned": (Pruned(base, keep, "2:4"),),
        "pruned-plain": (Pruned(Plain(draw(OUT, WIDTH).bfloat16() / 8), keep, "2:4"),),
        "slim": (Pruned(single, keep, "2:4"), adapter),
        "half-adapter": (base, half),
    }


every_combination = pytest.mark.parametrize("parts", combinations().values(), ids=list(combinations()))


def linear(parts: tuple[Part, ...], *, bias: bool = True) -> CompressedLinear:
    return CompressedLinear.from_parts(Parts(*parts), draw(OUT, seed=8) if bias else None)


def expected(parts: tuple[Part, ...], x: Tensor, *, bias: bool = True) -> Tensor:
    """In float64 all the way."""
    y = x.double() @ Parts(*parts).dense().double().T
    return y + draw(OUT, seed=8).double() if bias else y


@every_combination
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(1,), (7,), (2, 3), (2, 1, 5), (), (0,), (2, 0)], ids=str)
def test_the_output_is_that_of_the_dense_matrix(
    parts: tuple[Part, ...], bias: bool, leading: tuple[int, ...]
) -> None:  # law 24
    x = draw(*leading, WIDTH, seed=4)
    y = linear(parts, bias=bias)(x)
    assert y.shape == (*leading, OUT)
    assert y.dtype == torch.float32
    # Float32 sums of 44 terms of size one.
    torch.testing.assert_close(y.double(), expected(parts, x, bias=bias), rtol=1e-5, atol=1e-5)


@every_combination
def test_the_memory_layout_of_the_input_does_not_matter(parts: tuple[Part, ...]) -> None:  # law 24
    x = draw(WIDTH, 6, seed=4).T
    strided = draw(6, 2 * WIDTH, seed=5)[:, ::2]
    for one in (x, strided):
        assert not one.is_contiguous()
        torch.testing.assert_close(linear(parts)(one).double(), expected(parts, one), rtol=1e-5, atol=1e-5)  # float32 sums


@every_combination
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_inputs_give_narrow_outputs_near_the_exact_ones(parts: tuple[Part, ...], dtype: torch.dtype) -> None:  # law 24
    x = draw(6, WIDTH, seed=4).to(dtype)
    y = linear(parts)(x)
    assert y.dtype == dtype
    exact = expected(parts, x)
    # Weight, sum and bias are each rounded to 8 (bfloat16) or 11 bits: a few 2^-9 of outputs of size one to five.
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=2e-2)


@every_combination
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_no_cast_changes_a_stored_tensor(parts: tuple[Part, ...], cast: str) -> None:  # law 23
    layer = linear(parts)
    before = {name: tensor.clone() for name, tensor in layer.packed().items()}
    y = layer(draw(3, WIDTH))
    moved = layer.to(torch.bfloat16) if cast == "to" else getattr(layer, cast)()
    after = moved.packed()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype
        assert torch.equal(after[name], tensor)
    assert moved.bias is not None
    assert moved.bias.dtype == {"half": torch.float16, "double": torch.float64}.get(cast, torch.bfloat16)
    # Only the bias has been rounded: to eight bits, of values up to four.
    torch.testing.assert_close(moved.float()(draw(3, WIDTH)), y, rtol=0, atol=2.0**-6)


def test_casting_a_parent_module_changes_no_stored_tensor() -> None:  # law 23
    layer = linear(combinations()["slim"])
    before = {name: tensor.clone() for name, tensor in layer.packed().items()}
    torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), layer).to(dtype=torch.float16)
    assert all(torch.equal(layer.packed()[name], tensor) for name, tensor in before.items())


@every_combination
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_comes_back_from_its_description_and_its_state(parts: tuple[Part, ...], bias: bool) -> None:  # law 23
    layer = linear(parts, bias=bias)
    empty = CompressedLinear.empty(LayerEntry.parse(json.loads(json.dumps(layer.describe().to_json()))))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    assert {n: (t.shape, t.dtype) for n, t in empty.packed().items()} == {
        n: (t.shape, t.dtype) for n, t in layer.packed().items()
    }
    assert empty.describe() == layer.describe()
    empty.load_state_dict(layer.state_dict(), assign=True)
    x = draw(3, WIDTH)
    assert torch.equal(empty(x), layer(x))


def test_the_state_holds_the_packed_tensors_and_the_bias_and_nothing_else() -> None:  # law 29
    parts = combinations()["slim"]
    state = linear(parts).state_dict()
    assert set(state) == {*linear(parts).packed_names, "bias"}
    stored = sum(8 * t.numel() * t.element_size() for name, t in state.items() if name != "bias")
    assert stored == sum(part.storage_bits() for part in parts)


def test_a_state_loaded_after_use_is_used() -> None:
    first, second = (linear((codes((OUT, WIDTH), 3, 20, seed=seed),)) for seed in (1, 2))
    x = draw(3, WIDTH)
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


def test_the_dtype_of_the_input_may_change_between_calls() -> None:
    parts = combinations()["slim"]
    layer, x = linear(parts), draw(3, WIDTH)
    layer(x.bfloat16())
    torch.testing.assert_close(layer(x).double(), expected(parts, x), rtol=1e-5, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_of_another_dtype_than_the_input_is_added_all_the_same(dtype: torch.dtype) -> None:
    parts = combinations()["slim"]
    layer = CompressedLinear.from_parts(Parts(*parts), torch.ones(OUT, dtype=torch.float16))
    plain = CompressedLinear.from_parts(Parts(*parts), None)
    x = draw(3, WIDTH).to(dtype)
    torch.testing.assert_close(layer(x), plain(x) + 1)


def test_nothing_of_the_layer_asks_for_a_gradient() -> None:
    layer = linear(combinations()["slim"])
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    x = draw(3, WIDTH).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    exact = layer.parts().dense().sum(dim=0).expand(3, WIDTH)
    torch.testing.assert_close(x.grad, exact, rtol=1e-5, atol=1e-5)  # float32 sums of 24 terms


def test_a_layer_of_one_part_by_hand() -> None:
    layer = CompressedLinear.from_parts(Parts(Plain(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))), torch.tensor([10.0, 20.0]))
    assert layer(torch.tensor([1.0, -1.0])).tolist() == [9, 19]
    assert (layer.out_features, layer.in_features) == (2, 2)
