"""docs/laws.md lists every law that tests cite, no other, and where they do."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "laws.md"


def laws_of(page: str) -> dict[int, list[str]]:
    """The folders of tests that stand behind each numbered law."""
    items = re.split(r"^(?=\d+\. )", page, flags=re.MULTILINE)[1:]
    laws = {int(item.split(".")[0]): re.findall(r"`(tests/[\w/]+)`", item) for item in items}
    assert len(laws) == len(items), "a number stands twice"
    return laws


def cited_in(source: str) -> set[int]:
    """The laws that the comments of a file of tests cite: "law 9", "laws 1, 21", "laws 11 and 19"."""
    named = re.findall(r"#.*?\blaws? (\d+(?:(?:, | and )\d+)*)", source, re.IGNORECASE)
    return {int(number) for numbers in named for number in re.findall(r"\d+", numbers)}


LAWS = laws_of(PAGE.read_text())
TESTS = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if path != Path(__file__).resolve()]
CITED = {path.relative_to(ROOT): cited_in(path.read_text()) for path in TESTS}


def test_the_laws_are_numbered_without_a_gap() -> None:
    assert list(LAWS) == list(range(1, len(LAWS) + 1))


@pytest.mark.parametrize("path", [path for path, laws in CITED.items() if laws], ids=str)
def test_every_law_that_a_test_cites_stands_in_the_page_with_the_test_s_folder(path: Path) -> None:
    for law in CITED[path]:
        assert law in LAWS, f"{path} cites law {law}, and docs/laws.md ends at {len(LAWS)}"
        assert any(path.is_relative_to(folder) for folder in LAWS[law]), f"law {law} is tested in {path}: name its folder"


@pytest.mark.parametrize("law", LAWS)
def test_every_law_is_cited_by_a_test_in_each_folder_that_it_names(law: int) -> None:
    assert LAWS[law], f"law {law} names no folder of tests"
    for folder in LAWS[law]:
        assert any(law in laws and path.is_relative_to(folder) for path, laws in CITED.items()), f"law {law}: none in {folder}"


def test_citations_and_laws_are_read_as_they_are_written() -> None:
    assert cited_in("x()  # laws 1, 21\ny()  # law 9, as stored\n# Law 3. More.\nz()  # laws 11 and 19\nlaw = 5") == {
        1,
        21,
        9,
        3,
        11,
        19,
    }
    assert laws_of("# Laws\n\n1. One. (`tests/a`,\n   `tests/b/c`)\n2. Two.\n") == {1: ["tests/a", "tests/b/c"], 2: []}
