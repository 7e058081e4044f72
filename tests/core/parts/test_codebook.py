"""The codebook part: what it means, what it weighs, and that it comes back from its stored tensors bit for bit."""

import json

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.core.grid import GroupSize, scale_shape
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.base import Part
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.fields import Fields
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import LayerEntry, PartEntries, Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.runtime.linear import CompressedLinear

SHAPES = [(1, 1), (3, 5), (7, 12), (48, 172)]
GROUPS: list[GroupSize] = ["per-tensor", "per-channel", 5, 128]
"""Neither 5 nor 128 divides a width but that of (3, 5): the last group of a row is shorter."""

BITS = [2, 3, 4]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def levels_of(bits: int) -> Tensor:
    """A table as a quantile would give it: uneven, from -1 to 1."""
    return torch.linspace(-1, 1, 2**bits).pow(3).half()


def codebook(shape: tuple[int, int], bits: int = 4, group_size: GroupSize = "per-channel", seed: int = 0) -> Codebook:
    index = torch.randint(2**bits, shape, generator=generator(seed + bits)).to(torch.uint8)
    scale = (torch.rand(scale_shape(shape, group_size), generator=generator(seed + 1)) + 0.1).half()
    return Codebook(index, levels_of(bits), scale, bits, group_size)


def mask(shape: tuple[int, int], pattern: str | float) -> Tensor:
    return choose(torch.rand(shape, generator=generator(3)), Pattern.parse(pattern))


def through_storage(parts: Parts) -> Parts:
    """Parts packed and unpacked again, their entries through JSON."""
    entries = PartEntries.parse(Fields(json.loads(json.dumps(parts.describe().to_json())), "it"))
    assert entries == parts.describe()
    return entries.from_stored(parts.tensors(), parts.shape)


def assert_comes_back(base: Part, adapter: Part | None = None) -> Parts:
    parts = Parts(base, adapter=adapter)
    back = through_storage(parts)
    assert [type(part) for part in back] == [type(part) for part in parts]
    assert [part.describe() for part in back] == [part.describe() for part in parts]
    assert all(torch.equal(b.dense(), p.dense()) for b, p in zip(back, parts, strict=True))
    again, before = back.tensors(), parts.tensors()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) and again[name].dtype == before[name].dtype for name in before)
    return back


def stored_bits(part: Part) -> int:
    """Bits of the bytes that the packed tensors really take."""
    return sum(8 * len(t.contiguous().view(torch.uint8).flatten()) for t in part.tensors().values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_indices_and_levels_come_back_bit_for_bit(shape: tuple[int, int], group_size: GroupSize, bits: int) -> None:  # law 23
    part = codebook(shape, bits, group_size)
    back = assert_comes_back(part).base
    assert isinstance(back, Codebook)
    assert torch.equal(back.index, part.index) and back.index.dtype == torch.uint8
    assert torch.equal(back.values, part.values) and back.values.dtype == torch.float16
    assert torch.equal(back.scale, part.scale)


@pytest.mark.parametrize(("shape", "pattern"), [((7, 12), "2:4"), ((48, 172), "2:4"), ((5, 9), "1:3"), ((5, 9), 0.4)])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_under_a_mask_the_indices_that_stay_come_back(  # law 23
    shape: tuple[int, int], pattern: str | float, group_size: GroupSize, bits: int
) -> None:
    inner = codebook(shape, bits, group_size)
    part = Pruned(inner, mask(shape, pattern), str(pattern))
    back = assert_comes_back(part).base
    assert isinstance(back, Pruned) and isinstance(back.inner, Codebook)
    assert torch.equal(back.mask, part.mask)
    assert torch.equal(back.inner.index[back.mask], inner.index[part.mask])


def test_a_mask_lets_nothing_through_though_no_level_is_zero() -> None:  # law 8
    keep = mask((48, 172), "2:4")
    part = Pruned(codebook((48, 172)), keep, "2:4")
    assert not bool((levels_of(4) == 0).any())
    for one in (part, through_storage(Parts(part)).base):
        assert int((one.dense()[~keep] != 0).sum()) == 0
        assert torch.equal(one.dense()[keep], part.inner.dense()[keep])


@pytest.mark.parametrize("bits", BITS)
def test_the_factors_of_an_adapter_may_be_codebooks(bits: int) -> None:  # law 23
    adapter = LowRank(codebook((3, 7), bits, 5), codebook((3, 12), bits, 5, seed=9))
    assert_comes_back(Pruned(codebook((7, 12), bits), mask((7, 12), "2:4"), "2:4"), adapter)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_storage_bits_are_the_bits_of_the_stored_bytes(group_size: GroupSize, bits: int) -> None:  # law 29
    inner = codebook((5, 9), bits, group_size)
    for part in (inner, Pruned(inner, mask((5, 9), 0.4), "0.4"), LowRank(inner, codebook((5, 12), bits, group_size))):
        assert part.storage_bits() == stored_bits(part)


def test_what_a_codebook_weighs_by_hand() -> None:  # law 29
    # 5 rows of 9 indices at 3 bits: 27 bits are 4 bytes a row; 2 scales of 2 bytes a row; 8 levels of 2 bytes.
    inner = codebook((5, 9), 3, 5)
    assert inner.storage_bits() == 8 * (5 * (4 + 2 * 2) + 8 * 2)
    # 1:3 keeps 3 of 9 indices: 9 bits are 2 bytes a row; the mask takes 2 bytes a row.
    assert Pruned(inner, mask((5, 9), "1:3"), "1:3").storage_bits() == 8 * (5 * (2 + 2 * 2 + 2) + 8 * 2)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_a_table_of_whole_numbers_is_the_even_grid(group_size: GroupSize, bits: int) -> None:
    part = codebook((7, 172), bits, group_size)
    half = 2 ** (bits - 1)
    even = Codebook(part.index, torch.arange(-half, half).half(), part.scale, bits, group_size)
    uniform = Uniform((part.index.to(torch.int16) - half).to(torch.int8), part.scale, bits, group_size)
    assert torch.equal(even.dense(), uniform.dense())
    # The even grid adds half of its codes to store them: the same bits, but for the table.
    assert torch.equal(even.tensors()[""], uniform.tensors()[""])
    assert even.storage_bits() == uniform.storage_bits() + 16 * 2**bits


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_a_layer_multiplies_as_the_matrix_that_the_codebook_stands_for(
    pattern: str, group_size: GroupSize, bits: int
) -> None:  # law 24
    inner = codebook((24, 44), bits, group_size)
    part: Part = Pruned(inner, mask((24, 44), pattern), pattern) if pattern else inner
    x, bias = torch.randn(3, 44, generator=generator(5)), torch.randn(24, generator=generator(6))
    layer = CompressedLinear.from_parts(Parts(part), bias)
    expected = x.double() @ part.dense().double().T + bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)  # float32 sums of 44 terms of size one
    empty = CompressedLinear.empty(LayerEntry.parse(json.loads(json.dumps(layer.describe().to_json()))))
    empty.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("pattern", ["", "2:4"])
@pytest.mark.parametrize("count", [0, 8, 15, 17])
def test_a_table_of_another_number_of_levels_is_refused_in_words(count: int, pattern: str) -> None:  # law 23
    inner = codebook((8, 12))
    part: Part = Pruned(inner, mask((8, 12), pattern), pattern) if pattern else inner
    tensors = {**Parts(part).tensors(), "weight_codebook": torch.zeros(count).half()}
    with pytest.raises(CheckpointError, match=rf"codebook has the shape \[{count}\]; this layer's is \[16\]"):
        Parts(part).describe().from_stored(tensors, (8, 12))


@pytest.mark.parametrize("name", ["weight", "weight_codebook", "weight_scale"])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_tensors_that_do_not_fit_the_description_are_refused(name: str, damage: str) -> None:  # law 23
    part = codebook((8, 12), 4, 5)
    tensors = Parts(part).tensors()
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][..., :-1]
    with pytest.raises(CheckpointError):
        Parts(part).describe().from_stored(tensors, (8, 12))


def test_what_a_codebook_means_by_hand() -> None:
    index = torch.tensor([[0, 3, 1], [2, 2, 0]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]]).half()
    part = Codebook(index, torch.tensor([-3.0, -0.5, 0.25, 4.0]).half(), scale, 2, 2)
    assert part.dense().tolist() == [[-1.5, 2, -1], [0.25, 0.25, -0.75]]
    assert part.shape == (2, 3)
    # Two bits an index, least significant first: 0 + 3 x 4 + 1 x 16, and 2 + 2 x 4.
    assert part.tensors()[""].tolist() == [[28], [10]]
    adapter = LowRank(Plain(torch.tensor([[1.0, 2.0]])), Plain(torch.tensor([[1.0, 0.0, -1.0]])))
    assert Parts(part, adapter).dense().tolist() == [[-0.5, 2, -2], [2.25, 0.25, -2.75]]
