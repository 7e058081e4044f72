"""A model's blocks compressed one after another: what `pipeline.compress` does between opening and writing.

Each block is measured on the outputs of the compressed ones before it. Where a step needs a statistic that compares with the
original model, or block reconstruction does, the original block and its own inputs go along. A block is read when its turn
comes, and committed to the journal, with the inputs of the next, when it is done; a journal that holds blocks is gone on from.

Several ranks (slimlm.distributed) do this together: each runs its own windows through the block, the statistics are those of
all windows, the layers of a stage are dealt out, and each is handed to all when it is done. Matching is the first rank's alone.
"""

import copy
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.calibration.capture import (
    Arguments,
    BlockInputs,
    BlockRun,
    arguments_of,
    batches_of,
    first_inputs,
    run,
    run_through,
)
from slimlm.calibration.measurement import measure
from slimlm.calibration.stages import stages_of
from slimlm.core.errors import NumericsError
from slimlm.core.layer import Layer
from slimlm.core.parts import dense_of
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.core.statistics.mean_square import MeanSquare
from slimlm.distributed.group import Group, dealt
from slimlm.events import UNWATCHED, BlockDone, BlockWatch, Event, LayerDone, Observer
from slimlm.models.lazy import StreamedModel
from slimlm.models.structure import linears_of, swap, weight_of
from slimlm.recipe import Recipe, apply_steps
from slimlm.record import LayerRecord, layer_from, record_of, relative_error
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage.journal import Journal
from slimlm.tuning.block_reconstruction import Matching, match_block

_COMPRESSED, _ORIGINAL = "compressed", "original"
"""The names of the two kinds of activations in the journal."""


def compress_blocks(
    dense: StreamedModel,
    blocks: dict[str, nn.Module],
    recipe: Recipe,
    windows: Tensor,
    device: torch.device,
    progress: Observer,
    journal: Journal,
) -> BlockInputs:
    """Compress the model's blocks into the journal, each on the outputs of those before it; those it holds are done.

    Gives the outputs of the last compressed block.
    """
    names = list(blocks)
    progress(Event("compress", len(journal.blocks), len(names), blocks=kept_blocks(journal)))
    arguments, held = _begin(dense, blocks, recipe, windows, journal)
    coming = dense.coming(names[len(journal.blocks) :], device)
    for done, name in list(enumerate(names))[len(journal.blocks) :]:
        watch, began = BlockWatch(progress, name, done, len(names)), time.monotonic()
        watch.doing("read")
        flow = BlockInputs(held[_COMPRESSED], arguments, journal.group)
        original_flow = BlockInputs(_original(held), arguments, journal.group) if recipe.needs_original else None
        reconstruction = recipe.block_reconstruction
        block = next(coming)
        twin = copy.deepcopy(block) if original_flow is not None or reconstruction is not None else None
        original = None if twin is None or original_flow is None else BlockRun(twin, name, original_flow, device)
        records, energies = compress_block(block, name, flow, recipe, dense.dtypes, device, original, watch)
        if reconstruction is not None and twin is not None:
            watch.doing("match")
            teacher = flow if original_flow is None or reconstruction.inputs == "compressed" else original_flow
            targets = journal.spill("targets", run(BlockRun(twin, name, teacher, device)), journal.share)
            student = flow if original_flow is None or reconstruction.inputs != "dense" else original_flow
            matched = match(block, name, student, targets, reconstruction, dense.dtypes, device, windows, journal)
            records = [rerecorded(record, block, name, energies[record.name], twin, matched) for record in records]
            del targets
        watch.doing("propagate")
        streams = {_COMPRESSED: run_through(BlockRun(block, name, flow, device))}
        if original is not None:
            streams[_ORIGINAL] = run_through(original)
        tensors, about = stored_tensors(block, name, dense.dtypes)
        rows = [dataclasses.asdict(record) for record in records]
        held = journal.commit(name, tensors, about, rows, streams)
        watch.finished(tuple(records), time.monotonic() - began)
    return BlockInputs(held[_COMPRESSED], arguments, journal.group)


def kept_blocks(journal: Journal) -> tuple[BlockDone, ...]:
    """The blocks that an earlier run finished."""
    return tuple(
        BlockDone(number, block.name, tuple(map(layer_from, block.records)), None)
        for number, block in enumerate(journal.blocks, 1)
    )


def _original(held: dict[str, Sequence[Tensor]]) -> Sequence[Tensor]:
    """The original model's activations: those held, or, before the first block, the only ones there are."""
    if _ORIGINAL in held:
        return held[_ORIGINAL]
    inputs = held[_COMPRESSED]
    return list(inputs) if isinstance(inputs, list) else inputs


def own_windows(windows: Tensor, journal: Journal) -> Tensor:
    """Those of the windows `[count, length]` that this rank runs."""
    return windows.split(journal.shares)[journal.group.rank]


def _begin(
    dense: StreamedModel, blocks: dict[str, nn.Module], recipe: Recipe, windows: Tensor, journal: Journal
) -> tuple[dict[tuple[str, int], Arguments], dict[str, Sequence[Tensor]]]:
    """Every block's other arguments, and the activations to go on with: of the first block, or those that the journal holds."""
    own = own_windows(windows, journal)
    with dense.ends_filled(blocks):
        with dense.blocks_in_turn(blocks):
            arguments = arguments_of(dense.model, blocks, own)
            if recipe.block_reconstruction is not None and journal.group.size > 1 and journal.group.first:
                # It will match all windows, in batches as large as those of a single process.
                arguments |= arguments_of(dense.model, blocks, windows)
        if journal.inputs is None:
            streams = {_COMPRESSED: first_inputs(dense.model, blocks, own)}
            return arguments, journal.put_inputs(streams)
    return arguments, journal.held_inputs(len(batches_of(own)[0]))


def stored_tensors(
    block: nn.Module, name: str, dtypes: dict[str, torch.dtype]
) -> tuple[dict[str, Tensor], dict[str, dict[str, object]]]:
    """A finished block's tensors as they are stored, on the CPU, and what the config says of its layers; by full name.

    What was not compressed is cast back to its stored dtype, bit for bit.
    """
    layers = {n: m for n, m in block.named_modules() if isinstance(m, CompressedLinear)}
    packed = {f"{n}.{tensor}" for n, module in layers.items() for tensor in module.packed_names}
    tensors = {}
    for key, tensor in block.state_dict().items():
        full = f"{name}.{key}"
        tensors[full] = (tensor if key in packed else tensor.to(dtypes[full])).to("cpu").contiguous()
    return tensors, {f"{name}.{n}": module.about() for n, module in layers.items()}


def compress_block(
    block: nn.Module,
    block_name: str,
    flow: BlockInputs,
    recipe: Recipe,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
    original: BlockRun | None = None,
    watch: BlockWatch = UNWATCHED,
) -> tuple[list[LayerRecord], dict[str, Tensor]]:
    """Compress one block in place; `original` is the block before and its inputs, for steps that compare with them.

    Gives the layers' records and, by full name, the mean square of their inputs `[in]`.
    """
    linears = {name: linear for name, linear in linears_of(block).items() if not recipe.ignores(f"{block_name}.{name}")}
    if not linears:
        return [], {}
    energies: dict[str, Tensor] = {}
    block_run = BlockRun(block, block_name, flow, device)
    stages = stages_of(block_run, linears) if recipe.sequential else [list(linears)]
    records = []
    for stage in stages:
        watch.doing("measure", *stage)
        own = {name: linears[name] for name in stage}
        stats = measure(block_run, own, recipe.needs | {MeanSquare}, original)
        owners = dealt({name: cost_of(linear, recipe) for name, linear in own.items()}, flow.group.size)
        made = {}
        for name, linear in own.items():
            if owners[name] == flow.group.rank:
                watch.doing("steps", name)
                made[name] = compress_layer(f"{block_name}.{name}", linear, stats[name], recipe, dtypes)
        for name, linear in own.items():
            module, done = handed(flow.group, owners[name], made.get(name), linear)
            swap(block, name, module)
            energies[done.record.name] = stats[name][MeanSquare]
            records.append(done.record)
            watch.finished_layer(done)
    return records, energies


def cost_of(linear: nn.Module, recipe: Recipe) -> float:
    """About how long a layer takes, in no unit: for dealing layers out to ranks.

    Steps that know the covariance pass over it for every output; others work on products of low rank.
    """
    out, width = weight_of(linear).shape
    return float(out) * width * (width if Covariance in recipe.needs else min(out, width))


def compress_layer(
    name: str, linear: nn.Module, stats: Stats, recipe: Recipe, dtypes: dict[str, torch.dtype]
) -> tuple[CompressedLinear, LayerDone]:
    """Apply the recipe's steps to one layer, by full name; gives what takes its place, and what is to be told of it."""
    began = time.monotonic()
    layer = Layer.of(name, weight_of(linear), dtypes[f"{name}.weight"])
    if stats.note is not None:
        layer = layer.note(stats.note)
    try:
        layer = apply_steps(recipe.steps_for(name), layer, stats)
    except NumericsError as error:
        raise NumericsError(f"{name}: {error}") from error
    module = CompressedLinear.from_parts(layer.parts(), _bias_of(linear))
    return module, LayerDone(record_of(layer, stats[MeanSquare]), stats.tokens, time.monotonic() - began)


def handed(
    group: Group, owner: int, made: tuple[CompressedLinear, LayerDone] | None, linear: nn.Module
) -> tuple[CompressedLinear, LayerDone]:
    """The layer that the rank `owner` has made in place of `linear`, on every rank."""
    if group.size == 1:
        assert made is not None, "a single process makes every layer"
        return made
    about: Any = None if made is None else [made[0].about(), dataclasses.asdict(made[1])]
    (described, done), tensors = group.shared(owner, about, {} if made is None else made[0].packed())
    if made is not None:
        return made
    module = _compressed(described, tensors, _bias_of(linear), weight_of(linear).device)
    return module, LayerDone(layer_from(done["record"]), done["tokens"], done["seconds"])


def _bias_of(linear: nn.Module) -> Tensor | None:
    return dict(linear.named_parameters()).get("bias")


def _compressed(
    about: dict[str, Any], packed: dict[str, Tensor], bias: Tensor | None, device: torch.device
) -> CompressedLinear:
    """A layer of what `CompressedLinear.about` says and its packed tensors."""
    return CompressedLinear(tuple(about["shape"]), about["parts"], packed, bias).to(device)


def rerecorded(
    record: LayerRecord, block: nn.Module, block_name: str, energy: Tensor, twin: nn.Module, matched: tuple[float, float]
) -> LayerRecord:
    """A layer's record after matching has changed what is stored."""
    name = record.name.removeprefix(f"{block_name}.")
    module = block.get_submodule(name)
    assert isinstance(module, CompressedLinear)
    parts = module.parts()
    bits = sum(part.storage_bits() for part in parts)
    error = relative_error(weight_of(twin.get_submodule(name)), dense_of(parts), energy)
    return dataclasses.replace(record, bits=bits, error=error, matched=matched)


def match(
    block: nn.Module,
    block_name: str,
    inputs: BlockInputs,
    targets: Sequence[Tensor],
    options: Matching,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
    windows: Tensor,
    journal: Journal,
) -> tuple[float, float]:
    """Tune a compressed block towards the original outputs; the relative squared error on windows held back, before, after.

    The first rank does it, on all windows, and hands the block to the others.
    """
    group, batch = journal.group, len(batches_of(windows)[0])
    hidden = journal.gathered("matched inputs", inputs.hidden, batch)
    all_targets = journal.gathered("matched targets", targets, batch)
    found = None
    if group.first:
        found = match_block(block, block_name, BlockInputs(hidden, inputs.arguments), all_targets, options, dtypes, device)
    return hand_on(group, block, None if found is None else (found.before, found.after), device)


def hand_on(group: Group, block: nn.Module, matched: tuple[float, float] | None, device: torch.device) -> tuple[float, float]:
    """Give the other ranks the first one's block, and what matching it came to."""
    if group.size == 1:
        assert matched is not None, "a single process matches every block"
        return matched
    layers = {n: m.about() for n, m in block.named_modules() if isinstance(m, CompressedLinear)}
    (described, found), tensors = group.shared(0, [layers, matched], block.state_dict())
    if not group.first:
        for name, about in described.items():
            packed = {key: tensors.pop(f"{name}.{key}") for key in about["tensors"]}
            swap(block, name, _compressed(about, packed, tensors.pop(f"{name}.bias", None), device))
        block.load_state_dict(tensors, strict=False)
    return found[0], found[1]
