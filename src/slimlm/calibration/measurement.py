"""Measure the statistics that the steps need, and nothing more.

The classes in `slimlm.core.statistics` define which tensors a statistic is computed from, how a batch is added, and how the
totals of ranks and of pooled experts are merged; no statistic is named here.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.calibration.capture import BlockRun, layer_inputs
from slimlm.calibration.output_residuals import residual_batches
from slimlm.calibration.stages import kind_of
from slimlm.core.errors import ModelError, NumericsError
from slimlm.core.profiling import profiled
from slimlm.core.statistics.base import Batch, Needs, Source, Statistic, Stats, in_order
from slimlm.distributed.group import Group
from slimlm.models.structure import weight_of
from slimlm.runtime.memory import free_on_gpu

POOLED = "measured on the inputs of all experts together, because it was given fewer tokens than it has inputs"
"""The note of an expert that could not be measured on its own inputs."""
_SHARE_OF_GPU = 0.25


def measure(
    block_run: BlockRun, linears: dict[str, nn.Module], needs: Needs, original: BlockRun | None = None
) -> dict[str, Stats]:
    """Statistics of the inputs of these linear layers of a block, by the layer's name within it.

    Layers that are given the same tensor (q, k and v; gate and up) share one measurement. Every rank measures its samples, and
    all get the statistics of all samples. A statistic is None where its source (`Source`) does not exist for a layer: an expert
    that is routed other tokens than in the original model has none of original inputs; a layer whose output is not added to the
    block's output, or that is measured with others, has none of output residuals; one that has these has none of original
    inputs, which say less. An expert that is given fewer tokens than it has inputs gets the statistics of the same layer of all
    experts of the block together, and a note of it.

    Args:
        block_run: The block and its inputs.
        linears: The layers to measure, by their names within the block.
        needs: The statistics to measure.
        original: The original block and its inputs in the original model; for statistics that compare with these.

    Raises:
        NumericsError: An input or output holds NaN or infinity.
        ModelError: A layer is given no input, or an expert cannot have a statistic of whole samples.
    """
    assert original is not None or not any(own.source.compares for own in needs), "these statistics need the original block"
    of_residuals = frozenset(own for own in needs if own.source is Source.OUTPUT_RESIDUALS)
    if not of_residuals:
        return _measured_inputs(block_run, linears, needs, original)
    residuals: dict[type[Statistic], Tensor | None] = {}
    if len(linears) == 1 and original is not None:
        ((layer, linear),) = linears.items()
        residuals = _measured_residuals(block_run, layer, linear, of_residuals, original)
    spared = frozenset(own for own in needs if residuals and own.source is Source.ORIGINAL_INPUTS)
    found = _measured_inputs(block_run, linears, needs - of_residuals - spared, original)
    values: dict[type[Statistic], Tensor | None] = {**dict.fromkeys(of_residuals | spared), **residuals}
    # One object for layers that share an input, so that they share its cache.
    complete = {id(stats): replace(stats, values={**stats.values, **values}) for stats in found.values()}
    return {layer: complete[id(stats)] for layer, stats in found.items()}


def _measured_inputs(
    block_run: BlockRun, linears: dict[str, nn.Module], needs: Needs, original: BlockRun | None
) -> dict[str, Stats]:
    """The statistics that are measured at the layers' inputs: all but those of output residuals."""
    inputs, name = block_run.inputs, block_run.name
    totals: dict[str, LayerTotals] = {}
    owner: dict[str, str] = {}
    length = inputs.hidden[0].shape[1]
    originals = None
    if original is not None and any(own.source is Source.ORIGINAL_INPUTS for own in needs):
        originals = layer_inputs(original, {layer: original.block.get_submodule(layer) for layer in linears})
    for hidden, seen in zip(inputs.hidden, layer_inputs(block_run, linears), strict=True):
        before = next(originals) if originals is not None else {}
        first: list[tuple[Tensor, str]] = []
        for layer, x in seen.items():
            same = [other for tensor, other in first if tensor is x]
            owner[layer] = same[0] if same else layer
            if not same:
                first.append((x, layer))
                own = totals.setdefault(layer, LayerTotals(needs, length, f"{name}.{layer}"))
                own.add(x, before.get(layer), batch_tokens=len(hidden) * length)
    if inputs.group.size > 1:
        owner, totals = _of_all_ranks(owner, totals, block_run, LayerTotals(needs, length, name))
    all_tokens = sum(inputs.group.all_gather(sum(len(hidden) for hidden in inputs.hidden))) * length
    place = _resting_place(totals.values(), block_run.device)
    by_layer = {layer: totals[first_layer] for layer, first_layer in owner.items()}
    pooled = _pooled(block_run.block, linears, by_layer, all_tokens, place)
    stats = {layer: own.stats(place) for layer, own in totals.items() if own.tokens}
    found = {}
    for layer in linears:
        if layer not in pooled and owner.get(layer) not in stats:
            raise ModelError(
                f"{name}.{layer} got no input during calibration: the model uses its weight in another way, or does not use it "
                f'on plain text. Exclude it (`ignore="*.{layer}"`)'
            )
        found[layer] = pooled[layer] if layer in pooled else stats[owner[layer]]
    return found


def _measured_residuals(
    block_run: BlockRun, layer: str, linear: nn.Module, needs: Needs, original: BlockRun
) -> dict[type[Statistic], Tensor | None]:
    batches = residual_batches(block_run, linear, original)
    if batches is None:
        return {}
    totals = LayerTotals(needs, block_run.inputs.hidden[0].shape[1], f"{block_run.name}.{layer}")
    for batch in batches:
        totals.include(batch)
    group, device = block_run.inputs.group, block_run.device
    if group.size > 1:
        totals.merge_ranks(group.all_gather(totals.report()), group, device)
    return dict(totals.stats(_resting_place([totals], device)).values)


class LayerTotals:
    """The running statistics of one layer's inputs."""

    def __init__(self, needs: Needs, length: int, name: str) -> None:
        self.needs, self.length, self.name = needs, length, name
        self.tokens = 0
        self.statistics: list[Statistic] = [own() for own in in_order(needs)]

    def add(self, x: Tensor, original: Tensor | None, *, batch_tokens: int) -> None:
        """Add a batch of inputs.

        Args:
            x: The inputs, `[samples, length, in]`, or `[tokens, in]` as some models flatten them.
            original: The same layer's inputs in the original model, where they are needed.
            batch_tokens: Tokens of the whole batch; inputs of only some of them (an expert's) are not whole samples, and
                cannot be paired, because the router may have picked other tokens in the original model.

        Raises:
            ModelError: A statistic needs whole samples, and these are not.
        """
        rows = x.flatten(0, -2)
        complete = len(rows) == batch_tokens
        whole = [type(own).__name__ for own in self.statistics if own.source is Source.SAMPLES]
        if whole and not complete:
            raise ModelError(
                f"{self.name} is given {len(rows)} of {batch_tokens} tokens (an expert); a step of the recipe needs "
                f'{whole[0]}, which takes whole samples. Exclude such layers (`ignore="*.experts.*"`) or use another recipe'
            )
        before = None if original is None else original.flatten(0, -2)
        paired = before is not None and before.shape == rows.shape and complete
        self.include(Batch(rows, self.length, original_inputs=before if paired else None))

    @profiled("statistics")
    def include(self, batch: Batch) -> None:
        """Add a batch to all statistics."""
        self.tokens += len(batch.inputs)
        for own in self.statistics:
            own.add(batch)

    def report(self) -> list[Any]:
        """The data that other ranks need before totals are merged: tokens, and each total's availability and shape."""
        shapes = [None if own.total is None else list(own.total.shape) for own in self.statistics]
        return [self.tokens, [own.available for own in self.statistics], shapes]

    def merge_ranks(self, reports: list[list[Any]], group: Group, device: torch.device) -> None:
        """Merge with the totals of the other ranks; `reports` are those of all ranks that have this layer's totals."""
        self.tokens = sum(tokens for tokens, _, _ in reports)
        for i, own in enumerate(self.statistics):
            if not all(available[i] for _, available, _ in reports):
                own.withdraw()
                continue
            shape = next((shapes[i] for _, _, shapes in reports if shapes[i] is not None), None)
            if shape is not None:
                mine = torch.zeros(shape, dtype=own.total_dtype, device=device) if own.total is None else own.total
                merge = group.all_reduce_sum if own.reduction == "sum" else group.all_reduce_max
                own.total = merge(mine.contiguous())

    @classmethod
    def together(cls, parts: "list[LayerTotals]") -> "LayerTotals":
        """The totals over the tokens of all of these; inputs in the original model are not paired."""
        total = cls(parts[0].needs, parts[0].length, parts[0].name)
        for own in total.statistics:
            if own.source.compares:
                own.withdraw()
        for part in parts:
            total.tokens += part.tokens
            for own, other in zip(total.statistics, part.statistics, strict=True):
                own.merge(other)
        return total

    def bytes(self) -> int:
        """Bytes of the finished statistics, in float32."""
        return sum(4 * own.total.numel() for own in self.statistics if own.total is not None)

    @profiled("statistics")
    def stats(self, device: torch.device) -> Stats:
        """The finished statistics, on a device; raises NumericsError where one is not finite."""
        for own in self.statistics:
            if own.total is not None and not bool(own.total.isfinite().all()):
                what = "the block's outputs at" if own.source is Source.OUTPUT_RESIDUALS else "the inputs of"
                raise NumericsError(f"{what} {self.name} hold NaN or infinity; the model overflows on the calibration text")
        results = {type(own): own.result(self.tokens, self.length) for own in self.statistics}
        return Stats(self.tokens, {own: None if r is None else r.to(device) for own, r in results.items()})


def _pooled(
    block: nn.Module, linears: dict[str, nn.Module], totals: dict[str, LayerTotals], all_tokens: int, place: torch.device
) -> dict[str, Stats]:
    """Statistics for the layers of experts with fewer tokens (of `all_tokens`) than inputs: those of all experts together.

    totals: By layer; layers that share an input share an object, and a layer without inputs has none.
    """
    kinds: dict[str, list[str]] = {}
    for layer in linears:
        kinds.setdefault(kind_of(block, layer), []).append(layer)
    found: dict[str, Stats] = {}
    pools: dict[tuple[int, ...], Stats] = {}
    for kind, layers in kinds.items():
        given = {id(totals[layer]): totals[layer] for layer in layers if layer in totals and totals[layer].tokens}
        for layer in layers:
            own = totals.get(layer)
            tokens = 0 if own is None else own.tokens
            others = len(given) - (tokens > 0)
            if kind == layer or others == 0 or tokens == all_tokens or tokens >= weight_of(linears[layer]).shape[1]:
                continue
            pool = tuple(given)
            if pool not in pools:
                pools[pool] = replace(LayerTotals.together(list(given.values())).stats(place), note=POOLED)
            found[layer] = pools[pool]
    return found


def _resting_place(totals: Iterable[LayerTotals], device: torch.device) -> torch.device:
    """The device of statistics until steps use them: the block's, where they take at most a quarter of its free memory."""
    fits = device.type == "cpu" or sum(own.bytes() for own in totals) <= _SHARE_OF_GPU * free_on_gpu(device)
    return device if fits else torch.device("cpu")


def _of_all_ranks(
    owner: dict[str, str], totals: dict[str, LayerTotals], block_run: BlockRun, nothing: LayerTotals
) -> tuple[dict[str, str], dict[str, LayerTotals]]:
    """The layer that each layer shares its measurement with, and the totals, over all ranks.

    A rank may have no totals of a layer (an expert). nothing: Empty totals with the needs and the length of a sample.
    """
    group = block_run.inputs.group
    reports = group.all_gather([owner, {layer: each.report() for layer, each in totals.items()}])
    owners = {layer: first for owned, _ in reversed(reports) for layer, first in owned.items()}
    found = {}
    for layer in dict.fromkeys(layer for _, reported in reports for layer in reported):
        theirs = [reported[layer] for _, reported in reports if layer in reported]
        found[layer] = totals.get(layer) or LayerTotals(nothing.needs, nothing.length, f"{nothing.name}.{layer}")
        found[layer].merge_ranks(theirs, group, block_run.device)
    return owners, found
