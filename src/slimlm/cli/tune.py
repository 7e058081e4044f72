"""`slimlm tune`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import notes, notifier, print_json, say, show


def tune(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(metavar="FOLDER", help="Compressed folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must be new or empty.")],
    data: Annotated[str, typer.Option(help=f"Text to tune on: {options.EVALUATION_TEXT}.")],
    tokens: Annotated[int, typer.Option(min=2, help="Tokens that all steps take at most, such as 300000.")],
    method: Annotated[
        str,
        typer.Option(
            help="end_to_end (scales, codebooks, adapters, norms), peqa (scales), slim_peft (adapters) or slim_peft_paper "
            "(adapters, with the settings of the paper)."
        ),
    ] = "end_to_end",
    against: Annotated[
        str | None,
        typer.Option(help="The original model; all methods but slim_peft_paper need it.", show_default="none"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="The largest rate; for most methods a share of a tensor's size.", show_default="the method's"),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Windows per step.", show_default="the method's")] = None,
    length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens per window.", show_default="the method's, at most the model's context"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed by which windows of the text are drawn.")] = 0,
    device: options.Device = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for activations and blocks, such as 8GB; more stay on the disk.",
            show_default="half of the free memory",
        ),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an unfinished run and start again.")] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Tune the scales, codebooks, adapters and norms of a compressed model by gradient descent.

    What is written is the best form on windows of the text that are held back, never worse there than the given model. A run
    that was stopped goes on when the same command is given again.
    """
    limit = options.bytes_of(memory)

    from slimlm.display import progress_on
    from slimlm.report.tables import tuning_table
    from slimlm.run.tune import tune as tune_model

    with progress_on(notes, silent=quiet) as observer:
        result = tune_model(
            model,
            out,
            data=data,
            tokens=tokens,
            method=method,
            against=against,
            rate=rate,
            batch=batch,
            length=length,
            seed=seed,
            device=device,
            memory=limit,
            restart=restart,
            progress=observer,
            notify=notifier(context),
        )
    if as_json:
        print_json({"path": str(result.path), **result.record.to_dict()})
        return
    show(tuning_table(result.tuning))
    say(f"\nwritten and verified: {result.path}")
    if against is not None:
        say(f"next: slimlm eval {shlex.quote(str(result.path))} --against {shlex.quote(against)} --text TEXT")
