"""Choose how every layer is stored, under one budget, from measured losses.

For each group of layers that share an input (q, k and v; gate and up: fused kernels need them alike) and each option, the
relative error of the layers' outputs is measured on the original model's activations. For one option of each group, of about
the bits asked for, the KL divergence that it alone causes in the model's predictions is measured, too, on samples that the
statistics do not include; the losses of the group's other options are proportional to their errors (slimlm.planner.trials). A
knapsack picks the options of least summed loss, in sequential recipes of evened losses (slimlm.planner.budget). Because losses
do not quite add up, the choice is then applied to all layers and must beat the best single option on further samples; otherwise
that one is used. One block is in memory at a time.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from slimlm.core.errors import DataError, NumericsError, RecipeError
from slimlm.core.objective import Objective
from slimlm.core.output_error import NEEDS
from slimlm.core.statistics.base import Needs
from slimlm.events import Event, Observer
from slimlm.models.structure import weight_of
from slimlm.planner.budget import choose_options, evened
from slimlm.planner.forms import brief, needs_of, resolved
from slimlm.planner.options import Budget, Option, budget_of, options_of
from slimlm.planner.trials import Judged, Original, Visited
from slimlm.recipe import Recipe, Rule

_JUDGED_TOKENS = 512
"""The most tokens that losses are measured on, in windows of at most so many."""
_TRIED_TOKENS = 4
"""The most tokens, for each input of the widest layer, of the statistics that options are tried with."""
_LEAST_LOSS = 1e-8
"""What a measured loss counts at least: less is rounding of float32, and 0 would make all options of a group equal."""
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
    errors: tuple[float, ...]
    """The relative squared error of the layers' outputs under each option, averaged over the layers; infinite where one of them
    cannot take it."""
    losses: tuple[float, ...]
    """KL divergence per token, in nats, of each option applied to this group alone; but for one they are estimated."""
    measured: int
    """The number of the option whose loss was measured in the model."""
    chosen: int
    """The number of the option chosen."""


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
                    "measured": c.measured,
                    "errors": [_finite(error) for error in c.errors],
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


def judged_windows(count: int, length: int) -> tuple[int, int]:
    """How many of so many samples, and how many tokens of each, losses are measured on; as many check the choice."""
    length = min(length, _JUDGED_TOKENS)
    return max(1, min(count // 8, _JUDGED_TOKENS // length)), length


def tried_samples(count: int, length: int, widest: int) -> int:
    """Of so many samples of so many tokens, how many a plan's statistics are measured on where a layer has `widest` inputs."""
    return min(count, -(-_TRIED_TOKENS * widest // length))


def make_plan(original: Original, recipe: Recipe, samples: Tensor, *, budget: Budget, progress: Observer) -> Plan:
    """Measure every option for every group, choose, and check the choice.

    Args:
        original: The original model.
        recipe: The recipe that is varied.
        samples: The calibration samples, `[count, length]`. On some (at most an eighth, at least one, about 512 tokens)
            losses are measured, and as many others check the choice; of the rest as many as needed are used for statistics.
        budget: The options, and the cost that may be spent.
        progress: An observer of the events.

    Returns:
        The plan.

    Raises:
        DataError: There are too few samples.
        NumericsError: No choice within the budget gives finite outputs, or the original model's are not finite.
    """
    refuse_few_samples(len(samples))
    held, length = judged_windows(len(samples), samples.shape[1])
    statistics, judged, checked = samples[: -2 * held], samples[-2 * held : -held, :length], samples[-held:, :length]
    statistics = statistics[: tried_samples(len(statistics), samples.shape[1], original.widest(recipe.ignores))]
    needs = _needs_of_trials(budget.options)
    blocks = original.blocks
    events = _Progress(progress, 2 * len(blocks) + 2)

    groups: list[_Group] = []
    changed = Judged.of(original, judged)
    for here in original.walk(statistics, needs, recipe.ignores):
        own = [_tried(here, stage, budget) for stage in here.stages]
        changed.change(here, [_measured(here, stage, group, budget) for stage, group in zip(here.stages, own, strict=True)])
        groups += own
        events.done()
    measured = changed.losses()
    losses = [group.losses(loss) for group, loss in zip(groups, measured, strict=True)]
    expected = losses
    if recipe.sequential:
        expected = evened(losses, [group.measured for group in groups], [group.weights for group in groups])
    events.done()

    shapes = [shape for group in groups for shape in group.shapes]
    costs = [[sum(option.cost(shape, budget.objective) for shape in g.shapes) for option in budget.options] for g in groups]
    room = budget.cost(shapes)
    chosen = choose_options(expected, costs, room)
    if chosen is None:
        raise NumericsError(
            "no choice within the budget gives finite outputs of the model for every layer; ask for more bits, or try the "
            "recipe absmax"
        )
    uniform = _best_single(losses, costs, room)
    picks = [chosen] if uniform is None else [chosen, [uniform] * len(groups)]
    whole = [{name: i for group, i in zip(groups, pick, strict=True) for name in group.layers} for pick in picks]
    changed = Judged.of(original, checked)
    for here in original.walk(statistics, needs, recipe.ignores):
        changed.change_all(here, _all_made(here, whole, budget.options))
        events.done()
    planned_loss, *others = changed.losses()
    events.done()
    uniform_loss = others[0] if others else float("inf")
    fallback = uniform is not None and uniform_loss < planned_loss
    final = picks[-1] if fallback else chosen
    choices = tuple(
        Choice(group.layers, group.shapes, group.errors, tuple(own), group.measured, i)
        for group, own, i in zip(groups, losses, final, strict=True)
    )
    return Plan(budget.objective, budget.bits, budget.options, choices, planned_loss, uniform_loss, uniform, fallback)


def _needs_of_trials(options: tuple[Option, ...]) -> Needs:
    """The statistics of all options' steps; raises RecipeError where one compares with the original model."""
    needs: Needs = NEEDS.union(*(needs_of(brief(option.steps)) for option in options))
    compared = [statistic.__name__ for statistic in needs if statistic.source.compares]
    if compared:
        raise RecipeError(
            f"the recipe's steps need {compared[0]} even for a trial (`brief`), which compares compressed layers with the "
            "original model; a plan tries options on the original model itself, and so cannot measure it"
        )
    return needs


@dataclass(frozen=True)
class _Group:
    """Layers that share an input, by full name, and the errors of the options."""

    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    errors: tuple[float, ...]
    """By option; infinite where one of the layers cannot take it."""
    measured: int
    """The option whose loss is measured in the model."""

    @property
    def weights(self) -> int:
        """The number of weights."""
        return sum(out * width for out, width in self.shapes)

    def losses(self, measured: float) -> list[float]:
        """Each option's loss, given that of the option `measured`."""
        error, measured = self.errors[self.measured], max(measured, _LEAST_LOSS)
        return [
            0.0 if own == 0 else measured * own / error if error > 0 and math.isfinite(own) else float("inf")
            for own in self.errors
        ]


def _tried(here: Visited, stage: list[str], budget: Budget) -> _Group:
    """All options in a group of layers; of those with errors, the one nearest the budget is to be measured."""
    errors = tuple(here.error(stage, option) for option in budget.options)
    sizes = [weight_of(here.block.get_submodule(layer)).shape for layer in stage]
    shapes = tuple((size[0], size[1]) for size in sizes)
    weights = sum(out * width for out, width in shapes)
    taken = [i for i, error in enumerate(errors) if math.isfinite(error)]
    if not taken:
        raise NumericsError(f"none of the plan's options gives finite outputs of {here.name}.{stage[0]}; try the recipe absmax")

    def distance(i: int) -> float:
        return abs(sum(budget.options[i].stored_bits(shape) for shape in shapes) / weights - budget.bits)

    measured = min(taken, key=lambda i: (errors[i] == 0, distance(i)))
    return _Group(tuple(f"{here.name}.{layer}" for layer in stage), shapes, errors, measured)


def _measured(here: Visited, stage: list[str], group: _Group, budget: Budget) -> dict[str, Tensor]:
    """The weights of a group's layers under the option whose loss is measured."""
    return {layer: here.made(layer, budget.options[group.measured].steps) for layer in stage}


def _all_made(here: Visited, picks: list[dict[str, int]], options: tuple[Option, ...]) -> list[dict[str, Tensor]]:
    """For each pick of an option's number by layer, the weights of all layers of a block."""
    made: dict[tuple[str, int], Tensor] = {}
    changes = []
    for pick in picks:
        own = {}
        for layer in (layer for stage in here.stages for layer in stage):
            key = layer, pick[f"{here.name}.{layer}"]
            if key not in made:
                made[key] = here.made(layer, options[key[1]].steps)
            own[layer] = made[key]
        changes.append(own)
    return changes


def _best_single(losses: list[list[float]], costs: list[list[float]], room: float) -> int | None:
    """The option of least loss in all groups within the budget; None: no single one is."""
    whole = [sum(own) for own in zip(*costs, strict=True)]
    total = [sum(own) for own in zip(*losses, strict=True)]
    fitting = [i for i, cost in enumerate(whole) if cost <= room and math.isfinite(total[i])]
    return min(fitting, key=total.__getitem__, default=None)


@dataclass
class _Progress:
    """The events of a plan."""

    observer: Observer
    total: int
    count: int = 0

    def done(self) -> None:
        """A part of it is done."""
        self.count += 1
        self.observer(Event("plan", self.count, self.total))
