"""The time of a run, stage by stage: its operations at the rates of this machine."""

from collections.abc import Callable
from dataclasses import dataclass

from slimlm.calibration.samples import HELD_BACK_TOKENS
from slimlm.core.statistics.base import Source
from slimlm.core.statistics.covariance import Covariance
from slimlm.models.structure import linears_of, vocabulary_size, weight_of
from slimlm.planner.plan import judged_windows
from slimlm.planner.trials import outputs_tried
from slimlm.preflight.needs import RunNeeds
from slimlm.preflight.rates import Rates, StepCost
from slimlm.record import output_error_operations

_TOKENIZED = 100_000
"""Tokens per second of a fast tokenizer, including reading the text."""
_READ_AHEAD = 8
"""Tokens that are read for each token that is used."""
_UNPACKING = 12
"""The cost of unpacking a layer, in passes over its float32 weight."""
_ELEMENTS = 6
"""The cost of a block's elementwise operations (norms, activations, sums, positions), in passes over its layers' outputs."""
_DIVERGENCE = 6
"""The cost of the divergence of two distributions, in passes over one."""
_TUNING = 60
"""The cost of one step of block reconstruction (rounding forward and backward, Adam), in passes over the block's weights."""
_LAST_STAGE = 0.25
"""The share of a block that is left to run when the inputs of its last stage were computed and kept."""


@dataclass(frozen=True)
class Forward:
    """The time of running one block."""

    per_token: float
    """Seconds per token."""
    unpacking: float
    """Additional seconds per batch where the layers are packed."""

    def seconds(self, tokens: float, batches: float = 0.0) -> float:
        """Seconds for so many tokens, in so many batches where the layers are packed."""
        return self.per_token * tokens + self.unpacking * batches


def forward_of(run: RunNeeds, rates: Rates) -> Forward:
    """The cost of the first block."""
    block = next(iter(run.blocks.values()))
    shapes = [weight_of(linear).shape for linear in linears_of(block).values()]
    weights, outputs = sum(out * width for out, width in shapes), sum(out for out, _ in shapes)
    operations = 2 * weights * _active(run) + 4 * run.length * run.width
    per_token = operations / rates.products + 8 * _ELEMENTS * outputs / rates.passes
    return Forward(per_token, 8 * _UNPACKING * weights / rates.passes)


def _active(run: RunNeeds) -> float:
    """The share of the block's weights that are used for a token: of experts only those that it is routed to."""
    config = run.dense.model.config
    counts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    experts, each = next((count for count in counts if count), None), getattr(config, "num_experts_per_tok", None)
    if not experts or not each:
        return 1.0
    sizes = {name: out * width for name, (out, width) in run.shapes.items()}
    inside = sum(size for name, size in sizes.items() if ".experts." in name)
    return 1 - inside / sum(sizes.values()) * (1 - each / experts)


Cost = Callable[[str], StepCost]
"""The cost of the steps for a layer, by its full name."""


def seconds_of(run: RunNeeds, rates: Rates, cost: Cost) -> dict[str, float]:
    """Seconds of each stage of a run, by its name."""
    forward, blocks, needs = forward_of(run, rates), len(run.blocks), run.recipe.needs
    batches = run.tokens / run.tokens_at_once
    whole = forward.seconds(run.tokens)
    opening = 3 * run.dense.bytes / rates.passes + run.tokens * _READ_AHEAD / _TOKENIZED
    first = blocks * forward.seconds(run.tokens_at_once)
    # The stages of a block share one pass over it, and so do measuring and passing on in the original block.
    runs = float(run.streams)
    if any(statistic.source is Source.OUTPUT_RESIDUALS for statistic in needs):
        runs += 2 + 4 / batches
    measure = blocks * (runs * whole + _sums(run, rates, run.tokens))
    steps = sum(cost(name).seconds(shape) for name, shape in run.shapes.items())
    if Covariance in needs:
        steps += sum(map(output_error_operations, run.shapes.values())) / rates.products
    rest = _LAST_STAGE if run.recipe.sequential and run.recipe.block_reconstruction is None else 1.0
    passed = blocks * forward.seconds(rest * run.tokens, batches)
    kept = (run.blocks_bytes + (blocks + 1) * run.activations_bytes) / rates.written
    written = (2 * run.stored_bytes) / rates.written
    logits = 2 * vocabulary_size(run.dense.model) * (2 * run.width / rates.products + 8 * _DIVERGENCE / rates.passes)
    compared = HELD_BACK_TOKENS * (2 * blocks * forward.per_token + logits)
    checked = first + compared + blocks * forward.seconds(0, 1) + 2 * run.stored_bytes / rates.written
    times = {"open the model": opening, "first inputs": first, "measure": measure, "steps": steps}
    if run.recipe.block_reconstruction is not None:
        times["reconstruct"] = blocks * _reconstruction(run, forward, rates)
    return {**times, "propagate": passed, "keep": kept, "write": written, "verify": checked}


def planning_seconds(run: RunNeeds, rates: Rates, trial: Cost, options: int) -> float:
    """Seconds of a plan: statistics twice, every option tried in every group, one put into the model, two choices checked.

    Args:
        run: The needs of the run.
        rates: The rates of this machine.
        trial: The cost of a trial's steps for a layer, by its full name.
        options: The number of options.
    """
    forward, blocks = forward_of(run, rates), len(run.blocks)
    vocabulary = vocabulary_size(run.dense.model)
    windows, length = judged_windows(run.sample_count, run.length)
    judged = windows * length
    logits = vocabulary * (2 * run.width / rates.products + 8 * _DIVERGENCE / rates.passes)
    statistics = blocks * (2 * forward.seconds(run.tried_tokens) + _sums(run, rates, run.tried_tokens))
    whole = sum(trial(name).seconds(shape) for name, shape in run.shapes.items())
    some = sum(trial(name).seconds((outputs_tried(out), width)) for name, (out, width) in run.shapes.items())
    groups = blocks * len(run.inputs)
    # A model in which one group is changed goes through the blocks after it: half of them on average.
    passed = groups * blocks / 2 * forward.seconds(judged) + groups * judged * logits
    return 2 * statistics + options * some + 3 * whole + passed


def _sums(run: RunNeeds, rates: Rates, tokens: int) -> float:
    """Seconds of one block's statistics of so many tokens."""
    measured = [sizes for stage in run.inputs for sizes in stage]
    operations = sum(statistic.operations(sizes) for statistic in run.measured_together for sizes in measured)
    return operations * tokens / rates.products


def _reconstruction(run: RunNeeds, forward: Forward, rates: Rates) -> float:
    """Seconds of one block's reconstruction: forward and backward on each sample, and the rounding in every step."""
    options = run.recipe.block_reconstruction
    assert options is not None
    steps = options.passes * run.sample_count / options.batch
    weights = run.block_bytes / 4
    runs = options.passes * (3 + options.held_back) + 1
    return runs * forward.seconds(run.tokens) + steps * 8 * _TUNING * weights / rates.passes
