"""`slimlm generate`."""

import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import notifier, print_json, say_on_stderr
from slimlm.core.errors import SlimlmError

if TYPE_CHECKING:
    from slimlm.evaluation.compare import OpenModel


def generate(
    context: typer.Context,
    model: options.AnyModel,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random choices that a temperature above 0 makes.")] = 0,
    kernels: options.ChosenKernels = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Continue a text, printed as it is generated; auto uses the fast kernels on a CPU. Speed goes to standard error."""
    import torch

    from slimlm.cli.opened import kernels_of, refuse_cpu_kernels, show_kernels
    from slimlm.data.windows import check_seed
    from slimlm.evaluation.compare import open_any
    from slimlm.inference.generate import TextStream, room_for
    from slimlm.inference.generate import generate as generate_tokens
    from slimlm.report.tables import generation_lines
    from slimlm.run.config import pick_device
    from slimlm.runtime.whole_model import prefer_fast

    check_seed(seed)
    where = pick_device(device)
    refuse_cpu_kernels(kernels, where)
    opened = open_any(model, kernels=kernels, device=where, notify=notifier(context))
    prefer_fast(opened.model)
    ids = _prompt_tokens(opened, prompt)
    room_for(opened.model, len(ids))
    pieces, text = TextStream(opened.tokenizer), io.StringIO()

    def show(piece: str) -> None:
        text.write(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    show(pieces.put(ids))
    begun = len(text.getvalue())
    made = generate_tokens(
        opened.model,
        torch.tensor([ids], device=where),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_tokens=_stop_tokens(opened),
        each=lambda tokens: show(pieces.put(tokens)),
    )
    show(pieces.end())
    if as_json:
        written = {"text": text.getvalue()[begun:], **made.to_dict()}
        print_json({"model": model, "prompt": prompt, "kernels": kernels_of(opened), **written})
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    show_kernels(opened)
    for line in generation_lines(made):
        say_on_stderr(line)


def _prompt_tokens(opened: "OpenModel", prompt: str) -> list[int]:
    """The prompt's tokens, after the tokenizer's first one where it has one; raises SlimlmError where there are none."""
    tokenizer = opened.tokenizer
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = [*start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise SlimlmError("the prompt is empty and the tokenizer has no token to begin with; give --prompt some text")
    return ids


def _stop_tokens(opened: "OpenModel") -> list[int]:
    """The tokens that end a text, of the model and of the tokenizer."""
    from slimlm.inference.generate import stop_tokens_of

    own = opened.tokenizer.eos_token_id
    return sorted({*stop_tokens_of(opened.model), *([] if own is None else [own])})
