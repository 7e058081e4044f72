"""`slimlm recipes`."""

from typing import Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import print_json, say, show


def recipes(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="A recipe to show: a name, or a .toml file.", show_default="list all of them"),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the recipes; with a NAME show one as a file that --recipe takes."""
    from slimlm.recipe import open_recipe, shipped, source_text
    from slimlm.recipes import DEFAULT_RECIPE
    from slimlm.report.tables import plain_table

    if name is not None:
        opened = open_recipe(name)
        if as_json:
            print_json(opened.to_dict())
        else:
            say(source_text(name).rstrip())
        return
    if as_json:
        print_json({"default": DEFAULT_RECIPE, "recipes": shipped()})
        return
    rows = [(own, f"{summary} (the default)" if own == DEFAULT_RECIPE else summary) for own, summary in shipped().items()]
    show(plain_table(None, ("recipe", "what it does"), rows, left=2))
    say("\nmore: slimlm recipes NAME")
