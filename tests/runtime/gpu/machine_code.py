"""Compile the GPU kernels for GPUs that are not there, and count what their machine code does.

Needs Triton and no GPU: its package carries the assembler and the disassembler.

    python -m tests.runtime.gpu.machine_code 90                       # print the counts for sm_90
    python -m tests.runtime.gpu.machine_code 90 '2:4 fp16 batch 1'    # of one variant
    python -m tests.runtime.gpu.machine_code --record                 # write machine_code.json, which the test compares with
    python -m tests.runtime.gpu.machine_code --record 'unpack 2:4 bf16'   # only that of one variant again
    python -m tests.runtime.gpu.machine_code --room 86                # shared memory that the largest kernels take
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from slimlm.runtime.gpu import triton_kernels
from slimlm.runtime.gpu.layout import ROWS
from slimlm.runtime.gpu.tiles import Tile, tile_for

RECORD = Path(__file__).with_suffix(".json")
CAPABILITIES = (80, 90, 100)
_DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# Whether a number is a multiple of 16 is known for shapes and strides, as it is at a launch, and not for what follows a batch.
_ANY = ("batch", "blocks", "share", "splits", "tail_blocks")


@dataclass(frozen=True)
class Variant:
    """One specialization of the product's kernel, as `products` would launch it."""

    batch: int
    sparse: bool = True
    has_codebook: bool = False
    spans: int = 0
    """scales in a block of inputs; 0: one for all"""
    tail: int = 0
    """0: none; 1: packed; 2: floats"""
    tail_has_codebook: bool = False
    tail_floats: str = "fp16"
    stacked: bool = False
    split: bool = True
    dtype: str = "fp16"

    @property
    def name(self) -> str:
        kind = ("2:4" if self.sparse else "dense") + (" codebook" if self.has_codebook else "")
        scale = f" {self.spans} spans" if self.spans else ""
        tail = ("", " adapter", f" {self.tail_floats} adapter")[self.tail] + (" of codebooks" if self.tail_has_codebook else "")
        rest = f"{' stacked' if self.stacked else ''}{'' if self.split else ' unsplit'}"
        return f"{kind}{scale}{tail}{rest} {self.dtype} batch {self.batch}"


@dataclass(frozen=True)
class Unpacked:
    """One specialization of the kernel that unpacks a weight."""

    sparse: bool = True
    has_codebook: bool = False
    spans: int = 0
    tail: bool = False
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        kind = "adapter" if self.tail else "2:4" if self.sparse else "dense"
        codebook, spans = " codebook" if self.has_codebook else "", f" {self.spans} spans" if self.spans else ""
        return f"unpack {kind}{codebook}{spans} {self.dtype}"


def variants() -> Iterator[Variant | Unpacked]:
    """What the recipes make, at the batches of which tiles differ."""
    for batch in (1, 16, 32, 64, 128):
        yield Variant(batch)
    for batch in (1, 64):
        yield Variant(batch, sparse=False, spans=1)
    yield Variant(16, tail=1)
    yield Variant(1, spans=8)
    yield Variant(16, dtype="bf16")
    yield Variant(1, sparse=False, spans=4)
    yield Variant(1, tail=1, stacked=True)
    yield Variant(16, has_codebook=True, spans=8, tail=1, dtype="bf16")
    yield Variant(1, split=False)
    yield Variant(16, tail=2)
    yield Variant(16, has_codebook=True, spans=8, tail=1, tail_has_codebook=True, dtype="bf16")
    yield Unpacked()
    yield Unpacked(has_codebook=True, spans=8)
    yield Unpacked(dtype="fp32")
    yield Unpacked(sparse=False, spans=4)
    yield Unpacked(sparse=False, has_codebook=True, spans=1)
    yield Unpacked(sparse=False, tail=True)


def largest() -> Iterator[Variant]:
    """What takes the most shared memory of the tiles that all GPUs but the largest have, for each of these tiles."""
    for batch in (8, 16, 32, 128):
        yield Variant(batch, has_codebook=True, spans=8, tail=2, tail_floats="fp32", dtype="bf16")
        yield Variant(batch, sparse=False, has_codebook=True, spans=16, tail=2, tail_floats="fp32", dtype="bf16")


def compiled(variant: Variant | Unpacked, capability: int) -> Any:
    """The kernel for one GPU; products have their bias."""
    mode = {0: triton_kernels.TENSOR, 1: triton_kernels.BLOCK}.get(variant.spans, triton_kernels.SPANS)
    fixed = {
        "sparse": variant.sparse, "has_codebook": variant.has_codebook, "has_zero": False, "scale_mode": mode.value,
        "spans": max(1, variant.spans), "tail": variant.tail, "tile": ROWS,
    }  # fmt: skip
    options = {"num_warps": 8 if variant.dtype == "fp32" else 4}
    pointers = {
        "words": "*i32", "bits": "*i32", "counters": "*i32", "members": "*i32", "codebook": "*fp32",
        "tail_codebook": "*fp32", "zero": "*fp16",
        "scale": "*fp16" if variant.spans == 1 else "*fp32", "partial": "*fp32", "tail_scale": "*fp16",
    }  # fmt: skip
    pointers |= dict.fromkeys(("x", "y", "t", "bias", "out"), f"*{variant.dtype}")
    if isinstance(variant, Unpacked):
        return _compiled(triton_kernels.unpack_kernel, fixed, pointers, capability, options)
    tile = tile_of(variant, capability)
    del fixed["tail"]
    fixed |= {
        "has_bias": True, "tail_kind": variant.tail, "tail_has_codebook": variant.tail_has_codebook, "split": variant.split,
        "stacked": variant.stacked, "tile": tile.rows, "tokens": tile.tokens,
    }  # fmt: skip
    pointers["tail"] = f"*{variant.tail_floats}" if variant.tail == 2 else "*i32"
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return _compiled(triton_kernels.product_kernel, fixed, pointers, capability, options)


def tile_of(variant: Variant, capability: int) -> Tile:
    """The built-in tile."""
    return tile_for(variant.batch, 4096, (capability // 10, capability % 10))


def _compiled(kernel: Any, fixed: dict[str, Any], pointers: dict[str, str], capability: int, options: dict[str, Any]) -> Any:
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed:
            signature[name], constants[(place,)] = "constexpr", fixed[name]
            continue
        signature[name] = pointers.get(name, "i32")
        if name not in _ANY:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def counts(variant: Variant | Unpacked, capability: int) -> dict[str, Any]:
    """What a thread does for every weight that it makes: in the loop over the inputs, or all that unpacking does."""
    binary = compiled(variant, capability)
    every = [i for i in _disassembled(binary.asm["cubin"]) if i[1] != "NOP"]
    common = {
        "spills": sum(operation.startswith(("LDL", "STL")) for _, operation, _ in every),
        "shared_memory": binary.metadata.shared,
    }
    if isinstance(variant, Unpacked):
        stores = [operation for _, operation, _ in every if operation.startswith("STG")]
        weights = ROWS * (256 if variant.sparse else 64) / (256 if variant.dtype == "fp32" else 128)
        wide = sum(operation.endswith(".128") for operation in stores)
        barriers = sum(operation.startswith("BAR") for _, operation, _ in every)
        own = {"per_weight": round(len(every) / weights, 3), "stores": len(stores), "wide_stores": wide, "barriers": barriers}
        return {**own, **common}
    tile = tile_of(variant, capability)
    begin, end = _main_loop(every)
    loop = [operation for _, operation, _ in every[begin : end + 1]]
    weights = tile.rows * (256 if variant.sparse else 128) / (32 * tile.warps)

    def having(*beginnings: str) -> int:
        return sum(operation.startswith(beginnings) for operation in loop)

    return {
        "per_weight": round(len(loop) / weights, 3),
        "copies": having("LDGSTS", "UBLKCP", "UTMALDG"),
        "per-tensor": having("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA"),
        "barriers": having("BAR"),
        "to_shared": having("STS"),
        **common,
    }


def _disassembled(cubin: bytes) -> list[tuple[int, str, str]]:
    """Address, operation and text of every instruction."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        shown = subprocess.run([_DISASSEMBLER, "-sass", path], capture_output=True, text=True, check=True).stdout
    found = []
    for line in shown.splitlines():
        if match := _LINE.match(line):
            text = _PREDICATE.sub("", match[2].strip())
            found.append((int(match[1], 16), text.split()[0], text))
    return found


def _main_loop(instructions: list[tuple[int, str, str]]) -> tuple[int, int]:
    """The loop with the most logical operations or conversions: first and last instruction."""
    places = {address: i for i, (address, _, _) in enumerate(instructions)}
    loops = []
    for i, (address, operation, text) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", text) if operation.startswith("BRA") else None
        if target and (goal := int(target[1], 16)) < address and goal in places:
            loops.append((places[goal], i))
    return max(loops, key=lambda loop: sum(o.startswith(("LOP3", "LDG")) for _, o, _ in instructions[loop[0] : loop[1] + 1]))


def measure(capability: int, names: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The counts of the variants of these names, or of all, by name."""
    return {variant.name: counts(variant, capability) for variant in variants() if not names or variant.name in names}


def room(capability: int) -> dict[str, int]:
    """Bytes of shared memory that the largest kernels take, by name."""
    return {variant.name: compiled(variant, capability).metadata.shared for variant in largest()}


def record(names: Sequence[str]) -> None:
    """Write down the variants of these names, or all, for all GPUs; what else was written stays."""
    known = json.loads(RECORD.read_text(encoding="utf-8")) if names else {}
    found = {"triton": triton.__version__}
    for capability in CAPABILITIES:
        merged = {**known.get(f"sm_{capability}", {}), **measure(capability, names)}
        found[f"sm_{capability}"] = {variant.name: merged[variant.name] for variant in variants()}
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Print the counts for one card, or write the record for all."""
    if sys.argv[1] == "--record":
        record(sys.argv[2:])
        return
    capability = int(sys.argv[-1] if sys.argv[1] == "--room" else sys.argv[1])
    found = room(capability) if sys.argv[1] == "--room" else measure(capability, sys.argv[2:])
    sys.stdout.write(json.dumps({"triton": triton.__version__, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
