"""What the verbs say of themselves, and what they refuse before any work."""

import pytest
from typer.testing import CliRunner

from slimlm.cli import app


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("compress", ("allenai/c4:en", "what the recipe says", "half of what is free")),
        ("eval", ("the model's context, at most 2048",)),
        ("bench", ("what torch uses", "1, 4 and 16", "CPU threads")),
    ],
)
def test_help_names_the_defaults(verb: str, words: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
    said = " ".join(shown.replace("│", " ").split())
    assert all(each in said for each in words), said
