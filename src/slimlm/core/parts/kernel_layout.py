"""What kernels need to know of a part: the layout of its matrix in plain fields, or why no kernel can take it.

An `Entry` gives the layout, from which a backend decides whether it supports the part; a `Part` gives the operand, which is the
layout with the tensors. Backends do not look at the kind of a part, only at the fields below.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from slimlm.core.grid import GroupSize
from slimlm.core.mask import Pattern


@dataclass(frozen=True)
class MatrixLayout:
    """One element per weight. weight = (element - zero), or codebook[element], x scale x channel_scale, zero where masked.

    The stored tensors are named "" (the packed elements), "scale", "zero", "codebook", "channel_scale" and "mask", where there
    are any.
    """

    elements: Literal["integers", "indices", "floats"]
    """signed integers (stored with 2^(bits-1) added), indices into a codebook, or floating-point values"""
    bits: int
    """of an element"""
    dtype: torch.dtype | None = None
    """of floats"""
    group_size: GroupSize = "per-tensor"
    """weights that share a scale; unused for floats, which have none"""
    channel_scale: bool = False
    """whether there is a factor for each input"""
    mask: Pattern | None = None
    """the pattern by which weights were dropped; those that stay are stored without gaps. None: all stay"""
    zero: bool = False
    """whether each scale of integers comes with the integer that stands for zero; stored as one stream, 2^(bits-1) added"""


@dataclass(frozen=True)
class ProductLayout:
    """left^T right, of two matrices `[rank, out]` and `[rank, in]`; their tensors' names begin with "left" and "right"."""

    rank: int
    left: MatrixLayout
    right: MatrixLayout


KernelLayout = MatrixLayout | ProductLayout


@dataclass(frozen=True)
class Refusal:
    """Why kernels cannot take a part."""

    reason: str
    """for the user"""


@dataclass(frozen=True)
class MatrixOperand:
    """The tensors of a `MatrixLayout`, unpacked."""

    layout: MatrixLayout
    elements: Tensor
    """`[rows, columns]`: int8 integers, uint8 indices or floats; elements that the mask drops have no meaning"""
    scale: Tensor | None = None
    """`[1, 1]`, `[rows, 1]` or `[rows, groups]`, in its storage dtype"""
    codebook: Tensor | None = None
    """`[2^bits]`"""
    channel_scale: Tensor | None = None
    """`[columns]`"""
    mask: Tensor | None = None
    """bool `[rows, columns]`; True stays"""
    zero: Tensor | None = None
    """int8, of the shape of `scale`"""


@dataclass(frozen=True)
class ProductOperand:
    """The two matrices of a `ProductLayout`."""

    left: MatrixOperand
    right: MatrixOperand


KernelOperand = MatrixOperand | ProductOperand
