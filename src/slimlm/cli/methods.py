"""`slimlm methods`."""

import dataclasses
import inspect
import re
from typing import Any

from slimlm.cli import options
from slimlm.cli.console import output, print_json


def methods(as_json: options.Json = False) -> None:
    """List the methods with their papers and options, and the recipes."""
    from slimlm.core import registry
    from slimlm.recipe import shipped
    from slimlm.report.tables import plain_table

    found = [_described(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
    if as_json:
        print_json({"methods": found, "recipes": shipped()})
        return
    rows = [
        (m["kind"], m["name"], m["summary"], m["paper"], ", ".join(f"{k}={v!r}" for k, v in m["options"].items()))
        for m in found
    ]
    output.print(plain_table(None, ("step", "method", "what it does", "arXiv", "options and defaults"), rows, left=5))
    output.print()
    output.print(plain_table(None, ("recipe", "what it does"), list(shipped().items()), left=2))


def _described(kind: str, name: str) -> dict[str, Any]:
    """A method's summary, paper and options, from its file."""
    from slimlm.core import registry

    method = registry.find(kind, name)
    head = inspect.getdoc(inspect.getmodule(method)) or ""
    paper = re.search(r"arXiv (\d{4}\.\d{5})", head)
    return {
        "kind": kind,
        "name": name,
        "summary": (inspect.getdoc(method) or "").splitlines()[0],
        "paper": paper[1] if paper else "-",
        "options": {f.name: f.default for f in dataclasses.fields(method)},
    }
