"""Choose how every layer is stored, under one budget, from measured losses.

For each group of layers that share an input (q, k and v; gate and up: fused kernels need them alike) and each option, the group
alone is compressed on the original model's activations, and the model's output is compared with the original's on samples that
the statistics do not include: KL divergence per token. A knapsack picks the options of least summed loss. Because losses do not
quite add up, the choice is then applied to the whole model and must beat the best single option for all layers on further
samples; otherwise that one is used (where single-layer losses are large their sum misleads).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from slimlm.calibration.capture import BlockInputs, BlockRun, enter, run
from slimlm.calibration.measurement import measure
from slimlm.calibration.stages import stages_of
from slimlm.core.errors import DataError, NumericsError, RecipeError
from slimlm.core.layer import Layer
from slimlm.core.objective import Objective
from slimlm.core.statistics.base import Needs, Stats
from slimlm.events import Event, Observer
from slimlm.models.structure import linears_of, put_weight, vocabulary_size, weight_of
from slimlm.planner.budget import choose_options
from slimlm.planner.forms import brief, needs_of, resolved
from slimlm.planner.options import Budget, Option, budget_of, options_of
from slimlm.recipe import Recipe, Rule, apply_steps

_LOGITS_AT_ONCE = 2**26
"""The most logits that are held of the original model."""
_JUDGED_TOKENS = 4096
"""The most tokens that losses are measured on."""
_LEAST_SAMPLES = 3
_LEAST_BITS, _MOST_BITS = 1.5, 8.5
"""The range of budgets, in bits per weight."""


@dataclass(frozen=True)
class Choice:
    """The choice for one group of layers, and the measured losses."""

    layers: tuple[str, ...]
    """The layers of the group, by full name."""
    shapes: tuple[tuple[int, int], ...]
    """The shapes (out, in) of these layers."""
    losses: tuple[float, ...]
    """KL divergence per token, in nats, of each option applied to this group alone."""
    chosen: int
    """The number of the option."""


@dataclass(frozen=True)
class Plan:
    """The result of planning: an option for each group of layers."""

    objective: Objective
    """The unit of the budget."""
    asked_bits: float
    """The budget in bits per weight."""
    options: tuple[Option, ...]
    """The options for every group."""
    choices: tuple[Choice, ...]
    """The choice for each group of layers."""
    planned_loss: float
    """KL divergence per token with the knapsack's choice in all layers at once, on samples that are used for this only."""
    uniform_loss: float
    """The same with the best single option in all layers."""
    uniform: int | None
    """The number of the best single option within the budget; None: there is none."""
    fallback: bool
    """Whether the single option was used because the knapsack's choice was worse."""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of the chosen options, everything counted."""
        stored = sum(self.options[c.chosen].stored_bits(shape) for c in self.choices for shape in c.shapes)
        return stored / sum(out * width for c in self.choices for out, width in c.shapes)

    def recipe(self, base: Recipe) -> Recipe:
        """The recipe that carries out the plan: the base recipe with a rule for every group."""
        rules = tuple(Rule(c.layers, self.options[c.chosen].overrides) for c in self.choices)
        name = f"{base.name} at {self.asked_bits:g} bits ({self.objective})"
        summary = f"every layer as a plan chose: {self.bits_per_weight:.3f} bits per weight"
        return replace(base, name=name, summary=summary, steps=resolved(base.steps), rules=rules)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "objective": self.objective,
            "asked_bits": self.asked_bits,
            "bits_per_weight": self.bits_per_weight,
            "options": [option.to_dict() for option in self.options],
            "choices": [
                {
                    "layers": list(c.layers),
                    "weights": sum(out * width for out, width in c.shapes),
                    "chosen": c.chosen,
                    "losses": [_finite(loss) for loss in c.losses],
                    "bits": self._bits(c),
                }
                for c in self.choices
            ],
            "planned_loss": _finite(self.planned_loss),
            "uniform": self.uniform,
            "uniform_loss": _finite(self.uniform_loss),
            "fallback": self.fallback,
        }

    def _bits(self, choice: Choice) -> list[float]:
        weights = sum(out * width for out, width in choice.shapes)
        return [sum(option.stored_bits(shape) for shape in choice.shapes) / weights for option in self.options]


def _finite(loss: float) -> float | None:
    """None for infinity, which JSON lacks: an option that a layer cannot take, or no single option within the budget."""
    return loss if math.isfinite(loss) else None


def asked_budget(recipe: Recipe, bits: float, objective: Objective) -> Budget:
    """The budget of `bits` per weight for a recipe with a step that offers options."""
    if not _LEAST_BITS <= bits <= _MOST_BITS:
        raise RecipeError(f"`bits={bits:g}`: give an average from {_LEAST_BITS:g} to {_MOST_BITS:g} bits per weight")
    return Budget(options_of(recipe, bits, objective), bits, objective)


def auto_budget(recipe: Recipe, shapes: list[tuple[int, int]], objective: Objective) -> Budget:
    """The budget for a step with "auto" options: the cost of their defaults in all layers."""
    reference = Option(resolved(recipe.steps), ())
    bits = sum(reference.stored_bits(shape) for shape in shapes) / sum(out * width for out, width in shapes)
    return Budget(options_of(recipe, None, objective), bits, objective, reference)


def refuse_budget(shapes: dict[str, tuple[int, int]], budget: Budget) -> None:
    """Raise RecipeError where even the cheapest options cost more; the message names the smallest budget that can be met."""
    objective = budget.objective
    cheapest = 0.0
    for name, shape in shapes.items():
        fitting = [option for option in budget.options if option.refuses(shape) is None]
        if not fitting:
            raise RecipeError(f'none of the plan\'s options fits {name} of shape {shape}; exclude it (`ignore="{name}"`)')
        cheapest += min(option.cost(shape, objective) for option in fitting)
    own = list(shapes.values())
    if cheapest > budget.cost(own):
        low, high = budget.bits, 64.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if budget_of(own, middle, objective) >= cheapest else (middle, high)
        raise RecipeError(
            f"`bits={budget.bits:g}` cannot be met: with everything counted (codes, scales, codebooks, masks, adapters) the "
            f"smallest budget for this model is {high:.3f} bits per weight, counted by {objective}; ask for at least that"
        )


def refuse_few_samples(count: int) -> None:
    """Raise DataError where there are too few calibration samples for a plan."""
    if count < _LEAST_SAMPLES:
        raise DataError(
            f"a plan needs at least {_LEAST_SAMPLES} calibration samples, for statistics and two checks; there are {count}"
        )


def held_back(count: int, length: int, vocabulary: int) -> int:
    """How many of so many calibration samples, of so many tokens, losses are measured on; as many check the choice."""
    return max(1, min(count // 8, min(_JUDGED_TOKENS, _LOGITS_AT_ONCE // vocabulary) // length))


def make_plan(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    recipe: Recipe,
    samples: Tensor,
    *,
    budget: Budget,
    device: torch.device,
    progress: Observer,
) -> Plan:
    """Measure every option for every group, choose, and check the choice; the model is the same afterwards.

    Args:
        model: The original model, in float32 on the CPU.
        blocks: Its blocks by full name.
        recipe: The recipe that is varied.
        samples: The calibration samples, `[count, length]`. Some (at most an eighth, at least one, about 4096 tokens) are used
            to measure losses and as many others to check the choice; the rest are used for statistics.
        budget: The options, and the cost that may be spent.
        device: Where blocks are run to measure statistics.
        progress: An observer of the events.

    Returns:
        The plan.

    Raises:
        DataError: There are too few samples.
        NumericsError: No choice within the budget gives finite outputs, or the original model's are not finite.
    """
    refuse_few_samples(len(samples))
    options, objective = budget.options, budget.objective
    held = held_back(len(samples), samples.shape[1], vocabulary_size(model))
    statistics, judged, checked = samples[: -2 * held], samples[-2 * held : -held], samples[-held:]
    divergence, check = _Divergence(model, judged), _Divergence(model, checked)

    trial = _Trial(model, blocks, statistics, device, _needs_of_trials(options))
    groups: list[_Group] = []
    losses: list[list[float]] = []
    total = len(blocks) + 2
    for done, (stages, stats) in enumerate(trial.walk(recipe.ignores)):
        progress(Event("plan", done, total))
        for stage in stages:
            groups.append(_Group.of(model, stage))
            losses.append([trial.loss(groups[-1], option, stats, divergence) for option in options])

    shapes = [shape for group in groups for shape in group.shapes]
    costs = [[sum(option.cost(shape, objective) for shape in group.shapes) for option in options] for group in groups]
    room = budget.cost(shapes)
    chosen = choose_options(losses, costs, room)
    if chosen is None:
        raise NumericsError(
            "no choice within the budget gives finite outputs of the model for every layer; ask for more bits, or try the "
            "recipe absmax"
        )
    whole = [sum(own[i] for own in costs) for i in range(len(options))]
    fitting = [i for i in range(len(options)) if whole[i] <= room and all(own[i] < float("inf") for own in losses)]
    uniform = min(fitting, key=lambda i: sum(own[i] for own in losses), default=None)

    def at_once(numbers: list[int]) -> float:
        picked = {name: options[i] for group, i in zip(groups, numbers, strict=True) for name in group.layers}
        return trial.loss_of_all(picked, check)

    progress(Event("plan", len(blocks), total))
    planned_loss = at_once(chosen)
    progress(Event("plan", len(blocks) + 1, total))
    uniform_loss = float("inf") if uniform is None else at_once([uniform] * len(groups))
    progress(Event("plan", total, total))
    fallback = uniform is not None and uniform_loss < planned_loss
    final = [uniform] * len(groups) if fallback and uniform is not None else chosen
    choices = tuple(
        Choice(group.layers, group.shapes, tuple(own), i) for group, own, i in zip(groups, losses, final, strict=True)
    )
    return Plan(objective, budget.bits, options, choices, planned_loss, uniform_loss, uniform, fallback)


def _needs_of_trials(options: tuple[Option, ...]) -> Needs:
    """The statistics of all options' steps; raises RecipeError where one compares with the original model."""
    needs: Needs = frozenset().union(*(needs_of(brief(option.steps)) for option in options))
    compared = [statistic.__name__ for statistic in needs if statistic.source.compares]
    if compared:
        raise RecipeError(
            f"the recipe's steps need {compared[0]} even for a trial (`brief`), which compares compressed layers with the "
            "original model; a plan tries options on the original model itself, and so cannot measure it"
        )
    return needs


@dataclass(frozen=True)
class _Group:
    """Layers that share an input, by full name, and their shapes."""

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: nn.Module, layers: list[str]) -> "_Group":
        shapes = [weight_of(model.get_submodule(name)).shape for name in layers]
        return cls(tuple(layers), tuple((shape[0], shape[1]) for shape in shapes))


@dataclass(frozen=True)
class _Trial:
    """A model in which options are tried on a few layers, or one in each."""

    model: nn.Module
    blocks: dict[str, nn.Module]
    samples: Tensor
    """The samples for the statistics, `[count, length]`."""
    device: torch.device
    needs: Needs

    def walk(self, ignores: Callable[[str], bool]) -> Iterator[tuple[list[list[str]], dict[str, Stats]]]:
        """For each block its layers by stages and the statistics of their inputs in the original model, by full name.

        The model is on the CPU whenever this yields; changes that the caller makes to a block's weights do not affect the
        inputs of the next block.
        """
        inputs = enter(self.model, self.blocks, self.samples)
        for name, block in self.blocks.items():
            linears = {n: m for n, m in linears_of(block).items() if not ignores(f"{name}.{n}")}
            block.to(self.device)
            here = BlockRun(block, name, inputs, self.device)
            stages = stages_of(here, linears) if linears else []
            stats = measure(here, linears, self.needs) if linears else {}
            inputs = BlockInputs(list(run(here)), inputs.arguments)
            block.to("cpu")
            yield [[f"{name}.{n}" for n in stage] for stage in stages], {f"{name}.{n}": s for n, s in stats.items()}

    def loss(self, group: _Group, option: Option, stats: dict[str, Stats], divergence: "_Divergence") -> float:
        """The loss with the option in this group alone; infinite where one of its layers cannot take it."""
        if any(option.refuses(shape) is not None for shape in group.shapes):
            return float("inf")
        with _restored(self.model, list(group.layers)):
            self._compress(dict.fromkeys(group.layers, option), stats)
            return divergence.of(self.model)

    def loss_of_all(self, picked: dict[str, Option], check: "_Divergence") -> float:
        """The loss with every layer's option in the model at once; the statistics are measured again, block by block."""
        with _restored(self.model, list(picked)):
            for _, stats in self.walk(lambda name: name not in picked):
                self._compress({name: picked[name] for name in stats}, stats)
            return check.of(self.model)

    def _compress(self, picked: dict[str, Option], stats: dict[str, Stats]) -> None:
        """Replace the weights of these layers by the dense matrices of their compressed parts."""
        for name, option in picked.items():
            linear = self.model.get_submodule(name)
            try:
                layer = Layer.of(name, weight_of(linear).to(self.device))
                made = apply_steps(brief(option.steps), layer, stats[name])
            except NumericsError as error:
                raise NumericsError(f"{name}: {error}") from error
            put_weight(linear, made.parts().dense())


@contextmanager
def _restored(model: nn.Module, layers: list[str]) -> Iterator[None]:
    """A context after which these layers have the weights that they had before it."""
    before = {name: weight_of(model.get_submodule(name)).clone() for name in layers}
    try:
        yield
    finally:
        for name, weight in before.items():
            put_weight(model.get_submodule(name), weight)


class _Divergence:
    """KL(original || changed) of the next-token distributions, per token in nats, on some samples."""

    def __init__(self, model: nn.Module, samples: Tensor) -> None:
        self.samples = samples
        self.expected = [logits.log_softmax(dim=-1) for logits in self._logits(model)]
        if any(bool(logs.isnan().any()) for logs in self.expected):
            raise NumericsError(
                "the original model's logits hold NaN on the calibration text; there is nothing to compare with"
            )

    def _logits(self, model: nn.Module) -> Iterator[Tensor]:
        for batch in self.samples.split(max(1, _JUDGED_TOKENS // self.samples.shape[1])):
            # Yielded outside of no_grad, which would otherwise apply to the caller's code, too.
            with torch.no_grad():
                logits = model(batch, use_cache=False).logits.float()
            yield logits

    def of(self, model: nn.Module) -> float:
        """The divergence of the model as it is now; infinite where its outputs are not finite."""
        total = 0.0
        for expected, logits in zip(self.expected, self._logits(model), strict=True):
            found = logits.log_softmax(dim=-1)
            # A token of probability 0 in the original (a masked, padded vocabulary) adds nothing.
            terms = torch.where(expected.isinf(), 0.0, expected.exp() * (expected - found))
            total += float(terms.double().sum())
        return max(0.0, total / self.samples.numel()) if math.isfinite(total) else math.inf
