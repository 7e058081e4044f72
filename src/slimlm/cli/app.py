"""The command line: verbs, not knobs. Progress goes to standard error, results to standard output."""

import dataclasses
import inspect
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from slimlm.bench.gpu_tiles import tune_kernels
from slimlm.bench.model_speed import QUICK, Settings, model_speed, write_json
from slimlm.cli import demo as demonstration
from slimlm.cli import doctor as diagnosis
from slimlm.core import registry
from slimlm.core.errors import CheckpointError, DataError, KernelError, RecipeError, SlimlmError
from slimlm.core.step import Objective
from slimlm.data.documents import DEFAULT_DATA, documents
from slimlm.data.windows import check_seed, token_stream, windows_of
from slimlm.distributed.launch import own_rank, speaks, started
from slimlm.evaluation.activations import ActivationFormat, rounded_activations
from slimlm.evaluation.compare import OpenModel, open_any, same_tokens
from slimlm.evaluation.perplexity import perplexity
from slimlm.events import Event, Observer
from slimlm.inference.generate import Pieces, end_tokens, room_for
from slimlm.inference.generate import generate as generate_tokens
from slimlm.inference.load import read_description
from slimlm.models.opening import open_tokenizer, read_config
from slimlm.models.structure import context_length
from slimlm.pipeline import DEFAULT_RECIPE, estimate, pick_device
from slimlm.pipeline import compress as compress_model
from slimlm.pipeline import plan as make_plan
from slimlm.recipe import AS_STORED, open_recipe, shipped, to_toml
from slimlm.record import Record
from slimlm.report.estimate import estimate_table
from slimlm.report.live import shown
from slimlm.report.speed import generation_speed_table, layer_speed_table, speed_notes, speed_picture, tiles_table
from slimlm.report.tables import (
    choices_table,
    generation_words,
    layers_table,
    options_table,
    plain_table,
    plan_words,
    size,
    summary_table,
    verified_table,
)
from slimlm.runtime.dispatch import Kernels
from slimlm.runtime.whole_model import prefer_fast, prospect
from slimlm.runtime.whole_model import words as kernel_words
from slimlm.storage import checkpoint
from slimlm.verification.folder import verify as verify_folder

app = typer.Typer(
    name="slimlm",
    help="Make language models smaller without retraining them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Tables keep their width when piped; on a terminal they fit it.
output = Console(width=None if sys.stdout.isatty() else 160)
notes = Console(stderr=True)

Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress; notes and errors are shown all the same.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]

RecipeName = Annotated[str, typer.Option(help="A recipe's name (see 'slimlm methods') or a .toml file.")]
Bits = Annotated[float | None, typer.Option(help="Average bits per weight to spend, everything counted; plans each layer.")]
Counted = Annotated[Objective, typer.Option(help="What a budget counts: stored bits (size), or bytes and operations (speed).")]
EmbeddingBits = Annotated[
    int | None,
    typer.Option(
        help="Of input embedding and output head: 4 to 8; 16 leaves them as stored.  \\[default: what the recipe says]"
    ),
]
Data = Annotated[
    str | None,
    typer.Option(help=f".txt, .jsonl, .parquet or folder; hub data set; stdlib; self.  \\[default: {DEFAULT_DATA}]"),
]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens per window, at most the model's context.")]
Seed = Annotated[int, typer.Option(help="Which windows are drawn.")]

Memory = Annotated[
    str | None,
    typer.Option(
        help="Such as 8GiB: activations over it stay on the disk, plans over it are refused.  \\[default: half of what is free]"
    ),
]

Chosen = Annotated[
    Kernels, typer.Option("--kernels", help="Who multiplies compressed layers; auto: kernels where they take a layer.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        output.print(f"slimlm {version('slimlm')}", highlight=False)
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    """Make language models smaller without retraining them."""
    # `main` takes --debug off the line before typer sees it; it is declared here for --help.
    if started() > 1 and context.invoked_subcommand != "compress":
        raise SlimlmError(
            f"{context.invoked_subcommand} is work for one process; only compress divides it among several (torchrun)"
        )


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must not hold anything.")],
    recipe: RecipeName = DEFAULT_RECIPE,
    bits: Bits = None,
    objective: Counted = "size",
    embedding_bits: EmbeddingBits = None,
    data: Data = None,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Memory = None,
    restart: Annotated[bool, typer.Option("--restart", help="Drop what an unfinished run kept, and begin anew.")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Compress a model and write it packed; with --bits, plan first what each layer becomes.

    A run that was stopped goes on where it was when the same line is typed again.
    """
    with _stoppable(), shown(notes, silent=quiet) as observer:
        result = compress_model(
            model,
            out,
            recipe=recipe,
            bits=bits,
            objective=objective,
            embedding_bits=embedding_bits,
            tell=_tell,
            data=data,
            samples=samples,
            length=length,
            seed=seed,
            device=device,
            memory=_bytes(memory),
            restart=restart,
            progress=observer,
        )
    if own_rank() > 0:
        return
    kernels = _prospect(result.path)
    if as_json:
        _print_json({"path": str(result.path), "kernels": kernels, **result.record.to_dict()})
        return
    output.print(summary_table(result.record, kernels))
    output.print(f"\nwritten and verified: {result.path}", markup=False, highlight=False)


@app.command(name="plan")
def plan_(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    bits: Bits = None,
    objective: Counted = "size",
    embedding_bits: EmbeddingBits = None,
    save: Annotated[Path | None, typer.Option(help="Write the recipe that carries the plan out here (.toml).")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where it would be written: its disk is looked at.")] = None,
    recipe: RecipeName = DEFAULT_RECIPE,
    data: Data = None,
    samples: Samples = 128,
    length: Length = 2048,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Memory = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """What a run would find, need and take, before it; with --bits also what each layer could become and what is chosen.

    Without --bits (and without rank = "auto" in the recipe) no weight is read, and it takes seconds.
    """
    refuse_file(save)
    opened = open_recipe(recipe)
    asked: dict[str, Any] = {"bits": bits, "objective": objective, "embedding_bits": embedding_bits}
    asked |= {"samples": samples, "length": length, "device": device, "memory": _bytes(memory), "tell": _tell}
    planning = bits is not None or opened.needs_plan
    if save is not None and not planning:
        raise RecipeError('--save: there is no plan to save; give --bits, or a recipe with rank = "auto"')
    with shown(notes, silent=quiet) as observer:
        expected = estimate(model, out, recipe=opened, data=data, seed=seed, **asked)
        planned = make_plan(model, recipe=opened, data=data, seed=seed, progress=observer, **asked) if planning else None
    if save is not None and planned is not None:
        save.write_text(to_toml(planned[1]), encoding="utf-8")
    if as_json:
        found = {} if planned is None else {**planned[0].to_dict(), "embedding_bits": planned[1].embedding_bits}
        _print_json({"estimate": expected.to_dict(), **found})
        return
    output.print(estimate_table(expected))
    for words in expected.problems:
        output.print(f"\n{words}", markup=False, highlight=False, soft_wrap=True)
    if planned is not None:
        _show_plan(planned[0].to_dict(), planned[1].embedding_bits)
    if save is not None:
        output.print(f"written: {save}   next: slimlm compress MODEL --out OUT --recipe {save}", markup=False, highlight=False)


def _show_plan(data: dict[str, Any], embedding_bits: int) -> None:
    output.print()
    output.print(options_table(data))
    output.print()
    output.print(choices_table(data))
    output.print(f"\n{plan_words(data)}", markup=False, highlight=False)
    own = "as they are stored" if embedding_bits == AS_STORED else f"at {embedding_bits} bits"
    output.print(f"beside the budget: embedding and head {own}", markup=False, highlight=False)


_UNITS = {"": 1, "b": 1, "k": 2**10, "kib": 2**10, "m": 2**20, "mib": 2**20, "g": 2**30, "gib": 2**30, "t": 2**40, "tib": 2**40}
_UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def _bytes(text: str | None) -> int | None:
    """A size in bytes; raises SlimlmError where it is none."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _UNITS or (size := int(float(found[1]) * _UNITS[found[2]])) < 1:
        raise SlimlmError(f"--memory {text!r}: give a size such as 8GiB, 500MB or 2.5G")
    return size


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as schedulers and `kill` send it."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C ends with status 130, SIGTERM with 143, both without a traceback; the run has said what it keeps."""

    def terminate(number: int, frame: object) -> None:
        raise _TerminatedError

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except _TerminatedError:
        raise typer.Exit(143) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def refuse_file(path: Path | None) -> None:
    """Raise before any work where a recipe could not be written to this path."""
    if path is None:
        return
    if path.suffix != ".toml":
        raise RecipeError(f"--save {path}: a recipe's file ends in .toml")
    if path.exists() or not path.absolute().parent.is_dir():
        raise RecipeError(f"--save {path}: " + ("it exists already" if path.exists() else "there is no such folder"))


def _tell(text: str) -> None:
    notes.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


def _check_kernels(where: torch.device, kernels: Kernels) -> None:
    """Raise KernelError where kernels are asked for by name that run elsewhere, before anything is read."""
    if where.type != "cpu" and kernels in ("precise", "fast"):
        raise KernelError(f"--kernels {kernels}: these run on the CPU, and the device is {where}; use --device cpu")


def _tell_kernels(opened: OpenModel) -> None:
    if (words := kernel_words(opened.model)) is not None:
        notes.print(f"kernels: {words}", markup=False, highlight=False, soft_wrap=True)


def _prospect(folder: Path) -> str:
    """Who would multiply a checkpoint's layers here."""
    return prospect([about["parts"] for about in read_description(folder)["layers"].values()])


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Compressed folder, or any model.")],
    text: Annotated[str, typer.Option(help=".txt, .jsonl, .parquet or folder; hub data set; stdlib.")],
    against: Annotated[str | None, typer.Option(help="A second model to measure beside it.")] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window.  \\[default: the model's context, at most 2048]")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Stop reading after this many tokens.")] = None,
    activations: Annotated[
        ActivationFormat | None, typer.Option(help="Round the activations of the first model's linear layers.")
    ] = None,
    kernels: Chosen = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity on a text, of one model or of two side by side; on precise kernels unless told otherwise."""
    where = pick_device(device)
    sources = [source for source in (model, against) if source is not None]
    for folder in map(Path, sources):
        if (folder / checkpoint.RECORD).is_file():
            checkpoint.verify_files(folder)
    _check_kernels(where, kernels)
    models = [open_any(source, kernels=kernels, device=where, tell=_tell) for source in sources]
    for opened in models:
        _tell_kernels(opened)
    context = min(context_length(opened.model) or sys.maxsize for opened in models)
    window = length or min(context, 2048)
    if window > context:
        raise DataError(f"--length {window} is more than the model's context of {context} tokens")
    tokens = token_stream(models[0].tokenizer, documents(text, "evaluation"), at_most=max_tokens)
    windows = windows_of(tokens, window, source=text)
    if len(models) == 2 and not same_tokens(models[0], models[1], models[0].tokenizer.decode(windows[0])):
        raise DataError(f"{model} and {against} cut text into different tokens; their perplexities cannot be compared")
    with shown(notes) as observer:
        rows = [_evaluated(opened, windows, activations if opened is models[0] else None, observer) for opened in models]
    predicted = windows[:, 1:].numel()
    if as_json:
        _print_json({"text": text, "tokens": predicted, "length": window, "models": rows})
        return
    title = f"{predicted} tokens of {text}, windows of {window}"
    columns = ("model", "activations", "bits/weight", "size", "perplexity")
    table = [
        (r["model"], r["activations"], f"{r['bits_per_weight']:.3f}", size(r["bytes"]), f"{r['perplexity']:.4f}") for r in rows
    ]
    output.print(plain_table(title, columns, table, left=2))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Compressed folder, or any model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    kernels: Chosen = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Stream text from a model, on fast kernels unless told otherwise; how fast it came goes to standard error."""
    if max_new_tokens < 1 or temperature < 0:
        raise SlimlmError("--max-new-tokens must be at least 1 and --temperature at least 0")
    check_seed(seed)
    where = pick_device(device)
    _check_kernels(where, kernels)
    opened = open_any(model, kernels=kernels, device=where, tell=_tell)
    prefer_fast(opened.model)
    tokenizer = opened.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if not start + ids:
        raise SlimlmError("the prompt is empty and the tokenizer has no token to begin with; give --prompt some text")
    room_for(opened.model, len(start + ids))
    pieces, text = Pieces(tokenizer), io.StringIO()

    def show(piece: str) -> None:
        text.write(piece)
        if not as_json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    show(pieces.put(start + ids))
    begun = len(text.getvalue())
    made = generate_tokens(
        opened.model,
        torch.tensor([start + ids], device=where),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        ends=sorted({*end_tokens(opened.model), *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])}),
        each=lambda tokens: show(pieces.put(tokens)),
    )
    show(pieces.end())
    if as_json:
        written = {"text": text.getvalue()[begun:], **made.to_dict()}
        _print_json({"model": model, "prompt": prompt, "kernels": kernel_words(opened.model), **written})
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    _tell_kernels(opened)
    for line in generation_words(made.to_dict()):
        notes.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    out: Annotated[Path, typer.Argument(help="Compressed folder.")],
    against: Annotated[
        str | None, typer.Option(help="A dense model to measure beside it.  \\[default: random weights in the same shapes]")
    ] = None,
    kernels: Annotated[Kernels, typer.Option(help="auto, precise, fast or reference.")] = "auto",
    batch: Annotated[
        list[int] | None, typer.Option(help="Texts at once; may be given again.  \\[default: 1, 4 and 16]")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads to measure with.  \\[default: what torch uses]")
    ] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Of each text.  \\[default: 128]")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=1, help="Of each text, after the first.  \\[default: 32]")] = None,
    save: Annotated[
        Path | None, typer.Option("--out", help="Write the figures here (.json) and a picture beside it (.png).")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Coarse figures, in little time.")] = False,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="On an NVIDIA GPU: find the fastest tiles for these layers, and use them from now on."),
    ] = False,
    as_json: Json = False,
) -> None:
    """How fast the layers and the whole model run on this machine, beside dense ones and what reading memory allows."""
    if tune:
        given = (
            against,
            batch,
            threads,
            prompt_tokens,
            new_tokens,
            save,
            quick or None,
            None if kernels == "auto" else kernels,
        )
        if any(option is not None for option in given):
            raise SlimlmError("--tune measures the GPU kernels' tiles and nothing else; give it with --json at most")
        _tune(str(out), as_json)
        return
    if save is not None and (save.suffix != ".json" or not save.absolute().parent.is_dir()):
        raise SlimlmError(f"--out {save}: give a file that ends in .json, in a folder that exists")
    usual = QUICK if quick else Settings()
    settings = dataclasses.replace(
        usual,
        kernels=kernels,
        threads=threads or torch.get_num_threads(),
        batches=tuple(batch) if batch else usual.batches,
        prompt=prompt_tokens or usual.prompt,
        new=new_tokens or usual.new,
    )
    with shown(notes) as observer:
        result = model_speed(str(out), settings, against=against, report=lambda *at: observer(Event(*at)))
    told = speed_notes(result)
    if save is not None:
        write_json(save, result)
        told += [why for why in [speed_picture(result, save.with_suffix(".png"))] if why is not None]
    if as_json:
        _print_json(result)
    else:
        output.print(layer_speed_table(result))
        output.print()
        output.print(generation_speed_table(result))
    for words in told:
        _tell(words)


def _tune(source: str, as_json: bool) -> None:
    with shown(notes) as observer:
        found = tune_kernels(source, report=lambda *at: observer(Event(*at)), tell=_tell)
    if as_json:
        _print_json(found)
        return
    output.print(tiles_table(found))
    output.print(f"\nwritten: {found['path']}; used from now on", markup=False, highlight=False, soft_wrap=True)


@app.command(name="inspect")
def inspect_(
    out: Annotated[Path, typer.Argument(help="Compressed folder.")],
    as_json: Json = False,
) -> None:
    """What is in a compressed folder: every layer and the totals."""
    data = checkpoint.read_record(out)
    checkpoint.verify_files(out)
    kernels = _prospect(out)
    if as_json:
        _print_json({**data, "kernels": kernels})
        return
    record = Record.from_dict(data)
    try:
        tables = layers_table(record), summary_table(record, kernels)
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"the record of {out} is damaged: {error!r}") from error
    output.print(tables[0])
    output.print()
    output.print(tables[1])


_VERIFIED_TOKENS = 4096


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="Compressed folder.")],
    text: Annotated[
        str | None, typer.Option(help="Measure the perplexity, too: .txt, .jsonl, .parquet or folder; hub data set; stdlib.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window of the text.  \\[default: the model's context, at most 2048]")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help=f"Stop reading the text after this many tokens.  \\[default: {_VERIFIED_TOKENS}]")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check a compressed folder from end to end: checksums, masks, scales, every layer accounted for, and that it runs."""
    for option, given in (("--length", length), ("--max-tokens", max_tokens)):
        if text is None and given is not None:
            raise SlimlmError(f"{option} needs --text: it says how much of a text is read, and none is named")
    windows = None if text is None else _windows_for(out, text, length, max_tokens or _VERIFIED_TOKENS)
    found = verify_folder(out, windows, device=pick_device(device))
    if as_json:
        _print_json(found.to_dict())
    else:
        output.print(verified_table(found.to_dict()))
    found.raise_if_unsound()


def _windows_for(out: Path, text: str, length: int | None, max_tokens: int) -> torch.Tensor:
    """Token windows of a text for a checkpoint that is not opened."""
    checkpoint.read_record(out)
    if (tokenizer := open_tokenizer(str(out))) is None:
        raise DataError(f"{out} has no tokenizer, so text cannot be read; add its tokenizer files to the folder")
    config = read_config(str(out))
    own = config.get("text_config")
    context = (own if isinstance(own, dict) else config).get("max_position_embeddings")
    limit = context if isinstance(context, int) and context > 1 else 2048
    if length is not None and length > limit:
        raise DataError(f"--length {length} is more than the model's context of {limit} tokens")
    tokens = token_stream(tokenizer, documents(text, "evaluation"), at_most=max_tokens)
    return windows_of(tokens, length or min(limit, 2048, len(tokens)), source=text)


@app.command()
def methods(as_json: Json = False) -> None:
    """Every method with one line, its paper and its options; and the recipes."""
    found = [_method(kind, name) for kind in registry.KINDS for name in registry.names(kind)]
    if as_json:
        _print_json({"methods": found, "recipes": shipped()})
        return
    rows = [
        (m["kind"], m["name"], m["summary"], m["paper"], ", ".join(f"{k}={v!r}" for k, v in m["options"].items()))
        for m in found
    ]
    output.print(plain_table(None, ("step", "method", "what it does", "arXiv", "options and defaults"), rows, left=5))
    output.print()
    output.print(plain_table(None, ("recipe", "what it does"), list(shipped().items()), left=2))


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Keep the last model, compressed with recipe best, here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress the bundled model in several ways and show the figures beside the original's; offline."""
    with shown(notes) as observer:
        found = demonstration.run(out, observer)
    if as_json:
        _print_json(found.to_dict())
        return
    output.print(demonstration.table(found))
    output.print(f"\n{found.prompt}[...]", markup=False, highlight=False, style="bold")
    for name, continuation in found.continuations.items():
        output.print(f"\n-- {name}", style="bold", markup=False, highlight=False)
        output.print(continuation, markup=False, highlight=False)
    if out is not None:
        output.print(f"\nkept: {out}   try: slimlm generate {out} --prompt 'def main('", markup=False, highlight=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine and this installation offer: versions, memory, GPU, kernels; and what to do where they lack."""
    found = diagnosis.examine()
    if as_json:
        _print_json(found.to_dict())
        return
    output.print(diagnosis.table(found))
    for words in found.advice or ("all is well",):
        output.print(f"\n{words}", markup=False, highlight=False, soft_wrap=True)


def _method(kind: str, name: str) -> dict[str, Any]:
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


def _evaluated(
    opened: OpenModel, windows: torch.Tensor, activations: ActivationFormat | None, observer: Observer
) -> dict[str, Any]:
    def told(done: int, total: int) -> None:
        observer(Event(f"evaluate {opened.source}", done, total))

    with rounded_activations(opened.model, activations):
        measured = perplexity(opened.model, windows, progress=told)
    return {
        "model": opened.source,
        "kernels": kernel_words(opened.model),
        "activations": activations or "as they are",
        "bits_per_weight": opened.bits_per_weight,
        "bytes": opened.bytes,
        "perplexity": measured.value,
    }


def _print_json(data: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(data, indent=1) + "\n")


def _run(arguments: list[str]) -> None:
    """Run a verb, which ends in SystemExit once all it has to say is written."""
    try:
        app(args=arguments)
    except SystemExit:
        # What is still held back would fail where Python ends, without a word of ours.
        sys.stdout.flush()
        raise


def _silence_output() -> None:
    """Let nothing more go to standard output: Python would try once more at its end."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Entry point: an error of ours is one message and status 2; `--debug`, anywhere on the line, adds the traceback."""
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    transformers_logging.set_verbosity_error()
    try:
        _run(arguments)
    except SlimlmError as error:
        if debug:
            traceback.print_exc()
        if speaks(error):
            sys.stderr.write(f"slimlm: {error}\n")
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read has enough.
        _silence_output()
        sys.exit(1)
    except OSError as error:
        if debug:
            traceback.print_exc()
        _silence_output()
        where = f" ({error.filename})" if error.filename else ", of standard output or of a file"
        sys.stderr.write(f"slimlm: reading or writing failed{where}: {error.strerror or error}\n")
        sys.exit(2)
    except MemoryError:
        sys.stderr.write("slimlm: memory ran out\n")
        sys.exit(2)
