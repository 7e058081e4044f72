"""A model's blocks compressed in place, one after another: what `pipeline.compress` does between opening and writing.

Each block is measured on the outputs of the compressed ones before it. Where a step follows the original model (`Need.CROSS`,
`Need.DRIFT`), or matching does, the original block and its own inputs go along.
"""

import copy
import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from slimlm.calibrate import Flow, Original, enter, measure, measure_drift, run, stages_of
from slimlm.core.errors import NumericsError
from slimlm.core.layer import Layer, Need, measured
from slimlm.core.parts import dense_of
from slimlm.evaluate.results import LayerRecord, record_of, relative_error
from slimlm.models.opening import DenseModel
from slimlm.models.structure import linears_of, swap, weight_of
from slimlm.recipe import Recipe
from slimlm.runtime.linear import CompressedLinear
from slimlm.tune.match import Matching, match_block

Progress = Callable[[str, int, int], None]
"""Told (stage, done, total) as work goes on."""


def compress_blocks(
    dense: DenseModel,
    blocks: dict[str, nn.Module],
    recipe: Recipe,
    windows: Tensor,
    device: torch.device,
    progress: Progress,
) -> list[LayerRecord]:
    """Compress the model's blocks in place, each on the outputs of those before it."""
    progress("compress", 0, len(blocks))
    flow = enter(dense.model, blocks, windows)
    own_inputs = recipe.matching is not None and recipe.matching.inputs != "compressed"
    original_flow = flow if own_inputs or recipe.needs & Need.CROSS else None
    records: list[LayerRecord] = []
    for done, (block_name, block) in enumerate(blocks.items(), 1):
        block.to(device)
        twin = copy.deepcopy(block) if original_flow is not None or recipe.matching is not None else None
        original = None if twin is None or original_flow is None else (twin, original_flow)
        new, energies = compress_block(block, block_name, flow, recipe, dense.dtypes, device, original)
        if recipe.matching is not None and twin is not None:
            matched = match(block, twin, block_name, flow, original_flow, recipe.matching, dense.dtypes, device)
            new = [rerecorded(record, block, block_name, energies[record.name], twin, matched) for record in new]
        records += new
        flow = Flow(list(run(block, block_name, flow, device)), flow.arguments)
        if original is not None:
            original_flow = Flow(list(run(original[0], block_name, original[1], device)), flow.arguments)
        block.to("cpu")
        progress("compress", done, len(blocks))
    return records


def compress_block(
    block: nn.Module,
    block_name: str,
    flow: Flow,
    recipe: Recipe,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
    original: Original | None = None,
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
        own = {name: linears[name] for name in stage}
        stats = measure(block, block_name, own, flow, recipe.needs | Need.MEAN_SQUARE, device, original)
        if recipe.needs & Need.DRIFT and len(own) == 1 and original is not None:
            ((name, linear),) = own.items()
            drift = measure_drift(block, block_name, name, linear, flow, device, original)
            stats = {name: dataclasses.replace(stats[name], drift=drift)}
        for name, linear in own.items():
            full = f"{block_name}.{name}"
            layer = Layer.of(full, weight_of(linear), dtypes[f"{full}.weight"])
            try:
                for named in recipe.steps_for(full):
                    layer = named.step(layer, stats[name])
            except NumericsError as error:
                raise NumericsError(f"{full}: {error}") from error
            swap(block, name, CompressedLinear.from_parts(layer.parts(), dict(linear.named_parameters()).get("bias")))
            energies[full] = measured(stats[name].mean_square)
            records.append(record_of(layer, energies[full]))
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
    twin: nn.Module,
    block_name: str,
    flow: Flow,
    original_flow: Flow | None,
    options: Matching,
    dtypes: dict[str, torch.dtype],
    device: torch.device,
) -> tuple[float, float]:
    """Tune a compressed block towards its original; the relative squared error on held-back windows before and after."""
    inputs, teacher = flow, flow
    if options.inputs != "compressed":
        assert original_flow is not None
        teacher = original_flow
        inputs = original_flow if options.inputs == "dense" else flow
    targets = list(run(twin, block_name, teacher, device))
    matched = match_block(block, block_name, inputs, targets, options, dtypes, device)
    return matched.before, matched.after
