"""Where the verbs print: results to standard output; notes and progress to standard error."""

import json
import sys
from collections.abc import Callable
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from slimlm.cli.verb import in_flags

# Tables keep their width when piped; on a terminal they fit it.
output = Console(width=None if sys.stdout.isatty() else 160)
notes = Console(stderr=True)


def show(table: Table) -> None:
    """Print a table as a result; no line ends in spaces."""
    with output.capture() as captured:
        output.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def say(text: str, *, style: str | None = None) -> None:
    """Print a line of text as a result."""
    output.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def say_on_stderr(text: str) -> None:
    """Print a line of text to standard error."""
    notes.print(text, markup=False, highlight=False, soft_wrap=True)


def notifier(context: typer.Context) -> Callable[[str], None]:
    """A function that prints what the library tells the user, with the flags of the running verb."""

    def notify(text: str) -> None:
        say_on_stderr(f"note: {in_flags(text, context.command.params)}")

    return notify


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object as the result."""
    sys.stdout.write(json.dumps(data, indent=1) + "\n")
