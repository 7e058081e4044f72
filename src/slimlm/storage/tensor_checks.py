"""Whether the stored tensors of a packed layer or embedding are what packing gives: masks, scales, levels, values, padding.

For entries that `check_description` found sound, and tensors that are as described. Codes are not unpacked: each of their bit
patterns is on the grid.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from slimlm.core import bits as bitstream
from slimlm.core.mask import Pattern
from slimlm.core.parts import under
from slimlm.storage.entries import pattern_of

_BYTES_AT_ONCE = 2**22


def faults(entry: dict[str, Any], tensors: dict[str, Tensor]) -> Iterator[str]:
    """What is wrong with the tensors of one entry of a `quantization_config`, given by name, in words."""
    out, width = entry["shape"]
    for i, about in enumerate(entry["parts"]):
        own = under(prefix := "weight" if i == 0 else f"extra{i}", tensors)
        if about["kind"] == "low_rank":
            for side, columns in (("left", out), ("right", width)):
                yield from _of_elements(f"{prefix}_{side}", about[side], under(side, own), (about["rank"], columns), columns)
        elif about["kind"] == "pruned":
            found = list(_of_mask(f"{prefix}_keep", pattern_of(about), own["keep"], width))
            yield from found
            if not found:
                kept = int(bitstream.unpack(own["keep"][:1], 1, width).sum())
                yield from _of_elements(prefix, about["inner"], own, (out, width), kept)
        else:
            yield from _of_elements(prefix, about, own, (out, width), width)


def not_finite(name: str, tensor: Tensor) -> Iterator[str]:
    """A sentence where a floating-point tensor holds NaN or infinity; looks at a piece at a time."""
    if tensor.is_floating_point():
        bad = sum(int((~piece.isfinite()).sum()) for piece in tensor.reshape(-1).split(_BYTES_AT_ONCE))
        if bad:
            yield f"{name} holds {bad} values of {tensor.numel()} that are NaN or infinite"


def _of_elements(where: str, about: dict[str, Any], own: dict[str, Tensor], shape: tuple[int, int], kept: int) -> Iterator[str]:
    """kept: how many elements of each row are stored."""
    rows = shape[0]
    for name, tensor in own.items():
        if name in ("scale", "levels", "input_scale"):
            yield from not_finite(f"{where}_{name}", tensor)
    if about["kind"] == "plain":
        values = getattr(torch, about["dtype"])
        if own[""].numel() != rows * kept * values.itemsize:
            yield f"{where} holds {own[''].numel()} bytes; {rows} rows of {kept} weights take {rows * kept * values.itemsize}"
        else:
            yield from not_finite(where, own[""].contiguous().view(-1).view(values))
        return
    size = bitstream.packed_bytes(kept, about["bits"])
    if own[""].numel() != rows * size:
        yield f"{where} holds {own[''].numel()} bytes; {rows} rows of {kept} codes of {about['bits']} bits take {rows * size}"
    else:
        yield from _of_padding(where, own[""].view(rows, size), kept * about["bits"])


def _of_padding(where: str, packed: Tensor, used: int) -> Iterator[str]:
    """The bits of a row beyond those used are zero; packed uint8 `[rows, bytes]`."""
    if used % 8 and len(packed):
        rows = (packed[:, -1] >> used % 8).nonzero().flatten()
        if len(rows):
            yield f"{where} has bits set beyond the end of {len(rows)} rows, the first of them {int(rows[0])}"


def _of_mask(where: str, pattern: Pattern, packed: Tensor, width: int) -> Iterator[str]:
    """n of every m inputs stay, or, where a share was dropped, as many in every row; packed uint8 `[out, bytes]`."""
    size, kept = (pattern.of, pattern.kept) if pattern.of else (width, int(bitstream.unpack(packed[:1], 1, width).sum()))
    wrong, first, done = 0, "", 0
    for piece in packed.split(max(1, _BYTES_AT_ONCE // max(1, packed.shape[1]))):
        counts = bitstream.unpack(piece, 1, width).view(len(piece), -1, size).sum(dim=2)
        bad = (counts != kept).nonzero()
        if len(bad) and not wrong:
            row, group = bad[0].tolist()
            first = f"in row {done + row}, inputs {group * size} to {group * size + size - 1}, {int(counts[row, group])} stay"
        wrong, done = wrong + len(bad), done + len(piece)
    if wrong:
        yield f"{where} is no mask of {pattern}: {first}, not {kept}" + (f" ({wrong} such places)" if wrong > 1 else "")
    yield from _of_padding(where, packed, width)
