"""The needs of a run: the shapes of its layers, the size of its output, and the memory and disk that it takes.

All of it is computed from the meta model, without reading a weight. Whether arguments depend on the text the rehearsal finds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from slimlm.calibration.calls import MOST_KEPT, BlockArguments, call_of, explaining_failures
from slimlm.calibration.capture import BlockInputs, BlockRun, batches_of
from slimlm.calibration.samples import HELD_BACK_TOKENS
from slimlm.calibration.stages import stages_of
from slimlm.core.parts.uniform import UniformEntry
from slimlm.core.statistics.base import Sizes, Source, Statistic
from slimlm.core.statistics.covariance import Covariance
from slimlm.models.embeddings import GROUP_SIZE, Embeddings
from slimlm.models.lazy import LazyModel
from slimlm.models.structure import linears_of, text_config, weight_of
from slimlm.planner.forms import Steps, form_of, resolved
from slimlm.planner.plan import judged_windows, tried_samples
from slimlm.preflight.refusals import compressible
from slimlm.recipe import Recipe

_FEW_TOKENS = 8
"""Tokens of the sample with which the order of layers is found."""
_KEPT_BY_ALLOCATOR = 160 * 2**20
"""The most bytes, about, that the allocator keeps of small tensors that were freed."""


@dataclass(frozen=True)
class RunNeeds:
    """The work of a run, and the memory and disk that it takes."""

    dense: LazyModel
    """The original model."""
    blocks: dict[str, nn.Module]
    """The model's blocks, by full name."""
    recipe: Recipe
    """The recipe."""
    embeddings: Embeddings
    """How embedding and head are compressed."""
    skipped: dict[str, str]
    """The layers that are not compressed, and why."""
    sample_count: int
    """The number of calibration samples."""
    length: int
    """Tokens per sample."""
    bits: float | None = None
    """The budget in bits per weight, where a plan is yet to choose how layers are stored."""
    text_dependent: bool = False
    """Whether blocks have arguments that depend on the text, which the modules outside the blocks compute for every batch."""

    @property
    def tokens(self) -> int:
        """The tokens of all calibration samples."""
        return self.sample_count * self.length

    @property
    def tokens_at_once(self) -> int:
        """The tokens of a batch."""
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
        """Stored bits per weight of all layers to be compressed."""
        return sum(self.layer_bits.values()) / sum(out * width for out, width in self.shapes.values())

    @cached_property
    def blocks_bytes(self) -> int:
        """Bytes of the finished blocks."""
        layers = {f"{name}.weight" for name in self.shapes}
        others = sum(
            tensor.numel() * self.dense.dtypes[name].itemsize
            for name, tensor in self.dense.weights.items()
            if name not in layers and name.startswith(tuple(f"{block}." for block in self.blocks))
        )
        return sum(self.layer_bits.values()) // 8 + others

    @cached_property
    def embeddings_bytes(self) -> int:
        """Bytes of embedding and head where they are compressed."""
        entry = UniformEntry(self.embeddings.bits, GROUP_SIZE)
        shapes = [self.dense.weights[f"{name}.weight"].shape for name in self.embeddings.stored_names]
        return sum(entry.stored_bits((shape[0], shape[1])) for shape in shapes) // 8

    @cached_property
    def stored_bytes(self) -> int:
        """Bytes of all tensors of the output; the files' headers add about a hundred bytes for each."""
        replaced = {f"{name}.weight" for name in self.embeddings.names}
        outside = [name for name in self.dense.outside(self.blocks) if name not in replaced]
        kept = {self.dense.weights[name].data_ptr(): name for name in outside}
        rest = sum(self.dense.weights[name].numel() * self.dense.dtypes[name].itemsize for name in kept.values())
        return self.blocks_bytes + self.embeddings_bytes + rest + self.dense.unplaced.bytes

    @cached_property
    def stages(self) -> list[list[str]]:
        """The layers of one block (names within it) by the inputs they share, in the order in which these are computed.

        Found by running the first block that has any, with placeholder weights, on a few tokens. Raises ModelError where the
        model's blocks cannot be run one at a time.
        """
        name, linears = self._first
        block, sample = self.blocks[name], torch.zeros(1, min(_FEW_TOKENS, self.length), dtype=torch.long)
        with explaining_failures(self.dense.model):
            called = call_of(self.dense.model, block, sample)
            inputs = BlockInputs([called.hidden], BlockArguments({(name, 1): called.arguments}))
            return stages_of(BlockRun(block, name, inputs, torch.device("cpu")), linears)

    @property
    def _first(self) -> tuple[str, dict[str, nn.Module]]:
        """The first block with layers to be compressed, and these."""
        name = next(block for block in self.blocks if any(layer.startswith(f"{block}.") for layer in self.shapes))
        linears = linears_of(self.blocks[name])
        return name, {own: linear for own, linear in linears.items() if f"{name}.{own}" in self.shapes}

    @cached_property
    def stage_sizes(self) -> list[list[Sizes]]:
        """For each stage the sizes of its layers."""
        first, _ = self._first
        return [[Sizes(*self.shapes[f"{first}.{name}"], self.length) for name in stage] for stage in self.stages]

    @cached_property
    def inputs(self) -> list[list[Sizes]]:
        """For each stage the sizes of its distinct inputs; layers of one name in several experts have an input each."""
        found = []
        for stage, sizes in zip(self.stages, self.stage_sizes, strict=True):
            distinct = len(stage) // len({name.rpartition(".")[2] for name in stage})
            found.append(sizes[: max(1, distinct)])
        return found

    @property
    def measured_together(self) -> list[type[Statistic]]:
        """The statistics that are summed at the same time; those of output residuals follow, one layer at a time."""
        return [own for own in self.recipe.needs if own.source is not Source.OUTPUT_RESIDUALS]

    @property
    def widest_needed(self) -> int | None:
        """The number of inputs of the widest layer; None where the recipe needs no covariance."""
        return max(width for _, width in self.shapes.values()) if Covariance in self.recipe.needs else None

    @property
    def planned(self) -> bool:
        """Whether a plan is yet to choose how layers are stored."""
        return self.bits is not None or self.recipe.needs_plan

    # Memory, in bytes

    @cached_property
    def block_bytes(self) -> int:
        """Bytes of the largest block in float32."""
        return max(4 * sum(tensor.numel() for tensor in block.state_dict().values()) for block in self.blocks.values())

    @property
    def copies(self) -> int:
        """The number of blocks that are held: two where the original block is run as well."""
        return 2 if self.recipe.needs_original or self.recipe.block_reconstruction is not None else 1

    @cached_property
    def width(self) -> int:
        """The number of features per token between blocks."""
        own = getattr(text_config(self.dense.model), "hidden_size", None)
        return int(own) if own else max(width for _, width in self.shapes.values())

    @property
    def streams(self) -> int:
        """The number of streams of activations: two where the original model's are computed as well."""
        return 1 + self.recipe.needs_original

    @property
    def held_bytes(self) -> int:
        """Bytes of all activations that are held, in memory."""
        return self.tokens * self.width * 4 * (self.streams + (self.recipe.block_reconstruction is not None))

    @cached_property
    def kept_bytes(self) -> int:
        """The most bytes of what the passes of a block keep for later ones; see slimlm.calibration.kept.

        Of the compressed block that is at most the outputs of all layers, where it is run stage by stage; of the original one
        the inputs of all layers and the block's output. Of experts each token has those that it is routed to, counted as all.
        """
        outputs = sum(sizes.outputs for stage in self.stage_sizes for sizes in stage) if self.recipe.sequential else 0
        inputs = sum(sizes.inputs for stage in self.inputs for sizes in stage) + self.width if self.recipe.needs_original else 0
        return 4 * self.tokens * (outputs + inputs)

    @cached_property
    def batch_bytes(self) -> int:
        """Bytes of a block's intermediate results for a batch, and those that the allocator keeps of them."""
        block = next(iter(self.blocks.values()))
        outputs = sum(weight_of(linear).shape[0] for linear in linears_of(block).values())
        live = 2 * 4 * outputs * self.tokens_at_once
        return live + min(live, _KEPT_BY_ALLOCATOR)

    @property
    def measuring_bytes(self) -> int:
        """Bytes of statistics while they are summed: the totals, and as much again for those of a batch."""
        return 2 * self.totals_bytes

    def _measured_bytes(self, count: Callable[[type[Statistic], Sizes], int]) -> int:
        """Bytes for all inputs that are measured together (of a mixture, those of every expert)."""
        stages = [sum(count(own, sizes) for sizes in stage for own in self.measured_together) for stage in self.inputs]
        return max(stages, default=0) if self.recipe.sequential else sum(stages)

    @property
    def totals_bytes(self) -> int:
        """Bytes of the totals of statistics that are summed together."""
        return self._measured_bytes(lambda statistic, sizes: statistic.total_bytes(sizes))

    @property
    def results_bytes(self) -> int:
        """Bytes of these statistics when they are finished."""
        return self._measured_bytes(lambda statistic, sizes: statistic.result_bytes(sizes))

    @property
    def statistics_bytes(self) -> int:
        """Bytes of totals and finished statistics, which are held together while the latter are computed."""
        return self.totals_bytes + self.results_bytes

    @property
    def solving_bytes(self) -> int:
        """Bytes of the finished statistics and of the steps' intermediate results for one layer."""
        held = self.results_bytes
        steps = [named.step for named in self.recipe.steps]
        widest = max((width for _, width in self.shapes.values()), default=0)
        squares = max(step.covariance_copies for step in steps) * widest**2 if Covariance in self.recipe.needs else 0
        largest = max((out * width for out, width in self.shapes.values()), default=0)
        return held + 4 * squares + 4 * max(step.weight_copies for step in steps) * largest

    @property
    def reconstruction_bytes(self) -> int:
        """Bytes of block reconstruction: values, gradients, two moments, the rounded weights, and a step's activations."""
        if self.recipe.block_reconstruction is None:
            return 0
        steps = min(self.tokens, self.recipe.block_reconstruction.batch * self.length)
        captured = self.tokens * self.width * 4 if self.text_dependent else 0
        return 7 * self.block_bytes + 3 * self.batch_bytes * steps // self.tokens_at_once + captured

    @property
    def working_bytes(self) -> int:
        """Bytes of a block, its original where that is run as well, and the most that the work on it takes."""
        most = max(self.measuring_bytes + self.batch_bytes, self.solving_bytes, self.reconstruction_bytes)
        return self.copies * self.block_bytes + most + self.captured_bytes

    @property
    def captured_bytes(self) -> int:
        """Bytes of the modules that compute arguments which depend on the text, and of those that are kept.

        A block is taken to be given as many more numbers per token as its hidden states have.
        """
        return self.outer_bytes + min(MOST_KEPT, self.tokens * self.width * 4) if self.text_dependent else 0

    @property
    def outer_bytes(self) -> int:
        """Bytes in float32 of the modules outside the blocks that compute the first block's inputs."""
        return sum({id(t): 4 * t.numel() for t in self.dense.outer_tensors(self.blocks).values()}.values())

    @property
    def beginning_bytes(self) -> int:
        """Bytes while the first inputs are computed: the modules outside the blocks, one block, a batch."""
        return self.outer_bytes + self.block_bytes + self.batch_bytes

    @property
    def tried_tokens(self) -> int:
        """The tokens of a plan's statistics."""
        windows, _ = judged_windows(self.sample_count, self.length)
        widest = max(width for _, width in self.shapes.values())
        return self.length * tried_samples(self.sample_count - 2 * windows, self.length, widest)

    @property
    def planning_bytes(self) -> int:
        """Bytes while a plan is made: inputs and outputs of a block, a block's statistics, and the models that are judged."""
        if not self.planned:
            return 0
        windows, length = judged_windows(self.sample_count, self.length)
        # Twice, because the logits are computed from all of them together.
        judged = 2 * len(self.blocks) * len(self.inputs) * windows * length
        statistics = max(self.measuring_bytes + self.batch_bytes, self.solving_bytes)
        return 4 * self.width * (2 * self.tried_tokens + judged) + 2 * self.block_bytes + statistics + self.captured_bytes

    @property
    def ending_bytes(self) -> int:
        """Bytes while embedding and head are rounded: the original matrices, their codes, and the packed codes."""
        weights = {w.data_ptr(): w for w in (self.dense.weights[f"{name}.weight"] for name in self.embeddings.names)}
        return sum(w.numel() * (w.element_size() + 1) for w in weights.values()) + self.embeddings_bytes

    @property
    def least_bytes(self) -> int:
        """A lower bound of the bytes held at one time: a block, its original, the statistics that are measured together."""
        return self.copies * self.block_bytes + self.statistics_bytes

    @property
    def least_on_device(self) -> int:
        """The part of it that is on the device in any case; finished statistics go to main memory where they would fill it."""
        return self.copies * self.block_bytes + self.totals_bytes

    # Disk, in bytes

    @property
    def activations_bytes(self) -> int:
        """Bytes of one block's inputs in the journal; the next block's are written before these are removed."""
        return self.tokens * self.width * 4 * self.streams

    @property
    def held_back_bytes(self) -> int:
        """The most bytes, in the journal, of windows that are held back and the original model's outputs for them."""
        return HELD_BACK_TOKENS * (4 * self.width + torch.int64.itemsize)

    @property
    def disk_bytes(self) -> int:
        """The most bytes of output and journal: while the last block is stored, or while the checkpoint is written.

        Files that the model's own were converted to are in the journal until the end.
        """
        spilled = 0 if self.recipe.block_reconstruction is None else self.tokens * self.width * 4
        block = self.blocks_bytes + 2 * self.activations_bytes + spilled
        written = self.blocks_bytes + self.activations_bytes + self.embeddings_bytes + self.stored_bytes
        return max(block, written) + self.held_back_bytes + self.dense.converted_bytes


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder; 0 where there is no folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
