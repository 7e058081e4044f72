"""slimlm's own kernels for CPUs: 2:4, 2 to 8 bits, codebooks and low-rank parts, multiplied without unpacking them.

Activations are float32 or bfloat16 (other types are widened to float32 on the way in and narrowed on the way out) and
become integers inside, with one scale for 128 of them: 8 bits in "fast", 16 bits in "precise", which errs by less than
rounding the activations to bfloat16 would. Gradients flow to the activations and the bias; the parts are frozen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.errors import CheckpointError
from slimlm.core.parts import Description, dense_of, under
from slimlm.runtime.backends import Stored
from slimlm.runtime.cpu import bindings, native
from slimlm.runtime.cpu.bindings import Matrix, PackedProducts, Precision

_MOST_ADAPTERS = 8


@dataclass
class PreparedOnCpu:
    """A layer in the kernels' layout."""

    blob: Tensor
    """uint8 `[size]`"""
    bias: Tensor | None
    """float32 `[out]`"""
    stored: Stored

    @cached_property
    def packed(self) -> PackedProducts:
        """The layer ready to multiply."""
        return PackedProducts([self.blob], [self.bias], [self.stored.shape[0]], self.stored.shape[1])


class Cpu:
    """Products of packed layers on the CPU."""

    name = "cpu"

    def __init__(self, precision: Precision) -> None:
        self.precision: Precision = precision

    def refuses(self, stored: Stored) -> str | None:
        """Why the kernels cannot run here, or do not take the layer; None: they can."""
        if native.library() is None:
            return f"there are no CPU kernels: {native.status().reason}"
        if stored.device.type != "cpu":
            return f"the layer is on {stored.device}, and these kernels run on the CPU"
        return unfit(stored.descriptions) or _lacks_zero(stored)

    def prepare(self, stored: Stored) -> PreparedOnCpu:
        """Pack a layer, unless that was done earlier.

        Raises:
            CheckpointError: its tensors do not fit their description.
        """
        blob = pack(stored) if stored.blob is None else stored.blob
        return PreparedOnCpu(blob, None if stored.bias is None else stored.bias.detach().float(), stored)

    def matmul(self, x: Tensor, prepared: PreparedOnCpu) -> Tensor:
        """x W^T + bias `[..., out]` for x `[..., in]`, in the dtype of x."""
        if torch.is_grad_enabled() and _wants_gradient(x, prepared):
            return _Product.apply(x, prepared.stored.bias, prepared, self.precision)
        if torch.compiler.is_compiling():
            return _product(x, prepared.blob, prepared.bias, prepared.stored.shape[0], self.precision)
        return prepared.packed(x, self.precision)[0]


def unfit(descriptions: Sequence[Description]) -> str | None:
    """Why the layout does not hold parts that are so described, in words; None: it does."""
    if len(descriptions) > 1 + _MOST_ADAPTERS:
        return f"it has {len(descriptions) - 1} low-rank parts; the kernels take {_MOST_ADAPTERS}"
    base, *extras = descriptions
    wrong = [about["kind"] for about in extras if about["kind"] != "low_rank"]
    if wrong:
        return f"the kernels add low-rank parts to a base, not a {wrong[0]} part"
    own = base["inner"] if base["kind"] == "pruned" else base
    if base["kind"] == "low_rank":
        return "its first part is of low rank; the kernels want a base there"
    if base["kind"] == "pruned" and own["kind"] == "plain":
        return "its base is pruned but not quantized; the kernels take pruned weights of 2 to 8 bits"
    sides = [about[side] for about in extras for side in ("left", "right")]
    return next((reason for about in (own, *sides) if (reason := _unfit(about))), None)


def _unfit(about: Description) -> str | None:
    if about["kind"] not in ("uniform", "codebook", "plain"):
        return f"the kernels do not know {about['kind']} parts"
    if about["kind"] == "codebook" and about["bits"] > 4:
        return f"its table of levels has {about['bits']} bits; the kernels take tables of up to 4"
    if about["kind"] == "plain" and about["dtype"] not in ("float32", "float16", "bfloat16"):
        return f"its values are {about['dtype']}; the kernels take float32, float16 and bfloat16"
    return None


def _lacks_zero(stored: Stored) -> str | None:
    """A table of levels under a mask, in the layout without places, where no code can stand for what is left out."""
    base = stored.descriptions[0]
    if base["kind"] != "pruned" or base["inner"]["kind"] != "codebook" or _two_of_four(base, stored.shape[1]):
        return None
    if (stored.tensors["weight_levels"] == 0).any():
        return None
    return f"its table of levels has no zero for what its mask ({base['pattern']}) leaves out"


def _two_of_four(about: Description, width: int) -> bool:
    """Whether a pruned part is laid out as 2:4. Groups that would tear a four apart are laid out as zeros in full."""
    group = about["inner"]["group_size"]
    return about["pattern"] == "2:4" and (not isinstance(group, int) or group >= width or group % 4 == 0)


def pack(stored: Stored) -> Tensor:
    """A layer's bytes in the kernels' layout, uint8 `[size]`."""
    base, *extras = stored.descriptions
    # The matrices hold addresses only; this list keeps alive what lies there.
    alive: list[Tensor] = []
    matrices = [_matrix(base, under("weight", stored.tensors), stored.shape, False, alive)]
    for number, about in enumerate(extras, start=1):
        tensors = under(f"extra{number}", stored.tensors)
        for side, width in (("right", stored.shape[1]), ("left", stored.shape[0])):
            shape = about["rank"], width
            matrices.append(_matrix(about[side], under(side, tensors), shape, side == "left", alive))
    return bindings.pack(matrices)


def _matrix(
    about: Description, tensors: dict[str, Tensor], shape: tuple[int, int], transposed: bool, alive: list[Tensor]
) -> Matrix:
    def address(name: str, dtype: torch.dtype | None = None, size: tuple[int, ...] | None = None) -> Any:
        tensor = tensors[name].contiguous()
        if size is not None and tuple(tensor.shape) != size:
            raise CheckpointError(f"a stored {name} has the shape {list(tensor.shape)}; this layer's is {list(size)}")
        alive.append(tensor if dtype is None else tensor.to(dtype))
        return alive[-1].data_ptr()

    inner = about["inner"] if about["kind"] == "pruned" else about
    found = Matrix(rows=shape[0], columns=shape[1], transposed=int(transposed), values=address(""))
    found.values_bytes = alive[-1].numel() * alive[-1].element_size()
    if inner["kind"] == "plain":
        found.type = bindings.float_type(getattr(torch, inner["dtype"]))
        return found
    scale = tensors["scale"]
    found.bits = inner["bits"]
    found.scale_type = bindings.float_type(scale.dtype if scale.dtype == torch.float16 else torch.float32)
    sizes = grid.scale_shape(shape, inner["group_size"])
    found.scale = address("scale", torch.float16 if scale.dtype == torch.float16 else torch.float32, sizes)
    found.scale_rows, found.scale_columns = sizes
    found.group = inner["group_size"] if isinstance(inner["group_size"], int) else 0
    if inner["kind"] == "codebook":
        found.levels = address("levels", torch.float16, (2 ** inner["bits"],))
    if inner.get("input_scale"):
        found.input_scale = address("input_scale", torch.float16, (shape[1],))
    if about["kind"] == "pruned":
        found.keep = address("keep", torch.uint8, (shape[0], bitstream.packed_bytes(shape[1], 1)))
        found.two_of_four = int(_two_of_four(about, shape[1]))
    return found


def _wants_gradient(x: Tensor, prepared: PreparedOnCpu) -> bool:
    bias = prepared.stored.bias
    return x.requires_grad or (bias is not None and bias.requires_grad)


class _Product(torch.autograd.Function):
    """The product with gradients to x and the bias; the weight is unpacked for the backward pass and dropped again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, prepared: PreparedOnCpu, precision: Precision) -> Tensor:
        del bias  # of the prepared layer; an argument so that its gradient is asked for
        ctx.prepared = prepared
        return prepared.packed(x, precision)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        [gradient] = gradients
        weight = dense_of(ctx.prepared.stored.parts()) if ctx.needs_input_grad[0] else None
        to_x = None if weight is None else (gradient.float() @ weight).to(gradient.dtype)
        to_bias = gradient.flatten(0, -2).sum(dim=0) if ctx.needs_input_grad[1] else None
        return to_x, to_bias, None, None


@torch.library.custom_op("slimlm::packed_linear", mutates_args=())
def _product(x: Tensor, blob: Tensor, bias: Tensor | None, out: int, precision: str) -> Tensor:
    """The product as one operation that is opaque to torch.compile."""
    return PackedProducts([blob], [bias], [out], x.shape[-1])(x, "fast" if precision == "fast" else "precise")[0]


@_product.register_fake
def _(x: Tensor, blob: Tensor, bias: Tensor | None, out: int, precision: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)
