"""Weights as compressed-tensors stores them: packed and plain integers, float8, MXFP4 and MXFP8.

Which formats a layer has is in `config_groups`, by the names of layers (exact, or a pattern after "re:") or of their class.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimlm.models import mxfp4
from slimlm.models.codes import CodedWeight, Codes, Decoded, scales_of, spread, tiles, unpacked, words_for
from slimlm.models.fp8 import CODES as FLOAT8_CODES

_READ = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "mxfp4-pack-quantized",
    "mxfp8-quantized", "dense",
)  # fmt: skip


@dataclass(frozen=True)
class _Scheme:
    """How the weights of some layers are quantized."""

    targets: tuple[str, ...]
    bits: int
    kind: str
    """int or float"""
    strategy: str
    """what shares a scale: tensor, channel, group or block"""
    group: int
    block: tuple[int, int]
    symmetric: bool

    def tile(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the part of a weight that shares a scale."""
        whole = {"tensor": shape, "channel": (1, shape[1]), "group": (1, self.group), "block": self.block}
        return whole[self.strategy]

    def words(self) -> str:
        """The scheme in words."""
        sharing = {"group": f"groups of {self.group}", "block": f"blocks of {self.block[0]} x {self.block[1]}"}
        return f"{self.kind}{self.bits}, {sharing.get(self.strategy, f'a scale for each {self.strategy}')}"


def read(codes: Codes) -> Decoded:
    """The weights of a model in this format; raises ModelError where it is not read, or where tensors do not fit."""
    about = codes.about
    groups = about.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise codes.error(f"the quantization_config has config_groups = {groups!r}; it maps names to objects")
    for form in (about.get("format") or "dense", *(group.get("format") or "dense" for group in groups.values())):
        if form not in _READ:
            raise codes.error(f"the format of compressed-tensors is {form!r}; slimlm reads {', '.join(_READ)}")
    for key in ("sparsity_config", "transform_config"):
        inner = about.get(key)
        if isinstance(inner, dict) and any(
            inner.get(own) not in (None, "dense", {}, []) for own in ("format", "config_groups")
        ):
            raise codes.error(f"the quantization_config has a {key} ({inner}), which slimlm does not read")
    schemes = [_scheme(codes, group) for group in groups.values() if group.get("weights") is not None]
    weights = {}
    for name, tensor in codes.tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "weight_packed" or (leaf == "weight" and tensor.dtype in (torch.int8, *FLOAT8_CODES)):
            weights[f"{layer}.weight"] = _weight(codes, layer, leaf, _scheme_of(codes, layer, schemes))
    if not weights and schemes:
        raise codes.error("the quantization_config says compressed-tensors, and the files hold no weight in its codes")
    return Decoded("compressed-tensors, " + "; ".join(dict.fromkeys(scheme.words() for scheme in schemes)), weights)


def _scheme(codes: Codes, group: Mapping[str, Any]) -> _Scheme:
    own = group["weights"]
    if not isinstance(own, dict):
        raise codes.error(f"the quantization_config has weights = {own!r}; it is an object")
    size: Any = own.get("group_size")
    block: Any = own.get("block_structure")
    bits: Any = own.get("num_bits")
    kind: Any = own.get("type")
    strategy = own.get("strategy") or ("tensor" if size is None else "group" if size != -1 else "channel")
    fits = type(bits) is int and ((kind == "int" and 1 <= bits <= 8) or (kind == "float" and bits in (4, 8)))
    if not fits or strategy not in ("tensor", "channel", "group", "block"):
        raise codes.error(f"weights of {bits} bits of the type {kind!r} with a scale for each {strategy!r} are not read")
    if strategy == "group" and (type(size) is not int or size < 1):
        raise codes.error(f"the quantization_config says group_size = {size!r}; it is a whole number above 0")
    if strategy == "block" and not (
        isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    ):
        raise codes.error(f"the quantization_config says block_structure = {block!r}; it is two whole numbers above 0")
    targets = tuple(str(target) for target in group.get("targets") or ())
    sizes = (block[0], block[1]) if strategy == "block" else (1, 1)
    return _Scheme(targets, bits, kind, strategy, size if strategy == "group" else 1, sizes, own.get("symmetric", True) is True)


def _scheme_of(codes: Codes, layer: str, schemes: list[_Scheme]) -> _Scheme:
    """The scheme of a layer: one that names it, or one whose pattern fits, or the one for its class."""
    for fits in (_named, _described, _of_class):
        found = [scheme for scheme in schemes if any(fits(layer, target) for target in scheme.targets)]
        if found and all(own == found[0] for own in found):
            return found[0]
        if found:
            break
    raise codes.error(f"config_groups does not say how {layer} is quantized, or says it in two ways")


def _named(layer: str, target: str) -> bool:
    return layer == target


def _described(layer: str, target: str) -> bool:
    if not target.startswith("re:"):
        return False
    try:
        return re.match(target.removeprefix("re:"), layer) is not None
    except re.error:
        return False


def _of_class(layer: str, target: str) -> bool:
    return target.isidentifier()


def _weight(codes: Codes, layer: str, leaf: str, scheme: _Scheme) -> CodedWeight:
    name, scales, zeros = (f"{layer}.{own}" for own in (leaf, "weight_scale", "weight_zero_point"))
    codes.companion(name, scales)
    if leaf == "weight_packed" and scheme.kind == "float":
        return _mxfp4(codes, layer, scheme)
    of = [name, scales]
    if leaf == "weight_packed":
        shape = _shape(codes, layer)
        of.append(f"{layer}.weight_shape")
        codes.flat(name, (torch.int32,))
        codes.expect(name, (shape[0], words_for(shape[1], scheme.bits)))
    else:
        rows, columns = codes.flat(name, (torch.int8,) if scheme.kind == "int" else FLOAT8_CODES).shape
        shape = rows, columns
    tile = scheme.tile(shape)
    grid = tiles(shape, tile)
    codes.expect(scales, grid, *([(grid[0],)] if grid[1] == 1 else []), *([()] if grid == (1, 1) else []))
    if not scheme.symmetric:
        codes.companion(name, zeros)
    if zeros in codes.tensors:
        of.append(zeros)
        packed = leaf == "weight_packed" and not scheme.symmetric and scheme.strategy in ("group", "channel")
        codes.expect(zeros, *([(words_for(shape[0], scheme.bits), grid[1])] if packed else [grid, (grid[0],), ()]))
    order = f"{layer}.weight_g_idx"
    if order in codes.tensors:
        of.append(order)
        codes.expect(order, (shape[1],))
        index = codes.tensors[order]
        if int(index.min()) < -1 or int(index.max()) >= grid[1] or (len(index.sign().unique()) > 1 and int(index.min()) == -1):
            raise codes.error(f"{order} names a group beyond the {grid[1]} that there are")

    def make() -> Iterator[Tensor]:
        stored = codes.tensors[name]
        values = stored.float()
        if leaf == "weight_packed":
            values = unpacked(stored, scheme.bits, shape[1]).float() - 2 ** (scheme.bits - 1)
        by_tile = [scales_of(codes.tensors[scales]).reshape(grid)]
        if not scheme.symmetric:
            by_tile.append(_zero_points(codes.tensors[zeros], scheme, grid))
        wide = [_by_order(codes, each, order) if order in codes.tensors else spread(each, shape, tile) for each in by_tile]
        yield (values - wide[1] if len(wide) > 1 else values) * wide[0]

    return CodedWeight(shape, tuple(of), make)


def _shape(codes: Codes, layer: str) -> tuple[int, int]:
    stored = codes.companion(f"{layer}.weight_packed", f"{layer}.weight_shape")
    found = stored.tolist() if stored.ndim == 1 and not stored.is_floating_point() else []
    if len(found) != 2 or not all(0 < size < 2**31 for size in found):
        raise codes.error(f"{layer}.weight_shape is {found}; it is the number of outputs and of inputs")
    return found[0], found[1]


def _zero_points(stored: Tensor, scheme: _Scheme, grid: tuple[int, int]) -> Tensor:
    """Zero points in float32 by tile; packed ones are packed along the outputs."""
    if stored.dtype != torch.int32:
        return stored.float().reshape(grid)
    return unpacked(stored.T, scheme.bits, grid[0]).T.float() - 2 ** (scheme.bits - 1)


def _by_order(codes: Codes, by_group: Tensor, order: str) -> Tensor:
    """Values `[out, groups]` by input: `order` names the group of each, -1 in all where they are in order."""
    index = codes.tensors[order].long()
    groups, inputs = by_group.shape[1], len(index)
    if bool((index == -1).all()):
        index = torch.arange(inputs) // -(-inputs // groups)
    return by_group[:, index]


def _mxfp4(codes: Codes, layer: str, scheme: _Scheme) -> CodedWeight:
    name, scales = f"{layer}.weight_packed", f"{layer}.weight_scale"
    rows, halves = codes.flat(name, (torch.uint8,)).shape
    codes.flat(scales, (torch.uint8, torch.float8_e8m0fnu))
    if scheme.group != mxfp4.SHARING or scheme.strategy != "group":
        raise codes.error(f"4-bit floats of {layer} have groups of {scheme.group}; those of MXFP4 are of {mxfp4.SHARING}")
    codes.expect(scales, (rows, 2 * halves // mxfp4.SHARING))

    def make() -> Iterator[Tensor]:
        yield mxfp4.dequantized(codes.tensors[name], codes.tensors[scales])

    return CodedWeight((rows, 2 * halves), (name, scales), make)
