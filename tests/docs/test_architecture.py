"""docs/architecture.md says of the tree and of the layers what the source and pyproject.toml say."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "slimlm"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    """The text under a heading, up to the next one."""
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, f"the page has no section {title!r}"
    return found[1]


def tree_of(text: str) -> dict[str, str]:
    """What is said of each folder and file of the tree under src/slimlm/, by its path there; folders end in a slash."""
    tree: dict[str, str] = {}
    parents: list[str] = []
    inside, last = False, ""
    for line in text.splitlines():
        named = re.match(r"(?P<indent> +)(?P<name>[\w.]+(?:\.py|/)|src/slimlm/)(?: +(?P<words>.*))?$", line)
        depth = (len(named["indent"]) - 4) // 2 if named else 0
        if named and len(named["indent"]) <= 8:
            inside = named["name"] == "src/slimlm/" or (inside and depth > 0)
            if inside and depth > 0:
                parents = parents[: depth - 1]
                last = "".join(parents) + named["name"]
                tree[last] = named["words"] or ""
                if last.endswith("/"):
                    parents = [*parents, named["name"]]
        elif inside and last and line.startswith(" " * 20):
            tree[last] += " " + line.strip()
    return tree


TREE = tree_of(section("The tree"))


def test_every_package_and_every_module_of_the_root_stands_in_the_tree_and_no_other() -> None:
    folders = {f"{path.parent.relative_to(SOURCE)}/" for path in SOURCE.rglob("__init__.py")} - {"./"}
    modules = {path.name for path in SOURCE.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(TREE) == folders | modules


def test_every_module_that_the_tree_names_within_a_folder_exists() -> None:
    named = {path: re.findall(r"\w+\.py\b", words) for path, words in TREE.items() if path.endswith("/")}
    assert sum(map(len, named.values())) > 40
    missing = [folder + file for folder, files in named.items() for file in files if not (SOURCE / folder / file).is_file()]
    assert not missing


def test_every_path_that_the_page_names_leads_somewhere() -> None:
    named = re.findall(r"`([\w/]+/[\w*]+(?:\.\w+)?)`", PAGE)
    places = (SOURCE, ROOT)
    missing = [path for path in named if not any(any(place.glob(path)) for place in places)]
    assert len(named) > 30
    assert not missing


def test_the_layers_are_those_of_the_import_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    [layers] = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    listed = re.findall(r"^    (\S.*)$", section("Imports go down only"), re.MULTILINE)
    assert listed == [layer.replace("slimlm.", "") for layer in layers]


def test_every_package_and_every_module_of_the_root_has_a_layer() -> None:
    listed = re.findall(r"^    (\S.*)$", section("Imports go down only"), re.MULTILINE)
    layered = {name for line in listed for name in line.split(" | ")}
    roots = {path.removesuffix("/").removesuffix(".py") for path in TREE if "/" not in path.removesuffix("/")}
    # Data files only; nothing there imports anything.
    assert layered == roots - {"recipes"}


def test_a_tree_is_read_by_its_indentation() -> None:
    text = (
        "\n    src/slimlm/\n      a.py      one\n      b/        two,\n                    x.py\n        c/      three\n"
        "      d/\n    tests/      not there\n"
    )
    assert tree_of(text) == {"a.py": "one", "b/": "two, x.py", "b/c/": "three", "d/": ""}
