"""Weights in MXFP4 as GPT-OSS stores them (quant_method "mxfp4"): 4-bit floats, 32 of which share a power of two.

OCP Microscaling Formats (MX) specification 1.0: elements E2M1, scales E8M0. Of each byte the lower half is the first element.
The files hold `NAME_blocks`, uint8 `[experts, out, in / 32, 16]`, and `NAME_scales`, uint8 `[experts, out, in / 32]`; the
class has `NAME` as `[experts, in, out]`.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from slimlm.models.codes import CodedWeight, Codes, Decoded, scales_of

_ELEMENTS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the 16 codes of E2M1 stand for."""
SHARING = 32
"""Elements that share a scale."""


def read(codes: Codes) -> Decoded:
    """The weights of a model in MXFP4; raises ModelError where scales are missing or do not fit."""
    weights = {}
    for name, tensor in codes.tensors.items():
        if not name.endswith("_blocks") or tensor.dtype != torch.uint8:
            continue
        weight = name.removesuffix("_blocks")
        codes.companion(name, f"{weight}_scales")
        if tensor.ndim != 4 or tensor.shape[3] != SHARING // 2 or codes.tensors[f"{weight}_scales"].dtype != torch.uint8:
            raise codes.error(
                f"{name} has the shape {list(tensor.shape)}; MXFP4 has uint8 [experts, out, in / {SHARING}, {SHARING // 2}] "
                "there, and scales in uint8"
            )
        experts, out, groups, _ = tensor.shape
        codes.expect(f"{weight}_scales", (experts, out, groups))
        weights[weight] = CodedWeight(
            (experts, groups * SHARING, out),
            (name, f"{weight}_scales"),
            partial(_experts, tensor, codes.tensors[f"{weight}_scales"]),
        )
    if not weights:
        raise codes.error("the quantization_config says mxfp4, and the files hold no tensor named ..._blocks in uint8")
    return Decoded(f"MXFP4, a power of two for each {SHARING} weights", weights)


def _experts(blocks: Tensor, scales: Tensor) -> Iterator[Tensor]:
    """One expert after another, `[1, in, out]` in float32."""
    for own, scale in zip(blocks, scales, strict=True):
        yield dequantized(own.flatten(1), scale).T[None]


def dequantized(packed: Tensor, scales: Tensor) -> Tensor:
    """The weight in float32.

    Args:
        packed: the codes, uint8 `[out, in / 2]`.
        scales: the exponents, uint8 `[out, in / 32]`.

    Returns:
        `[out, in]`.
    """
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    values = torch.tensor(_ELEMENTS)[halves.int()]
    return (values.unflatten(-1, (-1, SHARING)) * scales_of(scales)[..., None]).flatten(-2)
