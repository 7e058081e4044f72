"""Weights in the layout of GPTQ (AutoGPTQ, GPTQModel): codes of 2, 3, 4 or 8 bits, packed along the inputs.

`qweight` int32 `[in bits / 32, out]`, `qzeros` int32 `[groups, out bits / 32]`, `scales` `[groups, out]` and, where inputs were
sorted by activation, `g_idx` int32 `[in]`, the group of each input. Codes follow one another from the lowest bit on, those of 3
bits across words. Format "gptq" stores zero points less 1, "gptq_v2" as they are.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from slimlm.models.codes import CodedWeight, Codes, Decoded, unpacked, words_for

_FORMATS = {"gptq": 1, "gptq_v2": 0}
"""What is added to a stored zero point."""


def read(codes: Codes) -> Decoded:
    """The weights of a model in GPTQ's layout; raises ModelError where tensors are missing or do not fit."""
    about = codes.about
    bits = codes.integer("bits", (2, 3, 4, 8))
    form = about.get("checkpoint_format") or about.get("format") or "gptq"
    if form not in _FORMATS:
        raise codes.error(f"the checkpoint_format of GPTQ is {form!r}; slimlm reads {' and '.join(_FORMATS)}")
    if exceptions := [name for name in about.get("dynamic") or {} if not str(name).startswith("-:")]:
        raise codes.error(f"some layers have bits or groups of their own, which is not read (dynamic: {exceptions[0]})")
    size = about.get("group_size", -1)
    if isinstance(size, bool) or not isinstance(size, int) or size == 0 or size < -1:
        raise codes.error(f"the quantization_config says group_size = {size!r}; it is a whole number above 0, or -1")
    layers = [name.removesuffix(".qweight") for name in codes.tensors if name.endswith(".qweight")]
    if not layers:
        raise codes.error("the quantization_config says gptq, and the files hold no tensor named qweight")
    weights = {f"{layer}.weight": _weight(codes, layer, bits, _FORMATS[form], size) for layer in layers}
    groups = "a scale for each row" if size == -1 else f"groups of {size}"
    return Decoded(f"GPTQ ({form}), {bits} bits, {groups}", weights)


def _weight(codes: Codes, layer: str, bits: int, offset: int, size: int) -> CodedWeight:
    name, scales, zeros, order = (f"{layer}.{leaf}" for leaf in ("qweight", "scales", "qzeros", "g_idx"))
    codes.companion(name, scales)
    codes.companion(name, zeros)
    words, out = codes.flat(name, (torch.int32,)).shape
    codes.flat(zeros, (torch.int32,))
    inputs = len(codes.tensors[order]) if order in codes.tensors and codes.tensors[order].ndim == 1 else words * 32 // bits
    size = inputs if size == -1 else size
    groups = -(-inputs // size)
    codes.expect(name, (words_for(inputs, bits), out))
    codes.expect(scales, (groups, out))
    codes.expect(zeros, (groups, words_for(out, bits)))
    of = (name, scales, zeros, *([order] if order in codes.tensors else []))

    index = codes.tensors[order].long() if order in codes.tensors else torch.arange(inputs) // size
    if inputs and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise codes.error(f"{order} names a group beyond the {groups} that there are")

    def make() -> Iterator[Tensor]:
        values = unpacked(codes.tensors[name].T, bits, inputs).float()
        points = unpacked(codes.tensors[zeros], bits, out).float() + offset
        yield (values - points.T[:, index]) * codes.tensors[scales].float().T[:, index]

    return CodedWeight((out, inputs), of, make)
