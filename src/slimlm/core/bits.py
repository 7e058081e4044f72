"""The one bit packing of the project.

Codes of one row follow each other in a stream of bits, least significant bit first; each row starts on a byte.
Code i of a row therefore lies at bits [i*bits, (i+1)*bits) of that row's bytes. Any width from 1 to 8 bits.

Eight codes, a byte each, are one int64 (on a little-endian machine, as all that torch runs on in practice are). Three steps
move pairs, fours and then all eight together, until the codes fill the lowest `bits` bytes; unpacking reverses the steps.
"""

import torch
from torch import Tensor

from slimlm.core.chunks import at_once
from slimlm.core.errors import CheckpointError
from slimlm.kernels import compression

_CODES_AT_ONCE = 2**18
"""Codes to work on at a time, so that intermediate values stay in the CPU's cache."""


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that one row of `count` codes of `bits` bits takes."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes, row by row.

    Args:
        codes: `[rows, count]`, whole numbers from 0 to 2^bits - 1 of any dtype.
        bits: of a code, 1 to 8.

    Returns:
        uint8 `[rows, packed_bytes(count, bits)]`.
    """
    if compression.takes_bytes(codes):
        return compression.pack(codes, bits)
    rows, count = codes.shape
    packed = torch.empty(rows, packed_bytes(count, bits), dtype=torch.uint8, device=codes.device)
    rows_at_once = _rows_at_once(count, codes.device)
    for piece, into in zip(codes.split(rows_at_once), packed.split(rows_at_once), strict=True):
        octets = _octets(piece, count, 8)
        for low, high, shift in _steps(bits):
            octets = (octets & low) | ((octets >> shift) & high)
        into.copy_(_bytes(octets, bits)[:, : packed.shape[1]])
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The codes that `pack` packed.

    Args:
        packed: uint8 `[rows, packed_bytes(count, bits)]`.
        bits: of a code, 1 to 8.
        count: codes in a row.

    Returns:
        uint8 `[rows, count]`.

    Raises:
        CheckpointError: the rows have a different size.
    """
    if packed.ndim != 2 or packed.shape[1] != packed_bytes(count, bits):
        raise CheckpointError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes a row; a stored tensor has the shape "
            f"{list(packed.shape)}"
        )
    if compression.takes_bytes(packed):
        return compression.unpack(packed, bits, count)
    codes = torch.empty(len(packed), count, dtype=torch.uint8, device=packed.device)
    rows_at_once = _rows_at_once(count, packed.device)
    for piece, into in zip(packed.split(rows_at_once), codes.split(rows_at_once), strict=True):
        octets = _octets(piece, count, bits)
        for low, high, shift in reversed(_steps(bits)):
            octets = (octets & low) | ((octets & high) << shift)
        into.copy_(_bytes(octets, 8)[:, :count])
    return codes


def _rows_at_once(count: int, device: torch.device) -> int:
    return max(1, at_once(_CODES_AT_ONCE, device) // max(1, count))


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """For each step the bit masks of the lower and (moved down) upper neighbours in an int64, and how far the upper move."""
    steps = []
    for lane in (16, 32, 64) if bits < 8 else ():
        filled = bits * lane // 16
        low = sum(((1 << filled) - 1) << start for start in range(0, 64, lane))
        steps.append((low, low << filled, lane // 2 - filled))
    return steps


def _octets(values: Tensor, count: int, size: int) -> Tensor:
    """Rows of bytes, `size` of them for each eight of `count` codes, as int64 `[rows, octets]`."""
    rows, octets = len(values), (count + 7) // 8
    bytes_ = torch.zeros(rows, octets * size, dtype=torch.uint8, device=values.device)
    bytes_[:, : values.shape[1]] = values
    if size < 8:
        bytes_ = torch.nn.functional.pad(bytes_.view(rows, octets, size), (0, 8 - size))
    return bytes_.view(rows, octets, 8).view(torch.int64).squeeze(-1)


def _bytes(octets: Tensor, size: int) -> Tensor:
    """The lowest `size` bytes of each int64 `[rows, octets]`, as uint8 `[rows, octets x size]`."""
    rows, count = octets.shape
    return octets[..., None].view(torch.uint8)[..., :size].reshape(rows, count * size)
