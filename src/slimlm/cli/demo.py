"""`slimlm demo`."""

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import notes, notifier, print_json, say, say_on_stderr, show
from slimlm.recipes import DEFAULT_RECIPE

if TYPE_CHECKING:
    from slimlm.bench.recipes import Row, Setting, Trial

_BUDGETS = (4.0, 3.0)
_PROMPTS = ("class Queue:\n    def __init__(self, maxsize=0):", "def read_lines(path):\n    with open(path")
_EXPLANATION = """\
Perplexity says how well a model predicts text that it has not seen (here: modules of Python's standard library); lower is \
better. The size counts all weights; bits/weight counts everything stored for a linear layer. 2:4 means that two of every four \
weights are zero."""
_DEFAULT_ELSEWHERE = f"The default recipe of slimlm compress, {DEFAULT_RECIPE}, takes minutes; slimlm demo --full has it, too."


def demo(
    context: typer.Context,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Keep the last model (recipe slim; with --full, recipe best) here.", show_default="not kept"
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Compare more recipes and budgets; takes half an hour.")] = False,
    as_json: options.Json = False,
) -> None:
    """Compress the bundled model in several ways and compare them with the original; offline, about a minute.

    A demo that was stopped continues when the same command is given again.
    """
    from slimlm.bench.recipes import compare_recipes
    from slimlm.display import duration, progress_on
    from slimlm.models.bundled import NAME, bundled_model
    from slimlm.report.comparison import comparison_table, row_line

    rows: list[Row] = []

    def each(row: "Row") -> None:
        rows.append(row)
        say_on_stderr(row_line(row, rows[0]))

    trials, store = _trials(out, full=full), _store()
    with progress_on(notes) as observer:
        try:
            found = compare_recipes(
                bundled_model(),
                trials,
                _setting(full=full),
                store=store,
                progress=observer,
                notify=notifier(context),
                each=each,
            )
        except KeyboardInterrupt:
            say_on_stderr(
                f"note: {max(0, len(rows) - 1)} of {len(trials)} recipes are done; what was compressed is kept in {store}, and "
                "the same command continues from there"
            )
            raise
    if as_json:
        print_json(found.to_dict())
        return
    show(comparison_table(found, f"{NAME}, measured on {found.tokens} tokens"))
    say(f"\n{_EXPLANATION} All {len(trials)} recipes took {duration(sum(row.seconds for row in found.rows))}.")
    if all(trial.recipe != DEFAULT_RECIPE or trial.bits is not None for trial in trials):
        say(_DEFAULT_ELSEWHERE)
    for i, prompt in enumerate(found.prompts):
        say(f"\n{prompt}[...]", style="bold")
        for name, continuations in found.continuations.items():
            say(f"\n-- {name}", style="bold")
            say(continuations[i])
    if out is not None:
        say(f"\nkept: {out}   next: slimlm generate {shlex.quote(str(out))} --prompt 'def main('")


def _store() -> Path:
    """The folder in the user's cache for the compressed models of a demo that is not done."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimlm" / "demo"


def _setting(*, full: bool) -> "Setting":
    from slimlm.bench.recipes import Setting

    return Setting("stdlib", samples=64 if full else 32, length=512, measured_samples=64 if full else 32, prompts=_PROMPTS)


def _trials(out: Path | None, *, full: bool) -> tuple["Trial", ...]:
    """The models of the comparison; the last is kept in `out` where that is given."""
    from slimlm.bench.recipes import Trial

    absmax = Trial("absmax", "4 bits, each weight rounded by itself", "absmax")
    gptq = Trial("gptq", "4 bits, rounding errors compensated", "gptq", continues=not full)
    slim = "4 bits, 2:4, with low-rank adapters for the error"
    if not full:
        return absmax, gptq, Trial("slim", slim, "slim", continues=True, out=out)
    budgets = [
        Trial(f"{bits} bits", f"planned within {bits} bits per weight", "best", bits, continues=bits == _BUDGETS[0])
        for bits in _BUDGETS
    ]
    return (
        absmax,
        gptq,
        *budgets,
        Trial("magnitude", "4 bits, 2:4, the smallest weights removed", "magnitude"),
        Trial("wanda", "4 bits, 2:4, weighted by the inputs", "wanda"),
        Trial("slim", slim, "slim"),
        Trial("best-24", "4 bits, 2:4 and adapters solved together", "best-24"),
        Trial("best", "4 bits, solved for layer after layer; the default", "best", continues=True, out=out),
    )
