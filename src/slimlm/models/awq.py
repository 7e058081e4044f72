"""Weights in the layout of AWQ's "gemm" version: 4-bit codes, packed along the outputs in an interleaved order.

`qweight` int32 `[in, out / 8]`, `qzeros` int32 `[groups, out / 8]`, `scales` `[groups, out]`. The eight codes of a word are,
from the lowest bits on, those of the outputs 0, 2, 4, 6, 1, 3, 5, 7.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from slimlm.models.codes import CodedWeight, Codes, Decoded, unpacked

_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word the code of each of eight outputs is."""


def read(codes: Codes) -> Decoded:
    """The weights of a model in AWQ's layout; raises ModelError where tensors are missing or do not fit."""
    codes.integer("bits", (4,))
    version = str(codes.about.get("version") or codes.about.get("format") or "gemm").lower()
    if version != "gemm":
        raise codes.error(f"the version of AWQ's layout is {version!r}; slimlm reads gemm")
    if codes.about.get("zero_point", True) is not True:
        raise codes.error("the quantization_config says zero_point = false; slimlm reads AWQ with zero points")
    size = codes.about.get("group_size", 128)
    if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
        raise codes.error(f"the quantization_config says group_size = {size!r}; it is a whole number above 0, or -1")
    layers = [name.removesuffix(".qweight") for name in codes.tensors if name.endswith(".qweight")]
    if not layers:
        raise codes.error("the quantization_config says awq, and the files hold no tensor named qweight")
    weights = {f"{layer}.weight": _weight(codes, layer, size) for layer in layers}
    return Decoded(f"AWQ, 4 bits, {'a scale for each row' if size == -1 else f'groups of {size}'}", weights)


def _weight(codes: Codes, layer: str, size: int) -> CodedWeight:
    name, scales, zeros = (f"{layer}.{leaf}" for leaf in ("qweight", "scales", "qzeros"))
    codes.companion(name, scales)
    codes.companion(name, zeros)
    inputs, words = codes.flat(name, (torch.int32,)).shape
    codes.flat(zeros, (torch.int32,))
    size = inputs if size == -1 else size
    groups = -(-inputs // size)
    codes.expect(scales, (groups, 8 * words))
    codes.expect(zeros, (groups, words))

    def make() -> Iterator[Tensor]:
        index = torch.arange(inputs) // size
        values, points = in_order(codes.tensors[name]), in_order(codes.tensors[zeros])
        yield ((values - points[index]) * codes.tensors[scales].float()[index]).T

    return CodedWeight((8 * words, inputs), (name, scales, zeros), make)


def in_order(words: Tensor) -> Tensor:
    """The codes of words `[rows, out / 8]` in the order of the outputs, float32 `[rows, out]`."""
    codes = unpacked(words, 4, 8 * words.shape[1]).unflatten(-1, (-1, 8))
    return codes[..., list(_PLACES)].flatten(-2).float()
