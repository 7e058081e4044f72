"""How much memory there is for this process."""

import os
from pathlib import Path


def total_and_free() -> tuple[int | None, int | None]:
    """Bytes, of the machine or of the container, whichever is less; None where the system does not tell."""
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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
