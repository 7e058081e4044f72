"""Results that are measured in pieces: rows in one file, each with the run that it came from."""

import json
import platform
import sys
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from slimlm.bench.layer_speed import machine
from slimlm.kernels import native

Data = dict[str, Any]


def versions(*more: str) -> dict[str, str]:
    """Of Python, torch, slimlm, and of what else was measured."""
    found = {"python": platform.python_version()}
    for name in ("slimlm", "torch", "transformers", *more):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def this_run(script: str, *packages: str) -> Data:
    """What every row of a run has in common; the library's checksum tells one state of the kernels from another."""
    path = native.library_path()
    return {
        "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]]),
        "machine": machine(),
        "versions": versions(*packages),
        "kernel_library": sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else None,
    }


def slug(name: str) -> str:
    """A processor's name as a part of a file's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


class Results:
    """Rows by their keys; a row that is measured again replaces the old one."""

    def __init__(self, path: Path, keys: tuple[str, ...], run: Data) -> None:
        self.path, self.keys, self.run = path, keys, run
        there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.runs: list[Data] = there.get("runs", [])
        self.missing: dict[str, str] = there.get("missing", {})
        self.rows: dict[tuple[Any, ...], Data] = {self._key(row): row for row in there.get("rows", [])}
        self.runs.append(run)

    def _key(self, row: Data) -> tuple[Any, ...]:
        return tuple(tuple(row[key]) if isinstance(row[key], list) else row[key] for key in self.keys)

    def add(self, row: Data, *names: str) -> None:
        """Keep a row of this run; names under which it was missing are missing no longer."""
        self.rows[self._key(row)] = {**row, "run": len(self.runs) - 1}
        self.found(*names)

    def found(self, *names: str) -> None:
        """What an earlier run named as missing is not."""
        for name in names:
            self.missing.pop(name, None)

    def to_dict(self) -> Data:
        """Plain data; runs of which no row is left are dropped."""
        used = sorted({row["run"] for row in self.rows.values()} | {len(self.runs) - 1})
        rows = [{**row, "run": used.index(row["run"])} for row in self.rows.values()]
        return {"runs": [self.runs[i] for i in used], "missing": self.missing, "rows": rows}

    def write(self) -> None:
        """Whole or not at all, so that a run that is killed leaves what it had."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)
