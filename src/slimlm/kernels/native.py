"""The CPU kernels' shared library: where it is, whether it can be used, and why not where it cannot.

The build of the package (csrc/build.py) puts `slimlm_cpu.so` next to this file, and a record `slimlm_cpu.json` of how it
was built or why it was not. The library is opened at the first use, and nothing is built here. The environment variable
SLIMLM_KERNEL_LIBRARY names another library to use in its place.
"""

import ctypes
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slimlm.kernels import processor

ABI = 6
"""The version of the functions' signatures; `slimlm_abi()` of a library that fits gives the same."""
OVERRIDE = "SLIMLM_KERNEL_LIBRARY"
NEEDS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "neondot": ("neon", "dotprod"),
    "neon": ("neon",),
    "portable": (),
}
"""Every variant, fastest first, with the processor's instructions that it needs."""


@dataclass(frozen=True)
class Variant:
    """The kernels compiled for one set of instructions, or not."""

    name: str
    built: bool
    active: bool
    why_not: str | None
    """Why it is not in use; None: it is."""


@dataclass(frozen=True)
class Status:
    """The state of the CPU kernels on this machine."""

    library: str
    """The path of the library, which need not exist."""
    reason: str | None
    """Why no kernels can be used; None: they can."""
    active: str | None
    """The name of the variant in use."""
    variants: tuple[Variant, ...]
    compiler: str | None
    """The compiler and its version; None: they were not recorded."""
    flags: str | None


def library_path() -> Path:
    """The path of the library: next to this file, or what SLIMLM_KERNEL_LIBRARY names."""
    named = os.environ.get(OVERRIDE)
    return Path(named).absolute() if named else Path(__file__).with_name("slimlm_cpu.so")


def library() -> ctypes.CDLL | None:
    """The library, which is opened once; None where it cannot be used, for the reason in `status()`."""
    return _opened(library_path())[0]


def status() -> Status:
    """Which variants were built, which one is in use, and why the others are not."""
    path = library_path()
    record = _record(path)
    opened, reason = _opened(path)
    if opened is None and not path.exists() and record.get("reason"):
        reason = record["reason"]
    runnable = [] if opened is None else opened.slimlm_variants().decode().split()
    active = runnable[0] if runnable else None
    # Of a library without a record, such as a named one, only the variants are known that it reports.
    built = record.get("variants") or runnable
    left_out = record.get("left_out") or {}
    variants = []
    for name in NEEDS:
        why_not = None
        if name != active:
            why_not = _why_not(name, name in built, left_out.get(name), runnable, active)
        variants.append(Variant(name, name in built, name == active, why_not))
    compiler = f"{record['compiler']}: {record['version']}" if record.get("compiler") else None
    return Status(str(path), reason, active, tuple(variants), compiler, " ".join(record.get("flags", [])) or None)


def _why_not(name: str, built: bool, left_out: str | None, runnable: list[str], active: str | None) -> str:
    if not built:
        return f"not built: {left_out}" if left_out else "not built"
    if active is None:
        return "the library cannot be used"
    if name in runnable:
        return f"it would run, but {active} is faster"
    lacking = [feature for feature in NEEDS[name] if feature not in processor.features()]
    if lacking:
        return f"the processor lacks {', '.join(lacking)}"
    return "the library found that the processor or the operating system does not allow it"


def _record(path: Path) -> dict[str, Any]:
    """The record that the build wrote next to the library; empty where there is none that can be read."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def _opened(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why it cannot be used."""
    if not path.exists():
        if os.environ.get(OVERRIDE):
            return None, f"{OVERRIDE} names {path}, which is not there"
        return None, f"there is no {path}, and no record of a build: this copy of slimlm was not installed"
    try:
        opened = ctypes.CDLL(str(path))
        opened.slimlm_abi.restype = ctypes.c_int
        opened.slimlm_abi.argtypes = []
        found = opened.slimlm_abi()
        if found != ABI:
            return None, f"{path} has interface {found}, and this version of slimlm needs {ABI}: it is of another version"
        opened.slimlm_variants.restype = ctypes.c_char_p
        opened.slimlm_variants.argtypes = []
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be opened: {error}"
    return opened, None
