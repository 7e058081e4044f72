"""READ FIRST. The whole run: configuration -> the loop over blocks -> assemble -> verify.

    config = RunConfig(...)                       slimlm.run.config      what is asked for
    prepared = decide(prepare(config, run), run)  slimlm.run.prepare     model opened and tried, samples drawn, plan made
    for block in remaining_blocks(...):           slimlm.run.block       read from the files, one at a time
        compress_block(...)                                              measure inputs, apply the steps, swap the layers
        reconstruct_block(...)                                           where the recipe asks for it
        commit_block(...)                                                outputs are the next block's inputs; all in the journal
    finish(...)                                   slimlm.run.assemble    write the checkpoint, read it back, compare

Inside `compress_block` each linear layer goes through the recipe's steps:

    layer = Layer.of(name, weight)
    for step in recipe.steps_for(name):
        layer = step(layer, stats)
    swap(block, name, CompressedLinear.from_parts(layer.parts(), bias))

`slimlm.run.resume` begins, stops and resumes runs; `slimlm.storage.journal` stores the finished blocks of a run meanwhile.
"""

import dataclasses
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Unpack

import torch
from torch import Tensor

from slimlm.calibration.measurement import POOLED
from slimlm.core import arguments
from slimlm.core.defaults import usual_defaults
from slimlm.core.errors import RecipeError
from slimlm.display import Show, shown
from slimlm.events import Event, Notify, both, logged
from slimlm.models.lazy import open_lazy
from slimlm.models.opening import read_config
from slimlm.models.structure import blocks_of
from slimlm.planner.plan import Plan
from slimlm.preflight.checks import existing, free_on_disk, problems_of
from slimlm.preflight.estimate import Estimate, estimate_of, memory_of, timed
from slimlm.recipe import Recipe
from slimlm.record import Record, quality_warning
from slimlm.run.assemble import Before, assemble, contents_of, peak_memory, verify_written
from slimlm.run.block import BlockTask, commit_block, compress_block, reconstruct_block, remaining_blocks, starting_streams
from slimlm.run.config import RunConfig, RunOptions, pick_device
from slimlm.run.log import open_log
from slimlm.run.prepare import (
    Prepared,
    decide,
    dense_perplexity,
    outputs_before,
    plan_within_budget,
    prepare,
    prepare_comparison,
    refuse_unfit_model,
    rehearsed,
    run_needs,
    warn_of_guesses,
)
from slimlm.run.resume import Run, open_run
from slimlm.runtime.memory import format_bytes
from slimlm.runtime.waiting import spinning_on_a_busy_machine
from slimlm.storage import checkpoint
from slimlm.storage.journal import MOVING, Journal

_NAMED_LAYERS = 8


@dataclass(frozen=True, repr=False)
class Result:
    """The result of `compress`; printed, it is a few lines."""

    path: Path
    """The folder that was written."""
    record: Record
    """The figures of each compressed layer, and the totals."""

    def __repr__(self) -> str:
        """Where the model is, its bits, its sizes and its perplexity; `record` has the rest."""
        record = self.record
        share = f"{record.stored_bytes / record.original_bytes:.1%} of the original"
        lines = [
            f"slimlm.Result: {record.model} by recipe {record.recipe['name']}",
            f"path             {self.path}",
            f"bits per weight  {record.bits_per_weight:.3f} in {len(record.layers)} layers",
            f"size             {format_bytes(record.original_bytes)} -> {format_bytes(record.stored_bytes)} ({share})",
        ]
        if (found := record.perplexity) is not None:
            of = f"on {found.tokens} tokens of the calibration text"
            lines.append(f"perplexity       {found.dense:.3f} -> {found.compressed:.3f} {of}")
        if (apart := record.divergence) is not None:
            means = f"mean {apart.mean.value:.4f} nats per token, same top token {apart.same_top.value:.1%}"
            lines.append(f"KL to original   {means}, on {apart.tokens} tokens of that text that were held back")
        return "\n".join(lines)


@usual_defaults()
def compress(
    model: str | Path,
    out: str | Path,
    *,
    restart: bool = False,
    progress: Show = "auto",
    notify: Notify = logged,
    **options: Unpack[RunOptions],
) -> Result:
    """Compress a causal language model and write it to a folder.

    Weights are read block by block. Every finished block is stored in a journal next to `out` until the run is done: a run that
    was stopped is resumed when this is called again with the same arguments; other arguments are refused. A log with the
    figures of every layer is written next to `out`, too, and stays there (slimlm.run.log). Started as several processes
    (torchrun) it divides the work among them; only the first writes and reports, and all return the record (docs/scaling.md).

    Args:
        model: A folder or a hub name.
        out: The folder to write, which must not hold anything.
        restart: Drop the journal of an unfinished run and start again.
        progress: True: a display on a terminal, lines elsewhere; False: nothing; "auto": a display on a terminal, lines in a
            notebook, nothing elsewhere; or an observer of the run's events.
        notify: A function that is given messages for the user; without one they are warnings of the logger "slimlm".
        **options: The fields of `RunConfig`, with the same defaults:
            recipe: A shipped name ("best"), a .toml file, its content as a dict, or a Recipe.
            bits: Average bits per weight that may be spent, everything counted; how each layer is stored is then planned.
            objective: What that budget counts: "size" or "speed".
            embedding_bits: Bits of input embedding and output head, 4 to 8, or 16 to keep them as stored; None: the recipe's.
            ignore: A pattern on the full names of layers that are not compressed ("*.down_proj"), or several.
            data: The calibration text: a file, a folder, a hub data set, "stdlib", "self", or a list of texts; or several by
                name, each with its share of the samples: {"a.jsonl": 0.7, "b.txt": 0.3}.
            chat: What the tokenizer's chat template is applied to: conversations in the text ("auto"), text, too, as a message
                of the user ("yes"), or nothing ("no").
            samples: The number of calibration samples; left out, as many as the model and the recipe need.
            length: Tokens per sample (512), at most the model's context.
            seed: The seed by which samples are drawn.
            device: "auto", "cpu", "cuda" or "cuda:N"; one block at a time is worked on there.
            memory: Bytes ("8GB") that calibration activations may take before they stay on the disk; None: half of the free
                memory.

    Returns:
        The folder and the record of what was done; `record.quality` says whether the perplexity rose too far.

    Raises:
        SlimlmError: The model, the recipe, the text or the machine does not suit the run; raised before the work begins
            wherever that can be known.
    """
    arguments.flag(restart, "restart")
    arguments.function(notify, "notify", "each message for the user")
    config = RunConfig.of(model, out, **options)
    folder = arguments.path(out, "out")
    read_config(config.model)  # A path that is no model is refused before any folder is made.
    with (
        shown(progress) as observer,
        open_run(folder, Path(config.model), restart=restart, progress=observer, notify=notify) as run,
    ):
        if (warning := spinning_on_a_busy_machine(torch.get_num_threads())) is not None:
            run.notify(warning)
        prepared = prepare(config, run)
        if run.group.first:
            warn_of_guesses(prepared, run)
            prepare_comparison(prepared, run)
        prepared = decide(prepared, run)
        if run.journal.blocks:
            run.notify(
                f"resuming after block {len(run.journal.blocks)} of {len(prepared.blocks)}, stored in {run.journal.folder}"
            )
        with open_log(prepared, run) as log:
            run = dataclasses.replace(run, progress=both(run.progress, log))
            run.journal.begin()
            streams = starting_streams(prepared, run)
            for block, block_progress in remaining_blocks(prepared, run):
                task = BlockTask.of(block, block_progress, streams, prepared)
                layers = compress_block(task)
                if prepared.recipe.block_reconstruction is not None:
                    layers = reconstruct_block(task, layers, prepared)
                streams = commit_block(task, layers, streams, prepared)
            outputs = streams.compressed.hidden
            record = Record.from_dict(run.group.broadcast(lambda: finish(prepared, outputs[0], run).to_dict()))
            log.end(record)
        run.journal.remove()
    _warn(record, run.notify)
    return Result(folder, record)


def finish(prepared: Prepared, outputs: Tensor, run: Run) -> Record:
    """Write the checkpoint of a journal whose blocks are all done, verify it, and then move it to its place.

    Args:
        prepared: The original model and the decisions of the run.
        outputs: The last block's outputs for the first batch of samples, `[samples, length, width]`.
        run: The run.
    """
    assert prepared.config.out is not None
    run.progress(Event("write", 0, 1))
    contents = contents_of(prepared, run.journal)
    note_moving = partial(run.journal.note, MOVING)
    with checkpoint.written_beside(prepared.config.out, run.journal.folder / "finished", note_moving) as folder:
        record, files = assemble(folder, contents, prepared, run)
        run.progress(Event("verify", 0, 1))
        before = Before(dense_perplexity(prepared, run).value, outputs_before(prepared, run))
        compared, divergence = verify_written(folder, contents, outputs, prepared, before)
        record = dataclasses.replace(record, perplexity=compared, divergence=divergence)
        record = dataclasses.replace(record, seconds=run.journal.elapsed, peak_memory=peak_memory())
        checkpoint.write_record(folder, record.to_dict(), files)
    run.progress(Event("verify", 1, 1))
    return record


def _warn(record: Record, notify: Notify) -> None:
    """Notify the user of pooled experts, a failed quality check and an exceeded budget."""
    pooled = [layer.name for layer in record.layers if POOLED in layer.notes]
    if pooled:
        more = f" and {len(pooled) - _NAMED_LAYERS} more, which slimlm.json names" if len(pooled) > _NAMED_LAYERS else ""
        notify(
            f"{len(pooled)} of the experts' layers were given fewer calibration tokens than they have inputs, and were "
            f"compressed by the inputs of all experts of their block: {', '.join(pooled[:_NAMED_LAYERS])}{more}. With more "
            "text or `samples` each is measured on its own inputs"
        )
    if (warning := quality_warning(record)) is not None:
        notify(warning)
    spent, plan_ = record.bits_per_weight, record.plan
    if plan_ is not None and plan_["objective"] == "size" and spent > plan_["asked_bits"]:
        notify(
            f"{spent:.3f} bits per weight were stored, over the {plan_['asked_bits']:g} asked for: some scales are too small "
            "for float16, and their layers' take 32 bits. Ask for a little less"
        )


@usual_defaults()
def plan(
    model: str | Path, *, progress: Show = "auto", notify: Notify = logged, **options: Unpack[RunOptions]
) -> tuple[Plan, Recipe]:
    """Choose how each layer is stored within a budget; one block is in memory at a time.

    Args:
        model: A folder or a hub name.
        progress: As for `compress`.
        notify: As for `compress`.
        **options: As for `compress`; with `bits` left out the recipe must say rank = "auto".

    Returns:
        The plan, and the recipe that carries it out.

    Raises:
        SlimlmError: As for `compress`.
    """
    arguments.function(notify, "notify", "each message for the user")
    config = RunConfig.of(model, **options)
    with TemporaryDirectory() as scratch, shown(progress) as observer:
        prepared = prepare(config, Run(Journal(Path(scratch)), progress=observer, notify=notify))
        if prepared.budget is None:
            raise RecipeError(
                f'there is nothing to plan: give `bits`, or a recipe with rank = "auto" ({prepared.recipe.name} has none)'
            )
        warn_of_guesses(prepared, Run(prepared.activations.journal, notify=notify))
        found = plan_within_budget(prepared, observer)
    return found, found.recipe(prepared.recipe)


@usual_defaults()
def estimate(
    model: str | Path, out: str | Path | None = None, *, notify: Notify = logged, **options: Unpack[RunOptions]
) -> Estimate:
    """Estimate what `compress` would need: layers, bits, tokens, memory, disk, and time by stages.

    The model is rehearsed as `compress` does it: run on a few random tokens, each block read once, so that one which cannot be
    compressed is refused here. Where not even a block fits in memory, that is among the problems, and no weight is read. No
    text is read: calibration is assumed to have as many samples as are asked for. The rates behind the times are measured on
    this machine, which takes some seconds.

    Args:
        model: A folder or a hub name.
        out: The folder that would be written: its disk is checked, and that nothing is there.
        notify: As for `compress`.
        **options: As for `compress`; a file or folder in `data` must exist.

    Returns:
        The estimate; `Estimate.problems` says what does not fit.

    Raises:
        SlimlmError: The model cannot be compressed, or the recipe does not suit it, as for `compress`.
    """
    arguments.function(notify, "notify", "each message for the user")
    config = RunConfig.of(model, out, **options)
    device = pick_device(config.device)
    config.budget()  # Raises where the budget makes no sense.
    folder = None if config.out is None else existing(config.out)
    free = None if folder is None else free_on_disk(folder)
    # On the disk that `compress` would use, where that can be written; that of temporary files may be in memory.
    above = None if config.out is None else existing(config.out.absolute().parent)
    place = above if above is not None and os.access(above, os.W_OK) else None
    with TemporaryDirectory(prefix=".slimlm-", dir=place) as scratch:
        dense = open_lazy(config.model, Path(scratch), notify)
        refuse_unfit_model(dense, blocks_of(dense.model))
        needs = rehearsed(run_needs(config, dense), config.memory)
        return estimate_of(
            needs,
            name=config.model_name,
            memory=memory_of(needs, config.memory),
            disk_free=free,
            times=timed(needs, folder, device),
            problems=problems_of(needs, device, config.out, config.memory, config.data),
        )
