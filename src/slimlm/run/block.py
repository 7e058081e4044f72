"""The work on one block: measure its inputs, apply the recipe's steps to its layers, reconstruct it, pass its outputs on.

Each block is measured on the outputs of the compressed ones before it. Where a step or block reconstruction compares with the
original model, the original block is run on its own inputs as well. A block is read from the model's files when its turn comes,
and committed to the journal, with the inputs of the next one, when it is done; a journal that holds blocks is resumed.

Several ranks (slimlm.distributed) do this together: each runs its own samples through the block, the statistics are those of
all samples, the layers of a stage are assigned to ranks, and each is broadcast when it is done. Only the first rank
reconstructs blocks.
"""

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.calibration.calls import BlockArguments, shared_arguments
from slimlm.calibration.capture import (
    BlockInputs,
    BlockRun,
    EachPass,
    Passes,
    batches_of,
    first_inputs,
    run_through,
)
from slimlm.calibration.capture import (
    run as run_block,
)
from slimlm.calibration.kept import KeptOriginal, KeptOutputs
from slimlm.calibration.measurement import measure
from slimlm.calibration.stages import stages_of
from slimlm.core.errors import NumericsError
from slimlm.core.layer import Layer
from slimlm.core.parts.fields import Json
from slimlm.core.parts.pack import LayerEntry
from slimlm.core.statistics.base import Source, Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.distributed.group import Group, assign
from slimlm.events import UNOBSERVED, BlockDone, BlockProgress, Event, LayerDone
from slimlm.models.structure import linears_of, swap, weight_of
from slimlm.recipe import Recipe, apply_steps
from slimlm.record import LayerRecord, record_of, relative_error
from slimlm.run.prepare import Prepared, text_capture
from slimlm.run.resume import Run
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage.journal import BlockContent, Journal
from slimlm.tuning.block_reconstruction import tune_block

_COMPRESSED, _ORIGINAL = "compressed", "original"
"""The names of the two streams of activations in the journal: outputs of compressed blocks, and of the original ones."""


@dataclass(frozen=True)
class Streams:
    """This rank's inputs of a block, and the other arguments of every block."""

    held: dict[str, Sequence[Tensor]]
    """By stream, one tensor `[samples, length, width]` per batch."""
    arguments: BlockArguments
    """Those of this rank's batches."""
    all_arguments: BlockArguments
    """Those of the batches of all ranks' samples, on which the first rank reconstructs blocks."""
    group: Group
    """The ranks of the run."""

    @property
    def compressed(self) -> BlockInputs:
        """The outputs of the compressed blocks."""
        return BlockInputs(self.held[_COMPRESSED], self.arguments, self.group)

    @property
    def original(self) -> BlockInputs:
        """The original model's activations; before the first block they are those of the compressed model."""
        if _ORIGINAL in self.held:
            return BlockInputs(self.held[_ORIGINAL], self.arguments, self.group)
        inputs = self.held[_COMPRESSED]
        # A list of its own: passing on empties each stream's.
        return BlockInputs(list(inputs) if isinstance(inputs, list) else inputs, self.arguments, self.group)


@dataclass(frozen=True)
class BlockTask:
    """One block, and all that the work on it needs."""

    name: str
    """The block's full name."""
    block: nn.Module
    """The block, on the device, in float32; it is compressed in place."""
    inputs: BlockInputs
    """The outputs of the compressed blocks before it."""
    recipe: Recipe
    """What is done to its layers."""
    dtypes: dict[str, torch.dtype]
    """What each tensor of the model is stored in, by full name."""
    device: torch.device
    """Where the block is."""
    original_block: nn.Module | None = None
    """The block as it was, where something needs it."""
    original_inputs: BlockInputs | None = None
    """The original model's activations, where something needs them."""
    all_arguments: BlockArguments | None = None
    """The arguments of the batches of all ranks' samples; needed where the block is reconstructed."""
    progress: BlockProgress = UNOBSERVED
    """Where the block's events go."""
    passes: Passes = field(default_factory=EachPass)
    """How the forward passes of the block are made."""
    original_passes: Passes = field(default_factory=EachPass)
    """How those of the original block on the original model's activations are made."""

    @classmethod
    def of(cls, block: nn.Module, progress: BlockProgress, streams: Streams, prepared: Prepared) -> "BlockTask":
        """The task of a block that is about to be compressed."""
        recipe = prepared.recipe
        needs_original = recipe.needs_original or recipe.block_reconstruction is not None
        layers, room = _layers_of(block, progress.name, recipe), prepared.room
        return cls(
            name=progress.name,
            block=block,
            inputs=streams.compressed,
            recipe=recipe,
            dtypes=prepared.dense.dtypes,
            device=prepared.device,
            original_block=copy.deepcopy(block) if needs_original else None,
            original_inputs=streams.original if recipe.needs_original else None,
            all_arguments=streams.all_arguments,
            progress=progress,
            passes=KeptOutputs(layers, room) if recipe.sequential else EachPass(),
            original_passes=KeptOriginal(layers, room, measured=measures_original_inputs(recipe)),
        )

    @property
    def compressed_run(self) -> BlockRun:
        """The block on the outputs of the compressed blocks before it."""
        return BlockRun(self.block, self.name, self.inputs, self.device, self.passes)

    @property
    def original_run(self) -> BlockRun | None:
        """The block as it was on its inputs in the original model, for steps that compare with it."""
        if self.original_block is None or self.original_inputs is None:
            return None
        return BlockRun(self.original_block, self.name, self.original_inputs, self.device, self.original_passes)

    @property
    def observed(self) -> tuple[BlockRun, dict[str, nn.Module]]:
        """The run in which the order of the layers is found, and these: the original block's where it keeps their inputs."""
        run, linears = self.original_run, self.linears
        if run is None or not measures_original_inputs(self.recipe):
            return self.compressed_run, linears
        return run, {name: run.block.get_submodule(name) for name in linears}

    @property
    def linears(self) -> dict[str, nn.Module]:
        """The layers to be compressed, by name within the block."""
        return _layers_of(self.block, self.name, self.recipe)


def measures_original_inputs(recipe: Recipe) -> bool:
    """Whether a recipe needs statistics of the inputs that layers have in the original model."""
    return any(own.source is Source.ORIGINAL_INPUTS for own in recipe.needs)


def _layers_of(block: nn.Module, name: str, recipe: Recipe) -> dict[str, nn.Module]:
    """The layers of the block of this name that the recipe compresses, by name within the block."""
    return {layer: linear for layer, linear in linears_of(block).items() if not recipe.ignores(f"{name}.{layer}")}


@dataclass(frozen=True)
class CompressedLayer:
    """The result of a layer's compression."""

    record: LayerRecord
    """The layer's record."""
    second_moment: Tensor
    """The mean square of its inputs, `[in]`."""


def starting_streams(prepared: Prepared, run: Run) -> Streams:
    """The inputs of the first block that remains: computed for the first block of all, else read from the journal."""
    dense, blocks, activations = prepared.dense, prepared.blocks, prepared.activations
    own = batches_of(activations.own(prepared.samples))
    # The first rank reconstructs blocks on all samples, in batches as large as those of a single process.
    reconstructs_all = prepared.recipe.block_reconstruction is not None and run.group.size > 1 and run.group.first
    with dense.outer_tensors_filled(blocks):
        arguments = all_arguments = _shared_arguments(prepared, own)
        if reconstructs_all:
            all_arguments = _shared_arguments(prepared, batches_of(prepared.samples))
        begun = None
        if run.journal.inputs is None:
            begun = activations.begin({_COMPRESSED: first_inputs(dense.model, blocks, own)})
    held = activations.resume(len(own[0])) if begun is None else begun
    if prepared.calls.text_dependent:
        # Made when the values above are freed, because it holds its own for the whole run.
        capture = text_capture(prepared)
        arguments, all_arguments = (dataclasses.replace(each, capture=capture) for each in (arguments, all_arguments))
    return Streams(held, arguments, all_arguments, run.group)


def _shared_arguments(prepared: Prepared, batches: Sequence[Tensor]) -> BlockArguments:
    """The arguments of all blocks for batches of token ids `[samples, length]`, but for those that depend on the text."""
    # And for one sample, on which a question about the block's structure is answered soon.
    shared = shared_arguments(prepared.dense.model, prepared.blocks, prepared.calls, [*batches, batches[0][:1]])
    return BlockArguments(shared, batches, prepared.calls.text_dependent)


def remaining_blocks(prepared: Prepared, run: Run) -> Iterator[tuple[nn.Module, BlockProgress]]:
    """The blocks that the journal does not hold, each read from the model's files when its turn comes."""
    names, done = list(prepared.blocks), len(run.journal.blocks)
    run.progress(Event("compress", done, len(names), blocks=finished_blocks(run.journal)))
    modules = prepared.dense.iterate_blocks(names[done:], prepared.device)
    for number, name in list(enumerate(names))[done:]:
        progress = BlockProgress(run.progress, name, number, len(names))
        progress.doing("read")
        yield next(modules), progress


def finished_blocks(journal: Journal) -> tuple[BlockDone, ...]:
    """The blocks that an earlier run finished."""
    return tuple(
        BlockDone(number, block.name, tuple(map(LayerRecord.from_dict, block.records)), None)
        for number, block in enumerate(journal.blocks, 1)
    )


def compress_block(task: BlockTask) -> list[CompressedLayer]:
    """Measure the inputs of a block's layers, apply the steps to each, and put the packed layers in their place.

    Layers are compressed stage by stage, a stage being those whose inputs are computed together, where the recipe is
    sequential; else all at once.
    """
    linears = task.linears
    if not linears:
        return []
    stages = stages_of(*task.observed) if task.recipe.sequential else [list(linears)]
    return [layer for stage in stages for layer in _compress_stage(task, {name: linears[name] for name in stage})]


def _compress_stage(task: BlockTask, linears: dict[str, nn.Module]) -> list[CompressedLayer]:
    """Compress these layers, each on one of the ranks."""
    task.progress.doing("measure", *linears)
    group = task.inputs.group
    stats = measure(task.compressed_run, linears, task.recipe.needs | {MeanSquare}, task.original_run)
    owners = assign({name: _cost_of(linear, task.recipe) for name, linear in linears.items()}, group.size)
    made = {}
    for name, linear in linears.items():
        if owners[name] == group.rank:
            task.progress.doing("steps", name)
            made[name] = compress_layer(task, name, linear, stats[name])
    found = []
    for name, linear in linears.items():
        module, done = _broadcast_layer(group, owners[name], made.get(name), linear)
        swap(task.block, name, module)
        found.append(CompressedLayer(done.record, stats[name][MeanSquare]))
        task.progress.finished_layer(done)
    for passes in (task.passes, task.original_passes):
        passes.finished(linears)
    return found


def _cost_of(linear: nn.Module, recipe: Recipe) -> float:
    """A relative estimate of the time that a layer takes, for assigning layers to ranks.

    Steps that use the covariance pass over it for every output; others work on products of low rank.
    """
    out, width = weight_of(linear).shape
    return float(out) * width * (width if Covariance in recipe.needs else min(out, width))


def compress_layer(task: BlockTask, name: str, linear: nn.Module, stats: Stats) -> tuple[CompressedLinear, LayerDone]:
    """Apply the recipe's steps to one layer.

    Args:
        task: The layer's block.
        name: The layer's name within the block.
        linear: The layer.
        stats: The statistics of its inputs.

    Returns:
        The packed layer, and the event to report.

    Raises:
        NumericsError: A step met values that are not finite; the message names the layer.
    """
    began, full = time.monotonic(), f"{task.name}.{name}"
    layer = Layer.of(full, weight_of(linear), task.dtypes[f"{full}.weight"])
    if stats.note is not None:
        layer = layer.with_notes(stats.note)
    try:
        layer = apply_steps(task.recipe.steps_for(full), layer, stats)
    except NumericsError as error:
        raise NumericsError(f"{full}: {error}") from error
    module = CompressedLinear.from_parts(layer.parts(), _bias_of(linear))
    covariance = stats.get(Covariance) if Covariance in stats.values else None
    return module, LayerDone(record_of(layer, stats[MeanSquare], covariance), stats.tokens, time.monotonic() - began)


def _broadcast_layer(
    group: Group, owner: int, made: tuple[CompressedLinear, LayerDone] | None, linear: nn.Module
) -> tuple[CompressedLinear, LayerDone]:
    """The packed layer that the rank `owner` has made for `linear`, on every rank."""
    if group.size == 1:
        assert made is not None, "a single process makes every layer"
        return made
    about: Any = None if made is None else [made[0].describe().to_json(), dataclasses.asdict(made[1])]
    (described, done), tensors = group.broadcast_from(owner, about, {} if made is None else made[0].packed())
    if made is not None:
        return made
    module = _compressed(LayerEntry.parse(described), tensors, _bias_of(linear), weight_of(linear).device)
    return module, LayerDone(LayerRecord.from_dict(done["record"]), done["tokens"], done["seconds"])


def _bias_of(linear: nn.Module) -> Tensor | None:
    return dict(linear.named_parameters()).get("bias")


def _compressed(entry: LayerEntry, packed: dict[str, Tensor], bias: Tensor | None, device: torch.device) -> CompressedLinear:
    """A layer made of the entry that `CompressedLinear.describe` gives and its packed tensors."""
    return CompressedLinear(entry.shape, entry.parts, packed, bias).to(device)


def reconstruct_block(task: BlockTask, layers: list[CompressedLayer], prepared: Prepared) -> list[CompressedLayer]:
    """Tune a compressed block towards the original block's outputs; gives its layers with new records.

    The first rank does it, on all samples, and broadcasts the block to the others.
    """
    options = task.recipe.block_reconstruction
    assert options is not None and task.original_block is not None
    task.progress.doing("reconstruct")
    activations, group = prepared.activations, task.inputs.group
    teacher = task.inputs if task.original_inputs is None or options.inputs == "compressed" else task.original_inputs
    student = task.inputs if task.original_inputs is None or options.inputs != "dense" else task.original_inputs
    # What is kept of the block no longer holds when its values have been tuned.
    task.passes.forget()
    of_original = task.original_passes if teacher is task.original_inputs else EachPass()
    own_targets = activations.hold(
        "targets", run_block(BlockRun(task.original_block, task.name, teacher, task.device, of_original))
    )
    batch = len(batches_of(prepared.samples)[0])
    hidden = activations.gather("student inputs", student.hidden, batch)
    targets = activations.gather("teacher outputs", own_targets, batch)
    losses = None
    if group.first:
        assert task.all_arguments is not None, "a block that is reconstructed has the arguments of all samples"
        inputs = BlockInputs(hidden, task.all_arguments)
        found = tune_block(task.block, task.name, inputs, targets, options, task.dtypes, task.device)
        losses = found.before, found.after
    losses = _broadcast_block(task, losses)
    return [_rerecorded(task, layer, losses) for layer in layers]


def _broadcast_block(task: BlockTask, losses: tuple[float, float] | None) -> tuple[float, float]:
    """Replace this rank's block by the first rank's; gives its losses before and after reconstruction."""
    block, group = task.block, task.inputs.group
    if group.size == 1:
        assert losses is not None, "a single process reconstructs every block"
        return losses
    layers = {n: m.describe().to_json() for n, m in block.named_modules() if isinstance(m, CompressedLinear)}
    (described, found), tensors = group.broadcast_from(0, [layers, losses], block.state_dict())
    if not group.first:
        for name, about in described.items():
            entry = LayerEntry.parse(about)
            packed = {key: tensors.pop(f"{name}.{key}") for key in entry.tensors}
            swap(block, name, _compressed(entry, packed, tensors.pop(f"{name}.bias", None), task.device))
        block.load_state_dict(tensors, strict=False)
    return found[0], found[1]


def _rerecorded(task: BlockTask, layer: CompressedLayer, losses: tuple[float, float]) -> CompressedLayer:
    """A layer with the record of the values that block reconstruction has changed."""
    assert task.original_block is not None
    name = layer.record.name.removeprefix(f"{task.name}.")
    module = task.block.get_submodule(name)
    assert isinstance(module, CompressedLinear)
    parts = module.parts()
    error = relative_error(weight_of(task.original_block.get_submodule(name)), parts.dense(), layer.second_moment)
    record = dataclasses.replace(layer.record, bits=parts.storage_bits(), error=error, output_error=None, reconstruction=losses)
    return dataclasses.replace(layer, record=record)


def commit_block(task: BlockTask, layers: list[CompressedLayer], streams: Streams, prepared: Prepared) -> Streams:
    """Run the compressed block, and store it in the journal with its outputs, which are the inputs of the next."""
    task.progress.doing("propagate")
    outputs = {_COMPRESSED: run_through(task.compressed_run)}
    if (original_run := task.original_run) is not None:
        outputs[_ORIGINAL] = run_through(original_run)
    records = tuple(layer.record for layer in layers)
    tensors, entries = stored_tensors(task.block, task.name, task.dtypes)
    content = BlockContent(task.name, tensors, entries, [dataclasses.asdict(record) for record in records])
    held = prepared.activations.commit(content, outputs)
    for passes in (task.passes, task.original_passes):
        passes.forget()
    task.progress.finished(records, task.progress.elapsed)
    return dataclasses.replace(streams, held=held)


def stored_tensors(
    block: nn.Module, name: str, dtypes: dict[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Json]]]:
    """A finished block's tensors as they are stored, on the CPU, and its layers' entries in the config; by full name.

    Tensors that were not compressed are cast back to their stored dtype, bit for bit.
    """
    layers = {n: m for n, m in block.named_modules() if isinstance(m, CompressedLinear)}
    packed = {f"{n}.{tensor}" for n, module in layers.items() for tensor in module.packed_names}
    tensors = {}
    for key, tensor in block.state_dict().items():
        full = f"{name}.{key}"
        tensors[full] = (tensor if key in packed else tensor.to(dtypes[full])).to("cpu").contiguous()
    return tensors, {f"{name}.{n}": module.describe().to_json() for n, module in layers.items()}
