"""Text that every Python already has: the source of its standard library.

The bundled example model is trained, calibrated and evaluated on it, so the demo needs no network and the project ships no text
of others. A hash of its path assigns each file to one of three splits, which are therefore disjoint by file and the same on
every machine (the files themselves differ a little from one Python version to the next).
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from slimlm.core.errors import DataError

Split = Literal["train", "calibration", "evaluation"]

_TESTS = {"test", "tests", "idle_test"}
_NOT_PROSE = {"encodings", "pydoc_data", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


def split_of(path: str) -> Split:
    """The split that a file belongs to, by a hash of its path: 1/16 evaluation, 1/16 calibration, the rest training."""
    share = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 16
    return "evaluation" if share == 0 else "calibration" if share == 1 else "train"


def stdlib_documents(split: Split, *, with_tests: bool = False) -> Iterator[str]:
    """The text of each standard-library module in one split, in order of path.

    Args:
        split: which split.
        with_tests: add Python's own test suite, which not every installation has; only training uses it.

    Raises:
        DataError: this Python comes without the source of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(_modules(root, _NOT_PROSE if with_tests else _NOT_PROSE | _TESTS))
    for parts in modules:
        if split_of("/".join(parts)) == split:
            text = root.joinpath(*parts).read_text(encoding="utf-8", errors="ignore")
            if len(text) > 200:
                yield text
    if not modules:
        raise DataError(
            f"no source of Python's standard library under {root} (it may be zipped); name a text file in place of 'stdlib'"
        )


def _modules(root: Path, without: set[str]) -> Iterator[tuple[str, ...]]:
    """The Python files under a folder, as the parts of their paths from there; folders of these names are not entered."""
    for folder, inner, files in os.walk(root):
        inner[:] = [name for name in inner if name not in without]
        parts = Path(folder).relative_to(root).parts
        yield from ((*parts, name) for name in files if name.endswith(".py"))
