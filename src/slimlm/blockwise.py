"""A model's blocks compressed one after another: what `pipeline.compress` does between opening and writing.

Each block is measured on the outputs of the compressed ones before it. Where a step follows the original model (`Need.CROSS`,
`Need.DRIFT`), or matching does, the original block and its own inputs go along. A block is read when its turn comes, and
committed to the journal, with the inputs of the next, when it is done; a journal that holds blocks is gone on from.
"""

import copy
import dataclasses
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slimlm.calibrate import (
    Arguments,
    Flow,
    Original,
    arguments_of,
    first_inputs,
    measure,
    measure_drift,
    run,
    run_through,
    stages_of,
)
from slimlm.core.errors import NumericsError
from slimlm.core.layer import Layer, Need, measured
from slimlm.core.parts import dense_of
from slimlm.evaluate.results import LayerRecord, layer_from, record_of, relative_error
from slimlm.events import UNWATCHED, BlockDone, BlockWatch, Event, LayerDone, Observer
from slimlm.models.structure import linears_of, swap, weight_of
from slimlm.recipe import Recipe
from slimlm.runtime.linear import CompressedLinear
from slimlm.storage.journal import Journal
from slimlm.streaming import StreamedModel
from slimlm.tune.match import Matching, match_block

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
) -> Flow:
    """Compress the model's blocks into the journal, each on the outputs of those before it; those it holds are done.

    Gives the outputs of the last compressed block.
    """
    names = list(blocks)
    progress(Event("compress", len(journal.blocks), len(names), blocks=kept_blocks(journal)))
    arguments, held = _begin(dense, blocks, windows, journal)
    coming = dense.coming(names[len(journal.blocks) :], device)
    for done, name in list(enumerate(names))[len(journal.blocks) :]:
        watch, began = BlockWatch(progress, name, done, len(names)), time.monotonic()
        watch.doing("read")
        flow = Flow(held[_COMPRESSED], arguments)
        original_flow = Flow(held.get(_ORIGINAL, list(flow.hidden)), arguments) if follows(recipe) else None
        block = next(coming)
        twin = copy.deepcopy(block) if original_flow is not None or recipe.matching is not None else None
        original = None if twin is None or original_flow is None else (twin, original_flow)
        records, energies = compress_block(block, name, flow, recipe, dense.dtypes, device, original, watch)
        if recipe.matching is not None and twin is not None:
            watch.doing("match")
            teacher = flow if original_flow is None or recipe.matching.inputs == "compressed" else original_flow
            targets = journal.spill("targets", run(twin, name, teacher, device), len(windows))
            matched = match(block, name, flow, original_flow, targets, recipe.matching, dense.dtypes, device)
            records = [rerecorded(record, block, name, energies[record.name], twin, matched) for record in records]
            del targets
        watch.doing("propagate")
        streams = {_COMPRESSED: run_through(block, name, flow, device)}
        if original is not None:
            streams[_ORIGINAL] = run_through(original[0], name, original[1], device)
        tensors, about = stored_tensors(block, name, dense.dtypes)
        rows = [dataclasses.asdict(record) for record in records]
        held = journal.commit(name, tensors, about, rows, streams, len(windows))
        watch.finished(tuple(records), time.monotonic() - began)
    return Flow(held[_COMPRESSED], arguments)


def kept_blocks(journal: Journal) -> tuple[BlockDone, ...]:
    """The blocks that an earlier run finished."""
    return tuple(
        BlockDone(number, block.name, tuple(map(layer_from, block.records)), None)
        for number, block in enumerate(journal.blocks, 1)
    )


def follows(recipe: Recipe) -> bool:
    """Whether the recipe needs the original model's activations beside those of the compressed blocks."""
    return bool(recipe.needs & Need.CROSS) or (recipe.matching is not None and recipe.matching.inputs != "compressed")


def _begin(
    dense: StreamedModel, blocks: dict[str, nn.Module], windows: Tensor, journal: Journal
) -> tuple[dict[tuple[str, int], Arguments], dict[str, Sequence[Tensor]]]:
    """Every block's other arguments, and the activations to go on with: of the first block, or those that the journal holds."""
    with dense.ends_filled(blocks):
        with dense.blocks_in_turn(blocks):
            arguments = arguments_of(dense.model, blocks, windows)
        if journal.inputs is None:
            streams = {_COMPRESSED: first_inputs(dense.model, blocks, windows)}
            return arguments, journal.put_inputs(streams, len(windows))
    return arguments, journal.held_inputs()


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
    flow: Flow,
    recipe: Recipe,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
    original: Original | None = None,
    watch: BlockWatch = UNWATCHED,
) -> tuple[list[LayerRecord], dict[str, Tensor]]:
    """Compress one block in place; `original` is the block before and its inputs, for steps that follow them.

    Gives the layers' records and, by full name, the mean square of their inputs `[in]`.
    """
    linears = {name: linear for name, linear in linears_of(block).items() if not recipe.leaves(f"{block_name}.{name}")}
    if not linears:
        return [], {}
    energies: dict[str, Tensor] = {}
    stages = stages_of(block, block_name, linears, flow, device) if recipe.sequential else [list(linears)]
    records = []
    for stage in stages:
        watch.doing("measure", *stage)
        own = {name: linears[name] for name in stage}
        stats = measure(block, block_name, own, flow, recipe.needs | Need.MEAN_SQUARE, device, original)
        if recipe.needs & Need.DRIFT and len(own) == 1 and original is not None:
            ((name, linear),) = own.items()
            drift = measure_drift(block, block_name, name, linear, flow, device, original)
            stats = {name: dataclasses.replace(stats[name], drift=drift)}
        for name, linear in own.items():
            full, began = f"{block_name}.{name}", time.monotonic()
            watch.doing("steps", name)
            layer = Layer.of(full, weight_of(linear), dtypes[f"{full}.weight"])
            if (note := stats[name].note) is not None:
                layer = layer.note(note)
            try:
                for named in recipe.steps_for(full):
                    layer = named.step(layer, stats[name])
            except NumericsError as error:
                raise NumericsError(f"{full}: {error}") from error
            swap(block, name, CompressedLinear.from_parts(layer.parts(), dict(linear.named_parameters()).get("bias")))
            energies[full] = measured(stats[name].mean_square)
            records.append(record_of(layer, energies[full]))
            watch.finished_layer(LayerDone(records[-1], stats[name].tokens, time.monotonic() - began))
    return records, energies


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
    flow: Flow,
    original_flow: Flow | None,
    targets: Sequence[Tensor],
    options: Matching,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
) -> tuple[float, float]:
    """Tune a compressed block towards the original outputs; the relative squared error on windows held back, before, after."""
    inputs = flow
    if options.inputs == "dense":
        assert original_flow is not None
        inputs = original_flow
    matched = match_block(block, block_name, inputs, targets, options, dtypes, device)
    return matched.before, matched.after
