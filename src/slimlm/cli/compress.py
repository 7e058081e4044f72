"""`slimlm compress`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import notes, notifier, print_json, say, show
from slimlm.distributed.environment import global_rank
from slimlm.recipes import DEFAULT_RECIPE

QUALITY_FAILED = 3
"""Exit code where the model was written, and its perplexity on the calibration text rose too far."""


def compress(
    context: typer.Context,
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must be new or empty.")],
    recipe: options.RecipeName = DEFAULT_RECIPE,
    bits: options.Bits = None,
    objective: options.BudgetObjective = "size",
    embedding_bits: options.EmbeddingBits = None,
    ignore: options.Ignore = None,
    data: options.Data = None,
    share: options.Share = None,
    chat: options.ChatTemplate = "auto",
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    memory: options.Memory = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop an unfinished run and start again.")] = False,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Compress a model and write it packed; with --bits, plan first how each layer is stored.

    A run that was stopped resumes after its last finished block when the same command is given again.

    Exit codes: 0; 2 after an error; 3 where the model was written but its perplexity on some of the calibration text is more
    than twice the original's.
    """
    limit, texts = options.bytes_of(memory), options.sources_of(data, share)

    from slimlm.cli.opened import kernels_for
    from slimlm.display import progress_on
    from slimlm.pipeline import compress as compress_model
    from slimlm.report.tables import summary_table

    with progress_on(notes, silent=quiet) as observer:
        result = compress_model(
            model,
            out,
            recipe=recipe,
            bits=bits,
            objective=objective,
            embedding_bits=embedding_bits,
            ignore=ignore,
            notify=notifier(context),
            data=texts,
            chat=chat,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            memory=limit,
            restart=restart,
            progress=observer,
        )
    if global_rank() > 0:
        return
    kernels = kernels_for(result.path)
    if as_json:
        print_json({"path": str(result.path), "kernels": kernels, **result.record.to_dict()})
        raise typer.Exit(QUALITY_FAILED if result.record.quality == "failed" else 0)
    show(summary_table(result.record, kernels))
    if result.record.quality == "failed":
        say(f"\nwritten; quality check failed (see the note above): {result.path}")
        raise typer.Exit(QUALITY_FAILED)
    say(f"\nwritten and verified: {result.path}")
    folder = shlex.quote(str(result.path))
    say(f"next: slimlm generate {folder} --prompt 'Some text'")
    say(f"      slimlm eval {folder} --against {shlex.quote(model)} --text TEXT")
