"""The memory of the machine, of this process and of a GPU."""

import os
from pathlib import Path

import torch


def total_and_free() -> tuple[int | None, int | None]:
    """The total and the free bytes of the machine or the container, whichever are fewer; None where they are not reported."""
    try:
        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None, None
    total, free = page * pages, None
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit = next(iter(_lines(Path("/sys/fs/cgroup/memory.max"))), "max")
    if limit.isdecimal() and int(limit) < total:
        used = next(iter(_lines(Path("/sys/fs/cgroup/memory.current"))), "")
        total = int(limit)
        if used.isdecimal() and free is not None:
            free = min(free, max(0, total - int(used)))
    return total, free


def format_bytes(size: int) -> str:
    """A number of bytes with a decimal unit, such as "1.23 GB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"


def resident() -> int | None:
    """Bytes of memory that this process uses at the moment; None where the system does not report it."""
    found = next(iter(_lines(Path("/proc/self/statm"))), "").split()
    return int(found[1]) * os.sysconf("SC_PAGE_SIZE") if len(found) > 1 else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def free_on_gpu(device: torch.device) -> int:
    """Free bytes of a GPU, including those that torch has reserved and does not use; 0: the device is no GPU."""
    if device.type != "cuda":
        return 0
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
