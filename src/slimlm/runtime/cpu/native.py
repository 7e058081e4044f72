"""The CPU kernels' shared library: where it lies, whether it can be used, and if not, why, in words.

The build of the package leaves `slimlm_cpu.so` in the folder above, and a record `slimlm_cpu.json` of how it was built or
why it was not (csrc/build.py). Nothing is opened before it is asked for, and nothing is built here. SLIMLM_KERNEL_LIBRARY names
another library to use in its place.
"""

import ctypes
import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from slimlm.runtime.cpu import processor

ABI = 2
"""The signatures this file knows; `slimlm_abi()` of a library that fits gives the same."""
OVERRIDE = "SLIMLM_KERNEL_LIBRARY"
NEEDS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "neondot": ("neon", "dotprod"),
    "neon": ("neon",),
    "portable": (),
}
"""Every variant, best first, with the instructions that it needs of the processor."""


@dataclass(frozen=True)
class Variant:
    """One way in which the kernels were or were not compiled."""

    name: str
    built: bool
    active: bool
    why_not: str | None
    """why it is not the active one; None where it is"""


@dataclass(frozen=True)
class Status:
    """What there is to know about the kernels on this machine."""

    library: str
    """where it lies or would lie"""
    reason: str | None
    """why no kernel can be used, in words; None where one can"""
    active: str | None
    """the name of the variant in use"""
    variants: tuple[Variant, ...]
    compiler: str | None
    """what built it; None where the record does not say"""
    flags: str | None


def library_path() -> Path:
    """The library in the folder above this one, or the one that SLIMLM_KERNEL_LIBRARY names."""
    named = os.environ.get(OVERRIDE)
    return Path(named).absolute() if named else Path(__file__).parent.with_name("slimlm_cpu.so")


def library() -> ctypes.CDLL | None:
    """The opened library, opened once; None where it cannot be used, for the reason in `status()`."""
    return _opened(library_path())[0]


def status() -> Status:
    """What was built, what is in use, and why the rest is not."""
    path = library_path()
    record = _record(path)
    opened, reason = _opened(path)
    if opened is None and not path.exists() and record.get("reason"):
        reason = record["reason"]
    runnable = [] if opened is None else opened.slimlm_variants().decode().split()
    active = runnable[0] if runnable else None
    # A library without a record, named by hand, is known only by what it says it can run.
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
    """What the build wrote beside the library; empty where there is nothing readable."""
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
        return None, f"there is no {path}, and no record of a build: this copy of slimlm was not installed, only found"
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
