"""`slimlm methods`."""

import dataclasses
import inspect
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any

import typer

from slimlm.cli import options
from slimlm.cli.console import print_json, say, show
from slimlm.core.errors import RecipeError


@dataclass(frozen=True)
class Method:
    """A method, as its file describes it."""

    kind: str
    name: str
    summary: str
    paper: str
    """Its arXiv number; "-" where there is none."""
    options: dict[str, Any]
    """Its options and their defaults."""
    description: str
    """Authors, equations and departures from the paper."""


def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A method to describe in full.", show_default="list all of them")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """List the methods with their papers and options, and the recipes; with a NAME describe one method."""
    from slimlm.core import registry
    from slimlm.recipe import shipped
    from slimlm.report.tables import plain_table

    known = [(kind, own) for kind in registry.KINDS for own in registry.names(kind)]
    if name is not None:
        _describe([_described(kind, own) for kind, own in known if own == name] or _refuse(name, known), as_json=as_json)
        return
    found, unusable = [], registry.ill_named()
    for kind, own in known:
        try:
            found.append(_described(kind, own))
        except RecipeError as error:
            unusable[f"{kind}.{own}"] = str(error)
    if as_json:
        listed = [{key: value for key, value in dataclasses.asdict(m).items() if key != "description"} for m in found]
        print_json({"methods": listed, "recipes": shipped(), "unusable": unusable})
        return
    rows = [(m.kind, m.name, m.summary, m.paper, ", ".join(f"{k}={v!r}" for k, v in m.options.items())) for m in found]
    show(plain_table(None, ("step", "method", "what it does", "arXiv", "options and defaults"), rows, left=5))
    say("")
    show(plain_table(None, ("recipe", "what it does"), list(shipped().items()), left=2))
    for wrong, why in unusable.items():
        say(f"\n{wrong} cannot be used: {why}")
    say("\nmore: slimlm methods NAME, slimlm recipes NAME")


def _describe(found: list[Method], *, as_json: bool) -> None:
    """Print methods in full: almost always one, because names are rarely used for two kinds."""
    if as_json:
        print_json({"methods": [dataclasses.asdict(method) for method in found]})
        return
    from slimlm.core import registry
    from slimlm.report.tables import plain_table

    for method in found:
        say(f"{method.name}: {registry.KINDS[method.kind]}", style="bold")
        say(f"\n{method.description}\n")
        show(plain_table(None, ("option", "default"), [(k, repr(v)) for k, v in method.options.items()], left=2))
        say(f'\nin a recipe:\n\n[[steps]]\n{method.kind} = "{method.name}"')


def _refuse(name: str, known: list[tuple[str, str]]) -> list[Method]:
    """Raise RecipeError for a name that no method has."""
    from slimlm.core import registry
    from slimlm.recipe import shipped

    names = sorted({own for _, own in known})
    if name in (unusable := registry.ill_named()):
        raise RecipeError(unusable[name])
    if name in shipped():
        raise RecipeError(f"{name!r} is a recipe; slimlm recipes {name} shows it")
    near = get_close_matches(name, names, n=1)
    raise RecipeError(
        f"no method is called {name!r}; {f'did you mean {near[0]!r}?' if near else 'there are: ' + ', '.join(names)}"
    )


def _described(kind: str, name: str) -> Method:
    """A method's summary, paper, options and description, from its file."""
    from slimlm.core import registry

    method = registry.find(kind, name)
    description = inspect.getdoc(inspect.getmodule(method)) or ""
    paper = re.search(r"arXiv\s(\d{4}\.\d{5})", description)
    return Method(
        kind=kind,
        name=name,
        summary=(inspect.getdoc(method) or "").splitlines()[0],
        paper=paper[1] if paper else "-",
        options={f.name: f.default for f in dataclasses.fields(method)},
        description=description,
    )
