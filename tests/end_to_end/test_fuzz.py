"""Damaged checkpoints are refused, or work: see tests/fuzz.py. The 10,000: `pytest -m slow tests/test_fuzz.py`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("pool", "count"),
    [
        ("checkpoints", 60),
        ("sources", 40),
        ("texts", 200),
        *(pytest.param(pool, 10_000, marks=pytest.mark.slow) for pool in ("checkpoints", "sources", "texts")),
    ],
)
def test_damaged_files_do_no_harm(pool: str, count: int, tmp_path: Path) -> None:
    # A process of its own, whose memory is limited and which may die.
    verbs = {"checkpoints": ("load", "inspect", "verify"), "sources": ("open",), "texts": ("read",)}[pool]
    typed = [sys.executable, "-m", "tests.fuzz", pool, "--count", str(count), "--work", str(tmp_path / "work")]
    ended = subprocess.run(typed, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode in (0, 1), f"at {[p.read_text() for p in tmp_path.glob('work/*/at-*')]}: {ended.stderr[-2000:]}"
    found = json.loads(ended.stdout)
    assert found["failures"] == []
    counts = found["counts"]
    assert found["tried"] == count
    # Both ways happen, so what is tried is neither all noise nor all harmless.
    assert min(counts[f"{verb}: {way}"] for verb in verbs for way in ("fine", "refused")) > count // 20
