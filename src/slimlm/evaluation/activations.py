"""8-bit activations as an option of evaluation (SLiM, arXiv 2410.09615, appendix B).

They are emulated: the inputs of every linear layer in the blocks are rounded and multiplied in the model's own dtype, so the
result is a measure of quality, not of speed. A layer's input is never changed in place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.evaluation.activation_formats import ActivationFormat
from slimlm.models.structure import LINEAR_KINDS, blocks_of
from slimlm.runtime.linear import CompressedLinear

_GROUP = 128
_FP8_TOP = 448.0


def fp8_per_tensor(x: Tensor) -> Tensor:
    """Round activations `[..., in]` to float8 E4M3 with one scale, which maps the largest magnitude to 448."""
    scale = x.abs().amax().float().clamp_min(1e-30) / _FP8_TOP
    return ((x.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype)


def int8_per_token(x: Tensor) -> Tensor:
    """Round activations `[..., in]` to 255 values with a scale per token, which maps its largest magnitude to 127."""
    return _int8(x.float()).to(x.dtype)


def int8_per_group(x: Tensor) -> Tensor:
    """Round activations `[..., in]` as `int8_per_token`, with a scale per 128 inputs; a shorter last group has its own."""
    width = x.shape[-1]
    padded = nn.functional.pad(x.float(), (0, -width % _GROUP))
    return _int8(padded.unflatten(-1, (-1, _GROUP))).flatten(-2)[..., :width].to(x.dtype)


def _int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(dim=-1, keepdim=True).clamp_min(1e-30) / 127
    return (x / scale).round().clamp(-127, 127) * scale


FORMATS: dict[ActivationFormat, Callable[[Tensor], Tensor]] = {
    "fp8": fp8_per_tensor,
    "int8-token": int8_per_token,
    "int8-group": int8_per_group,
}


@contextmanager
def rounded_activations(model: nn.Module, form: ActivationFormat | None) -> Iterator[None]:
    """Within this context the linear layers of the model's blocks get rounded inputs.

    Args:
        model: compressed or dense.
        form: how inputs are rounded; None: not at all.
    """
    if form is None:
        yield
        return
    rounding = FORMATS[form]

    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(args[0]), *args[1:])

    kinds = (CompressedLinear, *LINEAR_KINDS)
    layers = [m for block in blocks_of(model).values() for m in block.modules() if isinstance(m, kinds)]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
