"""Before the first block: open the model, check everything that can be checked, and draw the calibration samples.

The checksums of weights, samples that the model wrote itself, and the plan are read from the journal where it has them.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.calibration.calls import Arguments, BlockArguments, Calls, arguments_within, shared_arguments
from slimlm.calibration.capture import BlockInputs, batches_of, first_inputs, shares_of
from slimlm.calibration.kept import Room
from slimlm.calibration.samples import calibration_samples, sources_of
from slimlm.core.errors import CheckpointError, DataError, DoesNotFitError, ModelError
from slimlm.core.statistics.covariance import Covariance
from slimlm.data.mixture import recorded_name
from slimlm.distributed.group import Group
from slimlm.evaluation.perplexity import Perplexity, few_of, perplexity_of, pieces_of
from slimlm.evaluation.stored_model import LastOutputs, StoredModel
from slimlm.events import Event, Notify, Observer, silent
from slimlm.models.dense import DenseModel, open_dense
from slimlm.models.embeddings import Embeddings, embeddings_of
from slimlm.models.lazy import LazyModel, open_lazy
from slimlm.models.structure import blocks_of, context_length, vocabulary_size
from slimlm.planner.options import Budget
from slimlm.planner.plan import Plan, auto_budget, make_plan, refuse_budget, refuse_few_samples
from slimlm.planner.trials import Original
from slimlm.preflight.calibration import amount_of
from slimlm.preflight.checks import check_device, check_disk, check_memory, check_whole
from slimlm.preflight.estimate import Memory, memory_of
from slimlm.preflight.needs import RunNeeds
from slimlm.preflight.refusals import compressible, refuse_early, refuse_text, warn_of_few_tokens, without_embeddings
from slimlm.preflight.rehearsal import refuse_shared_weights, rehearse, rehearse_files
from slimlm.recipe import AS_STORED, Recipe, recipe_from_dict
from slimlm.run.config import RunConfig, pick_device
from slimlm.run.resume import Run
from slimlm.run.transport import ActivationTransport
from slimlm.runtime.memory import format_bytes, free_on_gpu
from slimlm.storage import checkpoint
from slimlm.storage.activations import ActivationStore
from slimlm.storage.file_limits import make_room
from slimlm.storage.identity import differences, weights_identity
from slimlm.storage.journal import DENSE, DENSE_OUTPUTS, OWN_TEXT, PLAN

_ONLY_GUESSES = 2
"""A perplexity of so many times the vocabulary is an alarm: guessing gives the vocabulary itself."""
_FILES_BESIDE = 32
"""Files that a run may have open besides mapped ones: those of libraries, and its own for a moment."""
_SHARE_OF_GPU = 0.25
"""The share of a GPU's free memory that a block's passes may keep tensors in."""
_ALIKE = ("model", "config", "recipe", "budget", "device", "versions")
"""Keys of a run's identity in which its ranks must agree."""


@dataclass(frozen=True)
class Prepared:
    """A model, opened and checked, and everything that the work on its blocks needs."""

    config: RunConfig
    """The configuration of the run."""
    dense: LazyModel
    """The model; its weights are read when they are needed."""
    blocks: dict[str, nn.Module]
    """The blocks by full name, in order, without values."""
    calls: Calls
    """How the model calls its blocks."""
    recipe: Recipe
    """The recipe to carry out; where there is a plan, the one that it chose."""
    embeddings: Embeddings
    """How embedding and head are compressed."""
    skipped: dict[str, str]
    """Layers that are not compressed, and why."""
    samples: Tensor
    """The calibration samples of all ranks, token ids `[count, length]`."""
    device: torch.device
    """The device that blocks are worked on."""
    activations: ActivationTransport
    """This rank's activations, and their exchange with the journal and the other ranks."""
    held_back: Tensor | None
    """Windows of the calibration text `[count, length]` on which the result is compared; None: there are none, or this is not
    the first rank."""
    room: Room
    """The memory for what a block's passes keep for later ones."""
    budget: Budget | None = None
    """The budget of a plan; None where nothing is planned."""
    plan: dict[str, Any] | None = None
    """The plan as plain data, once it is decided."""

    @property
    def few_samples(self) -> Tensor:
        """The calibration samples `[count, length]` that perplexities are measured on: this rank's first."""
        first = batches_of(self.activations.own(self.samples))[0]
        return few_of(first, vocabulary_size(self.dense.model))

    @property
    def calibration(self) -> dict[str, Any]:
        """The calibration as a record describes it."""
        wanted = self.config.calibration
        count, length = self.samples.shape
        counts = {"asked": wanted.samples, "samples": count, "length": length, "tokens": self.samples.numel()}
        sources = sources_of(self.samples, wanted)
        return {**dataclasses.asdict(wanted), "data": recorded_name(wanted.data), "sources": sources, **counts}


def prepare(config: RunConfig, run: Run) -> Prepared:
    """Open the model, check everything that can be checked, and draw the calibration samples.

    Raises:
        SlimlmError: The model, the recipe, the text or this machine does not suit the run, or the journal is another run's.
    """
    device, budget = pick_device(config.device), config.budget()
    recipe = config.opened_recipe
    run.progress(Event("open the model", 0, 1))
    dense = open_lazy(config.model, run.journal.folder / "original", run.notify)
    blocks = blocks_of(dense.model)
    make_room(_most_files(dense, len(dense.files), len(blocks)))
    shapes = compressible(blocks, recipe)
    config = _with_samples(config, dense, shapes, run.notify)
    match_run(config.identity(dense.files, dense.config, device), run)
    with dense.outer_tensors_filled(blocks):
        embeddings = planned_embeddings(dense, recipe)
    skipped = refuse_early(dense, blocks, recipe, planning=config.planned)
    refuse_text(dense, config.calibration)
    if run.group.first:
        run.journal.match_weights(weights_identity(dense.weights, blocks, dense.release))
    skipped = without_embeddings(skipped, embeddings)
    run.progress(Event("open the model", 1, 1))
    if config.planned and budget is None:
        budget = auto_budget(recipe, list(shapes.values()), config.objective)
    if budget is not None:
        refuse_budget(shapes, budget)
    refuse_unfit_model(dense, blocks)
    # With as many samples as are asked for, before any block or the whole model is read.
    wanted = config.calibration
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    needs = RunNeeds(dense, blocks, recipe, embeddings, skipped, wanted.samples, length, config.bits)
    shares = shares_of(torch.empty(wanted.samples, length, device="meta"), run.group.size)
    check_device(needs, device)
    check_memory(_memory_of_rank(needs, config, run.group, shares), config.memory)
    calls = rehearse(dense, blocks, shapes)
    whole = _open_whole(config, dense, run)
    samples, held_back = _draw(config, dense, whole, run)
    shares = shares_of(samples, run.group.size)
    _check_sample_count(len(samples), recipe, planned=budget is not None)
    if Covariance in recipe.needs:
        warn_of_few_tokens(shapes, samples.numel(), run.notify)
    count, length = samples.shape
    needs = dataclasses.replace(needs, sample_count=count, length=length, text_dependent=bool(calls.text_dependent))
    memory = _memory_of_rank(needs, config, run.group, shares)
    _refuse_unfit(needs, memory, config, run, device)
    return Prepared(
        config=config,
        dense=dense,
        blocks=blocks,
        calls=calls,
        recipe=recipe,
        embeddings=embeddings,
        skipped=skipped,
        samples=samples,
        device=device,
        activations=ActivationTransport(run.journal, _store_of(memory, config, run), run.group, shares),
        held_back=held_back,
        room=_room_of(memory, device, run),
        budget=budget,
    )


def _with_samples(config: RunConfig, dense: LazyModel, shapes: dict[str, tuple[int, int]], notify: Notify) -> RunConfig:
    """The configuration with as many samples and tokens as are asked for, or as the model and the recipe need."""
    if not shapes:
        return dataclasses.replace(config, samples=config.samples or 1, length=config.length or 2)  # refused in a moment
    context, asked = context_length(dense.model), (config.samples, config.length)
    amount = amount_of(asked, shapes, config.opened_recipe, context=context, planned=config.planned)
    if amount.reason is not None:
        tokens = f"{amount.samples} samples of {amount.length} tokens, {amount.samples * amount.length} in all"
        notify(f"calibration takes {tokens}: {amount.reason}; `samples` gives others")
    return dataclasses.replace(config, samples=amount.samples, length=amount.length)


def refuse_unfit_model(dense: LazyModel, blocks: dict[str, nn.Module]) -> None:
    """Raise ModelError where a model cannot be compressed, as far as that is known without its weights."""
    refuse_shared_weights(dense.model, blocks)
    with TemporaryDirectory(prefix="slimlm-") as scratch:
        rehearse_files(dense, Path(scratch))


def dense_perplexity(prepared: Prepared, run: Run) -> Perplexity:
    """The original model's perplexity on `Prepared.few_samples`, stored in the journal for a run that is resumed."""
    few = prepared.few_samples
    noted = run.journal.notes.get(DENSE)
    # Resumed by another number of ranks, the first may have fewer samples.
    if noted is not None and noted["tokens"] == few[:, 1:].numel():
        return Perplexity(**noted)
    dense, pieces = prepared.dense, pieces_of(few, vocabulary_size(prepared.dense.model))
    stored = StoredModel(dense.model, dense.weights, dense.release)
    found = perplexity_of(stored.logits(stored.outputs(few, prepared.device), pieces), few, pieces)
    run.journal.note(DENSE, dataclasses.asdict(found))
    return found


def _draw(config: RunConfig, dense: LazyModel, whole: DenseModel | None, run: Run) -> tuple[Tensor, Tensor | None]:
    """The calibration samples `[count, length]`, and on the first rank the windows that are held back, if there are any."""
    held_back: list[Tensor | None] = [None]

    def draw() -> Tensor:
        drawn = calibration_samples(dense, whole, config.calibration, run.journal, run.progress, run.notify)
        held_back[:] = [drawn.held_back]
        return drawn.samples

    return run.group.broadcast_tensor(draw), held_back[0]


def prepare_comparison(prepared: Prepared, run: Run) -> None:
    """Run the original model on the windows that are held back, or notify the user that there are none."""
    if outputs_before(prepared, run) is not None:
        return
    wrote = prepared.config.calibration.data == "self"
    why = (
        "the model writes the calibration text itself" if wrote else "the samples are all of the calibration text that was read"
    )
    run.notify(
        f"{why}, so nothing of it is held back: the record will not say how far the result's predictions are from the "
        "original's. Give more text or fewer `samples`, or measure that on another text"
    )


def outputs_before(prepared: Prepared, run: Run) -> LastOutputs | None:
    """The original model's last block's outputs for the windows that are held back, stored in the journal; None: none are."""
    held_back = prepared.held_back
    if held_back is None:
        return None
    hidden = run.journal.noted_tensor(DENSE_OUTPUTS)
    if hidden is None:
        dense = prepared.dense
        hidden = StoredModel(dense.model, dense.weights, dense.release).outputs(held_back, prepared.device).hidden
        run.journal.note_tensor(DENSE_OUTPUTS, hidden.contiguous())
    return LastOutputs(held_back, hidden, prepared.calls.forms)


def warn_of_guesses(prepared: Prepared, run: Run) -> None:
    """Notify where the original model predicts the calibration text far worse than guesses would."""
    found, vocabulary = dense_perplexity(prepared, run), vocabulary_size(prepared.dense.model)
    if found.value > _ONLY_GUESSES * vocabulary:
        run.notify(
            f"the original model's perplexity is {found.value:.4g} on {found.tokens} tokens of the calibration text; guessing "
            f"among the {vocabulary} tokens of its vocabulary gives {vocabulary}. Its weights are damaged, are not what its "
            "config says, or belong to another tokenizer: check the model before compressing it"
        )


def decide(prepared: Prepared, run: Run) -> Prepared:
    """The same with the recipe that a plan chose, where there is a budget; a plan in the journal is not made again."""
    if prepared.budget is None:
        return prepared
    if PLAN not in run.journal.notes:

        def make() -> dict[str, Any]:
            found = plan_within_budget(prepared, run.progress)
            return {"plan": found.to_dict(), "recipe": found.recipe(prepared.recipe).to_dict()}

        run.journal.note(PLAN, run.group.broadcast(make))
    noted = run.journal.notes[PLAN]
    recipe = recipe_from_dict(noted["recipe"], source=f"the plan in {run.journal.folder}")
    return dataclasses.replace(prepared, recipe=recipe, plan=noted["plan"])


def plan_within_budget(prepared: Prepared, progress: Observer) -> Plan:
    """The plan of a prepared run that has a budget."""
    assert prepared.budget is not None
    dense = prepared.dense
    stored = StoredModel(dense.model, dense.weights, dense.release)
    original = Original(stored, partial(_entered, prepared), prepared.calls.forms, prepared.device)
    return make_plan(original, prepared.recipe, prepared.samples, budget=prepared.budget, progress=progress)


def _entered(prepared: Prepared, samples: Tensor) -> BlockInputs:
    """The inputs of the first block for samples `[count, length]`, and every block's other arguments."""
    dense, blocks, calls = prepared.dense, prepared.blocks, prepared.calls
    batches = batches_of(samples)
    with dense.outer_tensors_filled(blocks):
        shared = shared_arguments(dense.model, blocks, calls, [*batches, batches[0][:1]])
        hidden = list(first_inputs(dense.model, blocks, batches))
    capture = text_capture(prepared) if calls.text_dependent else None
    return BlockInputs(hidden, BlockArguments(shared, batches, calls.text_dependent, capture))


def text_capture(prepared: Prepared) -> Callable[[str, Tensor], Arguments]:
    """A function that captures the arguments of a block, by name, for tokens `[samples, length]`."""
    dense = prepared.dense
    outside = StoredModel(dense.model, dense.weights, dense.release).assembled()
    return partial(arguments_within, outside, prepared.calls.forms)


def run_needs(config: RunConfig, dense: LazyModel) -> RunNeeds:
    """The needs of a run, without reading a weight or a text; see `rehearsed`.

    As many samples are assumed as are asked for, and that blocks have arguments which depend on the text.
    """
    recipe, blocks = config.opened_recipe, blocks_of(dense.model)
    embeddings = planned_embeddings(dense, recipe)
    skipped = without_embeddings(refuse_early(dense, blocks, recipe, planning=config.planned), embeddings)
    wanted = _with_samples(config, dense, compressible(blocks, recipe), silent).calibration
    refuse_text(dense, wanted)
    length = min(wanted.length, context_length(dense.model) or wanted.length)
    return RunNeeds(dense, blocks, recipe, embeddings, skipped, wanted.samples, length, config.bits, text_dependent=True)


def rehearsed(needs: RunNeeds, allowed: int | None) -> RunNeeds:
    """The needs of a run when the model is rehearsed; the same where a block does not fit in memory, so that it cannot be.

    Args:
        needs: The needs as far as they are known without reading a weight.
        allowed: The argument `memory`, in bytes.

    Raises:
        SlimlmError: The model cannot be compressed; see `slimlm.preflight.rehearsal.rehearse`.
    """
    try:
        check_memory(memory_of(needs, allowed), allowed)
    except DoesNotFitError:
        return needs
    calls = rehearse(needs.dense, needs.blocks, needs.shapes)
    return dataclasses.replace(needs, text_dependent=bool(calls.text_dependent))


def planned_embeddings(dense: LazyModel, recipe: Recipe) -> Embeddings:
    """How a recipe compresses embedding and head."""
    return embeddings_of(dense.model, None if recipe.embedding_bits == AS_STORED else recipe.embedding_bits)


def match_run(identity: dict[str, Any], run: Run) -> None:
    """Compare a run's identity with that of the journal, and those of the ranks with one another.

    Raises:
        CheckpointError: The journal is another run's, or a rank has another model or version than the first.
    """
    identity = json.loads(json.dumps(identity))
    if run.group.first:
        run.journal.match_identity(identity)
    first = run.group.broadcast(lambda: identity)
    if others := [words for key in _ALIKE for words in differences(first[key], identity[key], key)]:
        raise CheckpointError(f"this rank's run differs from the first rank's: {'; '.join(others[:5])}")


def _most_files(dense: LazyModel, files: int, blocks: int) -> int:
    """The number of files that are opened at the end of a run: the journal's, the original's again, and the new shards."""
    return blocks + files + dense.bytes // checkpoint.SHARD_BYTES + _FILES_BESIDE


def _open_whole(config: RunConfig, dense: LazyModel, run: Run) -> DenseModel | None:
    """The model in float32, where text of its own has to be made with it; on the first rank only.

    Raises:
        DoesNotFitError: The model takes more than all memory.
        ModelError: The model takes more than the memory that may be used.
    """
    if config.calibration.data != "self" or not run.group.first or OWN_TEXT in run.journal.notes:
        return None
    size = dense.whole_bytes
    check_whole(size, config.memory)
    if config.memory is not None and size > config.memory:
        raise ModelError(
            f"for text of its own the whole model has to be in memory, {format_bytes(size)}, more than the `memory` of "
            f"{format_bytes(config.memory)}; give more, or calibration text from a file"
        )
    run.notify(f"for text of its own the whole model is in memory meanwhile: {format_bytes(size)} in float32")
    return open_dense(config.model)


def _check_sample_count(count: int, recipe: Recipe, *, planned: bool) -> None:
    """Raise DataError where there are too few calibration samples for a plan or for block reconstruction."""
    if planned:
        refuse_few_samples(count)
    if recipe.block_reconstruction is not None and count < 2:
        raise DataError("block reconstruction holds samples back and needs at least 2; there is 1. Give more text or `samples`")


def _memory_of_rank(needs: RunNeeds, config: RunConfig, group: Group, shares: tuple[int, ...]) -> Memory:
    """The memory of this process: each rank holds its samples, and the first reconstructs blocks on all of them."""
    own = shares[group.rank]
    if group.size > 1 and group.first and needs.recipe.block_reconstruction is not None:
        own += needs.sample_count
    return memory_of(dataclasses.replace(needs, sample_count=own), config.memory, processes=group.local_size)


def _refuse_unfit(needs: RunNeeds, memory: Memory, config: RunConfig, run: Run, device: torch.device) -> None:
    """Raise DoesNotFitError where memory or disk certainly do not suffice; notify the user where they are tight."""
    check_device(needs, device)
    warnings = [check_memory(memory, config.memory)]
    if config.out is not None and run.group.first:
        warnings.append(check_disk(needs, config.out, run.journal.folder))
    for text in filter(None, warnings):
        run.notify(text)


def _store_of(memory: Memory, config: RunConfig, run: Run) -> ActivationStore:
    """The store of activations: in memory where they fit; they are written to the journal after every block in any case."""
    if config.out is not None and memory.on_disk:
        why = "`memory` allows" if config.memory is not None else "half of the free memory"
        limit = config.memory if config.memory is not None else (memory.free or 0) // 2
        size = format_bytes(memory.activations)
        run.notify(f"activations ({size}) stay on the disk, in {run.journal.folder}: more than {why}, {format_bytes(limit)}")
    return ActivationStore(run.journal.folder, in_memory=config.out is None or not memory.on_disk)


def _room_of(memory: Memory, device: torch.device, run: Run) -> Room:
    """The memory for what a block's passes keep for later ones: on the device, of what activations leave there."""
    limit = memory.room if device.type == "cpu" else int(_SHARE_OF_GPU * free_on_gpu(device))

    def when_full() -> None:
        run.notify(
            f"what the stages of a block have in common takes more than {format_bytes(limit or 0)}, which activations leave of "
            "the memory that may be used; some of it is computed again for every stage. More `memory` or fewer `samples` make "
            "that faster"
        )

    return Room(limit, when_full)
