"""How much of a mapped file is in memory."""

from pathlib import Path

import pytest

MIB = 2**20
SMAPS = Path("/proc/self/smaps")
needs_smaps = pytest.mark.skipif(not SMAPS.is_file(), reason="the system does not say which pages are in memory")


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process holds in memory."""
    total, ours = 0, False
    for line in SMAPS.read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total
