"""READ FIRST. compress(): block by block: measure, apply the steps, swap, pass on.

    for block in blocks:
        for stage in stages(block):                     # layers whose inputs come about together; one stage unless sequential
            stats = measure(block, inputs)              # what the steps need, on the compressed prefix's outputs
            for each linear layer of the stage:
                layer = Layer.of(name, weight)
                for step in recipe.steps_for(layer):
                    layer = step(layer, stats)
                swap(layer, CompressedLinear(layer.parts(), bias))
        match(block)                                    # where the recipe asks for it
        inputs = block(inputs)                          # now the compressed block

That is slimlm.run.block. Embedding and head follow where the recipe asks for it (slimlm.run.embeddings). Then the packed
tensors are written and checked (slimlm.verification.folder), and the reloaded model's logits compared with those in memory
(slimlm.run.assemble).
"""

import dataclasses
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.calibration.capture import BlockInputs, shares_of
from slimlm.calibration.measurement import POOLED
from slimlm.calibration.samples import Calibration, kept_windows
from slimlm.core.errors import CheckpointError, DataError, ModelError, RanksError, RecipeError, SlimlmError
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.step import Objective
from slimlm.data.documents import DEFAULT_DATA
from slimlm.data.windows import check_seed
from slimlm.distributed.launch import joined, local_rank, started
from slimlm.events import Event, Observer, both, quiet
from slimlm.models.lazy import StreamedModel, open_streamed, weight_files
from slimlm.models.opening import DenseModel, open_dense, read_config, words_of
from slimlm.models.structure import blocks_of, context_length, text_config
from slimlm.planner.options import Budget, options_of
from slimlm.planner.plan import Plan, asked_budget, auto_budget, make_plan, refuse_budget, refuse_few_windows
from slimlm.preflight.checks import check_device, check_disk, check_memory, check_whole, existing, free_on_disk, problems_of
from slimlm.preflight.estimate import Estimate, Memory, estimate_of, memory_of, timed
from slimlm.preflight.job import Job
from slimlm.preflight.refusals import compressible, read_once, refuse_early, tell_of_few_tokens, without_ends
from slimlm.recipe import Recipe, check_embedding_bits, open_recipe, recipe_from_dict
from slimlm.record import Record, explosion, layer_from
from slimlm.run.assemble import contents_of, verify, write
from slimlm.run.block import compress_blocks, own_windows
from slimlm.run.embeddings import Ends, ends_of
from slimlm.run.log import RunLog, end_of, open_log
from slimlm.runtime.memory import in_words
from slimlm.storage import checkpoint
from slimlm.storage.file_limits import make_room
from slimlm.storage.journal import MOVING, OWN_TEXT, PLAN, Journal, identity_of, open_journal

_FILES_BESIDE = 32
"""Files that a run may have open beside mapped ones: libraries' and its own for a moment."""


@dataclass(frozen=True)
class Result:
    """What `compress` gives back."""

    path: Path
    record: Record


Tell = Callable[[str], None]
"""Told in words what the user should know."""

DEFAULT_RECIPE = "best"


def silent(text: str) -> None:
    """Keeps what it is told to itself."""


def compress(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    bits: float | None = None,
    objective: Objective = "size",
    embedding_bits: int | None = None,
    data: str | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    memory: int | None = None,
    restart: bool = False,
    progress: Observer = quiet,
    tell: Tell = silent,
) -> Result:
    """Compress a causal language model and write it to the folder `out`.

    model: a folder or a hub name. recipe: a shipped name, a .toml file or a Recipe. bits: average bits per weight that may be
    spent, everything counted; what each layer becomes is then planned (see slimlm.planner). embedding_bits: of input embedding
    and output head, 4 to 8, or 16 to leave them as they are stored; None: what the recipe says. data: see `Calibration`.
    device: "auto", "cpu" or "cuda"; one block at a time is there. memory: bytes that calibration activations may take before
    they stay on the disk (None: half of what is free); what needs the whole model is refused where that is larger. tell: told
    in words what the user should know.

    Weights are read block by block. Every finished block is kept in a journal beside `out` until all is done: a run that was
    stopped goes on when it is called again with the same arguments; other arguments are refused. restart: drop what is kept.
    A log with the figures of every layer grows beside `out`, too, and stays there (slimlm.run.log). Raises a SlimlmError in
    words for anything that would not work, before the work begins wherever that can be known.

    Started as several processes (torchrun) it divides the work among them; only the first writes, tells and shows progress, and
    all return the record (see docs/scaling.md).
    """
    wanted = Calibration(data or DEFAULT_DATA, samples, length, seed)
    asked = Asked(str(model), asked_recipe(recipe, embedding_bits), bits, objective, wanted, device, memory, Path(out))
    # What is no model at all is known before anything is made.
    read_config(str(model))
    with joined() as group:
        if group.first:
            checkpoint.refuse_occupied(Path(out), restart=restart)
        else:
            progress, tell = quiet, silent
        with open_journal(Path(out), restart=restart, group=group) as journal, gone_on_with(journal, tell):
            if group.first:
                # Once more under the lock: the process that held it may have finished meanwhile.
                checkpoint.refuse_occupied(Path(out), restart=restart)
            ready = prepare(asked, journal, progress, tell)
            recipe, found = plan_of(ready, journal, progress)
            ready = dataclasses.replace(ready, whole=None)
            if journal.blocks:
                tell(f"going on after block {len(journal.blocks)} of {len(ready.blocks)}, kept in {journal.folder}")
            with logged(Path(out), asked, ready, recipe, journal) as log:
                journal.begin()
                told = progress if log is None else both(progress, log)
                flow = compress_blocks(ready.dense, ready.blocks, recipe, ready.windows, ready.device, told, journal)
                finish = partial(finished, Path(out), asked, ready, recipe, found, flow, journal, told)
                record = Record.from_dict(group.told(lambda: finish().to_dict()))
                if log is not None:
                    log.add(end_of(record))
            journal.remove()
    tell_of_starved([layer.name for layer in record.layers if POOLED in layer.notes], tell)
    if (warning := explosion(record)) is not None:
        tell(warning)
    spent = record.bits_per_weight
    if found is not None and found["objective"] == "size" and spent > found["asked_bits"]:
        tell(
            f"{spent:.3f} bits per weight were stored, over the {found['asked_bits']:g} asked for: some scales are too small "
            "for float16, and their layers' take 32 bits. Ask for a little less"
        )
    return Result(Path(out), record)


@contextmanager
def logged(out: Path, asked: "Asked", ready: "Ready", recipe: Recipe, journal: Journal) -> Iterator[RunLog | None]:
    """The log of the run; only the first of several ranks keeps one."""
    if not journal.group.first:
        yield None
        return
    with open_log(out, log_header(asked, ready, recipe, journal)) as log:
        yield log


@contextmanager
def gone_on_with(journal: Journal, tell: Tell) -> Iterator[None]:
    """Say what is kept and how to go on where a run goes on, is stopped, or finds the disk full."""

    def words() -> str:
        if journal.restarting:
            return f"nothing is kept of it; what was in {journal.folder} before --restart still is"
        if not journal.worth:
            return "no block was finished, and nothing is kept"
        return f"{len(journal.blocks)} finished blocks are kept in {journal.folder}; the same line goes on from there"

    try:
        yield
    except KeyboardInterrupt:
        tell(f"stopped: {words()}")
        raise
    except RanksError as error:
        raise RanksError(f"{error}; {words()}", speaks=error.speaks) from error
    except OSError as error:
        raise CheckpointError(f"reading or writing failed: {error}; {words()}") from error
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise SlimlmError(f"memory ran out ({words_of(error)}); {words()}. Give it more, or fewer --samples") from error
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise CheckpointError(f"{error}; {words()}") from error
        raise


def _is_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    """Torch and Python have no class for it where the CPU's memory ran out and where a thread finds no room for its stack."""
    said = ("allocate memory", "can't start new thread")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)


def finished(
    out: Path,
    asked: "Asked",
    ready: "Ready",
    recipe: Recipe,
    found: dict[str, Any] | None,
    flow: BlockInputs,
    journal: Journal,
    progress: Observer,
) -> Record:
    """Write the checkpoint of a journal whose blocks are all done, and verify it; gives its record."""
    progress(Event("write", 0, 1))
    dense, layers = ready.dense, [layer_from(row) for block in journal.blocks for row in block.records]
    contents = contents_of(dense, ready.blocks, ready.ends, journal)
    inside = sum(p.numel() for block in ready.blocks.values() for p in block.parameters() if p.ndim > 1)
    record = Record(
        model=_own_name(asked.model),
        recipe=recipe.to_dict(),
        calibration=calibrated_on(asked, ready),
        layers=tuple(layers),
        ends=tuple(contents.ends),
        left=ready.left,
        coverage=sum(r.shape[0] * r.shape[1] for r in layers) / inside,
        original_bytes=dense.bytes,
        stored_bytes=0,
        seconds=0.0,
        peak_memory=None,
        versions=_versions(),
        plan=found,
    )
    moving = partial(journal.note, MOVING)
    with checkpoint.written_beside(out, journal.folder / "finished", moving) as folder:
        files = write(folder, dense, contents)
        record = dataclasses.replace(record, stored_bytes=checkpoint.stored_bytes(folder))
        checkpoint.write_record(folder, record.to_dict(), files)
        progress(Event("verify", 0, 1))
        compared = verify(folder, dense, ready.blocks, contents, flow, own_windows(ready.windows, journal), ready.device)
        record = dataclasses.replace(record, perplexity=compared, seconds=journal.elapsed, peak_memory=peak_memory())
        checkpoint.write_record(folder, record.to_dict(), files)
    progress(Event("verify", 1, 1))
    return record


def calibrated_on(asked: "Asked", ready: "Ready") -> dict[str, Any]:
    """What a record says of the calibration text."""
    return {
        **dataclasses.asdict(asked.calibration),
        "data": _own_name(asked.calibration.data),
        "asked": asked.calibration.samples,
        "samples": ready.windows.shape[0],
        "length": ready.windows.shape[1],
        "tokens": ready.windows.numel(),
    }


def log_header(asked: "Asked", ready: "Ready", recipe: Recipe, journal: Journal) -> dict[str, Any]:
    """What the run's log begins with."""
    return {
        "model": _own_name(asked.model),
        "recipe": recipe.to_dict(),
        "calibration": calibrated_on(asked, ready),
        "device": str(ready.device),
        "blocks": len(ready.blocks),
        "after": len(journal.blocks),
        "left": ready.left,
        "versions": _versions(),
    }


def plan(
    model: str | Path,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    bits: float | None = None,
    objective: Objective = "size",
    embedding_bits: int | None = None,
    data: str | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    memory: int | None = None,
    progress: Observer = quiet,
    tell: Tell = silent,
) -> tuple[Plan, Recipe]:
    """Choose what each layer becomes within a budget; gives the plan and the recipe that carries it out.

    The arguments are those of `compress`; with `bits` left out the recipe must say rank = "auto". The whole model is in memory
    meanwhile, in float32.
    """
    wanted = Calibration(data or DEFAULT_DATA, samples, length, seed)
    asked = Asked(str(model), asked_recipe(recipe, embedding_bits), bits, objective, wanted, device, memory)
    with TemporaryDirectory() as scratch:
        ready = prepare(asked, Journal(Path(scratch)), progress, tell)
        if ready.budget is None:
            raise RecipeError(
                f'there is nothing to plan: give --bits, or a recipe with rank = "auto" ({ready.recipe.name} has none)'
            )
        found = planned(ready, progress)
    return found, found.recipe(ready.recipe)


def estimate(
    model: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Recipe = DEFAULT_RECIPE,
    bits: float | None = None,
    objective: Objective = "size",
    embedding_bits: int | None = None,
    data: str | None = None,
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str = "auto",
    memory: int | None = None,
    tell: Tell = silent,
) -> Estimate:
    """What `compress` would need with the same arguments: layers, bits, tokens, memory, disk, and time by stages.

    No weight and no text is read (but for old .bin files, which are converted first, and models that have to be opened whole):
    calibration is taken to have as many windows as are asked for. The rates behind the times are measured on this machine,
    which takes some seconds. out: where it would be written, so that its disk is looked at, and
    whether anything is there. data: looked for, where it is a file or folder. Raises
    what `compress` would raise for a recipe that does not suit the model; what does not fit is in `Estimate.problems`.
    """
    asked = Asked(
        str(model),
        asked_recipe(recipe, embedding_bits),
        bits,
        objective,
        Calibration(data or DEFAULT_DATA, samples, length, seed),
        device,
        memory,
    )
    where, planning = pick_device(device), budget_asked(asked) is not None or asked.recipe.needs_plan
    with TemporaryDirectory() as scratch:
        dense = open_streamed(asked.model, Path(scratch), tell)
        blocks, ends = blocks_of(dense.model), ends_of(dense.model, asked.recipe.embedding_bits)
        left = without_ends(refuse_early(dense, blocks, asked.recipe, planning=planning), ends)
        job = Job(dense, blocks, asked.recipe, ends, left, samples, min(length, context_length(dense.model) or length), bits)
        folder = None if out is None else existing(Path(out))
        return estimate_of(
            job,
            name=_own_name(asked.model),
            memory=memory_of(job, memory),
            disk_free=None if folder is None else free_on_disk(folder),
            seconds=timed(job, folder, where),
            problems=problems_of(job, where, None if out is None else Path(out), memory, data),
        )


@dataclass(frozen=True)
class Asked:
    """What a run was asked for."""

    model: str
    recipe: Recipe
    bits: float | None
    objective: Objective
    calibration: Calibration
    device: str
    memory: int | None
    """bytes; see `compress`"""
    out: Path | None = None
    """None: nothing is to be written"""

    def __post_init__(self) -> None:
        check_seed(self.calibration.seed)

    def identity(self, files: list[Path], config: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """What the result depends on, but for weights and calibration text, which the journal compares when they are read."""
        own = {**dataclasses.asdict(self.calibration), "data": _own_name(self.calibration.data)}
        return {
            "model": identity_of(files),
            "config": config,
            "recipe": self.recipe.to_dict(),
            "budget": {"bits": self.bits, "objective": self.objective},
            "calibration": own,
            "device": device.type,
            "versions": {name: version(name) for name in ("slimlm", "torch", "transformers")},
        }


@dataclass(frozen=True)
class Ready:
    """A model, opened and checked, before any work."""

    dense: StreamedModel
    blocks: dict[str, nn.Module]
    recipe: Recipe
    ends: Ends
    """what becomes of embedding and head"""
    left: dict[str, str]
    """layers that stay as they are, and why"""
    windows: Tensor
    device: torch.device
    budget: Budget | None
    """None where nothing is to be planned"""
    whole: DenseModel | None
    """the model in memory, where a plan is still to be made"""


def asked_recipe(recipe: str | Recipe, embedding_bits: int | None) -> Recipe:
    """The recipe, opened, with other bits for embedding and head where they are asked for."""
    found = open_recipe(recipe) if isinstance(recipe, str) else recipe
    if embedding_bits is None:
        return found
    return dataclasses.replace(found, embedding_bits=check_embedding_bits(embedding_bits, "embedding_bits"))


def prepare(asked: Asked, journal: Journal, progress: Observer, tell: Tell) -> Ready:
    """Open the model and check everything that can be checked; raises in words. What the journal keeps is not made again."""
    recipe, bits, objective = asked.recipe, asked.bits, asked.objective
    where, budget = pick_device(asked.device), budget_asked(asked)
    planning = bits is not None or recipe.needs_plan
    progress(Event("open the model", 0, 1))
    dense = open_streamed(asked.model, journal.folder / "original", tell)
    blocks = blocks_of(dense.model)
    files = weight_files(dense.folder)
    make_room(most_files(dense, len(files), len(blocks)))
    alike = ("model", "config", "recipe", "budget", "device", "versions")
    journal.meet(asked.identity(files, dense.config, where), alike=alike)
    with dense.ends_filled(blocks):
        ends = ends_of(dense.model, recipe.embedding_bits)
    left = refuse_early(dense, blocks, recipe, planning=planning)
    if journal.group.first:
        journal.meet_weights(read_once(dense, blocks))
    left = without_ends(left, ends)
    progress(Event("open the model", 1, 1))
    shapes = compressible(blocks, recipe)
    if planning and budget is None:
        budget = auto_budget(recipe, list(shapes.values()), objective)
    if budget is not None:
        refuse_budget(shapes, budget)
    reasons = needs_whole(asked, journal, planning=planning) if journal.group.first else []
    whole = open_whole(asked, dense, reasons, tell) if reasons else None
    windows = journal.group.tensor_told(lambda: kept_windows(dense, whole, asked.calibration, journal, progress))
    journal.shares = shares_of(windows, journal.group.size)
    if budget is not None:
        refuse_few_windows(len(windows))
    if recipe.block_reconstruction is not None and len(windows) < 2:
        raise DataError("block matching holds windows back and needs at least 2; there is 1. Give more text or --samples")
    if Covariance in recipe.needs:
        tell_of_few_tokens(shapes, windows.numel(), tell)
    job = Job(dense, blocks, recipe, ends, left, len(windows), windows.shape[1], bits)
    refuse_unfit(job, asked, journal, where, tell)
    if asked.out is not None:
        choose_place(asked, job, journal, tell)
    return Ready(dense, blocks, recipe, ends, left, windows, where, budget, whole if PLAN not in journal.notes else None)


def most_files(dense: StreamedModel, files: int, blocks: int) -> int:
    """How many more files are open at once at the end of a run: the journal's, the original's again, and the new shards."""
    return blocks + files + dense.bytes // checkpoint.SHARD_BYTES + _FILES_BESIDE


def budget_asked(asked: Asked) -> Budget | None:
    """The budget where bits were asked for; raises RecipeError where that makes no sense, whatever the model."""
    if asked.bits is not None:
        return asked_budget(asked.recipe, asked.bits, asked.objective)
    if asked.recipe.needs_plan:
        options_of(asked.recipe, None, asked.objective)
    elif asked.objective != "size":
        raise RecipeError(f"--objective {asked.objective} says what a budget counts, and there is none; give --bits")
    return None


def needs_whole(asked: Asked, journal: Journal, *, planning: bool) -> list[str]:
    """For what the whole model has to be in memory, in words; what the journal keeps needs it no more."""
    reasons = ["a plan"] if planning and PLAN not in journal.notes else []
    return [*reasons, "text of its own"] if asked.calibration.data == "self" and OWN_TEXT not in journal.notes else reasons


def open_whole(asked: Asked, dense: StreamedModel, reasons: list[str], tell: Tell) -> DenseModel:
    """The model in float32; raises ModelError where that is more than the memory that may be used."""
    what, size = " and ".join(reasons), dense.whole_bytes
    check_whole(size, asked.memory)
    # A plan holds the activations of all windows in memory beside it.
    width = getattr(text_config(dense.model), "hidden_size", None) or 0
    held = asked.calibration.samples * asked.calibration.length * width * 4 if "a plan" in reasons else 0
    if asked.memory is not None and size + held > asked.memory:
        raise ModelError(
            f"for {what} the whole model has to be in memory, {in_words(size + held)} with activations, more than --memory "
            f"{in_words(asked.memory)}; give more, or a recipe without a plan and calibration text from a file"
        )
    tell(f"for {what} the whole model is in memory meanwhile: {in_words(size)} in float32")
    return open_dense(asked.model)


def refuse_unfit(job: Job, asked: Asked, journal: Journal, device: torch.device, tell: Tell) -> None:
    """Raise DoesNotFitError where memory or disk surely do not suffice; tells where they are tight."""
    check_device(job, device)
    warnings = [check_memory(own_memory(job, asked, journal), asked.memory)]
    if asked.out is not None and journal.group.first:
        warnings.append(check_disk(job, asked.out, journal.folder))
    for text in filter(None, warnings):
        tell(text)


def own_memory(job: Job, asked: Asked, journal: Journal) -> Memory:
    """What this process holds: of several ranks each has its windows, and the first matches blocks on all of them."""
    group, share = journal.group, journal.share
    if group.size > 1 and group.first and asked.recipe.block_reconstruction is not None:
        share += job.windows
    return memory_of(dataclasses.replace(job, windows=share), asked.memory, processes=group.here)


def choose_place(asked: Asked, job: Job, journal: Journal, tell: Tell) -> None:
    """Decide whether activations stay in memory; they are written after every block in any case."""
    found = own_memory(job, asked, journal)
    journal.in_memory = not found.on_disk
    if found.on_disk:
        why = "--memory allows" if asked.memory is not None else "half of the free memory"
        limit = asked.memory if asked.memory is not None else (found.free or 0) // 2
        size = in_words(found.activations)
        tell(f"activations ({size}) stay on the disk, in {journal.folder}: more than {why}, {in_words(limit)}")


_NAMED = 8


def tell_of_starved(layers: list[str], tell: Tell) -> None:
    """Name the experts' layers that were given too few tokens to be measured by themselves."""
    if not layers:
        return
    more = f" and {len(layers) - _NAMED} more, which slimlm.json names" if len(layers) > _NAMED else ""
    tell(
        f"{len(layers)} of the experts' layers were given fewer calibration tokens than they have inputs, and were compressed "
        f"by what all experts of their block were given: {', '.join(layers[:_NAMED])}{more}. More text or --samples lets them "
        "be measured by themselves"
    )


def planned(ready: Ready, progress: Observer) -> Plan:
    """The plan for what was prepared with a budget."""
    assert ready.budget is not None and ready.whole is not None
    model = ready.whole.model
    return make_plan(
        model,
        blocks_of(model),
        ready.recipe,
        ready.windows,
        budget=ready.budget,
        device=ready.device,
        progress=progress,
    )


def plan_of(ready: Ready, journal: Journal, progress: Observer) -> tuple[Recipe, dict[str, Any] | None]:
    """The recipe to carry out and, where it was planned, the plan; one that the journal keeps is not made again."""
    if ready.budget is None:
        return ready.recipe, None
    if PLAN not in journal.notes:

        def make() -> dict[str, Any]:
            found = planned(ready, progress)
            return {"plan": found.to_dict(), "recipe": found.recipe(ready.recipe).to_dict()}

        journal.note(PLAN, journal.group.told(make))
    kept = journal.notes[PLAN]
    return recipe_from_dict(kept["recipe"], source=f"the plan in {journal.folder}"), kept["plan"]


def pick_device(name: str) -> torch.device:
    """The device to compress on; "auto" is cuda where there is one, else the CPU. Several ranks take a GPU each."""
    if name == "auto":
        return pick_device("cuda" if torch.cuda.is_available() else "cpu")
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise SlimlmError(f'device = {name!r}: give "auto", "cpu", "cuda" or "cuda:N"')
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SlimlmError("--device cuda was asked for, but torch finds no CUDA device here; use --device cpu")
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise SlimlmError(f'device = {name!r}: give "auto", "cpu", "cuda" or "cuda:N"') from error
    if found.type == "cuda" and started() > 1:
        if found.index is not None or local_rank() >= torch.cuda.device_count():
            raise SlimlmError(
                f"device = {name!r}: each process on a machine takes a GPU of its own; this is number {local_rank() + 1}, and "
                f"torch finds {torch.cuda.device_count()}. Start one for each GPU with --device cuda, or give --device cpu"
            )
        return torch.device("cuda", local_rank())
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise SlimlmError(f"device = {name!r}: torch finds {torch.cuda.device_count()} CUDA devices, counted from 0")
    return found


def peak_memory() -> int | None:
    """The most memory this process has held, in bytes, where the system tells."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _own_name(source: str) -> str:
    """A source's name without the folders above it, which are nobody else's business; a hub name as it is."""
    return Path(source).resolve().name if Path(source).exists() else source


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("slimlm", "torch", "transformers", "safetensors")}
    return {**found, "python": platform.python_version()}
