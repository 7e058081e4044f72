"""Layers of all kinds of parts, on a GPU where there is one, else where Triton's interpreter computes."""

from dataclasses import replace

import torch
from torch import Tensor

from slimlm.core import grid
from slimlm.core.mask import Pattern, choose
from slimlm.core.parts.base import Part
from slimlm.core.parts.codebook import Codebook
from slimlm.core.parts.low_rank import LowRank
from slimlm.core.parts.pack import Parts
from slimlm.core.parts.plain import Plain
from slimlm.core.parts.pruned import Pruned
from slimlm.core.parts.uniform import Uniform
from slimlm.runtime.gpu import device
from slimlm.runtime.linear import CompressedLinear

WHERE = torch.device("cuda" if torch.cuda.is_available() and not device.interpreted() else "cpu")
REASON = device.refuses(WHERE)
"""why the kernels cannot run there; None: they can"""
OUT, WIDTH = 70, 264
"""No multiples of a tile or of a block; two blocks of inputs, so that they can be split."""
# Relative to the largest output. Sums are float32; weights, a group's scale, t and the output are rounded to 11 or 8 bits, and
# the interpreter cuts bfloat16 off where a GPU rounds: a full 2^-8 for t, and again for the output.
ERRORS = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-6}
NARROW = [torch.float16, torch.bfloat16]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales(shape: tuple[int, int], group: grid.GroupSize, seed: int) -> Tensor:
    drawn = torch.rand(*grid.scale_shape(shape, group), generator=torch.Generator().manual_seed(seed))
    # The sign of a scale is free, and scales of a group differ widely.
    return ((0.02 + 0.1 * drawn) * torch.where(drawn < 0.3, -1, 1)).half()


def codes(shape: tuple[int, int], group: grid.GroupSize, *, bits: int = 4, seed: int = 0, inputs: bool = False) -> Uniform:
    generator = torch.Generator().manual_seed(seed)
    top = 2 ** (bits - 1)
    drawn = torch.randint(-top, top, shape, generator=generator, dtype=torch.int8)
    channel_scale = (0.5 + torch.rand(shape[1], generator=generator)).half() if inputs else None
    return Uniform(drawn, scales(shape, group, seed), bits, group, channel_scale)


def with_zeros(inner: Uniform, *, seed: int = 9) -> Uniform:
    top = 2 ** (inner.bits - 1)
    generator = torch.Generator().manual_seed(seed)
    zero = torch.randint(-top, top, tuple(inner.scale.shape), generator=generator, dtype=torch.int8)
    return replace(inner, zero=zero)


def table(shape: tuple[int, int], group: grid.GroupSize, *, bits: int = 4, seed: int = 0, power: int = 3) -> Codebook:
    """Levels without zero, so that what is left out cannot be one of them."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    return Codebook(index, torch.linspace(-1.5, 1.7, 2**bits).pow(power).half(), scales(shape, group, seed), bits, group)


def pruned(inner: Uniform | Codebook) -> Pruned:
    return Pruned(inner, choose(draw(*inner.shape, seed=3), Pattern.parse("2:4")), "2:4")


def half_kept(inner: Uniform) -> Pruned:
    keep = torch.zeros(inner.shape, dtype=torch.bool)
    keep.scatter_(1, draw(*inner.shape, seed=3).topk(inner.shape[1] // 2, dim=1).indices, True)
    return Pruned(inner, keep, "0.5")


def adapter(kind: str, out: int = OUT, width: int = WIDTH, rank: int = 5) -> LowRank:
    left, right = (rank, out), (rank, width)
    made = {
        "groups": lambda: (codes(left, 32, seed=5), codes(right, 128, seed=6)),
        "rows": lambda: (codes(left, "per-channel", bits=3, seed=5), codes(right, "per-tensor", seed=6)),
        "tables": lambda: (table(left, 128, seed=5), table(right, 32, seed=6)),
        "plain": lambda: (Plain(draw(*left, seed=5).half() / 8), Plain(draw(*right, seed=6).bfloat16() / 8)),
        "mixed": lambda: (Plain(draw(*left, seed=5) / 8), codes(right, 64, seed=6)),
    }
    return LowRank(*made[kind]())


def combinations(out: int = OUT, width: int = WIDTH) -> dict[str, tuple[Part, ...]]:
    shape = (out, width)
    return {
        "2:4 one scale": (pruned(codes(shape, "per-tensor")),),
        "2:4 rows, inputs scaled": (pruned(codes(shape, "per-channel", inputs=True)),),
        "2:4 groups of 32 + adapter": (pruned(codes(shape, 32)), adapter("groups", out, width)),
        "2:4 groups of 128": (pruned(codes(shape, 128)),),
        "2:4 groups of 96, 3 bits": (pruned(codes(shape, 96, bits=3)),),
        "2:4 groups of 256": (pruned(codes(shape, 256)),),
        "2:4 table, groups of 32 + adapter": (pruned(table(shape, 32)), adapter("groups", out, width)),
        "2:4 table of 2 bits, one scale": (pruned(table(shape, "per-tensor", bits=2)),),
        "2:4 one scale + plain adapter": (pruned(codes(shape, "per-tensor")), adapter("plain", out, width)),
        "groups of 128 + adapter of rows": (codes(shape, 128), adapter("rows", out, width)),
        "groups of 32 + mixed adapter": (codes(shape, 32), adapter("mixed", out, width)),
        "groups of 8, half kept": (half_kept(codes(shape, 8)),),
        "table, groups of 64 + adapter of tables": (table(shape, 64), adapter("tables", out, width)),
        "one group longer than a row": (codes(shape, 512),),
        "zeros, groups of 128 + adapter": (with_zeros(codes(shape, 128)), adapter("groups", out, width)),
        "zeros, groups of 32, 3 bits, inputs scaled": (with_zeros(codes(shape, 32, bits=3, inputs=True)),),
        "zeros of rows": (with_zeros(codes(shape, "per-channel")),),
        "one zero": (with_zeros(codes(shape, "per-tensor")),),
        "zeros, 2:4, groups of 64": (pruned(with_zeros(codes(shape, 64))),),
        "zeros, groups of 24, half kept": (half_kept(with_zeros(codes(shape, 24))),),
    }


def layer(parts: tuple[Part, ...], *, bias: bool = True) -> CompressedLinear:
    return CompressedLinear.from_parts(Parts(*parts), draw(parts[0].shape[0], seed=8) if bias else None).to(WHERE)


def exact(parts: tuple[Part, ...], x: Tensor, *, bias: bool = True) -> Tensor:
    y = x.cpu().double() @ Parts(*parts).dense().double().T
    return y + draw(parts[0].shape[0], seed=8).double() if bias else y


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu().double() - expected).abs().max() / expected.abs().max())
