"""What a run will need: the shapes of what it will work on, what it will store, and what that takes of memory and disk.

All of it follows from the meta model: no weight is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from slimlm.calibration.capture import BlockInputs, BlockRun, arguments_of, batches_of, first_inputs
from slimlm.calibration.stages import stages_of
from slimlm.core.parts.uniform import UniformEntry
from slimlm.core.statistics.base import Sizes, Source, Statistic
from slimlm.core.statistics.covariance import Covariance
from slimlm.models.embeddings import GROUP_SIZE, Embeddings
from slimlm.models.lazy import LazyModel
from slimlm.models.structure import linears_of, text_config, weight_of
from slimlm.planner.forms import Steps, form_of, resolved
from slimlm.preflight.refusals import compressible
from slimlm.recipe import Recipe

_FEW_TOKENS = 8
_KEPT_BY_ALLOCATOR = 160 * 2**20
"""Of small tensors that are freed the allocator keeps about as much again, up to about this."""
_LAYER_COPIES = {"joint": 14, "quantize": 8, "prune": 6, "compensate": 8}
"""Float32 copies of a layer's weight that a step of a kind holds at its fullest."""


@dataclass(frozen=True)
class RunNeeds:
    """What a run is to do, and what that takes."""

    dense: LazyModel
    blocks: dict[str, nn.Module]
    """the model's blocks, by full name"""
    recipe: Recipe
    embeddings: Embeddings
    """what becomes of embedding and head"""
    skipped: dict[str, str]
    """what is not compressed, and why"""
    sample_count: int
    """calibration samples"""
    length: int
    """tokens per sample"""
    bits: float | None = None
    """a budget per weight, where what layers become is yet to be planned"""

    @property
    def tokens(self) -> int:
        """Of all calibration samples."""
        return self.sample_count * self.length

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a batch."""
        return batches_of(torch.empty(self.sample_count, self.length, device="meta"))[0].numel()

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Full name and shape `(out, in)` of every layer that is to be compressed."""
        return compressible(self.blocks, self.recipe)

    def steps(self, layer: str) -> Steps:
        """The steps for a layer, by full name."""
        return resolved(self.recipe.steps_for(layer))

    @cached_property
    def layer_bits(self) -> dict[str, int]:
        """Stored bits of every layer, by full name."""
        if self.bits is not None:
            return {name: int(self.bits * out * width) for name, (out, width) in self.shapes.items()}
        dtypes = self.dense.dtypes
        return {name: form_of(self.steps(name), dtypes[f"{name}.weight"]).bits(shape) for name, shape in self.shapes.items()}

    @property
    def bits_per_weight(self) -> float:
        """Over all layers to be compressed."""
        return sum(self.layer_bits.values()) / sum(out * width for out, width in self.shapes.values())

    @cached_property
    def blocks_bytes(self) -> int:
        """Of the finished blocks."""
        layers = {f"{name}.weight" for name in self.shapes}
        others = sum(
            tensor.numel() * self.dense.dtypes[name].itemsize
            for name, tensor in self.dense.weights.items()
            if name not in layers and name.startswith(tuple(f"{block}." for block in self.blocks))
        )
        return sum(self.layer_bits.values()) // 8 + others

    @cached_property
    def embeddings_bytes(self) -> int:
        """Of embedding and head where they are compressed."""
        entry = UniformEntry(self.embeddings.bits, GROUP_SIZE)
        shapes = [self.dense.weights[f"{name}.weight"].shape for name in self.embeddings.stored_names]
        return sum(entry.stored_bits((shape[0], shape[1])) for shape in shapes) // 8

    @cached_property
    def stored_bytes(self) -> int:
        """Of all tensors of the output; the files' headers add about a hundred bytes for each."""
        replaced = {f"{name}.weight" for name in self.embeddings.names}
        outside = [name for name in self.dense.outside(self.blocks) if name not in replaced]
        kept = {self.dense.weights[name].data_ptr(): name for name in outside}
        rest = sum(self.dense.weights[name].numel() * self.dense.dtypes[name].itemsize for name in kept.values())
        return self.blocks_bytes + self.embeddings_bytes + rest

    @cached_property
    def stages(self) -> list[list[str]]:
        """The layers of one block (names within it) by the inputs they share, in the order in which these come about.

        Found by running the first block that has any, empty, on a few tokens. Raises ModelError where the model cannot be
        followed.
        """
        name, linears = self._first
        first = {name: self.blocks[name]}
        samples = torch.zeros(1, min(_FEW_TOKENS, self.length), dtype=torch.long)
        arguments = arguments_of(self.dense.model, first, samples)
        inputs = BlockInputs(list(first_inputs(self.dense.model, first, samples)), arguments)
        return stages_of(BlockRun(first[name], name, inputs, torch.device("cpu")), linears)

    @property
    def _first(self) -> tuple[str, dict[str, nn.Module]]:
        """The first block with layers to be compressed, and these."""
        name = next(block for block in self.blocks if any(layer.startswith(f"{block}.") for layer in self.shapes))
        linears = linears_of(self.blocks[name])
        return name, {own: linear for own, linear in linears.items() if f"{name}.{own}" in self.shapes}

    @cached_property
    def inputs(self) -> list[list[Sizes]]:
        """For each stage the sizes of its distinct inputs: layers of one name in several experts have one each."""
        first, _ = self._first
        found = []
        for stage in self.stages:
            sizes = [Sizes(*self.shapes[f"{first}.{name}"], self.length) for name in stage]
            distinct = len(stage) // len({name.rpartition(".")[2] for name in stage})
            found.append(sizes[: max(1, distinct)])
        return found

    @property
    def measured_together(self) -> list[type[Statistic]]:
        """The statistics that are summed at the same time; those of output residuals come after, one layer's at a time."""
        return [own for own in self.recipe.needs if own.source is not Source.OUTPUT_RESIDUALS]

    @property
    def widest_needed(self) -> int | None:
        """Inputs of the widest layer, where the recipe asks for its covariance."""
        return max(width for _, width in self.shapes.values()) if Covariance in self.recipe.needs else None

    @property
    def planned(self) -> bool:
        """Whether what layers become is yet to be planned."""
        return self.bits is not None or self.recipe.needs_plan

    # Memory, in bytes

    @cached_property
    def block_bytes(self) -> int:
        """Of the largest block in float32."""
        return max(4 * sum(tensor.numel() for tensor in block.state_dict().values()) for block in self.blocks.values())

    @property
    def copies(self) -> int:
        """Of the block: two where the original goes along."""
        return 2 if self.recipe.needs_original or self.recipe.block_reconstruction is not None else 1

    @cached_property
    def width(self) -> int:
        """Features per token between blocks."""
        own = getattr(text_config(self.dense.model), "hidden_size", None)
        return int(own) if own else max(width for _, width in self.shapes.values())

    @property
    def streams(self) -> int:
        """Activations that go from block to block."""
        return 1 + self.recipe.needs_original

    @property
    def held_bytes(self) -> int:
        """Of all activations that are held, as they are in memory."""
        return self.tokens * self.width * 4 * (self.streams + (self.recipe.block_reconstruction is not None))

    @cached_property
    def batch_bytes(self) -> int:
        """Of what a block computes of a batch and still needs at its fullest, and of what the allocator keeps of it."""
        block = next(iter(self.blocks.values()))
        outputs = sum(weight_of(linear).shape[0] for linear in linears_of(block).values())
        live = 2 * 4 * outputs * self.tokens_at_once
        return live + min(live, _KEPT_BY_ALLOCATOR)

    @property
    def measuring_bytes(self) -> int:
        """Of statistics while they are summed: the totals, and as much again for a batch's own."""
        return 2 * self.totals_bytes

    def _measured_bytes(self, count: Callable[[type[Statistic], Sizes], int]) -> int:
        """Of the inputs that are measured together: of a mixture, every expert's."""
        stages = [sum(count(own, sizes) for sizes in stage for own in self.measured_together) for stage in self.inputs]
        return max(stages, default=0) if self.recipe.sequential else sum(stages)

    @property
    def totals_bytes(self) -> int:
        """Of the statistics that are summed together, as they count themselves."""
        return self._measured_bytes(lambda statistic, sizes: statistic.total_bytes(sizes))

    @property
    def results_bytes(self) -> int:
        """Of these statistics when they are finished."""
        return self._measured_bytes(lambda statistic, sizes: statistic.result_bytes(sizes))

    @property
    def statistics_bytes(self) -> int:
        """Of totals and finished statistics, which are made while the totals are there."""
        return self.totals_bytes + self.results_bytes

    @property
    def solving_bytes(self) -> int:
        """Of the finished statistics and of what the steps hold for one layer."""
        held = self.results_bytes
        kinds = {named.kind for named in self.recipe.steps}
        widest = max((width for _, width in self.shapes.values()), default=0)
        squares = (56 if "joint" in kinds else 32) * widest**2 if Covariance in self.recipe.needs else 0
        largest = max((out * width for out, width in self.shapes.values()), default=0)
        return held + squares + 4 * max(_LAYER_COPIES[kind] for kind in kinds) * largest

    @property
    def reconstruction_bytes(self) -> int:
        """Of a block that is reconstructed: values, gradients, two moments, the rounded weights; and its steps' activations."""
        if self.recipe.block_reconstruction is None:
            return 0
        steps = min(self.tokens, self.recipe.block_reconstruction.batch * self.length)
        return 7 * self.block_bytes + 3 * self.batch_bytes * steps // self.tokens_at_once

    @property
    def working_bytes(self) -> int:
        """Of a block, its original where that goes along, and the fullest moment of the work on it."""
        most = max(self.measuring_bytes + self.batch_bytes, self.solving_bytes, self.reconstruction_bytes)
        return self.copies * self.block_bytes + most

    @property
    def beginning_bytes(self) -> int:
        """While the first inputs are computed: what is outside the blocks, one block, a batch."""
        outside = {id(tensor): 4 * tensor.numel() for tensor in self.dense.outer_tensors(self.blocks).values()}
        return sum(outside.values()) + self.block_bytes + self.batch_bytes

    @property
    def ending_bytes(self) -> int:
        """While embedding and head are rounded: as they are stored, their codes, and these packed."""
        weights = {w.data_ptr(): w for w in (self.dense.weights[f"{name}.weight"] for name in self.embeddings.names)}
        return sum(w.numel() * (w.element_size() + 1) for w in weights.values()) + self.embeddings_bytes

    @property
    def least_bytes(self) -> int:
        """What is held at one time whatever else is done: a block, its original, the covariances that are measured together."""
        return self.copies * self.block_bytes + self.statistics_bytes

    @property
    def least_on_device(self) -> int:
        """Of that, what surely lies on the device; finished statistics go to main memory where they would fill it."""
        return self.copies * self.block_bytes + self.totals_bytes

    # Disk, in bytes

    @property
    def activations_bytes(self) -> int:
        """Of one generation of activations in the journal; the next is written before it goes."""
        return self.tokens * self.width * 4 * self.streams

    @property
    def disk_bytes(self) -> int:
        """Of output and journal at the fullest moment: while the last block is kept, or while all is written a second time."""
        spilled = 0 if self.recipe.block_reconstruction is None else self.tokens * self.width * 4
        block = self.blocks_bytes + 2 * self.activations_bytes + spilled
        return max(block, self.blocks_bytes + self.activations_bytes + self.embeddings_bytes + self.stored_bytes)


def folder_bytes(folder: Path) -> int:
    """Of the files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
