"""How large the tiles of a product are: by card, kind and size of a layer, and batch; built in, or measured on this card.

The built-in ones come from counts of the machine code's instructions and registers (tests/runtime/gpu/machine_code.json), not
from measurements. `slimlm.bench.gpu_tiles.tune_kernels` measures (tuning.py) and writes what it found into the user's cache, a
file for each card; it is used as long as slimlm and Triton are those that it was measured with.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from slimlm.core.errors import KernelError
from slimlm.runtime.gpu.device import triton_version
from slimlm.runtime.gpu.layout import MOST_TILES, ROWS, Packed


@dataclass(frozen=True)
class Tile:
    """What one program makes."""

    rows: int
    """of the weight"""
    tokens: int
    warps: int
    stages: int
    """of the pipeline that loads ahead"""
    waves: int
    """programs for each multiprocessor to aim at by splitting the inputs"""


FUSED_UP_TO = 256
"""Where nothing was measured, tokens up to which weights are multiplied as they are packed; for more they are unpacked once and
cuBLAS multiplies. From bytes and operations: at 256 tokens an unpacked weight costs about as much as the slower product."""

# From counts of the machine code's instructions and of registers (tests/runtime/gpu/machine_code.json), not from measurements.
_SMALL = {8: Tile(64, 8, 2, 3, 4), 16: Tile(64, 16, 2, 3, 4)}
_AMPERE = {**_SMALL, 32: Tile(64, 32, 4, 3, 2), 64: Tile(64, 64, 4, 3, 2), 256: Tile(128, 128, 8, 2, 2)}
_HOPPER = {**_SMALL, 32: Tile(128, 32, 4, 3, 2), 64: Tile(128, 64, 4, 2, 2), 256: Tile(128, 128, 8, 2, 2)}
# With 4 warps Triton takes these cards' own tensor instructions, which read weights from memory and not from registers: the
# code for that has several times as many instructions and waits at barriers.
_BLACKWELL = {**_SMALL, 32: Tile(64, 32, 2, 3, 2), 256: Tile(64, 64, 2, 3, 2)}
# All others have 100 KB of shared memory a multiprocessor, where a table's tile of 128 tokens takes 140.
_OTHERS = {**_SMALL, 32: Tile(64, 32, 4, 3, 2), 256: Tile(64, 64, 4, 2, 2)}


def _tiles(capability: tuple[int, int]) -> dict[int, Tile]:
    if capability == (8, 0):
        return _AMPERE
    return {9: _HOPPER, 10: _BLACKWELL}.get(capability[0], _OTHERS)


def tile_for(batch: int, rows: int, capability: tuple[int, int]) -> Tile:
    """The tile for a batch up to FUSED_UP_TO and a card; `rows` with those that fill up."""
    tile = next(own for most, own in _tiles(capability).items() if batch <= most)
    return tile if rows % tile.rows == 0 else replace(tile, rows=ROWS, warps=min(tile.warps, 4))


def splits_for(tile: Tile, tiles: int, blocks: int, processors: int) -> tuple[int, int]:
    """Into how many parts the blocks of inputs are split, and how many blocks each has: enough programs to fill the card."""
    wanted = max(1, min(blocks, 16, round(tile.waves * processors / tiles)))
    share = -(-blocks // wanted)
    return -(-blocks // share), share


BATCHES = (8, 16, 32, 64, 128, 256)
"""The largest batch of each class of batches."""
_LARGE = 2**25
"""Weights from which on a layer is of the large ones: 4096 x 4096 is not, 4096 x 11008 is."""


@dataclass(frozen=True)
class Kind:
    """A class of layers for which one tile serves."""

    weight: str
    """such as "2:4 table 8 spans": what the kernel is made for"""
    dtype: str
    """of the activations"""
    large: bool

    @classmethod
    def of(cls, packed: Packed, dtype: torch.dtype) -> "Kind":
        """The class of a weight, for activations of a dtype."""
        form = "2:4" if packed.sparse else "dense"
        table = "" if packed.levels is None else " table"
        spans = f" {packed.scale.shape[2]} spans" if packed.scale.ndim == 3 else ""
        large = packed.words.shape[-2] * packed.width >= _LARGE
        return cls(form + table + spans, str(dtype).removeprefix("torch."), large)

    def __str__(self) -> str:
        return f"{self.weight}, {self.dtype}, {'large' if self.large else 'small'}"


@dataclass
class Table:
    """What was measured on a card."""

    tiles: dict[str, Tile] = field(default_factory=dict)
    """by `key`"""
    fused_up_to: dict[str, int] = field(default_factory=dict)
    """tokens up to which weights are multiplied as they are packed, by kind"""

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def key(kind: Kind, batch: int) -> str:
    """Of a kind and the class that a batch of up to 256 is in."""
    return f"{kind}, batch {next(most for most in BATCHES if batch <= most)}"


def usable(tile: Tile, step: int, batch: int) -> bool:
    """Whether a tile fits a weight of which every layer has a multiple of `step` rows, and a batch."""
    return step % tile.rows == 0 and batch <= MOST_TILES * tile.tokens


def folder() -> Path:
    """Where measured tables lie."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimlm" / "gpu"


def path_of(card: str) -> Path:
    """The file of a card's table."""
    return folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', card).strip('-')}.json"


def versions() -> dict[str, str | None]:
    """What a table was measured with, which other versions may be faster or slower than."""
    return {"slimlm": version("slimlm"), "triton": triton_version()}


def write(card: str, table: Table) -> Path:
    """Keep a card's table; raises KernelError where that cannot be."""
    path = path_of(card)
    text = json.dumps({"card": card, "versions": versions(), **table.to_dict()}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise KernelError(f"what was measured cannot be kept in {path}: {error}") from error
    return path


def read(card: str) -> Table:
    """A card's table, empty where none was measured with these versions; raises KernelError for a damaged file."""
    path = path_of(card)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["versions"] != versions():
            return Table()
        tiles = {name: Tile(**tile) for name, tile in found["tiles"].items()}
        return Table(tiles, {name: int(most) for name, most in found["fused_up_to"].items()})
    except FileNotFoundError:
        return Table()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise KernelError(
            f"the tiles that were measured for {card} cannot be read ({path}: {error}); delete that file, or measure again "
            "(slimlm.bench.gpu_tiles.tune_kernels, or 'slimlm bench' with its option tune)"
        ) from error


_TABLES: dict[torch.device, Table] = {}


def table_of(device: torch.device) -> Table:
    """The table in use on a device, read at the first call; an empty one off a card."""
    if device not in _TABLES:
        _TABLES[device] = read(torch.cuda.get_device_name(device)) if device.type == "cuda" else Table()
    return _TABLES[device]


_TRIALS: set[torch.device] = set()
"""Devices on which tiles are being measured."""


@contextmanager
def using(device: torch.device, table: Table, *, trial: bool = False) -> Iterator[None]:
    """Meanwhile another table is in use on a device; a trial: its tiles are not replaced where they cannot run."""
    before = table_of(device)
    _TABLES[device] = table
    if trial:
        _TRIALS.add(device)
    try:
        yield
    finally:
        _TABLES[device] = before
        _TRIALS.discard(device)


def without(packed: Packed, batch: int, device: torch.device, dtype: torch.dtype, reason: Exception) -> bool:
    """Do without the measured tile for a weight from now on, as the card has no room for it, and say so.

    It was measured without an adapter's second half, which takes more. False: no measured tile is in use there, or on trial.
    """
    name = key(Kind.of(packed, dtype), batch)
    if device in _TRIALS or table_of(device).tiles.pop(name, None) is None:
        return False
    warnings.warn(f"the tile that was measured for {name}, cannot run here ({reason}); the built-in one does", stacklevel=2)
    return True


def forget() -> None:
    """Read the tables anew."""
    _TABLES.clear()


@cache
def card_of(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability and number of multiprocessors; the interpreter's are made up, so that it splits, too."""
    if device.type != "cuda":
        return (8, 0), 2
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor), found.multi_processor_count


def tile_of(packed: Packed, batch: int, step: int, device: torch.device, dtype: torch.dtype) -> Tile:
    """The measured tile for a weight and activations, or the built-in one; `step` as in `usable`."""
    measured = table_of(device).tiles
    tile = measured.get(key(Kind.of(packed, dtype), batch)) if measured else None
    if tile is not None and usable(tile, step, batch):
        return tile
    return tile_for(batch, step, card_of(device)[0])


def fused_up_to(packed: Packed, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens up to which a weight is multiplied as it is packed."""
    measured = table_of(device).fused_up_to
    return measured.get(str(Kind.of(packed, dtype)), FUSED_UP_TO) if measured else FUSED_UP_TO
