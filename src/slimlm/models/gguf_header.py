"""The header of GGUF files: which pieces a model has, what they say of it, and where their tensors lie.

The layout is that of GGUF versions 2 and 3 (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). It is walked here
rather than by the `gguf` package, whose reader trusts every length in a file: a damaged one keeps it busy without end. Types,
their blocks and their arithmetic are that package's.
"""

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from slimlm.core.errors import ModelError
from slimlm.storage.mapping import MappedFile, MappedFiles

Value = int | float | bool | str | list[int | float | bool] | None
"""What a key of the header has; None stands for a list of texts (tokens, merges), which is walked and not kept."""

PLAIN = ("F32", "F16", "BF16")
"""Types whose tensors hold weights as they are."""
READ = (
    *PLAIN, "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S",
    "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4",
)  # fmt: skip
"""Types that are read."""
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of values that have a fixed size, as `struct` names them."""
_STRING, _ARRAY = 8, 9
_PIECE = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_DIMENSIONS = 4
_AGAIN = "download it again"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file, not read yet."""

    name: str
    kind: str
    """its type, such as "Q4_K" """
    shape: tuple[int, ...]
    begin: int
    """its first byte in the file"""
    size: int
    """its bytes"""

    @property
    def bits(self) -> float:
        """Of a weight, scales included."""
        return 8 * self.size / prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What one file says of itself."""

    path: Path
    metadata: dict[str, Value]
    tensors: tuple[GgufTensor, ...]


@dataclass(frozen=True)
class Gguf:
    """A model in one GGUF file, or in the pieces of a split one."""

    source: str
    """its name in messages"""
    pieces: tuple[Header, ...]

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [piece.path for piece in self.pieces]

    @property
    def metadata(self) -> Mapping[str, Value]:
        """What the first piece says of the model."""
        return self.pieces[0].metadata

    @property
    def tensors(self) -> dict[str, GgufTensor]:
        """The tensors of all pieces, by name."""
        return {tensor.name: tensor for piece in self.pieces for tensor in piece.tensors}

    @property
    def weights_by_type(self) -> dict[str, int]:
        """How many weights are stored in each type, the commonest first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.kind] += prod(tensor.shape)
        return dict(counts.most_common())

    def error(self, message: str) -> ModelError:
        """The error that says `message` of this model."""
        return ModelError(f"{self.source}: {message}")

    def text(self, key: str) -> str | None:
        """A text of the header; None where there is none."""
        found = self.metadata.get(key)
        return found if isinstance(found, str) else None

    def number(self, key: str) -> int | float | None:
        """A number of the header; None where there is none."""
        found = self.metadata.get(key)
        return found if isinstance(found, int | float) and not isinstance(found, bool) else None

    def mapped(self) -> MappedFiles:
        """The bytes of all tensors, uint8 `[bytes]` by name, as views of the files."""
        return MappedFiles({piece.path.name: _mapped(piece) for piece in self.pieces})


def is_gguf(source: str) -> bool:
    """Whether a source is a GGUF file, or a folder that holds such files in place of a config and of other weights."""
    path = Path(source)
    if path.is_dir():
        return not (path / "config.json").is_file() and any(path.glob("*.gguf"))
    return path.is_file() and path.suffix == ".gguf"


def open_gguf(source: str) -> Gguf:
    """The headers of a model that `is_gguf`: every length, type and place in them is checked, and no tensor is read.

    Raises:
        ModelError: A file is damaged or truncated, a piece is missing, a type is not read, or the folder holds several models.
    """
    paths = _pieces(_one_of(Path(source)))
    pieces = tuple(_header(path) for path in paths)
    found = Gguf(source, pieces)
    for number, piece in enumerate(pieces):
        said = piece.metadata.get("split.count", 1), piece.metadata.get("split.no", 0)
        if said not in ((len(paths), number), (0, 0)):
            raise found.error(
                f"{piece.path.name} says that it is piece {said[1]} (counted from 0) of {said[0]}, and by its name it is "
                f"{number} of {len(paths)}; the files were renamed: give each its first name again"
            )
    held = sum(len(piece.tensors) for piece in pieces)
    total = pieces[0].metadata.get("split.tensors.count", held) if len(pieces) > 1 else held
    if total != held or len(found.tensors) != held:
        raise found.error(
            f"its files hold {len(found.tensors)} tensors in {held} entries, and should hold {total}; they belong to different "
            "models: download all of them again"
        )
    return found


def _one_of(path: Path) -> Path:
    """A GGUF file, or the first piece of the only model in a folder."""
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    models = {match["name"] if (match := _PIECE.fullmatch(file.name)) else file.name: file for file in reversed(files)}
    if len(models) > 1:
        names = ", ".join(sorted(file.name for file in models.values()))
        raise ModelError(f"{path} holds {len(models)} GGUF models: {names}. Give the path of one of these files")
    return files[0]


def _pieces(path: Path) -> list[Path]:
    """All pieces of the model that a file belongs to; ModelError where one is missing."""
    match = _PIECE.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match["count"])
    if not 1 <= int(match["number"]) <= count:
        raise ModelError(f"{path.name} names piece {int(match['number'])} of {count}; pieces are counted from 1")
    names = [f"{match['name']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{path} is one of {count} pieces, and {missing[0]}{more} is not beside it; download what is missing")
    return [path.parent / name for name in names]


class _Walk:
    """A place in a file that moves on as values are read; it never leaves the file."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path = path
        self.memory = memory
        self.at = 0

    def error(self, why: str) -> ModelError:
        return ModelError(f"{self.path} {why}")

    def moved(self, size: int) -> int:
        """Move on by so many bytes; gives the place before them."""
        begin = self.at
        if size > len(self.memory) - begin:
            raise self.error(
                f"is truncated, or damaged: its header goes on after its last byte, the {len(self.memory)}th; {_AGAIN}"
            )
        self.at += size
        return begin

    def number(self, form: str) -> int:
        (found,) = self.numbers(form, 1)
        return int(found)

    def numbers(self, form: str, count: int) -> tuple[int | float | bool, ...]:
        begin = self.moved(count * struct.calcsize(f"<{form}"))
        return struct.unpack_from(f"<{count}{form}", self.memory, begin)

    def string(self) -> str:
        length = self.number("Q")
        begin = self.moved(length)
        try:
            return self.memory[begin : begin + length].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"is damaged: at byte {begin} of its header is no text; {_AGAIN}") from error

    def value(self) -> Value:
        kind = self.number("I")
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], 1)[0]
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise self.error(f"is damaged: its header has a value of the type {kind} before byte {self.at}; {_AGAIN}")
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            return list(self.numbers(_SCALARS[kind], count))
        if kind != _STRING:
            raise self.error(f"has a list of values of the type {kind} in its header, which slimlm does not read")
        for _ in range(count):
            self.moved(self.number("Q"))
        return None


def _header(path: Path) -> Header:
    types = _types()
    size = path.stat().st_size
    if size < len(b"GGUF"):
        raise ModelError(f"{path} has {size} bytes and is no GGUF file; {_AGAIN}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        walk = _Walk(path, memory)
        if memory[: walk.moved(4) + 4] != b"GGUF":
            raise ModelError(f"{path} does not begin as a GGUF file does; {_AGAIN}")
        if (version := walk.number("I")) not in _VERSIONS:
            raise ModelError(
                f"{path} is of version {version} of GGUF; slimlm reads 2 and 3, with the lowest byte of a number first. "
                "Convert the model again with a current llama.cpp"
            )
        count, keys = walk.number("Q"), walk.number("Q")
        metadata: dict[str, Value] = {}
        for _ in range(keys):
            key = walk.string()
            if key in metadata:
                raise walk.error(f"is damaged: its header has {key!r} twice; {_AGAIN}")
            metadata[key] = walk.value()
        entries = [_entry(walk) for _ in range(count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"{path} is damaged: it aligns tensors to {alignment} bytes, which is no power of two; {_AGAIN}")
    start = -(-walk.at // alignment) * alignment
    tensors = tuple(_tensor(path, entry, types, start, size) for entry in entries)
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ModelError(f"{path} is damaged: it holds two tensors of one name; {_AGAIN}")
    return Header(path, metadata, tensors)


@dataclass(frozen=True)
class _Entry:
    """What a header says of a tensor."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _entry(walk: _Walk) -> _Entry:
    name, dimensions = walk.string(), walk.number("I")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise walk.error(f"is damaged: its tensor {name!r} has {dimensions} dimensions; {_AGAIN}")
    # The dimension that moves fastest comes first.
    shape = tuple(int(length) for length in reversed(walk.numbers("Q", dimensions)))
    return _Entry(name, shape, walk.number("I"), walk.number("Q"))


def _tensor(path: Path, entry: _Entry, types: Mapping[int, tuple[str, int, int]], start: int, size: int) -> GgufTensor:
    """A tensor of the file, whose bytes are there."""
    if entry.kind not in types:
        raise ModelError(
            f"{entry.name} in {path} is of a type that slimlm does not read (number {entry.kind}); it reads {', '.join(READ)}. "
            "llama.cpp converts to one of these: llama-quantize, from the file that this one was made of"
        )
    kind, block, of_block = types[entry.kind]
    if min(entry.shape) < 1 or entry.shape[-1] % block:
        raise ModelError(f"{path} is damaged: {entry.name} has the shape {list(entry.shape)}, and {kind} has blocks of {block}")
    length = prod(entry.shape) // block * of_block
    begin = start + entry.offset
    if begin + length > size:
        raise ModelError(
            f"{path} is truncated, or damaged: {entry.name} ends at byte {begin + length}, and the file has {size}; {_AGAIN}"
        )
    return GgufTensor(entry.name, kind, entry.shape, begin, length)


def _types() -> dict[int, tuple[str, int, int]]:
    """By its number in files the name of each type that is read, the weights of a block and its bytes."""
    try:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError as error:
        raise ModelError(
            "GGUF files are read with the package gguf, which is not installed: pip install 'slimlm[gguf]'"
        ) from error
    return {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType if kind.name in READ}


def _mapped(piece: Header) -> MappedFile:
    with piece.path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    views = {own.name: torch.frombuffer(memory, dtype=torch.uint8, count=own.size, offset=own.begin) for own in piece.tensors}
    start = torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr()
    return MappedFile(views, {}, memory, start, b"")


def described(tensors: Iterable[GgufTensor]) -> dict[str, str]:
    """Type and shape of tensors, "Q4_K [48, 256]", by name."""
    return {tensor.name: f"{tensor.kind} {list(tensor.shape)}" for tensor in tensors}
