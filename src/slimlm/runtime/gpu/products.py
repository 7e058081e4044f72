"""The products of the GPU kernels as operations of torch.

The operations are opaque to torch.compile and can be captured in a CUDA graph once a layer has multiplied in the dtype at hand:
they wait for nothing, and all they allocate is their result and partial sums. The product of one layer has gradients. The
counters of split products are the layer's and return to zero, so one layer must not run on two streams at the same time.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlm.core.errors import KernelError
from slimlm.runtime.gpu.layout import DENSE_BLOCK, MOST_TILES, ROWS, SPARSE_BLOCK, Packed
from slimlm.runtime.gpu.stacking import Stack
from slimlm.runtime.gpu.tiles import Tile, drop_measured_tile, fused_up_to, gpu_model, splits_for, tile_of

NARROW = (torch.float16, torch.bfloat16)
"""The dtypes of activations that the kernels multiply by packed weights. For others the weight is unpacked, in float32."""


@cache
def _kernels() -> ModuleType:
    """triton_kernels.py, imported at the first launch, because it imports Triton."""
    from slimlm.runtime.gpu import triton_kernels

    return triton_kernels


@cache
def constants(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The bits that turn nibbles into floats (triton_kernels.py), int32 `[2]`; `prepare` makes them, not a captured call."""
    bits = [0x64086408, 0x64806480] if dtype == torch.float16 else [0x43084308, 0]
    return torch.tensor(bits, dtype=torch.int32, device=device)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _scale_mode(kernels: ModuleType, scale: Tensor) -> Any:
    if scale.ndim == 3:
        return kernels.BLOCK if scale.shape[2] == 1 else kernels.SPANS
    return kernels.TENSOR if scale.numel() == 1 else kernels.ROW


@torch.library.custom_op("slimlm::gpu_product", mutates_args=())
def _product(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    tail: Tensor | None,
    tail_scale: Tensor | None,
    tail_codebook: Tensor | None,
    counters: Tensor,
    rows: int,
    width: int,
    tail_group: int,
    zero: Tensor | None,
) -> Tensor:
    flat = x.reshape(-1, width)
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], rows)
    middle = None if t is None else t.reshape(len(flat), -1)
    packed = Packed(words, scale, codebook, rows, width, zero)
    if fits_one_launch(flat, packed):
        second = None if middle is None or tail is None else SecondFactor(middle, tail, tail_scale, tail_codebook, tail_group)
        y = _launch_that_fits(flat, Operands(packed, bias, second, counters))
    else:
        y = F.linear(flat, matrix(packed, x.dtype), None if bias is None else bias.to(x.dtype))
        if middle is not None and tail is not None:
            y.addmm_(middle, _tail_matrix(tail, tail_scale, tail_codebook, rows, tail_group, x.dtype).T)
    return y.view(*x.shape[:-1], rows)


def fits_one_launch(x: Tensor, packed: Packed) -> bool:
    """Whether activations `[..., in]` are multiplied by the packed weight: they have 16 bits and are not too many."""
    return x.dtype in NARROW and x.numel() <= fused_up_to(packed, x.device, x.dtype) * packed.width


@_product.register_fake
def _(x, words, scale, codebook, bias, t, tail, tail_scale, tail_codebook, counters, rows, width, tail_group, zero):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("slimlm::gpu_unpacked", mutates_args=())
def _unpacked(
    words: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    rows: int,
    width: int,
    tail_group: int,
    dtype: torch.dtype,
    zero: Tensor | None,
) -> Tensor:
    """float16, bfloat16 or float32 `[rows, width]`, in memory rows of whole blocks; tail_group 0: not a tail."""
    kernels = _kernels()
    out = words.new_empty(rows, _room(words), dtype=dtype)
    with _on(words.device):
        kernels.unpack_kernel[(words.shape[-2] // ROWS, words.shape[0])](
            words, scale, _or(zero, words), _or(codebook, words), out, rows, _plane(words), out.stride(0),
            scale.stride(0) if tail_group else 0, max(1, tail_group),
            sparse=words.ndim == 4, has_codebook=codebook is not None, has_zero=zero is not None, tail=tail_group > 0,
            tile=ROWS, scale_mode=kernels.TENSOR if tail_group else _scale_mode(kernels, scale),
            spans=scale.shape[2] if scale.ndim == 3 else 1, num_warps=8 if dtype == torch.float32 else 4,
        )  # fmt: skip
    return out[:, :width]


@_unpacked.register_fake
def _(words, scale, codebook, rows, width, tail_group, dtype, zero):  # type: ignore[no-untyped-def]
    return words.new_empty(rows, _room(words), dtype=dtype)[:, :width]


def _room(words: Tensor) -> int:
    """Inputs with those that fill up the last block."""
    return words.shape[0] * (SPARSE_BLOCK if words.ndim == 4 else DENSE_BLOCK // 2)


def matrix(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix `[rows, width]` that a weight stands for, unpacked."""
    found = torch.float32 if dtype not in NARROW else dtype
    packed_words, scale, codebook = packed.words, packed.scale, packed.codebook
    return _unpacked(packed_words, scale, codebook, packed.rows, packed.width, 0, found, packed.zero).to(dtype)


def _tail_matrix(
    tail: Tensor, scale: Tensor | None, codebook: Tensor | None, rows: int, group: int, dtype: torch.dtype
) -> Tensor:
    """An adapter's second factor `[rows, ranks]`."""
    if scale is None:
        return tail[:rows].to(dtype)
    found = torch.float32 if dtype not in NARROW else dtype
    return _unpacked(tail, scale, codebook, rows, scale.shape[-1], group, found, None).to(dtype)


class SecondFactor(NamedTuple):
    """The second factor L `[rows, ranks]` of an adapter, and the product of the inputs with the first."""

    t: Tensor
    """`[..., ranks]`"""
    words: Tensor
    """as packed, or the values `[rows, ranks]`"""
    scale: Tensor | None
    """`[groups of rows, ranks]`; None: `words` are the values"""
    codebook: Tensor | None
    """float32 `[16]`; None: the codes are numbers"""
    group: int
    """rows that share the scales of a rank"""


class Operands(NamedTuple):
    """The tensors that a launch reads in addition to the activations."""

    packed: Packed
    bias: Tensor | None
    """`[rows]`"""
    second: SecondFactor | None
    counters: Tensor
    members: Tensor | None = None
    """of a stacked weight (stacking.Stack.members)"""


def _plane(words: Tensor) -> int:
    """Rows from one plane of words to the next."""
    return words.stride(-3) // 8 if words.shape[-3] > 1 else words.shape[-2]


def _launch_that_fits(x: Tensor, operands: Operands, step: int = 0) -> Tensor:
    """The product with the measured tile, or with the built-in one where the GPU has no room for that.

    step: number of rows that divides the rows of every layer of a stacked weight; 0: it is one layer.
    """
    packed = operands.packed
    x = _padded(x, _room(packed.words))
    while True:
        tile = tile_of(packed, len(x), step or packed.words.shape[-2], x.device, x.dtype)
        try:
            return launch(x, operands, tile)
        except _no_room() as error:
            if not drop_measured_tile(packed, len(x), x.device, x.dtype, error):
                raise


def _no_room() -> type[Exception]:
    """What Triton raises, before it launches, for a tile that takes more memory than a multiprocessor has."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def launch(x: Tensor, operands: Operands, tile: Tile) -> Tensor:
    """One launch of the product kernel with one tile.

    Args:
        x: activations `[batch, inputs]`, float16 or bfloat16, with whole blocks of inputs.
        operands: what is multiplied and added.
        tile: the work of one program.

    Returns:
        `[batch, rows]` in the dtype of x.
    """
    packed, bias, second, counters, members = operands
    kernels = _kernels()
    batch, padded = len(x), packed.words.shape[-2]
    blocks = x.shape[1] // (SPARSE_BLOCK if packed.sparse else DENSE_BLOCK)
    across, along = padded // tile.rows, -(-batch // tile.tokens)
    assert along <= MOST_TILES and across * along <= counters.numel()
    splits, share = splits_for(tile, across * along, blocks, gpu_model(x.device).multiprocessors)
    y = torch.empty(batch, packed.rows, dtype=x.dtype, device=x.device)
    sums = across * along * splits * tile.rows * tile.tokens if splits > 1 else 0
    partial = torch.empty(sums, dtype=torch.float32, device=x.device) if sums else counters
    scale = packed.scale
    # What a launch does not read still needs a pointer.
    none = packed.words
    kind, tail_stride = kernels.NO_TAIL, 0
    t, tail, tail_scale, tail_codebook, tail_group = second or SecondFactor(x, none, None, None, 1)
    if second is not None:
        kind = kernels.DENSE_TAIL if tail_scale is None else kernels.PACKED_TAIL
        tail_stride = (tail if tail_scale is None else tail_scale).stride(0)
    with _on(x.device):
        kernels.product_kernel[(across, splits, along)](
            x, packed.words, scale, _or(packed.zero, none), _or(packed.codebook, none), _or(bias, none), y, partial, counters,
            constants(x.device, x.dtype), t, tail, _or(tail_scale, none), _or(tail_codebook, none),
            _or(members, none), batch, packed.rows, blocks, _plane(packed.words), x.stride(0),
            0 if second is None else t.stride(0), share, splits, 0 if second is None else t.shape[1] // 64, tail_stride,
            max(1, tail_group),
            sparse=packed.sparse, has_codebook=packed.codebook is not None, has_zero=packed.zero is not None,
            scale_mode=_scale_mode(kernels, scale), spans=scale.shape[2] if scale.ndim == 3 else 1, has_bias=bias is not None,
            tail_kind=kind, tail_has_codebook=tail_codebook is not None, split=splits > 1, stacked=members is not None,
            tile=tile.rows, tokens=tile.tokens, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def _padded(x: Tensor, width: int) -> Tensor:
    """Activations `[batch, in]` padded with zeros to a width, with their inputs contiguous."""
    if x.shape[1] < width:
        return F.pad(x, (0, width - x.shape[1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, words, scale, codebook, bias, t, tail, tail_scale, tail_codebook, _, rows, width, tail_group, zero = inputs
    ctx.save_for_backward(words, scale, codebook, tail, tail_scale, tail_codebook, zero)
    ctx.rows, ctx.width, ctx.tail_group = rows, width, tail_group
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype, None if t is None else t.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """To x, the bias and t; what is packed is frozen."""
    words, scale, codebook, tail, tail_scale, tail_codebook, zero = ctx.saved_tensors
    of_x, of_bias, of_t = ctx.dtypes
    to_x = to_bias = to_t = None
    if ctx.needs_input_grad[0]:
        to_x = gradient.to(of_x) @ matrix(Packed(words, scale, codebook, ctx.rows, ctx.width, zero), of_x)
    if ctx.needs_input_grad[4]:
        to_bias = gradient.flatten(0, -2).sum(dim=0).to(of_bias)
    if ctx.needs_input_grad[5]:
        to_t = gradient.to(of_t) @ _tail_matrix(tail, tail_scale, tail_codebook, ctx.rows, ctx.tail_group, of_t)
    return to_x, None, None, None, to_bias, to_t, *(None,) * 8


torch.library.register_autograd("slimlm::gpu_product", _gradients, setup_context=_keep)


def product(
    x: Tensor, packed: Packed, counters: Tensor, *, bias: Tensor | None = None, second: SecondFactor | None = None
) -> Tensor:
    """x W^T (+ t L^T) (+ bias), with sums in float32.

    Up to `tiles.fused_up_to` tokens of 16 bits the weights of a group are rounded to the dtype of x once more than by the
    reference where it is bfloat16: the scale is, too.

    Args:
        x: activations `[..., in]`.
        packed: the weight W `[rows, in]`.
        counters: int32 zeros, one for each tile of the largest launch; they are zero again afterwards.
        bias: `[rows]`.
        second: t `[..., ranks]` and the adapter's second factor L `[rows, ranks]`.

    Returns:
        `[..., rows]` in the dtype of x.

    Raises:
        KernelError: the activations have another width than the weight.
    """
    if x.shape[-1] != packed.width:
        raise KernelError(f"the layer has {packed.width} inputs, and the activations are {list(x.shape)}")
    t, tail, tail_scale, tail_codebook, tail_group = second or (None, None, None, None, 0)
    return _product(
        x, packed.words, packed.scale, packed.codebook, bias, t, tail, tail_scale, tail_codebook, counters,
        packed.rows, packed.width, tail_group, packed.zero,
    )  # fmt: skip


@torch.library.custom_op("slimlm::gpu_stacked_product", mutates_args=())
def _stacked(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    codebook: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    tail: Tensor | None,
    tail_scale: Tensor | None,
    tail_codebook: Tensor | None,
    members: Tensor,
    counters: Tensor,
    rows: int,
    width: int,
    step: int,
    zero: Tensor | None,
) -> Tensor:
    flat = x.reshape(-1, width)
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], rows)
    middle = None if t is None else t.reshape(len(flat), -1)
    second = None if middle is None or tail is None else SecondFactor(middle, tail, tail_scale, tail_codebook, 1)
    packed = Packed(words, scale, codebook, rows, width, zero)
    y = _launch_that_fits(flat, Operands(packed, bias, second, counters, members), step)
    return y.view(*x.shape[:-1], rows)


@_stacked.register_fake
def _(x, words, scale, codebook, bias, t, tail, tail_scale, tail_codebook, members, counters, rows, width, step, zero):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)


def stacked_product(x: Tensor, stack: Stack, bias: Tensor | None) -> Tensor:
    """The products of stacked layers with their input, without gradients.

    Args:
        x: activations `[..., in]` that `fits_one_launch` accepts.
        stack: the layers as one weight.
        bias: `[rows]`, padding included.

    Returns:
        `[..., rows]`, padding included; `stack.rows` says where each layer's outputs are.

    Raises:
        KernelError: the activations have another width than the weight.
    """
    base, tail = stack.base, stack.tail
    if x.shape[-1] != base.width:
        raise KernelError(f"the layers have {base.width} inputs, and the activations are {list(x.shape)}")
    t = None
    if isinstance(stack.right, Packed):
        right = stack.right
        no_bias_and_factor = (None,) * 5
        t = _stacked(
            x, right.words, right.scale, right.codebook, *no_bias_and_factor, stack.right_members, stack.counters,
            right.rows, right.width, ROWS, right.zero,
        )  # fmt: skip
    elif stack.right is not None:
        t = F.linear(x, stack.right.of(x.dtype))
    words = scale = codebook = None
    if tail is not None:
        words = tail.values if tail.packed is None else tail.packed.words
        scale, codebook = (None, None) if tail.packed is None else (tail.packed.scale, tail.packed.codebook)
    return _stacked(
        x, base.words, base.scale, base.codebook, bias, t, words, scale, codebook, stack.members, stack.counters,
        base.rows, base.width, stack.step, base.zero,
    )  # fmt: skip
