"""The one bit packing of the project.

Codes of one row follow each other in a stream of bits, least significant bit first; each row starts on a byte.
Code i of a row therefore lies at bits [i*bits, (i+1)*bits) of that row's bytes. Any width from 1 to 8 bits.
"""

import torch
from torch import Tensor

from slimlm.core.errors import CheckpointError

_CODES_AT_ONCE = 2**22


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that one row of `count` codes takes."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes `[rows, count]` (0 .. 2^bits - 1) into uint8 `[rows, packed_bytes(count, bits)]`."""
    pieces = [_pack(piece, bits) for piece in codes.split(_rows_at_once(codes.shape[1]))]
    return torch.cat(pieces)


def _rows_at_once(count: int) -> int:
    """Rows to work on at a time: the int64 in between take a dozen times the space of the codes."""
    return max(1, _CODES_AT_ONCE // max(1, count))


def _pack(codes: Tensor, bits: int) -> Tensor:
    rows, count = codes.shape
    octets = (count + 7) // 8
    padded = torch.zeros(rows, octets * 8, dtype=torch.int64, device=codes.device)
    padded[:, :count] = codes
    shifts = torch.arange(8, device=codes.device) * bits
    # Eight codes of b bits fill exactly b bytes, so each int64 below holds its b bytes at the low end.
    words = (padded.view(rows, octets, 8) << shifts).sum(dim=-1)
    bytes_ = (words[..., None] >> (torch.arange(bits, device=codes.device) * 8)) & 0xFF
    return bytes_.to(torch.uint8).view(rows, octets * bits)[:, : packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 `[rows, count]`; raises CheckpointError when the rows have another size."""
    if packed.ndim != 2 or packed.shape[1] != packed_bytes(count, bits):
        raise CheckpointError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes a row; a stored tensor has the shape "
            f"{list(packed.shape)}"
        )
    return torch.cat([_unpack(piece, bits, count) for piece in packed.split(_rows_at_once(count))])


def _unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    rows = packed.shape[0]
    octets = (count + 7) // 8
    padded = torch.zeros(rows, octets * bits, dtype=torch.int64, device=packed.device)
    padded[:, : packed.shape[1]] = packed
    words = (padded.view(rows, octets, bits) << (torch.arange(bits, device=packed.device) * 8)).sum(dim=-1)
    codes = (words[..., None] >> (torch.arange(8, device=packed.device) * bits)) & ((1 << bits) - 1)
    return codes.to(torch.uint8).view(rows, octets * 8)[:, :count].contiguous()
