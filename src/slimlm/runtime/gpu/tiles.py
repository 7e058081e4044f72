"""How large the tiles of a product are: by GPU, kind and size of a layer, and batch; built in, or measured on this GPU.

The built-in tiles come from counts of the machine code's instructions and registers (tests/runtime/gpu/machine_code.json), not
from measurements. The search (tile_search.py) measures, and its result lies in the user's cache, a file for each GPU; it is
used as long as slimlm and Triton are those that it was measured with.
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
    """The share of a product that one program computes, and how."""

    rows: int
    """of the weight"""
    tokens: int
    warps: int
    stages: int
    """of the pipeline that loads ahead"""
    waves: int
    """inputs are split so that there are about as many programs for each multiprocessor"""


FUSED_UP_TO = 256
"""Tokens up to which, where nothing was measured, products are made with packed weights; for more tokens a weight is unpacked
and cuBLAS multiplies. From bytes and operations: at 256 tokens unpacking costs about as much as the slower product."""

# From counts of the machine code's instructions and of registers (tests/runtime/gpu/machine_code.json), not from measurements.
_SMALL = {8: Tile(64, 8, 2, 3, 4), 16: Tile(64, 16, 2, 3, 4)}
_AMPERE = {**_SMALL, 32: Tile(64, 32, 4, 3, 2), 64: Tile(64, 64, 4, 3, 2), 256: Tile(128, 128, 8, 2, 2)}
_HOPPER = {**_SMALL, 32: Tile(128, 32, 4, 3, 2), 64: Tile(128, 64, 4, 2, 2), 256: Tile(128, 128, 8, 2, 2)}
# With 4 warps Triton takes these GPUs' own tensor instructions, which read weights from memory and not from registers: the
# code for that has several times as many instructions and waits at barriers.
_BLACKWELL = {**_SMALL, 32: Tile(64, 32, 2, 3, 2), 256: Tile(64, 64, 2, 3, 2)}
# All others have 100 KB of shared memory a multiprocessor, where the tile of 128 tokens of a codebook takes 140.
_OTHERS = {**_SMALL, 32: Tile(64, 32, 4, 3, 2), 256: Tile(64, 64, 4, 2, 2)}


def _tiles(capability: tuple[int, int]) -> dict[int, Tile]:
    if capability == (8, 0):
        return _AMPERE
    return {9: _HOPPER, 10: _BLACKWELL}.get(capability[0], _OTHERS)


def tile_for(batch: int, rows: int, capability: tuple[int, int]) -> Tile:
    """The built-in tile.

    Args:
        batch: tokens, at most FUSED_UP_TO.
        rows: of the weight, padding included.
        capability: the GPU's compute capability.
    """
    tile = next(own for most, own in _tiles(capability).items() if batch <= most)
    return tile if rows % tile.rows == 0 else replace(tile, rows=ROWS, warps=min(tile.warps, 4))


def splits_for(tile: Tile, tiles: int, blocks: int, processors: int) -> tuple[int, int]:
    """How the blocks of inputs are split, so that there are enough programs to fill the GPU.

    Args:
        tile: the work of one program.
        tiles: of the product, before inputs are split.
        blocks: of inputs.
        processors: multiprocessors of the GPU.

    Returns:
        The number of splits, and how many blocks each has.
    """
    wanted = max(1, min(blocks, 16, round(tile.waves * processors / tiles)))
    share = -(-blocks // wanted)
    return -(-blocks // share), share


BATCHES = (8, 16, 32, 64, 128, 256)
"""The largest batch of each class of batches."""
_LARGE = 2**25
"""Number of weights from which on a layer counts as large: 4096 x 4096 is not, 4096 x 11008 is."""


@dataclass(frozen=True)
class Kind:
    """A class of layers for which one tile serves."""

    weight: str
    """such as "2:4 codebook 8 spans": what the kernel is compiled for"""
    dtype: str
    """of the activations"""
    large: bool

    @classmethod
    def of(cls, packed: Packed, dtype: torch.dtype) -> "Kind":
        """The class of a weight, for activations of a dtype."""
        form = "2:4" if packed.sparse else "dense"
        codebook = "" if packed.codebook is None else " codebook"
        zeros = "" if packed.zero is None else " zeros"
        spans = f" {packed.scale.shape[2]} spans" if packed.scale.ndim == 3 else ""
        large = packed.words.shape[-2] * packed.width >= _LARGE
        return cls(form + codebook + zeros + spans, str(dtype).removeprefix("torch."), large)

    def __str__(self) -> str:
        return f"{self.weight}, {self.dtype}, {'large' if self.large else 'small'}"


@dataclass
class Table:
    """What was measured on a GPU."""

    tiles: dict[str, Tile] = field(default_factory=dict)
    """by `key`"""
    fused_up_to: dict[str, int] = field(default_factory=dict)
    """tokens up to which products are made with packed weights, by kind"""

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


def key(kind: Kind, batch: int) -> str:
    """The name, in a table, of a kind and the class of a batch of up to 256 tokens."""
    return f"{kind}, batch {next(most for most in BATCHES if batch <= most)}"


def usable(tile: Tile, step: int, batch: int) -> bool:
    """Whether a tile fits a weight and a batch.

    Args:
        tile: the work of one program.
        step: number of rows that divides the rows of every layer of the weight.
        batch: tokens.
    """
    return step % tile.rows == 0 and batch <= MOST_TILES * tile.tokens


def folder() -> Path:
    """The folder of measured tables."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimlm" / "gpu"


def path_of(gpu: str) -> Path:
    """The file of a GPU's table, by the GPU's name."""
    return folder() / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu).strip('-')}.json"


def versions() -> dict[str, str | None]:
    """The versions that a table is measured with; kernels of other versions may be faster or slower."""
    return {"slimlm": version("slimlm"), "triton": triton_version()}


def write(gpu: str, table: Table) -> Path:
    """Write a GPU's table into the user's cache and return its path.

    Raises:
        KernelError: the file cannot be written.
    """
    path = path_of(gpu)
    text = json.dumps({"gpu": gpu, "versions": versions(), **table.to_dict()}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise KernelError(f"the measured tiles cannot be written to {path}: {error}") from error
    return path


def read(gpu: str) -> Table:
    """A GPU's table; it is empty where none was measured with these versions.

    Raises:
        KernelError: the file is damaged or cannot be read.
    """
    path = path_of(gpu)
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
            f"the tiles that were measured for {gpu} cannot be read ({path}: {error}); delete that file, or measure again"
        ) from error


_TABLES: dict[torch.device, Table] = {}


def table_of(device: torch.device) -> Table:
    """The table in use on a device, read at the first call; an empty one where the device is no GPU."""
    if device not in _TABLES:
        _TABLES[device] = read(torch.cuda.get_device_name(device)) if device.type == "cuda" else Table()
    return _TABLES[device]


_MEASURED_NOW: set[torch.device] = set()
"""Devices on which tiles are being measured."""


@contextmanager
def using(device: torch.device, table: Table, *, measuring: bool = False) -> Iterator[None]:
    """Within this context another table is in use on a device.

    Args:
        device: the GPU.
        table: its tiles.
        measuring: an error of a tile that cannot run is raised, and the tile is not replaced.
    """
    before = table_of(device)
    _TABLES[device] = table
    if measuring:
        _MEASURED_NOW.add(device)
    try:
        yield
    finally:
        _TABLES[device] = before
        _MEASURED_NOW.discard(device)


def drop_measured_tile(packed: Packed, batch: int, device: torch.device, dtype: torch.dtype, reason: Exception) -> bool:
    """Stop using the measured tile for a weight, as the GPU has no room for it, and warn of that.

    It was measured without an adapter's second factor, which takes more room.

    Args:
        packed: the weight.
        batch: tokens.
        device: the GPU.
        dtype: of the activations.
        reason: the error of the tile.

    Returns:
        False where no measured tile was in use, or tiles are being measured.
    """
    name = key(Kind.of(packed, dtype), batch)
    if device in _MEASURED_NOW or table_of(device).tiles.pop(name, None) is None:
        return False
    warnings.warn(f"the tile that was measured for {name}, cannot run here ({reason}); the built-in one does", stacklevel=2)
    return True


def forget_tables() -> None:
    """Read the measured tables again at the next product."""
    _TABLES.clear()


@dataclass(frozen=True)
class GpuModel:
    """The properties of a GPU that tiles depend on."""

    capability: tuple[int, int]
    """compute capability"""
    multiprocessors: int


@cache
def gpu_model(device: torch.device) -> GpuModel:
    """The properties of a GPU; of Triton's interpreter some that make it split inputs, too."""
    if device.type != "cuda":
        return GpuModel((8, 0), 2)
    found = torch.cuda.get_device_properties(device)
    return GpuModel((found.major, found.minor), found.multi_processor_count)


def tile_of(packed: Packed, batch: int, step: int, device: torch.device, dtype: torch.dtype) -> Tile:
    """The measured tile for a product, or the built-in one.

    Args:
        packed: the weight.
        batch: tokens.
        step: number of rows that divides the rows of every layer of the weight.
        device: the GPU.
        dtype: of the activations.
    """
    measured = table_of(device).tiles
    tile = measured.get(key(Kind.of(packed, dtype), batch)) if measured else None
    if tile is not None and usable(tile, step, batch):
        return tile
    return tile_for(batch, step, gpu_model(device).capability)


def fused_up_to(packed: Packed, device: torch.device, dtype: torch.dtype) -> int:
    """Tokens up to which products are made with this packed weight."""
    measured = table_of(device).fused_up_to
    return measured.get(str(Kind.of(packed, dtype)), FUSED_UP_TO) if measured else FUSED_UP_TO
