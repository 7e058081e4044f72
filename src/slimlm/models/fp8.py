"""Weights in float8 with their scales: DeepSeek's layout (quant_method "fp8", `weight_scale_inv`) and FBGEMM's.

Despite its name `weight_scale_inv` is what the codes are multiplied by. The config names the blocks that have one scale each;
without blocks there is one for each tensor or row.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from slimlm.models.codes import CodedWeight, Codes, Decoded, scales_of, spread, tiles

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


def read(codes: Codes) -> Decoded:
    """The weights of a model in float8; raises ModelError where scales are missing or do not fit."""
    tile = _block(codes)
    weights = {name: _weight(codes, name, tile) for name, tensor in codes.tensors.items() if tensor.dtype in CODES}
    if not weights:
        raise codes.error("the quantization_config says fp8, and the files hold no tensor in float8")
    what = "a scale for each row or tensor" if tile is None else f"a scale for each block of {tile[0]} x {tile[1]}"
    return Decoded(f"fp8, {what}", weights)


def _block(codes: Codes) -> tuple[int, int] | None:
    block = codes.about.get("weight_block_size")
    if block is None:
        return None
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise codes.error(f"the quantization_config says weight_block_size = {block!r}; it is two whole numbers above 0")
    return block[0], block[1]


def _weight(codes: Codes, name: str, tile: tuple[int, int] | None) -> CodedWeight:
    names = [f"{name}_scale_inv", f"{name}_scale", *(f"{name.removesuffix('.weight')}.{leaf}" for leaf in _SHORT)]
    usual = names[1] if codes.about.get("quant_method") == "fbgemm_fp8" else names[0]
    scale = next((own for own in names if own in codes.tensors), usual)
    codes.companion(name, scale)
    rows, columns = codes.flat(name, CODES).shape
    if codes.tensors[scale].numel() == 1:
        tile = rows, columns
    elif tile is None:
        codes.expect(scale, (rows, 1), (rows,))
        tile = 1, columns
    else:
        codes.expect(scale, tiles((rows, columns), tile))
    return CodedWeight((rows, columns), (name, scale), lambda: dequantized(codes.tensors[name], codes.tensors[scale], tile))


_SHORT = ("scale", "qscale_weight")
"""Names that some checkpoints give the scales of a layer."""


def dequantized(values: Tensor, scales: Tensor, tile: tuple[int, int]) -> Iterator[Tensor]:
    """The weight in float32: each code times the scale of its tile.

    Args:
        values: the codes, float8 `[out, in]`.
        scales: one for each tile, `[out / tile rows, in / tile columns]`; of one tile or of rows alone also `[...]`.
        tile: rows and columns.
    """
    shape = values.shape[0], values.shape[1]
    yield values.float() * spread(scales_of(scales).reshape(tiles(shape, tile)), shape, tile)
