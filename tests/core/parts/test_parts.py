"""Parts: what they mean, what they weigh, and that they come back from their stored tensors bit for bit."""

import json

import pytest
import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.core.grid import GroupSize, scale_shape
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.base import Part, parse_entry
from slimlm.core.parts.fields import Fields
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import LayerEntry, PartEntries, Parts, TensorEntry
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform

SHAPES = [(1, 1), (3, 5), (7, 12), (48, 172)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def uniform(shape: tuple[int, int], bits: int = 4, group_size: GroupSize = "per-channel", *, inputs: bool = False) -> Uniform:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=generator(bits)).to(torch.int8)
    scale = (torch.rand(scale_shape(shape, group_size), generator=generator(1)) + 0.1).half()
    return Uniform(codes, scale, bits, group_size, torch.rand(shape[1], generator=generator(2)).half() if inputs else None)


def plain(shape: tuple[int, int], dtype: torch.dtype = torch.float16) -> Plain:
    return Plain(torch.randn(shape, generator=generator()).to(dtype))


def mask(shape: tuple[int, int], pattern: str | float) -> Tensor:
    return choose(torch.rand(shape, generator=generator(3)), Pattern.parse(pattern))


def through_storage(parts: Parts) -> Parts:
    """Parts packed and unpacked again, their entries through JSON."""
    entries = PartEntries.parse(Fields(json.loads(json.dumps(parts.describe().to_json())), "it"))
    assert entries == parts.describe()
    return entries.from_stored(parts.tensors(), parts.shape)


def assert_comes_back(base: Part, adapter: Part | None = None, outliers: Part | None = None) -> Parts:
    parts = Parts(base, adapter=adapter, outliers=outliers)
    back = through_storage(parts)
    assert [type(part) for part in back] == [type(part) for part in parts]
    assert all(torch.equal(b.dense(), p.dense()) for b, p in zip(back, parts, strict=True))
    again, before = back.tensors(), parts.tensors()
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) and again[name].dtype == before[name].dtype for name in before)
    return back


def stored_bits(part: Part) -> int:
    """Bits of the bytes that the packed tensors really take."""
    return sum(8 * len(t.contiguous().view(torch.uint8).flatten()) for t in part.tensors().values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", ["per-tensor", "per-channel", 5, 128])
@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_bit_for_bit(shape: tuple[int, int], group_size: GroupSize, bits: int) -> None:  # law 23
    part = uniform(shape, bits, group_size)
    back = assert_comes_back(part).base
    assert isinstance(back, Uniform)
    assert torch.equal(back.codes, part.codes)
    assert back.codes.dtype == torch.int8


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_plain_values_come_back_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:  # law 23
    part = plain(shape, dtype)
    back = assert_comes_back(part).base
    assert isinstance(back, Plain)
    assert back.values.dtype == dtype


@pytest.mark.parametrize(
    ("shape", "pattern"), [((7, 12), "2:4"), ((48, 172), "2:4"), ((5, 9), "1:3"), ((5, 9), 0.4), ((3, 1), 0.0)]
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
def test_pruned_weights_come_back_bit_for_bit(shape: tuple[int, int], pattern: str | float, bits: int) -> None:  # law 23
    inner = plain(shape) if bits == 16 else uniform(shape, bits, 4, inputs=True)
    part = Pruned(inner, mask(shape, pattern), str(pattern))
    back = assert_comes_back(part).base
    assert isinstance(back, Pruned)
    assert torch.equal(back.mask, part.mask)
    assert back.pattern == part.pattern


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_a_sum_of_parts_comes_back_bit_for_bit(rank: int, bits: int) -> None:  # law 23
    def factor(width: int) -> Plain | Uniform:
        return plain((rank, width)) if bits == 16 else uniform((rank, width), bits, 8)

    base = Pruned(uniform((7, 12)), mask((7, 12), "2:4"), "2:4")
    adapter = LowRank(factor(7), factor(12))
    assert_comes_back(base, adapter)
    # Outliers and an adapter of the same kind stand together, and neither takes the other's tensors.
    assert_comes_back(base, adapter, LowRank(factor(7), plain((rank, 12))))
    assert_comes_back(base, None, plain((7, 12)))


def test_zeros_by_hand() -> None:
    # Two rows of two groups of two inputs: 2-bit codes under scales 1 and 2 (row 0), 0.5 and 4 (row 1).
    codes = torch.tensor([[-2, 1, 0, -1], [1, 1, -2, 0]], dtype=torch.int8)
    scale = torch.tensor([[1, 2], [0.5, 4]]).half()
    zero = torch.tensor([[-2, 1], [0, -1]], dtype=torch.int8)
    part = Uniform(codes, scale, 2, 2, None, zero)
    assert part.dense().tolist() == [[0, 3, -2, -4], [0.5, 0.5, -4, 4]]
    # With 2 added the zeros are 0, 3, 2 and 1, two bits each, the first lowest: one byte, and so are the codes of a row.
    tensors = part.tensors()
    assert tensors["zero"].tolist() == [0b01_10_11_00]
    assert part.storage_bits() == 8 * (2 * 1 + 4 * 2 + 1)
    assert assert_comes_back(part).base.describe().to_json()["zero"] is True


def test_a_symmetric_grid_is_stored_as_ever_and_is_that_of_zeros_in_the_middle() -> None:
    part = uniform((7, 12), 3, 5)
    middle = Uniform(part.codes, part.scale, 3, 5, None, torch.zeros_like(part.scale, dtype=torch.int8))
    assert torch.equal(middle.dense(), part.dense())
    assert set(part.describe().to_json()) == {"kind", "bits", "group_size", "channel_scale"}
    assert {name: t for name, t in middle.tensors().items() if name != "zero"}.keys() == part.tensors().keys()
    assert all(torch.equal(middle.tensors()[name], tensor) for name, tensor in part.tensors().items())


def test_a_reader_that_knows_no_zeros_is_not_misled() -> None:
    # Such a reader passes over the entry's field; the tensor that it does not expect is what stops it.
    part = Parts(uniform((4, 8), 4, "per-channel"))
    data = {name: TensorEntry.of(tensor) for name, tensor in part.tensors().items()}
    data["weight_zero"] = TensorEntry(torch.uint8, (2,))
    with pytest.raises(CheckpointError, match=r"its parts are stored in weight, weight_scale; it names .*weight_zero"):
        LayerEntry(shape=(4, 8), bias=False, parts=part.describe(), tensors=data).check()


def test_a_mask_lets_nothing_through() -> None:  # law 8
    keep = mask((48, 172), "2:4")
    part = Pruned(uniform((48, 172)), keep, "2:4")
    for one in (part, through_storage(Parts(part)).base):
        assert int((one.dense()[~keep] != 0).sum()) == 0
        assert torch.equal(one.dense()[keep], part.inner.dense()[keep])


@pytest.mark.parametrize("inputs", [False, True])
def test_storage_bits_are_the_bits_of_the_stored_bytes(inputs: bool) -> None:  # law 29
    parts: list[Part] = [plain((5, 9)), uniform((5, 9), 3, 4, inputs=inputs), LowRank(plain((2, 5)), uniform((2, 9), 4, 4))]
    parts.append(Pruned(uniform((5, 9), 3, 4, inputs=inputs), mask((5, 9), 0.4), "0.4"))
    for part in parts:
        assert part.storage_bits() == stored_bits(part)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_two_of_four_at_b_bits_cost_half_of_b_and_one_a_weight(bits: int) -> None:  # law 29
    part = Pruned(uniform((16, 64), bits, "per-tensor"), mask((16, 64), "2:4"), "2:4")
    assert part.storage_bits() == 16 * 64 * (bits / 2 + 1) + 16  # and one float16 scale


def test_what_parts_weigh_by_hand() -> None:  # law 29
    # 5 rows of 9 codes at 3 bits: 27 bits are 4 bytes a row; 3 scales of 2 bytes a row.
    assert uniform((5, 9), 3, 4).storage_bits() == 8 * 5 * (4 + 3 * 2)
    assert plain((5, 9)).storage_bits() == 5 * 9 * 16
    assert LowRank(plain((2, 5)), plain((2, 9))).storage_bits() == 2 * (5 + 9) * 16
    # 1:3 keeps 3 of 9 codes at 4 bits: 2 bytes a row, one float16 scale; the mask takes 2 bytes a row.
    assert Pruned(uniform((5, 9), 4), mask((5, 9), "1:3"), "1:3").storage_bits() == 8 * 5 * (2 + 2 + 2)


def test_a_sum_means_the_sum_of_its_parts() -> None:
    base, adapter = uniform((7, 12)), LowRank(plain((2, 7)), plain((2, 12)))
    torch.testing.assert_close(Parts(base, adapter).dense(), base.dense() + adapter.dense(), rtol=0, atol=0)


def test_what_parts_mean_by_hand() -> None:
    codes = torch.tensor([[1, -2, 3], [0, 1, -8]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]]).half()
    part = Uniform(codes, scale, 4, 2)
    assert part.dense().tolist() == [[0.5, -1, 6], [0, 1, -2]]
    scaled = Uniform(codes, scale, 4, 2, torch.tensor([1.0, 0.5, 2.0]).half())
    assert scaled.dense().tolist() == [[0.5, -0.5, 12], [0, 0.5, -4]]
    keep = torch.tensor([[True, False, True], [False, True, True]])
    assert Pruned(part, keep, "2:3").dense().tolist() == [[0.5, 0, 6], [0, 1, -2]]
    pair = LowRank(Plain(torch.tensor([[1.0, 2.0]])), Plain(torch.tensor([[3.0, 4.0, 5.0]])))
    assert pair.dense().tolist() == [[3, 4, 5], [6, 8, 10]]
    assert (pair.rank, pair.shape) == (1, (2, 3))


@pytest.mark.parametrize(
    "parts",
    [
        (plain((8, 12)),),
        (uniform((8, 12), 4, 5),),
        (Pruned(uniform((8, 12), 4, 5), mask((8, 12), "2:4"), "2:4"),),
        (plain((8, 12)), LowRank(plain((2, 8)), uniform((2, 12), 4, 5))),
    ],
    ids=["plain", "uniform", "pruned", "low-rank"],
)
@pytest.mark.parametrize("damage", ["missing", "short-row", "missing-row"])
def test_tensors_that_do_not_fit_the_description_are_refused(parts: tuple[Part, ...], damage: str) -> None:  # law 23
    for name, tensor in Parts(*parts).tensors().items():
        tensors = Parts(*parts).tensors()
        if damage == "missing":
            del tensors[name]
        else:
            tensors[name] = tensor[..., :-1] if damage == "short-row" else tensor[:-1]
        with pytest.raises(CheckpointError):
            Parts(*parts).describe().from_stored(tensors, (8, 12))


def test_an_input_scale_of_another_length_is_refused() -> None:  # law 23
    part = uniform((8, 12), inputs=True)
    tensors = {**Parts(part).tensors(), "weight_channel_scale": torch.ones(11).half()}
    with pytest.raises(CheckpointError, match="channel_scale"):
        Parts(part).describe().from_stored(tensors, (8, 12))


def test_a_mask_with_unequal_rows_is_refused() -> None:
    part = Pruned(uniform((2, 8)), mask((2, 8), "2:4"), "2:4")
    tensors = Parts(part).tensors()
    tensors["weight_mask"] = torch.tensor([[0b11110000], [0b00000001]], dtype=torch.uint8)
    with pytest.raises(CheckpointError, match="different numbers"):
        Parts(part).describe().from_stored(tensors, (2, 8))


def test_a_part_of_unknown_kind_is_refused_by_name() -> None:
    with pytest.raises(CheckpointError, match="'ternary'"):
        parse_entry({"kind": "ternary"})
