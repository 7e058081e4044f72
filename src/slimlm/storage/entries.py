"""What config.json says of packed layers and embeddings, checked against itself before anything is made of it.

A shape and its parts fix name, dtype and size of every stored tensor, but for how many weights a mask keeps. So once a
description is sound and the tensors are as described, what is made of them is at most 32 times as large as the file: a
weight takes a bit at least, and is unpacked into 32.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from slimlm.core import grid
from slimlm.core.bits import packed_bytes
from slimlm.core.errors import CheckpointError, RecipeError
from slimlm.core.mask import Pattern

_VALUES = ("float16", "bfloat16", "float32", "float64")
_SCALES = ("float16", "float32")
_LARGEST = 2**40
"""No dimension is larger."""


class _UnsoundError(Exception):
    """Says what is wrong with one entry."""


@dataclass(frozen=True)
class _Expected:
    """What one tensor is to be."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    at_most: bool = False
    """whether a mask decides on the last dimension, which is then a bound"""


def check_description(about: dict[str, Any], where: object) -> None:
    """Raise CheckpointError where a `quantization_config` does not describe layers and embeddings that can be."""
    layers: Any = about.get("layers")
    embeddings: Any = about.get("embeddings", {})
    both = (("layers", layers), ("embeddings", embeddings))
    for kind, entries in both:
        if not isinstance(entries, dict):
            raise CheckpointError(f"{where} has no {kind} by name in its quantization_config; the checkpoint is damaged")
    for kind, entries in both:
        for name, entry in entries.items():
            try:
                _check_entry(entry, embeddings if kind == "layers" else None)
                _refuse_if(not name or "" in name.split("."), "this is no name of a module")
            except _UnsoundError as error:
                raise CheckpointError(
                    f"{where} does not describe {name!r} soundly: {error}; the checkpoint is damaged"
                ) from None
    experts = about.get("experts", [])
    if not isinstance(experts, list) or not all(isinstance(name, str) for name in experts):
        raise CheckpointError(f"{where} does not list experts by name; the checkpoint is damaged")
    if twice := sorted(set(layers) & set(embeddings)):
        raise CheckpointError(f"{where} describes {twice[0]!r} both as a layer and as an embedding; the checkpoint is damaged")


def _check_entry(entry: Any, embeddings: dict[str, Any] | None) -> None:
    """embeddings: those that a layer may be tied to; None: this is one."""
    _refuse_if(not isinstance(entry, dict), f"it is a {type(entry).__name__}")
    shape = _shape(entry.get("shape"))
    if embeddings is None:
        factor = entry.get("factor")
        number = isinstance(factor, int | float) and not isinstance(factor, bool) and math.isfinite(factor)
        _refuse_if(not number, f"factor is {factor!r}, not a number")
    else:
        _refuse_if(not isinstance(entry.get("bias"), bool), f"bias is {entry.get('bias')!r}, neither true nor false")
    if embeddings is not None and "tied_to" in entry:
        owner = embeddings.get(entry["tied_to"]) if isinstance(entry["tied_to"], str) else None
        _refuse_if(not isinstance(owner, dict), f"it is tied to {entry['tied_to']!r}, which is no embedding here")
        assert owner is not None
        same = all(entry.get(key) == owner.get(key) for key in ("shape", "parts", "tensors"))
        _refuse_if(not same, f"it is tied to {entry['tied_to']}, and described otherwise")
    _check_tensors(entry.get("tensors"), _tensors_of(entry.get("parts"), shape))


def _check_tensors(found: Any, expected: dict[str, _Expected]) -> None:
    _refuse_if(not isinstance(found, dict), "its tensors have no names")
    if found.keys() != expected.keys():
        raise _UnsoundError(f"its parts are stored in {', '.join(expected)}; it names {', '.join(map(str, found)) or 'none'}")
    for name, own in expected.items():
        about = found[name]
        _refuse_if(not isinstance(about, list) or len(about) != 2, f"{name} has no dtype and shape")
        dtype, shape = about
        _refuse_if(dtype not in own.dtypes, f"{name} is {dtype!r}; it can be {' or '.join(own.dtypes)}")
        dims = isinstance(shape, list) and all(_is_count(n) for n in shape) and len(shape) == len(own.shape)
        fits = dims and (tuple(shape) == own.shape if not own.at_most else _within(shape, own.shape))
        _refuse_if(not fits, f"{name} is {shape}; of these parts it is {'at most ' * own.at_most}{list(own.shape)}")


def _within(shape: list[int], bound: tuple[int, ...]) -> bool:
    return shape[:-1] == list(bound[:-1]) and shape[-1] <= bound[-1]


def _tensors_of(parts: Any, shape: tuple[int, int]) -> dict[str, _Expected]:
    """The stored tensors of these parts by name."""
    _refuse_if(not isinstance(parts, list) or not parts, "it has no parts")
    found = {}
    for i, about in enumerate(parts):
        prefix = "weight" if i == 0 else f"extra{i}"
        for end, own in _of_part(about, shape):
            found[f"{prefix}_{end}" if end else prefix] = own
    _refuse_if("weight" not in found, "its first part is low_rank")
    base = found["weight"]
    return {**found, "weight": _Expected(base.dtypes, (math.prod(base.shape),), base.at_most)}


def _of_part(about: Any, shape: tuple[int, int]) -> Iterator[tuple[str, _Expected]]:
    _refuse_if(not isinstance(about, dict), f"a part is {about!r}")
    kind = about.get("kind")
    if kind == "low_rank":
        rank = about.get("rank")
        _refuse_if(not _is_count(rank), f"rank is {rank!r}")
        for side, width in (("left", shape[0]), ("right", shape[1])):
            for end, own in _of_elements(about.get(side), (rank, width), masked=False):
                yield f"{side}_{end}" if end else side, own
    elif kind == "pruned":
        try:
            pattern = pattern_of(about)
        except RecipeError as error:
            raise _UnsoundError(str(error)) from error
        if (reason := pattern.refuses("it", shape[1])) is not None:
            raise _UnsoundError(reason)
        yield from _of_elements(about.get("inner"), shape, masked=True)
        yield "keep", _Expected(("uint8",), (shape[0], packed_bytes(shape[1], 1)))
    else:
        yield from _of_elements(about, shape, masked=False)


def pattern_of(about: dict[str, Any]) -> Pattern:
    """The pattern that a `pruned` part was stored with; raises RecipeError where it is none."""
    text = about.get("pattern")
    try:
        return Pattern.parse(text if isinstance(text, str) and ":" in text else float(text or ""))
    except (TypeError, ValueError, OverflowError):
        return Pattern.parse(str(text))


def _of_elements(about: Any, shape: tuple[int, int], *, masked: bool) -> Iterator[tuple[str, _Expected]]:
    _refuse_if(not isinstance(about, dict), f"a part is {about!r}")
    kind, rows, width = about.get("kind"), *shape
    if kind == "plain":
        sizes = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
        _refuse_if(about.get("dtype") not in _VALUES, f"plain values are {' or '.join(_VALUES)}, not {about.get('dtype')!r}")
        yield "", _Expected(("uint8",), (rows, width * sizes[about["dtype"]]), masked)
        return
    _refuse_if(
        kind not in ("uniform", "codebook"),
        f"a part is of the unknown kind {kind!r}; this program knows plain, uniform, codebook, pruned, low_rank",
    )
    bits, group_size, least = about.get("bits"), about.get("group_size"), 2 if kind == "uniform" else 1
    _refuse_if(not _is_count(bits) or not least <= bits <= 8, f"{kind} has {least} to 8 bits, not {bits!r}")
    _refuse_if(
        group_size not in ("per-tensor", "per-channel") and (not _is_count(group_size) or group_size < 1),
        f"group is {group_size!r}",
    )
    yield "", _Expected(("uint8",), (rows, packed_bytes(width, bits)), masked)
    yield "scale", _Expected(_SCALES, grid.scale_shape(shape, group_size))
    if kind == "codebook":
        yield "levels", _Expected(("float16",), (2**bits,))
        return
    _refuse_if(not isinstance(about.get("input_scale"), bool), f"input_scale is {about.get('input_scale')!r}")
    if about["input_scale"]:
        yield "input_scale", _Expected(("float16",), (width,))


def _shape(found: Any) -> tuple[int, int]:
    fits = isinstance(found, list) and len(found) == 2 and all(_is_count(n) and n >= 1 for n in found)
    _refuse_if(not fits, f"its shape is {found!r}, not two numbers of at least 1")
    return found[0], found[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _refuse_if(wrong: bool, words: str) -> None:
    if wrong:
        raise _UnsoundError(words)


def own_entries(about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The layers and embeddings of a `quantization_config` under whose names packed tensors are stored."""
    layers = {name: entry for name, entry in about["layers"].items() if "tied_to" not in entry}
    return layers | about.get("embeddings", {})


def packed_names(about: dict[str, Any]) -> Iterable[str]:
    """The full names of all packed tensors that a `quantization_config` describes."""
    return (f"{name}.{tensor}" for name, entry in own_entries(about).items() for tensor in entry["tensors"])
