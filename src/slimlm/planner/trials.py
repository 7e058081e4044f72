"""Options tried on the original model, with one block of it in memory.

One walk over the blocks measures, on the original activations, the error of every option's outputs for every group of layers.
How much a group matters is measured in the same walk: one option of each group is put into the model alone, and the hidden
states that this changes are passed on through the remaining original blocks to the logits. That a group's loss is proportional
to its relative error is the linearity theorem of HIGGS (Malinovskii et al., arXiv 2411.17525, section 3); the factor is
measured here with the group's own error, where the paper adds random noise.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from slimlm.calibration.calls import OutputForm
from slimlm.calibration.capture import BlockInputs, BlockRun, run
from slimlm.calibration.measurement import measure
from slimlm.calibration.stages import stages_of
from slimlm.core.errors import NumericsError
from slimlm.core.layer import Layer
from slimlm.core.output_error import relative_output_error
from slimlm.core.statistics.base import Needs, Stats
from slimlm.evaluation.divergence import kl_divergence
from slimlm.evaluation.perplexity import pieces_of
from slimlm.evaluation.stored_model import LastOutputs, StoredModel
from slimlm.models.structure import blocks_of, linears_of, put_weight, vocabulary_size, weight_of
from slimlm.planner.forms import Steps, brief, share_of
from slimlm.planner.options import Option
from slimlm.recipe import apply_steps

_LEAST_OUTPUTS, _ONE_OF = 128, 8
"""Options are tried on at least so many outputs of a layer, and on one of so many of a large layer."""
Ignores = Callable[[str], bool]
"""Whether a layer, by its full name, is not compressed."""


def outputs_tried(out: int) -> int:
    """On about how many of a layer's outputs an option without an adapter is tried."""
    return min(out, max(_LEAST_OUTPUTS, out // _ONE_OF))


@dataclass(frozen=True)
class Original:
    """The original model, which runs from its stored tensors."""

    stored: StoredModel
    """The model."""
    enter: Callable[[Tensor], BlockInputs]
    """The inputs of the first block for samples `[count, length]`, and every block's other arguments."""
    forms: Mapping[str, OutputForm]
    """The form of each block's output, by name."""
    device: torch.device
    """Where blocks are run."""

    @property
    def blocks(self) -> list[str]:
        """The names of the blocks, in order."""
        return list(blocks_of(self.stored.meta_model))

    def widest(self, ignores: Ignores) -> int:
        """The most inputs of a layer that is not left out; 1 where all are."""
        blocks = blocks_of(self.stored.meta_model)
        layers = {f"{name}.{layer}": m for name, block in blocks.items() for layer, m in linears_of(block).items()}
        return max((weight_of(m).shape[1] for full, m in layers.items() if not ignores(full)), default=1)

    def walk(self, samples: Tensor, needs: Needs, ignores: Ignores) -> Iterator["Visited"]:
        """Each block in turn with the statistics of its layers' inputs in the original model.

        Args:
            samples: Token ids `[count, length]`.
            needs: The statistics to measure.
            ignores: The layers that are left out.
        """
        inputs = self.enter(samples)
        for name in self.blocks:
            block = self.stored.block(name, self.device)
            here = BlockRun(block, name, inputs, self.device)
            linears = {n: m for n, m in linears_of(block).items() if not ignores(f"{name}.{n}")}
            stages = stages_of(here.of_one_sample(), linears) if linears else []
            yield Visited(name, block, stages, measure(here, linears, needs) if linears else {}, self.device)
            inputs = BlockInputs(list(run(here)), inputs.arguments)
            inside = f"{name}."
            self.stored.release([tensor for full, tensor in self.stored.tensors.items() if full.startswith(inside)])


@dataclass(frozen=True)
class Visited:
    """A block of the original model, and what is known of its layers' inputs."""

    name: str
    """The block's full name."""
    block: nn.Module
    """The block, on the device; whoever changes it changes it back."""
    stages: list[list[str]]
    """Its layers by name within the block, those that share an input together."""
    stats: dict[str, Stats]
    """The statistics of their inputs in the original model."""
    device: torch.device
    """Where the block is."""

    def made(self, layer: str, steps: Steps) -> Tensor:
        """The matrix `[out, in]` that a layer has after the steps, shortened as for a trial."""
        return self._of_steps(layer, weight_of(self.block.get_submodule(layer)), steps)

    def _of_steps(self, layer: str, weight: Tensor, steps: Steps) -> Tensor:
        """What a layer's matrix, or some of its outputs, `[outputs, in]`, is after the steps of a trial."""
        full = f"{self.name}.{layer}"
        try:
            return apply_steps(brief(steps), Layer.of(full, weight), self.stats[layer]).parts().dense()
        except NumericsError as error:
            raise NumericsError(f"{full}: {error}") from error

    def error(self, group: Sequence[str], option: Option) -> float:
        """The relative squared error of an option in a group of layers, averaged over them; infinite where one cannot take it.

        Where the option has no adapter, it is tried on some of a layer's outputs: all options on the same ones, so that their
        ratios are nearly those of the whole layer. An adapter's rank would be another share of fewer outputs.
        """
        shapes = [weight_of(self.block.get_submodule(layer)).shape for layer in group]
        if any(option.refuses((shape[0], shape[1])) is not None for shape in shapes):
            return float("inf")
        errors = [self._error(layer, option.steps) for layer in group]
        mean = sum(errors) / len(errors)
        return mean if math.isfinite(mean) else float("inf")

    def _error(self, layer: str, steps: Steps) -> float:
        weight = weight_of(self.block.get_submodule(layer))
        if share_of(steps) == 0:
            weight = weight[:: len(weight) // outputs_tried(len(weight))]
        return relative_output_error(weight, self._of_steps(layer, weight, steps), self.stats[layer])

    @contextmanager
    def holding(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Within this context the block's layers have these weights."""
        before = {layer: weight_of(self.block.get_submodule(layer)).clone() for layer in weights}
        try:
            for layer, weight in weights.items():
                put_weight(self.block.get_submodule(layer), weight)
            yield
        finally:
            for layer, weight in before.items():
                put_weight(self.block.get_submodule(layer), weight)


@dataclass
class Judged:
    """Tokens on which changed models are compared with the original: hidden states that are passed from block to block."""

    original: Original
    """The model."""
    tokens: Tensor
    """The tokens, `[windows, length]`, of one batch."""
    inputs: BlockInputs
    """Their inputs of the next block in the original model."""
    changed: list[Tensor] = field(default_factory=list)
    """The same in changed models, `[windows, length, width]` each."""

    @classmethod
    def of(cls, original: Original, tokens: Tensor) -> "Judged":
        """Before the first block, without changed models."""
        inputs = original.enter(tokens)
        assert len(inputs.hidden) == 1, "so few tokens are one batch"
        return cls(original, tokens, inputs)

    def output(self, here: Visited, hidden: Tensor) -> Tensor:
        """The output of a block, as it is now, for hidden states `[windows, length, width]`."""
        inputs = replace(self.inputs, hidden=[hidden])
        return next(run(BlockRun(here.block, here.name, inputs, here.device)))

    def change(self, here: Visited, changes: Sequence[Mapping[str, Tensor]]) -> None:
        """Pass the block: the changed models so far go on through the original block, and each change begins another one.

        Args:
            here: The block.
            changes: The weights `[out, in]` of some of its layers, for each new model.
        """
        for model, before in enumerate(self.changed):
            self.changed[model] = self.output(here, before)
        (hidden,) = self.inputs.hidden
        for weights in changes:
            with here.holding(weights):
                self.changed.append(self.output(here, hidden))
        self.inputs = replace(self.inputs, hidden=[self.output(here, hidden)])

    def change_all(self, here: Visited, changes: Sequence[Mapping[str, Tensor]]) -> None:
        """Pass the block with changes to all models; the first block begins them."""
        (hidden,) = self.inputs.hidden
        passed = []
        for before, weights in zip(self.changed or [hidden] * len(changes), changes, strict=True):
            with here.holding(weights):
                passed.append(self.output(here, before))
        self.inputs, self.changed = replace(self.inputs, hidden=[self.output(here, hidden)]), passed

    def losses(self) -> list[float]:
        """KL(original || changed) per token, in nats, of each changed model, after the last block; infinite where not finite.

        Raises:
            NumericsError: The original model's logits hold NaN.
        """
        count, models = len(self.tokens), len(self.changed)
        pieces = pieces_of(self.tokens, vocabulary_size(self.original.stored.meta_model))
        hidden = torch.cat([*self.inputs.hidden, *self.changed])
        outputs = LastOutputs(self.tokens.repeat(1 + models, 1), hidden, self.original.forms)
        of_all = [
            (slice(model * count + rows.start, min(model * count + rows.stop, (model + 1) * count)), positions)
            for rows, positions in pieces
            for model in range(1 + models)
        ]
        logits = self.original.stored.logits(outputs, of_all, device=self.original.device)
        totals = torch.zeros(models, dtype=torch.float64)
        for _ in pieces:
            expected = next(logits).float().log_softmax(dim=-1)
            if bool(expected.isnan().any()):
                raise NumericsError(
                    "the original model's logits hold NaN on the calibration text; there is nothing to compare with"
                )
            for model in range(models):
                totals[model] += kl_divergence(expected, next(logits).float().log_softmax(dim=-1)).sum().cpu()
        means = totals / self.tokens.numel()
        return [max(0.0, float(mean)) if bool(mean.isfinite()) else float("inf") for mean in means]
