"""The one bit packing: nothing lost, nothing wasted, and the layout that the docstring promises."""

import pytest
import torch

from slimlm.core.bits import pack, packed_bytes, unpack
from slimlm.core.errors import SlimlmError

WIDTHS = range(1, 9)
COUNTS = [0, 1, 2, 3, 7, 8, 9, 43, 172]


def random_codes(rows: int, count: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, count), generator=generator).to(torch.uint8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_unpack_returns_what_was_packed(bits: int, count: int) -> None:  # law 23
    codes = random_codes(5, count, bits)
    assert torch.equal(unpack(pack(codes, bits), bits, count), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", COUNTS)
def test_a_row_takes_its_bits_rounded_up_to_a_byte(bits: int, count: int) -> None:  # law 29
    size = pack(random_codes(3, count, bits), bits).shape
    assert size == (3, packed_bytes(count, bits))
    assert 0 <= 8 * size[1] - bits * count < 8


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_extreme_codes_survive(bits: int) -> None:
    codes = torch.tensor([[0, 2**bits - 1] * 6, [2**bits - 1, 0] * 6], dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, 12), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_layout_is_one_stream_of_bits_from_the_least_significant(bits: int) -> None:
    codes = random_codes(2, 11, bits)
    for row, packed in zip(codes.tolist(), pack(codes, bits).tolist(), strict=True):
        # Python's own big integers: code i at bits [i*bits, (i+1)*bits), bytes in little-endian order.
        stream = sum(code << (i * bits) for i, code in enumerate(row))
        assert bytes(packed) == stream.to_bytes(packed_bytes(11, bits), "little")


def test_packing_leaves_its_argument_alone() -> None:
    codes = random_codes(3, 10, 4)
    before = codes.clone()
    pack(codes, 4)
    assert torch.equal(codes, before)


def test_codes_of_any_memory_layout_are_packed_alike() -> None:
    codes = random_codes(6, 10, 3)
    assert torch.equal(pack(codes.T.contiguous().T, 3), pack(codes, 3))


def test_a_row_of_the_wrong_size_is_refused_rather_than_filled() -> None:  # law 23
    packed = pack(random_codes(3, 16, 4), 4)
    for wrong in (packed[:, :-1], torch.cat([packed, packed[:, :1]], dim=1)):
        with pytest.raises(SlimlmError, match="bytes"):
            unpack(wrong, 4, 16)


def test_four_bit_codes_by_hand() -> None:
    # The first code is the low half of the first byte: 1 + 2*16 = 33, 3 + 15*16 = 243, 7.
    assert pack(torch.tensor([[1, 2, 3, 15, 7]]), 4).tolist() == [[33, 243, 7]]


def test_three_bit_codes_by_hand() -> None:
    # 5 + 3*8 + (2 mod 4)*64 = 157, what is left of the third code is 0.
    assert pack(torch.tensor([[5, 3, 2]]), 3).tolist() == [[157, 0]]


def test_a_mask_by_hand() -> None:
    assert pack(torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 1]]), 1).tolist() == [[0b10000101, 1]]
