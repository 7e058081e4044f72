"""`slimlm eval`."""

from typing import Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import notes, notifier, print_json, say_on_stderr, show
from slimlm.evaluation.activation_formats import ActivationFormat


def evaluate(
    context: typer.Context,
    model: options.AnyModel,
    against: Annotated[
        str | None, typer.Option(help="The original, or another model, to compare with.", show_default="none")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help=f"Text to measure on: {options.EVALUATION_TEXT}.", show_default="WikiText-2 (test), where no tasks are named"
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Stop reading the text after this many tokens.", show_default="all of it")
    ] = None,
    length: options.MeasuredLength = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Tasks of lm_eval by name, such as arc_easy,piqa, or .jsonl files of tasks; needs pip install 'slimlm[eval]'.",
            show_default="none",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.", show_default="all")] = None,
    activations: Annotated[
        ActivationFormat | None,
        typer.Option(help="Round the activations of the first model's linear layers.", show_default="not rounded"),
    ] = None,
    kernels: options.ChosenKernels = "auto",
    device: options.Device = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory that a compressed model may take, such as 8GB; a larger one is run block by block from its files. "
            "For --tasks each model is in memory as a whole.",
            show_default="half of the free memory",
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity on a text, and with --against the KL divergence from the original on the same tokens.

    Windows of the text do not overlap; standard errors take a window as the unit. auto uses the precise kernels on a CPU.
    """
    limit_of_memory = options.bytes_of(memory)

    from slimlm.cli.opened import refuse_cpu_kernels
    from slimlm.display import progress_on
    from slimlm.evaluation.evaluate import evaluate as evaluate_model
    from slimlm.report.evaluation import evaluation_tables
    from slimlm.run.config import pick_device

    where = pick_device(device)
    refuse_cpu_kernels(kernels, where)
    with progress_on(notes) as observer:
        found = evaluate_model(
            model,
            against=against,
            text=text,
            tokens=tokens,
            length=length,
            tasks=tuple(tasks or ()),
            limit=limit,
            activations=activations,
            kernels=kernels,
            device=where,
            memory=limit_of_memory,
            progress=observer,
            notify=notifier(context),
        )
    for each in found.models:
        if each.kernels is not None:
            say_on_stderr(f"kernels: {each.kernels}")
    if as_json:
        print_json(found.to_dict())
        return
    for table in evaluation_tables(found):
        show(table)
