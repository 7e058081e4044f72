"""`slimlm plan`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimlm.cli import options
from slimlm.cli.console import notes, notifier, print_json, say, show
from slimlm.cli.verb import in_flags
from slimlm.core.errors import RecipeError
from slimlm.recipes import DEFAULT_RECIPE

if TYPE_CHECKING:
    from slimlm.planner.plan import Plan
    from slimlm.recipe import Recipe


def plan(
    context: typer.Context,
    model: options.Model,
    bits: options.Bits = None,
    objective: options.BudgetObjective = "size",
    embedding_bits: options.EmbeddingBits = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the planned recipe to this .toml file.", show_default="not written")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder that compress would write; its disk is checked.", show_default="no check"),
    ] = None,
    recipe: options.RecipeName = DEFAULT_RECIPE,
    ignore: options.Ignore = None,
    data: options.Data = None,
    share: options.Share = None,
    chat: options.ChatTemplate = "auto",
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    memory: options.Memory = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Show what compress would need: layers, size, memory, disk, time; with --bits also the plan for each layer.

    The model is run on a few tokens, so that one that cannot be compressed is refused. Without --bits (and without rank =
    "auto" in the recipe) that takes seconds, and for large models as long as reading them once.
    """
    _refuse_file(save)
    limit, texts = options.bytes_of(memory), options.sources_of(data, share)

    from slimlm.display import progress_on
    from slimlm.pipeline import estimate
    from slimlm.pipeline import plan as make_plan
    from slimlm.recipe import open_recipe, to_toml
    from slimlm.report.estimate import estimate_table

    opened = open_recipe(recipe)
    asked: dict[str, Any] = {"recipe": opened, "bits": bits, "objective": objective, "embedding_bits": embedding_bits}
    asked |= {
        "ignore": ignore,
        "data": texts,
        "chat": chat,
        "samples": samples,
        "length": length,
        "seed": seed,
        "device": device,
        "memory": limit,
    }
    asked["notify"] = notifier(context)
    planning = bits is not None or opened.needs_plan
    if save is not None and not planning:
        raise RecipeError('--save: there is no plan to save; give --bits, or a recipe with rank = "auto"')
    with progress_on(notes, silent=quiet) as observer:
        expected = estimate(model, out, **asked)
        planned = make_plan(model, progress=observer, **asked) if planning else None
    if save is not None and planned is not None:
        save.write_text(to_toml(planned[1]), encoding="utf-8")
    problems = [in_flags(problem, context.command.params) for problem in expected.problems]
    if as_json:
        found = {} if planned is None else {**planned[0].to_dict(), "embedding_bits": planned[1].embedding_bits}
        print_json({"estimate": {**expected.to_dict(), "problems": problems}, **found})
        return
    show(estimate_table(expected))
    for problem in problems:
        say(f"\n{problem}")
    if planned is not None:
        _show(*planned)
    if save is not None:
        say(f"written: {save}   next: slimlm compress MODEL --out OUT --recipe {save}")


def _show(planned: "Plan", recipe: "Recipe") -> None:
    from slimlm.recipe import AS_STORED
    from slimlm.report.tables import choices_table, options_table, plan_summary

    data = planned.to_dict()
    say("")
    show(options_table(data))
    say("")
    show(choices_table(data))
    say(f"\n{plan_summary(data)}")
    stored = "as they are" if recipe.embedding_bits == AS_STORED else f"in {recipe.embedding_bits} bits"
    say(f"not counted: token embedding and lm_head, which are stored {stored}")


def _refuse_file(path: Path | None) -> None:
    """Raise before any work where a recipe could not be written to this path."""
    if path is None:
        return
    if path.suffix != ".toml":
        raise RecipeError(f"--save {path}: a recipe's file ends in .toml")
    if path.exists() or not path.absolute().parent.is_dir():
        raise RecipeError(f"--save {path}: " + ("it exists already" if path.exists() else "there is no such folder"))
