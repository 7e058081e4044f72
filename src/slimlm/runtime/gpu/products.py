"""The products as operations of torch.

Both operations are opaque to torch.compile, have gradients, and are safe to capture in a CUDA graph once a layer has multiplied
in the dtype at hand: they wait for nothing, and what they allocate is their result and partial sums. The
counters of split products are the layer's and return to zero; so one layer must not run on two streams at the same time.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlm.core.errors import KernelError
from slimlm.runtime.gpu.layout import DENSE_BLOCK, MOST_TILES, ROWS, SPARSE_BLOCK, Joint, Packed
from slimlm.runtime.gpu.tiles import Tile, card_of, fused_up_to, splits_for, tile_of, without

NARROW = (torch.float16, torch.bfloat16)
"""What the tensor cores take here. For other activations the weight is unpacked, in float32."""


@cache
def _kernels() -> ModuleType:
    from slimlm.runtime.gpu import kernels

    return kernels


@cache
def constants(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The bits that turn nibbles into floats (kernels.py), int32 `[2]`. Made before a graph is captured, by `prepare`."""
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
    levels: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    tail: Tensor | None,
    tail_scale: Tensor | None,
    tail_levels: Tensor | None,
    counters: Tensor,
    rows: int,
    width: int,
    tail_group: int,
) -> Tensor:
    flat = x.reshape(-1, width)
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], rows)
    middle = None if t is None else t.reshape(len(flat), -1)
    packed = Packed(words, scale, levels, rows, width)
    if fits_one_launch(flat, packed):
        y = _launch(flat, packed, bias, _Second(middle, tail, tail_scale, tail_levels, tail_group), counters)
    else:
        y = F.linear(flat, matrix(packed, x.dtype), None if bias is None else bias.to(x.dtype))
        if middle is not None and tail is not None:
            y.addmm_(middle, _tail_matrix(tail, tail_scale, tail_levels, rows, tail_group, x.dtype).T)
    return y.view(*x.shape[:-1], rows)


def fits_one_launch(x: Tensor, packed: Packed) -> bool:
    """Whether activations `[..., in]` are multiplied as the weight is packed: 16 bits, and not too many."""
    return x.dtype in NARROW and x.numel() <= fused_up_to(packed, x.device, x.dtype) * packed.width


@_product.register_fake
def _(x, words, scale, levels, bias, t, tail, tail_scale, tail_levels, counters, rows, width, tail_group):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("slimlm::gpu_unpacked", mutates_args=())
def _unpacked(
    words: Tensor, scale: Tensor, levels: Tensor | None, rows: int, width: int, tail_group: int, dtype: torch.dtype
) -> Tensor:
    """float16, bfloat16 or float32 `[rows, width]`, in memory rows of whole blocks; tail_group 0: not a tail."""
    kernels = _kernels()
    out = words.new_empty(rows, _room(words), dtype=dtype)
    with _on(words.device):
        kernels.unpack_kernel[(words.shape[-2] // ROWS, words.shape[0])](
            words, scale, words if levels is None else levels, out, rows, _plane(words), out.stride(0),
            scale.stride(0) if tail_group else 0, max(1, tail_group),
            sparse=words.ndim == 4, table=levels is not None, tail=tail_group > 0, tile=ROWS,
            scale_mode=kernels.TENSOR if tail_group else _scale_mode(kernels, scale),
            spans=scale.shape[2] if scale.ndim == 3 else 1, num_warps=8 if dtype == torch.float32 else 4,
        )  # fmt: skip
    return out[:, :width]


@_unpacked.register_fake
def _(words, scale, levels, rows, width, tail_group, dtype):  # type: ignore[no-untyped-def]
    return words.new_empty(rows, _room(words), dtype=dtype)[:, :width]


def _room(words: Tensor) -> int:
    """Inputs with those that fill up the last block."""
    return words.shape[0] * (SPARSE_BLOCK if words.ndim == 4 else DENSE_BLOCK // 2)


def matrix(packed: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix `[rows, width]` that a weight stands for, unpacked."""
    found = torch.float32 if dtype not in NARROW else dtype
    return _unpacked(packed.words, packed.scale, packed.levels, packed.rows, packed.width, 0, found).to(dtype)


def _tail_matrix(
    tail: Tensor, scale: Tensor | None, levels: Tensor | None, rows: int, group: int, dtype: torch.dtype
) -> Tensor:
    """An adapter's second factor `[rows, ranks]`."""
    if scale is None:
        return tail[:rows].to(dtype)
    found = torch.float32 if dtype not in NARROW else dtype
    return _unpacked(tail, scale, levels, rows, scale.shape[-1], group, found).to(dtype)


class _Second(NamedTuple):
    """An adapter's second factor, and what the first made of the inputs; both None where there is no adapter."""

    t: Tensor | None
    words: Tensor | None
    """or values"""
    scale: Tensor | None
    levels: Tensor | None
    group: int


def _plane(words: Tensor) -> int:
    """Rows from one plane of words to the next."""
    return words.stride(-3) // 8 if words.shape[-3] > 1 else words.shape[-2]


def _launch(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    second: _Second,
    counters: Tensor,
    members: Tensor | None = None,
    step: int = 0,
) -> Tensor:
    """`step`: rows of which every member of a joint weight has a multiple; 0: of one layer."""
    x = _filled_up(x, _room(packed.words))
    while True:
        tile = tile_of(packed, len(x), step or packed.words.shape[-2], x.device, x.dtype)
        try:
            return _tiled(x, packed, bias, second, counters, members, tile)
        except _no_room() as error:
            if not without(packed, len(x), x.device, x.dtype, error):
                raise


def _no_room() -> type[Exception]:
    """What Triton raises, before it launches, for a tile that takes more memory than a multiprocessor has."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def _tiled(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None,
    second: _Second,
    counters: Tensor,
    members: Tensor | None,
    tile: Tile,
) -> Tensor:
    """A launch with one tile; x `[batch, whole blocks]`."""
    kernels = _kernels()
    batch, padded = len(x), packed.words.shape[-2]
    blocks = x.shape[1] // (SPARSE_BLOCK if packed.sparse else DENSE_BLOCK)
    across, along = padded // tile.rows, -(-batch // tile.tokens)
    assert along <= MOST_TILES and across * along <= counters.numel()
    splits, share = splits_for(tile, across * along, blocks, card_of(x.device)[1])
    y = torch.empty(batch, packed.rows, dtype=x.dtype, device=x.device)
    sums = across * along * splits * tile.rows * tile.tokens if splits > 1 else 0
    partial = torch.empty(sums, dtype=torch.float32, device=x.device) if sums else counters
    t, tail = second.t, second.words
    kind, ranks, stride = kernels.NO_TAIL, 0, 0
    if t is not None and tail is not None:
        kind = kernels.DENSE_TAIL if second.scale is None else kernels.PACKED_TAIL
        ranks, stride = t.shape[1], (tail if second.scale is None else second.scale).stride(0)
    scale = packed.scale
    # What a launch does not read still needs a pointer.
    none = packed.words
    with _on(x.device):
        kernels.product_kernel[(across, splits, along)](
            x, packed.words, scale, _or(packed.levels, none), _or(bias, none), y, partial, counters,
            constants(x.device, x.dtype), _or(t, x), _or(tail, none), _or(second.scale, none), _or(second.levels, none),
            _or(members, none), batch, packed.rows, blocks, _plane(packed.words), x.stride(0),
            0 if t is None else t.stride(0), share, splits, ranks // 64, stride, max(1, second.group),
            sparse=packed.sparse, table=packed.levels is not None, scale_mode=_scale_mode(kernels, scale),
            spans=scale.shape[2] if scale.ndim == 3 else 1, has_bias=bias is not None,
            tail_kind=kind, tail_table=second.levels is not None, split=splits > 1, joint=members is not None,
            tile=tile.rows, tokens=tile.tokens, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return y


def _filled_up(x: Tensor, width: int) -> Tensor:
    """Activations `[batch, in]` with zeros up to a width, and inputs side by side."""
    if x.shape[1] < width:
        return F.pad(x, (0, width - x.shape[1]))
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, words, scale, levels, bias, t, tail, tail_scale, tail_levels, _, rows, width, tail_group = inputs
    ctx.save_for_backward(words, scale, levels, tail, tail_scale, tail_levels)
    ctx.rows, ctx.width, ctx.tail_group = rows, width, tail_group
    ctx.dtypes = x.dtype, None if bias is None else bias.dtype, None if t is None else t.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    """To x, the bias and t; what is packed is frozen."""
    words, scale, levels, tail, tail_scale, tail_levels = ctx.saved_tensors
    of_x, of_bias, of_t = ctx.dtypes
    to_x = to_bias = to_t = None
    if ctx.needs_input_grad[0]:
        to_x = gradient.to(of_x) @ matrix(Packed(words, scale, levels, ctx.rows, ctx.width), of_x)
    if ctx.needs_input_grad[4]:
        to_bias = gradient.flatten(0, -2).sum(dim=0).to(of_bias)
    if ctx.needs_input_grad[5]:
        to_t = gradient.to(of_t) @ _tail_matrix(tail, tail_scale, tail_levels, ctx.rows, ctx.tail_group, of_t)
    return to_x, None, None, None, to_bias, to_t, *(None,) * 7


torch.library.register_autograd("slimlm::gpu_product", _gradients, setup_context=_keep)


def product(
    x: Tensor,
    packed: Packed,
    counters: Tensor,
    *,
    bias: Tensor | None = None,
    t: Tensor | None = None,
    tail: tuple[Tensor, Tensor | None, Tensor | None, int] | None = None,
) -> Tensor:
    """x W^T (+ t L^T) (+ bias): `[..., in]` to `[..., rows]`, in the dtype of x.

    tail: words or values, scales, levels and group of L `[rows, ranks]`, for t `[..., ranks]`. Sums are taken in float32. Up to
    `tiles.fused_up_to` tokens of 16 bits, weights of a group are rounded to the dtype of x once more than by the reference
    where it is bfloat16: the scale is, too. Raises KernelError for activations of another width.
    """
    if x.shape[-1] != packed.width:
        raise KernelError(f"the layer has {packed.width} inputs, and the activations are {list(x.shape)}")
    values, scale, levels, group = tail or (None, None, None, 0)
    return _product(
        x, packed.words, packed.scale, packed.levels, bias, t, values, scale, levels, counters, packed.rows, packed.width, group
    )


@torch.library.custom_op("slimlm::gpu_joint_product", mutates_args=())
def _joint(
    x: Tensor,
    words: Tensor,
    scale: Tensor,
    levels: Tensor | None,
    bias: Tensor | None,
    t: Tensor | None,
    tail: Tensor | None,
    tail_scale: Tensor | None,
    tail_levels: Tensor | None,
    members: Tensor,
    counters: Tensor,
    rows: int,
    width: int,
    step: int,
) -> Tensor:
    flat = x.reshape(-1, width)
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], rows)
    middle = None if t is None else t.reshape(len(flat), -1)
    second = _Second(middle, tail, tail_scale, tail_levels, 1)
    y = _launch(flat, Packed(words, scale, levels, rows, width), bias, second, counters, members, step)
    return y.view(*x.shape[:-1], rows)


@_joint.register_fake
def _(x, words, scale, levels, bias, t, tail, tail_scale, tail_levels, members, counters, rows, width, step):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)


def joint_product(x: Tensor, joint: Joint, bias: Tensor | None) -> Tensor:
    """Layers that share their input as one: `[..., in]` to `[..., rows]`, theirs and those that fill up side by side.

    For activations that `fits_one_launch` takes, and without gradients. Raises KernelError for activations of another width.
    """
    base, tail = joint.base, joint.tail
    if x.shape[-1] != base.width:
        raise KernelError(f"the layers have {base.width} inputs, and the activations are {list(x.shape)}")
    t = None
    if isinstance(joint.right, Packed):
        right = joint.right
        none = (None,) * 5
        t = _joint(
            x, right.words, right.scale, right.levels, *none, joint.right_members, joint.counters, right.rows, right.width, ROWS
        )
    elif joint.right is not None:
        t = F.linear(x, joint.right.of(x.dtype))
    words = scale = levels = None
    if tail is not None:
        words = tail.values if tail.packed is None else tail.packed.words
        scale, levels = (None, None) if tail.packed is None else (tail.packed.scale, tail.packed.levels)
    return _joint(
        x, base.words, base.scale, base.levels, bias, t, words, scale, levels, joint.members, joint.counters,
        base.rows, base.width, joint.step,
    )  # fmt: skip
