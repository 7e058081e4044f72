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

That is slimlm.blockwise. Embedding and head follow where the recipe asks for it (slimlm.embedding). Then the packed tensors are
written, read back, and the reloaded model's logits compared with those in memory.
"""

import dataclasses
import fnmatch
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

from slimlm.blockwise import Progress, activations_bytes, compress_blocks, own_windows
from slimlm.calibrate import Flow, shares_of
from slimlm.core.errors import CheckpointError, DataError, ModelError, RanksError, RecipeError, SlimlmError
from slimlm.core.layer import Need, refuse_not_finite
from slimlm.core.sweep import tokens_needed
from slimlm.data.documents import DEFAULT_DATA, documents
from slimlm.data.windows import choose_windows, sample_from_model, token_stream, windows_of
from slimlm.embedding import Ends, ends_of
from slimlm.evaluate.results import Record, layer_from
from slimlm.finish import contents_of, verify, write
from slimlm.models.opening import DenseModel, open_dense
from slimlm.models.structure import blocks_of, context_length, linears_of, weight_of
from slimlm.plan.options import Budget, Objective
from slimlm.plan.plan import (
    Plan,
    alternation_of,
    asked_budget,
    auto_budget,
    make_plan,
    refuse_budget,
    refuse_few_windows,
)
from slimlm.ranks.join import joined, local_rank, started
from slimlm.recipe import Recipe, check_embedding_bits, open_recipe, recipe_from_dict
from slimlm.runtime.memory import total_and_free
from slimlm.storage import checkpoint
from slimlm.storage.journal import MOVING, OWN_TEXT, PLAN, TEXT, Journal, identity_of, open_journal
from slimlm.streaming import StreamedModel, open_streamed, weight_files

_READ_AHEAD = 8
"""Calibration windows are drawn from up to this many times the text they need."""


@dataclass(frozen=True)
class Calibration:
    """Where the calibration text comes from and how much of it is used."""

    data: str = DEFAULT_DATA
    """a .txt, .jsonl or .parquet file or folder, a hub data set, "stdlib", or "self" (the model's own text)"""
    samples: int = 128
    length: int = 2048
    """tokens per window; at most the model's context"""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1 or self.length < 2:
            raise DataError(
                f"samples = {self.samples}, length = {self.length}: calibration needs at least one window of two tokens"
            )


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


def quiet(stage: str, done: int, total: int) -> None:
    """Progress that says nothing."""
    del stage, done, total


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
    progress: Progress = quiet,
    tell: Tell = silent,
) -> Result:
    """Compress a causal language model and write it to the folder `out`.

    model: a folder or a hub name. recipe: a shipped name, a .toml file or a Recipe. bits: average bits per weight that may be
    spent, everything counted; what each layer becomes is then planned (see slimlm.plan). embedding_bits: of input embedding and
    output head, 4 to 8, or 16 to leave them as they are stored; None: what the recipe says. data: see `Calibration`. device:
    "auto", "cpu" or "cuda"; one block at a time is there. memory: bytes that calibration activations may take before they stay
    on the disk (None: half of what is free); what needs the whole model is refused where that is larger. tell: told in words
    what the user should know.

    Weights are read block by block. Every finished block is kept in a journal beside `out` until all is done: a run that was
    stopped goes on when it is called again with the same arguments; other arguments are refused. restart: drop what is kept.
    Raises a SlimlmError in words for anything that would not work, before the work begins wherever that can be known.

    Started as several processes (torchrun) it divides the work among them; only the first writes, tells and shows progress, and
    all return the record (see docs/scaling.md).
    """
    wanted = Calibration(data or DEFAULT_DATA, samples, length, seed)
    with joined() as group:
        if group.first:
            checkpoint.refuse_occupied(Path(out))
        else:
            progress, tell = quiet, silent
        asked = Asked(str(model), asked_recipe(recipe, embedding_bits), bits, objective, wanted, device, memory)
        with open_journal(Path(out), restart=restart, group=group) as journal, gone_on_with(journal, tell):
            ready = prepare(asked, journal, progress, tell)
            recipe, found = plan_of(ready, journal, progress)
            ready = dataclasses.replace(ready, whole=None)
            if journal.blocks:
                tell(f"going on after block {len(journal.blocks)} of {len(ready.blocks)}, kept in {journal.folder}")
            flow = compress_blocks(ready.dense, ready.blocks, recipe, ready.windows, ready.device, progress, journal)
            finish = partial(finished, Path(out), asked, ready, recipe, found, flow, journal, progress)
            record = Record.from_dict(group.told(lambda: finish().to_dict()))
            journal.remove()
    spent = record.bits_per_weight
    if found is not None and found["objective"] == "size" and spent > found["asked_bits"]:
        tell(
            f"{spent:.3f} bits per weight were stored, over the {found['asked_bits']:g} asked for: some scales are too small "
            "for float16, and their layers' take 32 bits. Ask for a little less"
        )
    return Result(Path(out), record)


@contextmanager
def gone_on_with(journal: Journal, tell: Tell) -> Iterator[None]:
    """Say what is kept and how to go on where a run goes on, is stopped, or finds the disk full."""

    def words() -> str:
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
        raise CheckpointError(f"writing failed: {error}; {words()}") from error
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise CheckpointError(f"{error}; {words()}") from error
        raise


def finished(
    out: Path,
    asked: "Asked",
    ready: "Ready",
    recipe: Recipe,
    found: dict[str, Any] | None,
    flow: Flow,
    journal: Journal,
    progress: Progress,
) -> Record:
    """Write the checkpoint of a journal whose blocks are all done, and verify it; gives its record."""
    progress("write and verify", 0, 1)
    dense, layers = ready.dense, [layer_from(row) for block in journal.blocks for row in block.records]
    contents = contents_of(dense, ready.blocks, ready.ends, journal)
    inside = sum(p.numel() for block in ready.blocks.values() for p in block.parameters() if p.ndim > 1)
    record = Record(
        model=_own_name(asked.model),
        recipe=recipe.to_dict(),
        calibration={
            **dataclasses.asdict(asked.calibration),
            "data": _own_name(asked.calibration.data),
            "asked": asked.calibration.samples,
            "samples": ready.windows.shape[0],
            "length": ready.windows.shape[1],
            "tokens": ready.windows.numel(),
        },
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
        write(folder, dense, contents)
        record = dataclasses.replace(record, stored_bytes=checkpoint.stored_bytes(folder))
        checkpoint.write_record(folder, record.to_dict())
        verify(folder, dense, ready.blocks, contents, flow, own_windows(ready.windows, journal), ready.device)
        record = dataclasses.replace(record, seconds=journal.elapsed, peak_memory=peak_memory())
        checkpoint.write_record(folder, record.to_dict())
    progress("write and verify", 1, 1)
    return record


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
    progress: Progress = quiet,
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

    def identity(self, files: list[Path], device: torch.device) -> dict[str, Any]:
        """What the result depends on, but for the calibration text, whose windows the journal keeps."""
        own = {**dataclasses.asdict(self.calibration), "data": _own_name(self.calibration.data)}
        return {
            "model": identity_of(files),
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


def prepare(asked: Asked, journal: Journal, progress: Progress, tell: Tell) -> Ready:
    """Open the model and check everything that can be checked; raises in words. What the journal keeps is not made again."""
    recipe, bits, objective = asked.recipe, asked.bits, asked.objective
    where = pick_device(asked.device)
    planning = bits is not None or has_auto_rank(recipe)
    budget = None
    if bits is not None:
        budget = asked_budget(recipe, bits, objective)
    elif planning:
        alternation_of(recipe)
    elif objective != "size":
        raise RecipeError(f"--objective {objective} says what a budget counts, and there is none; give --bits")
    progress("open the model", 0, 1)
    dense = open_streamed(asked.model, journal.folder / "original", tell)
    blocks = blocks_of(dense.model)
    journal.meet(asked.identity(weight_files(dense.folder), where), alike=("model", "recipe", "budget", "device", "versions"))
    with dense.ends_filled(blocks):
        ends = ends_of(dense.model, recipe.embedding_bits)
    left = refuse_early(dense, blocks, recipe, planning=planning)
    left = {name: reason for name, reason in left.items() if name != ends.head} | ends.left
    progress("open the model", 1, 1)
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
    if recipe.matching is not None and len(windows) < 2:
        raise DataError("block matching holds windows back and needs at least 2; there is 1. Give more text or --samples")
    if recipe.needs & Need.GRAM:
        tell_of_few_tokens(shapes, windows.numel(), tell)
    choose_place(asked, dense, windows, shapes, journal, tell)
    return Ready(dense, blocks, recipe, ends, left, windows, where, budget, whole if PLAN not in journal.notes else None)


def needs_whole(asked: Asked, journal: Journal, *, planning: bool) -> list[str]:
    """For what the whole model has to be in memory, in words; what the journal keeps needs it no more."""
    reasons = ["a plan"] if planning and PLAN not in journal.notes else []
    return [*reasons, "text of its own"] if asked.calibration.data == "self" and OWN_TEXT not in journal.notes else reasons


def open_whole(asked: Asked, dense: StreamedModel, reasons: list[str], tell: Tell) -> DenseModel:
    """The model in float32; raises ModelError where that is more than the memory that may be used."""
    what, size = " and ".join(reasons), dense.whole_bytes
    if asked.memory is not None and size > asked.memory:
        raise ModelError(
            f"for {what} the whole model has to be in memory, {in_words(size)} in float32, more than --memory "
            f"{in_words(asked.memory)}; give more, or a recipe without a plan and calibration text from a file"
        )
    tell(f"for {what} the whole model is in memory meanwhile: {in_words(size)} in float32")
    return open_dense(asked.model)


def choose_place(
    asked: Asked, dense: StreamedModel, windows: Tensor, shapes: dict[str, tuple[int, int]], journal: Journal, tell: Tell
) -> None:
    """Decide whether activations stay in memory; they are written after every block in any case."""
    width = getattr(dense.model.config, "hidden_size", None) or max(width for _, width in shapes.values())
    needed, free = activations_bytes(windows, width, asked.recipe, journal), total_and_free()[1]
    limit = asked.memory if asked.memory is not None else None if free is None else free // 2 // journal.group.here
    journal.in_memory = limit is None or needed <= limit
    if limit is not None and not journal.in_memory:
        why = "--memory allows" if asked.memory is not None else "half of the free memory"
        tell(f"activations ({in_words(needed)}) stay on the disk, in {journal.folder}: more than {why}, {in_words(limit)}")


def in_words(size: int) -> str:
    """Bytes in a unit that suits them."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def has_auto_rank(recipe: Recipe) -> bool:
    """Whether a plan has to give the layers their ranks."""
    return any(getattr(named.step, "rank", None) == "auto" for named in recipe.steps)


def compressible(blocks: dict[str, nn.Module], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Full name and shape (out, in) of every layer that the recipe compresses."""
    linears = {f"{block}.{name}": linear for block, module in blocks.items() for name, linear in linears_of(module).items()}
    shapes = {name: weight_of(linear).shape for name, linear in linears.items() if not recipe.leaves(name)}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def tell_of_few_tokens(shapes: dict[str, tuple[int, int]], tokens: int, tell: Tell) -> None:
    """Say so where the calibration text is too short for the covariance of the widest layer."""
    name, (_, width) = max(shapes.items(), key=lambda entry: entry[1][1])
    if tokens < tokens_needed(width):
        tell(
            f"calibration has {tokens} tokens, but the covariance of the widest layer ({name}, {width} inputs) needs "
            f"{tokens_needed(width)}: for layers with too few, what is measured between two inputs is shrunk and the original "
            "model's outputs are not followed. Give more text or --samples for a better result"
        )


def planned(ready: Ready, progress: Progress) -> Plan:
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


def plan_of(ready: Ready, journal: Journal, progress: Progress) -> tuple[Recipe, dict[str, Any] | None]:
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


def refuse_early(
    dense: StreamedModel, blocks: dict[str, nn.Module], recipe: Recipe, *, planning: bool = False
) -> dict[str, str]:
    """Check every layer against the recipe before any work; gives the layers that stay as they are, and why.

    When a plan will choose pattern and rank, the recipe's own are not asked whether they fit.
    """
    model = dense.model
    left = {
        name: "outside the blocks"
        for name, module in linears_of(model).items()
        if not any(name.startswith(block + ".") for block in blocks)
    }
    if not any(linears_of(block) for block in blocks.values()):
        raise ModelError(
            f"the blocks of {type(model).__name__} ({next(iter(blocks))} and on) hold no linear layers: there is nothing to "
            "compress; slimlm knows nn.Linear and transformers' Conv1D"
        )
    for name, tensor in dense.weights.items():
        if tensor.is_floating_point():
            refuse_not_finite(name, tensor)
            dense.release([tensor])
    known = [f"{block_name}.{name}" for block_name, block in blocks.items() for name in linears_of(block)]
    for pattern in recipe.leave:
        if not fnmatch.filter(known, pattern):
            raise RecipeError(f"leave = {pattern!r} matches no layer of the model; its layers are named like {known[0]}")
    for rule in recipe.rules:
        if unmatched := [pattern for pattern in rule.layers if not fnmatch.filter(known, pattern)]:
            raise RecipeError(f"a rule's {unmatched[0]!r} matches no layer of the model; its layers are named like {known[0]}")
    if all(map(recipe.leaves, known)):
        raise RecipeError(f"leave = {list(recipe.leave)} leaves no layer to compress")
    for block_name, block in blocks.items():
        for name, linear in linears_of(block).items():
            full = f"{block_name}.{name}"
            if recipe.leaves(full):
                left[full] = "left by the recipe"
                continue
            out, width = weight_of(linear).shape
            if not planning and (reason := recipe.refuses(full, (out, width))):
                raise ModelError(f'{reason}; or leave the layer out of the recipe (leave = ["*.{name}"])')
        linear_weights = {f"{name}.weight" for name in linears_of(block)}
        for name, parameter in block.named_parameters():
            if parameter.ndim > 1 and name not in linear_weights:
                left[f"{block_name}.{name}"] = f"{tuple(parameter.shape)}, not a linear layer that slimlm knows"
    return left


def kept_windows(
    dense: StreamedModel, whole: DenseModel | None, wanted: Calibration, journal: Journal, progress: Progress
) -> Tensor:
    """The calibration windows `[count, length]`, kept in the journal.

    Text that the model wrote itself is taken from there; other text is read again, and must be the same.
    """
    if wanted.data == "self":
        kept = journal.noted_tensor(OWN_TEXT)
        if kept is None:
            assert whole is not None
            kept = own_text(whole, wanted, progress)
            journal.note_tensor(OWN_TEXT, kept)
        return kept
    windows = calibration_windows(dense, wanted)
    kept = journal.noted_tensor(TEXT)
    if kept is None:
        journal.note_tensor(TEXT, windows)
    elif not torch.equal(kept, windows):
        raise CheckpointError(
            f"the run in {journal.folder} was begun on other calibration text: {wanted.data} has changed since, or the "
            "tokenizer has. Bring it back to go on, or add --restart to begin anew"
        )
    return windows


def own_text(dense: DenseModel, wanted: Calibration, progress: Progress) -> Tensor:
    """Windows `[count, length]` that the model writes itself."""
    start = None if dense.tokenizer is None else dense.tokenizer.bos_token_id
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    pieces = []
    for piece in sample_from_model(dense.model, samples=wanted.samples, length=length, seed=wanted.seed, start=start):
        pieces.append(piece)
        progress("sample text", sum(map(len, pieces)), wanted.samples)
    return torch.cat(pieces)


def calibration_windows(dense: StreamedModel, wanted: Calibration) -> Tensor:
    """Token windows `[count, length]` of a text to calibrate on."""
    if dense.tokenizer is None:
        raise DataError(f"{dense.source} has no tokenizer, so text cannot be read; add its files, or calibrate on 'self'")
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    texts = documents(wanted.data, "calibration")
    tokens = token_stream(dense.tokenizer, texts, at_most=_READ_AHEAD * wanted.samples * length)
    return choose_windows(windows_of(tokens, length, source=wanted.data), wanted.samples, wanted.seed)


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
    return Path(source).name if Path(source).exists() else source


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("slimlm", "torch", "transformers", "safetensors")}
    return {**found, "python": platform.python_version()}
