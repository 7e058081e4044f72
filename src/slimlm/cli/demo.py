"""`slimlm demo`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import notes, print_json, say, show

if TYPE_CHECKING:
    from slimlm.bench.recipes import Setting, Trial

_BUDGETS = (4.0, 3.0)
_PROMPT = "class Queue:\n    def __init__(self, maxsize=0):"
_EXPLANATION = """\
Perplexity says how well a model predicts text that it has not seen (here: modules of Python's standard library); lower is \
better. The size counts all weights; bits/weight counts everything stored for a linear layer. 2:4 means that two of every four \
weights are zero."""


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Keep the last model (recipe slim; with --full, recipe best) here.", show_default="not kept"
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Compare more recipes and budgets; takes half an hour.")] = False,
    as_json: options.Json = False,
) -> None:
    """Compress the bundled model in several ways and compare them with the original; offline, about a minute."""
    from slimlm.bench.recipes import compare_recipes
    from slimlm.models.bundled import NAME, bundled_model
    from slimlm.report.comparison import comparison_table
    from slimlm.report.live import progress_on

    with progress_on(notes) as observer:
        found = compare_recipes(bundled_model(), _trials(out, full=full), _setting(full=full), progress=observer)
    if as_json:
        print_json(found.to_dict())
        return
    show(comparison_table(found, f"{NAME}, measured on {found.tokens} tokens"))
    say(f"\n{_EXPLANATION}")
    say(f"\n{found.prompt}[...]", style="bold")
    for name, continuation in found.continuations.items():
        say(f"\n-- {name}", style="bold")
        say(continuation)
    if out is not None:
        say(f"\nkept: {out}   try: slimlm generate {out} --prompt 'def main('")


def _setting(*, full: bool) -> "Setting":
    from slimlm.bench.recipes import Setting

    return Setting("stdlib", samples=64 if full else 32, length=512, measured_samples=64 if full else 32, prompt=_PROMPT)


def _trials(out: Path | None, *, full: bool) -> tuple["Trial", ...]:
    """The models of the comparison; the last is kept in `out` where that is given."""
    from slimlm.bench.recipes import Trial

    absmax = Trial("absmax", "4 bits, each weight rounded by itself", "absmax")
    gptq = Trial("gptq", "4 bits, rounding errors compensated", "gptq")
    slim = "4 bits, 2:4, with low-rank adapters for the error"
    if not full:
        return absmax, gptq, Trial("slim", slim, "slim", continues=True, out=out)
    budgets = [Trial(f"{bits} bits", f"planned within {bits} bits per weight", "best", bits) for bits in _BUDGETS]
    return (
        absmax,
        gptq,
        *budgets,
        Trial("magnitude", "16 bits, 2:4, the smallest weights removed", "magnitude", continues=True),
        Trial("wanda", "16 bits, 2:4, weighted by the inputs", "wanda"),
        Trial("slim", slim, "slim"),
        Trial("best", "4 bits, 2:4 and adapters solved together", "best", continues=True, out=out),
    )
