"""`slimlm bench`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from slimlm.cli import options
from slimlm.cli.console import notes, notifier, print_json, say, show
from slimlm.core.errors import SlimlmError
from slimlm.runtime.kernel_names import Kernels


def bench(
    context: typer.Context,
    folder: options.Folder,
    against: Annotated[
        str | None,
        typer.Option(help="A dense model to compare with.", show_default="random weights in the same shapes"),
    ] = None,
    kernels: Annotated[Kernels, typer.Option(help="Kernels for compressed layers; auto prefers the fast ones.")] = "auto",
    batches: Annotated[
        list[int] | None,
        typer.Option("--batch", help="Sequences at once; may be given several times.", show_default="1, 4 and 16"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads to measure with.", show_default="what torch uses")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens of each sequence.", show_default="128")
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="New tokens of each sequence, after the first.", show_default="32"),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--out", help="Write the figures to this .json file, and a plot next to it.", show_default="not written"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Coarse figures in little time.")] = False,
    tiles: Annotated[
        bool,
        typer.Option("--tiles", help="On an NVIDIA GPU: find the fastest tiles for these layers, and use them from now on."),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Measure the speed of the layers and the whole model, compared with dense ones and the bound of memory bandwidth."""
    if tiles:
        others = (against, batches, threads, prompt_tokens, new_tokens, save)
        if quick or kernels != "auto" or any(option is not None for option in others):
            raise SlimlmError("--tiles measures the GPU kernels' tiles and nothing else; give it with --json at most")
        _tiles(context, folder, as_json=as_json)
        return
    if save is not None and (save.suffix != ".json" or not save.absolute().parent.is_dir()):
        raise SlimlmError(f"--out {save}: give a file that ends in .json, in a folder that exists")

    import torch

    from slimlm.bench.model_speed import QUICK, Settings, model_speed, write_json
    from slimlm.display import progress_on
    from slimlm.events import Event
    from slimlm.report.speed import generation_speed_table, layer_speed_table, speed_notes, speed_picture

    usual = QUICK if quick else Settings()
    settings = dataclasses.replace(
        usual,
        kernels=kernels,
        threads=threads or torch.get_num_threads(),
        batches=tuple(batches or usual.batches),
        prompt_tokens=prompt_tokens or usual.prompt_tokens,
        new_tokens=new_tokens or usual.new_tokens,
    )
    with progress_on(notes) as observer:
        result = model_speed(str(folder), settings, against=against, report=lambda *at: observer(Event(*at)))
    remarks = speed_notes(result)
    if save is not None:
        write_json(save, result)
        remarks += [why for why in [speed_picture(result, save.with_suffix(".png"))] if why is not None]
    if as_json:
        print_json(result)
    else:
        show(layer_speed_table(result))
        say("")
        show(generation_speed_table(result))
    notify = notifier(context)
    for remark in remarks:
        notify(remark)


def _tiles(context: typer.Context, folder: Path, *, as_json: bool) -> None:
    from slimlm.bench.gpu_tiles import tune_kernels
    from slimlm.display import progress_on
    from slimlm.events import Event
    from slimlm.report.speed import tiles_table

    with progress_on(notes) as observer:
        found = tune_kernels(str(folder), report=lambda *at: observer(Event(*at)), notify=notifier(context))
    if as_json:
        print_json(found)
        return
    show(tiles_table(found))
    say(f"\nwritten: {found['path']}; used from now on")
