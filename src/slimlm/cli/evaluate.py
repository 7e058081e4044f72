"""`slimlm eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimlm.cli import options
from slimlm.cli.console import notes, notifier, print_json, show
from slimlm.core.errors import DataError
from slimlm.evaluation.activation_formats import ActivationFormat

if TYPE_CHECKING:
    from torch import Tensor

    from slimlm.evaluation.compare import OpenModel
    from slimlm.events import Observer


def evaluate(
    context: typer.Context,
    model: options.AnyModel,
    text: Annotated[str, typer.Option(help=f"Text to measure on: {options.EVALUATION_TEXT}.")],
    against: Annotated[str | None, typer.Option(help="A second model to compare with.", show_default="none")] = None,
    length: options.MeasuredLength = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Stop reading the text after this many tokens.", show_default="all of it")
    ] = None,
    activations: Annotated[
        ActivationFormat | None,
        typer.Option(help="Round the activations of the first model's linear layers.", show_default="not rounded"),
    ] = None,
    kernels: options.ChosenKernels = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure perplexity on a text, of one model or of two side by side; auto uses the precise kernels on a CPU."""
    from slimlm.cli.opened import refuse_cpu_kernels, show_kernels, text_samples
    from slimlm.display import progress_on
    from slimlm.evaluation.compare import open_any, same_tokens
    from slimlm.models.structure import context_length
    from slimlm.report.tables import plain_table
    from slimlm.run.config import pick_device
    from slimlm.runtime.memory import format_bytes
    from slimlm.storage import checkpoint

    where = pick_device(device)
    sources = [source for source in (model, against) if source is not None]
    for folder in map(Path, sources):
        if (folder / checkpoint.RECORD).is_file():
            checkpoint.verify_files(folder)
    refuse_cpu_kernels(kernels, where)
    models = [open_any(source, kernels=kernels, device=where, notify=notifier(context)) for source in sources]
    for opened in models:
        show_kernels(opened)
    contexts = [found for opened in models if (found := context_length(opened.model)) is not None]
    shortest = min(contexts, default=None)
    samples = text_samples(models[0].tokenizer, text, length=length, context=shortest, at_most=max_tokens)
    if len(models) == 2 and not same_tokens(models[0], models[1], models[0].tokenizer.decode(samples[0])):
        raise DataError(f"{model} and {against} cut text into different tokens; their perplexities cannot be compared")
    with progress_on(notes) as observer:
        rows = [_measured(opened, samples, activations if opened is models[0] else None, observer) for opened in models]
    predicted = samples[:, 1:].numel()
    if as_json:
        print_json({"text": text, "tokens": predicted, "length": samples.shape[1], "models": rows})
        return
    title = f"{predicted} tokens of {text}, in samples of {samples.shape[1]}"
    columns = ("model", "activations", "bits/weight", "size", "perplexity")
    table = [
        (r["model"], r["activations"], f"{r['bits_per_weight']:.3f}", format_bytes(r["bytes"]), f"{r['perplexity']:.4f}")
        for r in rows
    ]
    show(plain_table(title, columns, table, left=2))


def _measured(
    opened: "OpenModel", samples: "Tensor", activations: ActivationFormat | None, observer: "Observer"
) -> dict[str, Any]:
    """A row of the table, as plain data."""
    from slimlm.cli.opened import kernels_of
    from slimlm.evaluation.activations import rounded_activations
    from slimlm.evaluation.perplexity import perplexity
    from slimlm.events import Event

    with rounded_activations(opened.model, activations):
        measured = perplexity(
            opened.model, samples, progress=lambda done, total: observer(Event(f"evaluate {opened.source}", done, total))
        )
    return {
        "model": opened.source,
        "kernels": kernels_of(opened),
        "activations": activations or "as they are",
        "bits_per_weight": opened.bits_per_weight,
        "bytes": opened.bytes,
        "perplexity": measured.value,
    }
