"""Compile the GPU kernels for cards that are not there, and count what their machine code does.

Needs Triton and no GPU: its package carries the assembler and the disassembler.

    python -m tests.runtime.gpu.machine_code 90                       # print the counts for sm_90
    python -m tests.runtime.gpu.machine_code 90 '2:4 fp16 batch 1'    # of one variant
    python -m tests.runtime.gpu.machine_code --record                 # write machine_code.json, which the test compares with
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

from slimlm.runtime.gpu import kernels
from slimlm.runtime.gpu.tiles import tile_for

RECORD = Path(__file__).with_suffix(".json")
CAPABILITIES = (80, 90, 100)
_DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P\w+\s+")
# Whether a number is a multiple of 16 is known for shapes and strides, as it is at a launch, and not for what follows a batch.
_ANY = ("batch", "blocks", "share", "splits", "tail_blocks")


@dataclass(frozen=True)
class Variant:
    """One specialization of the kernel, as `products` would launch it."""

    batch: int
    sparse: bool = True
    table: bool = False
    spans: int = 0
    """scales in a block of inputs; 0: one for all"""
    tail: int = 0
    joint: bool = False
    dtype: str = "fp16"

    @property
    def name(self) -> str:
        kind = ("2:4" if self.sparse else "dense") + (" table" if self.table else "")
        scale = f" {self.spans} spans" if self.spans else ""
        return f"{kind}{scale}{' adapter' if self.tail else ''}{' joint' if self.joint else ''} {self.dtype} batch {self.batch}"


def variants() -> Iterator[Variant]:
    """What the recipes make, at the batches of which tiles differ."""
    for batch in (1, 16, 32, 64, 128):
        yield Variant(batch)
    for batch in (1, 64):
        yield Variant(batch, sparse=False, spans=1)
    yield Variant(16, tail=1)
    yield Variant(1, spans=8)
    yield Variant(16, dtype="bf16")
    yield Variant(1, sparse=False, spans=4)
    yield Variant(1, tail=1, joint=True)
    yield Variant(16, table=True, spans=8, tail=1, dtype="bf16")


def compiled(variant: Variant, capability: int) -> Any:
    """The kernel for one card, split, with its bias."""
    tile = tile_for(variant.batch, 4096, (capability // 10, capability % 10))
    mode = {0: kernels.TENSOR, 1: kernels.BLOCK}.get(variant.spans, kernels.SPANS)
    fixed = {
        "sparse": variant.sparse, "table": variant.table, "scale_mode": mode.value, "spans": max(1, variant.spans),
        "has_bias": True, "tail_kind": variant.tail, "tail_table": False, "split": True,
        "joint": variant.joint, "tile": tile.rows, "tokens": tile.tokens,
    }  # fmt: skip
    floats = f"*{variant.dtype}"
    pointers = {
        "x": floats, "y": floats, "t": floats, "bias": floats, "words": "*i32", "tail": "*i32", "bits": "*i32",
        "counters": "*i32", "members": "*i32", "scale": "*fp16" if variant.spans == 1 else "*fp32", "tail_scale": "*fp16",
        "levels": "*fp32", "tail_levels": "*fp32", "partial": "*fp32",
    }  # fmt: skip
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernels.product_kernel.arg_names):
        if name in fixed:
            signature[name], constants[(place,)] = "constexpr", fixed[name]
            continue
        signature[name] = pointers.get(name, "i32")
        if name not in _ANY:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernels.product_kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def counts(variant: Variant, capability: int) -> dict[str, Any]:
    """Instructions of the loop over the inputs, each thread's, for every weight that it makes."""
    tile = tile_for(variant.batch, 4096, (capability // 10, capability % 10))
    binary = compiled(variant, capability)
    instructions = _disassembled(binary.asm["cubin"])
    begin, end = _main_loop(instructions)
    loop = [operation for _, operation, _ in instructions[begin : end + 1]]
    weights = tile.rows * (256 if variant.sparse else 128) / (32 * tile.warps)

    def having(*beginnings: str) -> int:
        return sum(operation.startswith(beginnings) for operation in loop)

    return {
        "per_weight": round(len(loop) / weights, 3),
        "spills": sum(operation.startswith(("LDL", "STL")) for _, operation, _ in instructions),
        "copies": having("LDGSTS", "UBLKCP", "UTMALDG"),
        "tensor": having("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "UTCMMA"),
        "barriers": having("BAR"),
        "to_shared": having("STS"),
        "shared_memory": binary.metadata.shared,
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


def main() -> None:
    """Print the counts for one card, or write the record for all."""
    if sys.argv[1:] == ["--record"]:
        found = {"triton": triton.__version__, **{f"sm_{c}": measure(c) for c in CAPABILITIES}}
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    sys.stdout.write(json.dumps({"triton": triton.__version__, **measure(int(sys.argv[1]), sys.argv[2:])}, indent=1) + "\n")


if __name__ == "__main__":
    main()
