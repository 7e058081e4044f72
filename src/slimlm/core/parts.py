"""A compressed weight is a sum of parts, and each part can say what it means.

    W  ~  base.dense() + low_rank.dense() + ...

`dense()` is the float32 matrix `[out, in]` a part stands for. That matrix is the law: kernels, files and tests are
checked against it. `packed()` gives the tensors that are stored, by the end of their name; `storage_bits()` is their
size. `describe()` is the small dictionary that, with those tensors, gives the part back through `rebuild`.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from slimlm.core import bits as bitstream
from slimlm.core import grid
from slimlm.core.errors import CheckpointError

Description = dict[str, Any]
"""What JSON can hold: the kind of a part and its options."""


class Part(Protocol):
    """One summand of a compressed weight."""

    @property
    def shape(self) -> tuple[int, int]: ...
    def dense(self) -> Tensor: ...
    def packed(self) -> dict[str, Tensor]: ...
    def describe(self) -> Description: ...
    def storage_bits(self) -> int: ...


class _Stored:
    """Counts bits as stored: padding to whole bytes, scales and masks included."""

    def packed(self) -> dict[str, Tensor]:
        raise NotImplementedError

    def storage_bits(self) -> int:
        """Bits of all tensors that must be stored for this part."""
        return sum(8 * t.numel() * t.element_size() for t in self.packed().values())


@dataclass(frozen=True)
class Plain(_Stored):
    """Floating-point weights as they are: float16, bfloat16 or float32."""

    values: Tensor
    """`[out, in]`"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dense(self) -> Tensor:
        return self.values.float()

    def packed(self) -> dict[str, Tensor]:
        return self.packed_kept(None)

    def packed_kept(self, keep: Tensor | None) -> dict[str, Tensor]:
        values = self.values if keep is None else self.values[keep].view(self.shape[0], -1)
        return {"": values.contiguous().view(torch.uint8)}

    def describe(self) -> Description:
        return {"kind": "plain", "dtype": str(self.values.dtype).removeprefix("torch.")}

    @classmethod
    def rebuild(cls, about: Description, tensors: dict[str, Tensor], shape: tuple[int, int], keep: Tensor | None) -> "Plain":
        dtype = getattr(torch, about["dtype"])
        return cls(_scatter(tensors[""].contiguous().view(dtype), shape, keep))


@dataclass(frozen=True)
class Uniform(_Stored):
    """Integer codes on an even grid: weight = codes x scale (x input_scale, per input, where there is one)."""

    codes: Tensor
    """int8 `[out, in]`, from -2^(bits-1) to 2^(bits-1) - 1"""
    scale: Tensor
    """`[1, 1]`, `[out, 1]` or `[out, groups]`, in its storage dtype"""
    bits: int
    group_size: grid.GroupSize
    input_scale: Tensor | None = None
    """float16 `[in]`, or None for ones"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self) -> Tensor:
        dense = grid.dense(self.codes, self.scale, self.group_size)
        return dense if self.input_scale is None else dense * self.input_scale.float()

    def packed(self) -> dict[str, Tensor]:
        return self.packed_kept(None)

    def packed_kept(self, keep: Tensor | None) -> dict[str, Tensor]:
        codes = self.codes if keep is None else self.codes[keep].view(self.shape[0], -1)
        unsigned = codes.view(torch.uint8) + 2 ** (self.bits - 1)
        tensors = {"": bitstream.pack(unsigned, self.bits), "scale": self.scale.contiguous()}
        if self.input_scale is not None:
            tensors["input_scale"] = self.input_scale
        return tensors

    def describe(self) -> Description:
        return {
            "kind": "uniform",
            "bits": self.bits,
            "group_size": self.group_size,
            "input_scale": self.input_scale is not None,
        }

    @classmethod
    def rebuild(cls, about: Description, tensors: dict[str, Tensor], shape: tuple[int, int], keep: Tensor | None) -> "Uniform":
        bits = about["bits"]
        stored = shape[1] if keep is None else _kept_per_row(keep)
        codes = (bitstream.unpack(tensors[""], bits, stored) - 2 ** (bits - 1)).view(torch.int8)
        scale = _fitting("scale", tensors["scale"], grid.scale_shape(shape, about["group_size"]))
        input_scale = tensors["input_scale"] if about["input_scale"] else None
        if input_scale is not None:
            _fitting("input_scale", input_scale, (shape[1],))
        return cls(_scatter(codes, shape, keep), scale, bits, about["group_size"], input_scale)


@dataclass(frozen=True)
class Codebook(_Stored):
    """Indices into one table of levels: weight = levels[index] x scale."""

    index: Tensor
    """uint8 `[out, in]`, from 0 to 2^bits - 1"""
    levels: Tensor
    """float16 `[2^bits]`, one table for the whole matrix"""
    scale: Tensor
    """as in `Uniform`"""
    bits: int
    group_size: grid.GroupSize

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.shape[0], self.index.shape[1]

    def dense(self) -> Tensor:
        places = self.index.flatten().int()
        return grid.dense(self.levels.float().index_select(0, places).view(self.shape), self.scale, self.group_size)

    def packed(self) -> dict[str, Tensor]:
        return self.packed_kept(None)

    def packed_kept(self, keep: Tensor | None) -> dict[str, Tensor]:
        index = self.index if keep is None else self.index[keep].view(self.shape[0], -1)
        return {"": bitstream.pack(index, self.bits), "levels": self.levels, "scale": self.scale.contiguous()}

    def describe(self) -> Description:
        return {"kind": "codebook", "bits": self.bits, "group_size": self.group_size}

    @classmethod
    def rebuild(cls, about: Description, tensors: dict[str, Tensor], shape: tuple[int, int], keep: Tensor | None) -> "Codebook":
        bits = about["bits"]
        index = bitstream.unpack(tensors[""], bits, shape[1] if keep is None else _kept_per_row(keep))
        levels = _fitting("levels", tensors["levels"], (2**bits,))
        scale = _fitting("scale", tensors["scale"], grid.scale_shape(shape, about["group_size"]))
        return cls(_scatter(index, shape, keep), levels, scale, bits, about["group_size"])


Elementwise = Plain | Uniform | Codebook
"""Parts that hold one code or value per weight, so that a mask can lie over them."""


@dataclass(frozen=True)
class Pruned(_Stored):
    """A part of which only some weights stay; the mask is stored as one bit per weight.

    For 2:4 that bit costs exactly what two 2-bit positions per four inputs would, and serves every other pattern too.
    Every row keeps the same number of weights, so that rows can be found in the packed codes.
    """

    inner: Elementwise
    keep: Tensor
    """bool `[out, in]`; True stays"""
    pattern: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    def dense(self) -> Tensor:
        return self.inner.dense() * self.keep

    def packed(self) -> dict[str, Tensor]:
        return {**self.inner.packed_kept(self.keep), "keep": bitstream.pack(self.keep.view(torch.uint8), 1)}

    def describe(self) -> Description:
        return {"kind": "pruned", "pattern": self.pattern, "inner": self.inner.describe()}

    @classmethod
    def rebuild(cls, about: Description, tensors: dict[str, Tensor], shape: tuple[int, int]) -> "Pruned":
        keep = _fitting("keep", bitstream.unpack(tensors["keep"], 1, shape[1]).view(torch.bool), shape)
        inner = _ELEMENTWISE[about["inner"]["kind"]].rebuild(about["inner"], tensors, shape, keep)
        return cls(inner, keep, about["pattern"])


@dataclass(frozen=True)
class LowRank(_Stored):
    """A product of two thin factors. Both are kept `[rank, n]`, so that groups run along the long side.

    dense = left.dense()^T @ right.dense(), with left `[rank, out]` and right `[rank, in]`.
    """

    left: Elementwise
    right: Elementwise

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[1], self.right.shape[1]

    @property
    def rank(self) -> int:
        return self.left.shape[0]

    def dense(self) -> Tensor:
        return self.left.dense().T @ self.right.dense()

    def packed(self) -> dict[str, Tensor]:
        tensors = {}
        for side, factor in (("left", self.left), ("right", self.right)):
            tensors.update({_join(side, name): tensor for name, tensor in factor.packed().items()})
        return tensors

    def describe(self) -> Description:
        return {"kind": "low_rank", "rank": self.rank, "left": self.left.describe(), "right": self.right.describe()}

    @classmethod
    def rebuild(cls, about: Description, tensors: dict[str, Tensor], shape: tuple[int, int]) -> "LowRank":
        def factor(side: str, width: int) -> Elementwise:
            own = under(side, tensors)
            return _ELEMENTWISE[about[side]["kind"]].rebuild(about[side], own, (about["rank"], width), None)

        return cls(factor("left", shape[0]), factor("right", shape[1]))


_ELEMENTWISE: dict[str, type[Plain] | type[Uniform] | type[Codebook]] = {
    "plain": Plain,
    "uniform": Uniform,
    "codebook": Codebook,
}


def _kept_per_row(keep: Tensor) -> int:
    counts = keep.view(torch.uint8).sum(dim=1, dtype=torch.int32)
    if keep.shape[0] == 0:
        return 0
    if bool((counts != counts[0]).any()):
        raise CheckpointError("a stored mask keeps different numbers of weights in different rows")
    return int(counts[0])


def _fitting(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"a stored {name} has the shape {list(tensor.shape)}; this layer's is {list(shape)}")
    return tensor


def _scatter(stored: Tensor, shape: tuple[int, int], keep: Tensor | None) -> Tensor:
    if keep is None:
        return _fitting("weight", stored, shape)
    kept = int(keep.view(torch.uint8).sum(dtype=torch.int64))
    if stored.numel() != kept:
        raise CheckpointError(f"a stored mask keeps {kept} weights, but {stored.numel()} are stored")
    return torch.zeros(shape, dtype=stored.dtype, device=stored.device).masked_scatter_(keep, stored)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}_{name}" if name else prefix


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named `prefix` or `prefix_...`, by the rest of their names."""
    return {n[len(prefix) :].removeprefix("_"): t for n, t in tensors.items() if n == prefix or n.startswith(prefix + "_")}


def pack_parts(parts: tuple[Part, ...]) -> dict[str, Tensor]:
    """The tensors of a layer's parts by name: `weight...` for the first, `extra1...` and on for the others.

    `weight` itself, the base's elements, is one-dimensional, row after row, so that no program takes it for a matrix.
    """
    tensors = {
        _join("weight" if i == 0 else f"extra{i}", name): tensor
        for i, part in enumerate(parts)
        for name, tensor in part.packed().items()
    }
    return {**tensors, "weight": tensors["weight"].flatten()}


def unpack_parts(descriptions: list[Description], tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Part, ...]:
    """The inverse of `pack_parts`; raises CheckpointError when a description and its tensors disagree."""
    parts: list[Part] = []
    for i, about in enumerate(descriptions):
        own = under("weight" if i == 0 else f"extra{i}", tensors)
        kind = about.get("kind")
        try:
            if i == 0 and "" in own:
                own[""] = own[""].view(shape[0], -1)
            if kind in _ELEMENTWISE:
                parts.append(_ELEMENTWISE[kind].rebuild(about, own, shape, None))
            elif kind == "pruned":
                parts.append(Pruned.rebuild(about, own, shape))
            elif kind == "low_rank":
                parts.append(LowRank.rebuild(about, own, shape))
            else:
                raise CheckpointError(
                    f"a part of unknown kind {kind!r}; this program knows plain, uniform, codebook, pruned, low_rank"
                )
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"a {kind} part of shape {shape} does not fit its stored tensors: {error}") from error
    return tuple(parts)


def dense_of(parts: tuple[Part, ...]) -> Tensor:
    """The float32 matrix `[out, in]` that a layer's parts stand for together."""
    total = parts[0].dense()
    for part in parts[1:]:
        total = total + part.dense()
    return total
