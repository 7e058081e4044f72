"""Flags are the command line's: the library speaks of arguments, and the command line puts the flags in their place."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import slimlm

SOURCE = Path(slimlm.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z]")

NOT_YET: set[str] = set()
"""Files that still name flags."""


def strings_with_flags(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of the strings that name a flag; how a docstring says that a module is run (`python -m`) is none."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            for line in node.value.splitlines():
                if FLAG.search(line) and "python -m" not in line:
                    yield node.lineno, line.strip()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("x = 'give --samples'", ["give --samples"]),
        ("x = f'--bits {y}'", ["--bits"]),
        ("def f():\n    '''Add --restart.'''", ["Add --restart."]),
        ("'''python -m slimlm.module --seed 0'''", []),
        ("x = 'two -- dashes', 'a--b', '---', '`samples`'  # --samples", []),
    ],
)
def test_the_reader_finds_flags_in_strings(source: str, found: list[str]) -> None:
    assert [text for _, text in strings_with_flags(source)] == found


def test_no_string_outside_the_command_line_names_a_flag() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {text}"
        for path in sorted(SOURCE.rglob("*.py"))
        if path.relative_to(SOURCE).parts[0] != "cli" and path.relative_to(SOURCE).as_posix() not in NOT_YET
        for line, text in strings_with_flags(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)
