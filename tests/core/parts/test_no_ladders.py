"""No room but core/parts asks what kind of part it has before it: that is what keeps a new part one file.

Read from the source: outside of core/parts no `isinstance`, `type(...) is` or `match` on a class of parts or entries, and no
kind of a part as a string that something is compared with or looked up by.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import slimlm
from slimlm.core.parts.base import Entry, Part, kinds

SOURCE = Path(slimlm.__file__).parent
ROOM = SOURCE / "core" / "parts"


def subclasses(of: type) -> Iterator[type]:
    for child in of.__subclasses__():
        yield child
        yield from subclasses(child)


KINDS = set(kinds())
CLASSES = {own.__name__ for base in (Part, Entry) for own in (base, *subclasses(base)) if own.__module__.startswith("slimlm.")}


def named(node: ast.AST) -> set[str]:
    """All names in an expression, attributes by their last one."""
    names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
    return names | {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


def called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def texts(node: ast.AST) -> set[str]:
    """The strings that an expression is, or that it displays."""
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        return set().union(*map(texts, node.elts))
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def ladders(source: str) -> list[str]:
    """What asks for a kind of part, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        wrong = False
        if isinstance(node, ast.Call) and called(node) in ("isinstance", "issubclass"):
            wrong = bool(named(node.args[1]) & CLASSES)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            by_type = any(called(side) == "type" for side in sides) and any(named(side) & CLASSES for side in sides)
            wrong = by_type or any(texts(side) & KINDS for side in sides)
        elif isinstance(node, ast.MatchClass):
            wrong = bool(named(node.cls) & CLASSES)
        elif isinstance(node, ast.MatchValue):
            wrong = bool(texts(node.value) & KINDS)
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            wrong = any(key is not None and "kind" in texts(key) and texts(value) & KINDS for key, value in pairs)
            wrong |= sum(key is not None and bool(texts(key) & KINDS) for key in node.keys) > 1
        if wrong:
            found.append(f"line {node.lineno}: {ast.unparse(node)[:80]}")  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(SOURCE.rglob("*.py")) if ROOM not in path.parents],
    ids=lambda path: path.relative_to(SOURCE).as_posix(),
)
def test_no_other_room_asks_for_a_kind_of_part(path: Path) -> None:
    assert ladders(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(part, Uniform)",
        "isinstance(part, Plain | uniform.Uniform)",
        "isinstance(entry, (LowRankEntry, int))",
        "issubclass(found, Elementwise)",
        "type(part) is Pruned",
        "{'plain': 1, 'uniform': 2}[kind]",
        "kind == 'low_rank'",
        "kind in ('uniform', 'codebook')",
        "{'kind': 'plain', 'dtype': 'float16'}",
        "match part:\n    case Codebook(): pass",
        "match kind:\n    case 'pruned': pass",
    ],
)
def test_a_ladder_is_found(line: str) -> None:
    assert len(ladders(line)) == 1


@pytest.mark.parametrize(
    "line", ["isinstance(x, Tensor)", "Uniform(codes, scale, 4, 32)", "{'uniform': plan['uniform']}", "type(x) is int"]
)
def test_what_is_no_ladder_passes(line: str) -> None:
    assert ladders(line) == []
