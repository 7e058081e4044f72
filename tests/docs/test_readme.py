"""What the README quotes and links is there."""

from pathlib import Path

from slimlm.cli.compress import QUALITY_FAILED
from slimlm.storage.checkpoint import MODEL_TYPE

ROOT = Path(__file__).resolve().parents[2]
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_the_readme_quotes_what_transformers_says_where_slimlm_is_not_imported() -> None:
    assert f'"{MODEL_TYPE}"' in README


def test_the_readme_links_every_page_of_the_documentation() -> None:
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"](docs/{page.name})" not in README] == []


def test_the_readme_names_the_exit_code_of_a_failed_quality_check() -> None:
    assert f"`compress` ends with exit code {QUALITY_FAILED}" in README
