"""The options and the budget of a plan: options that a step offers, their stored bits, and their cost at run time."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from slimlm.core import registry
from slimlm.core.errors import RecipeError
from slimlm.core.objective import Objective
from slimlm.core.solvers.low_rank import rank_of
from slimlm.core.step import Step
from slimlm.planner.forms import Steps, form_of, resolved, share_of
from slimlm.recipe import NamedStep, Recipe, refusal_of

_PROMPT, _GENERATED = 512, 128
"""Tokens of the workload that `speed` counts: a prompt and what is generated, one sequence at a time."""
_OPERATIONS_PER_BYTE = 100
"""Operations that a machine does in the time in which it moves a byte: one figure for all machines."""
_FLOAT = torch.float16
"""The dtype of layers that an option does not quantize."""


@dataclass(frozen=True)
class Option:
    """One way to store a layer: the recipe's steps, one of them with other values of its options."""

    steps: Steps
    """The steps for the layer."""
    overrides: tuple[tuple[str, Any], ...]
    """The content of a recipe's rule for it."""
    number: int = 0
    """The number of the step that is varied."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: all options of the step that is varied, and a description of those that vary."""
        return {**dataclasses.asdict(self.steps[self.number].step), "description": str(self)}

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of this shape (out, in) cannot be stored so, or None."""
        return refusal_of(self.steps, "the layer", shape)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits of codes, scales, mask, adapter, padding and codebook; scales count 16 bits.

        A codebook's few bits are saved where an even grid is as good; more are stored where some scale is too small for
        float16, so that all scales of the layer take 32 bits.
        """
        return form_of(self.steps, _FLOAT).bits(shape)

    def operations(self, shape: tuple[int, int]) -> int:
        """Multiplications and additions per token; weights that an n:m pattern drops are not counted."""
        out, width = shape
        share = 1.0
        for pattern in (named.step.sparsity for named in self.steps):
            if pattern is not None and pattern.of:
                share = 1 - pattern.dropped
        return int(2 * out * width * share) + 2 * rank_of(share_of(self.steps), shape) * (out + width)

    def cost(self, shape: tuple[int, int], objective: Objective) -> float:
        """Stored bits ("size"), or the bits that could be moved in the time of one prompt and its continuation ("speed").

        While generating, every token moves all stored bits; for the prompt they are moved once, and the operations count.
        """
        stored = self.stored_bits(shape)
        if objective == "size":
            return float(stored)
        prompt = max(stored, 8 * _PROMPT * self.operations(shape) / _OPERATIONS_PER_BYTE)
        return prompt + _GENERATED * max(stored, 8 * self.operations(shape) / _OPERATIONS_PER_BYTE)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value if value != '' else 'none'}" for name, value in self.overrides)


@dataclass(frozen=True)
class Budget:
    """The options of a plan, and the cost that it may spend."""

    options: tuple[Option, ...]
    """The options for every layer."""
    bits: float
    """Bits per weight: those asked for, or those of `reference`."""
    objective: Objective
    """The unit of cost."""
    reference: Option | None = None
    """The option whose cost in all layers is the budget; None: the budget is the cost of dense layers of `bits`."""

    def cost(self, shapes: list[tuple[int, int]]) -> float:
        """The cost that may be spent on layers of these shapes."""
        if self.reference is None:
            return budget_of(shapes, self.bits, self.objective)
        return sum(self.reference.cost(shape, self.objective) for shape in shapes)


def budget_of(shapes: list[tuple[int, int]], bits: float, objective: Objective) -> float:
    """The cost that may be spent: that of dense layers of `bits` per weight."""
    total = 0.0
    for shape in shapes:
        out, width = shape
        stored = bits * out * width
        if objective == "speed":
            operations = 8 * 2 * out * width / _OPERATIONS_PER_BYTE
            stored = max(stored, _PROMPT * operations) + _GENERATED * max(stored, operations)
        total += stored
    return total


def options_of(recipe: Recipe, bits: float | None, objective: Objective) -> tuple[Option, ...]:
    """The options that the one step of a recipe that has any offers to a plan.

    Args:
        recipe: A recipe of which exactly one step offers options; the other steps do not vary.
        bits: The budget per weight; None: only options for values that are "auto" in the step.
        objective: The unit of the budget.

    Raises:
        RecipeError: No step offers options, or several do, or the recipe has rules.
    """
    offered = {i: found for i, named in enumerate(recipe.steps) if (found := named.step.options(bits, objective))}
    steps = ", ".join(dict.fromkeys(f"{named.kind} {named.method}" for named in recipe.steps))
    if not offered:
        raise RecipeError(
            f"recipe {recipe.name} cannot be planned: none of its steps ({steps}) offers options to a plan; the methods that "
            f"do are {', '.join(methods_with_options())}"
        )
    if len(offered) > 1:
        raise RecipeError(
            f"recipe {recipe.name} cannot be planned: a plan varies one step, and several of its steps ({steps}) offer "
            "options; remove all but one of them"
        )
    if recipe.rules:
        raise RecipeError(f"recipe {recipe.name} cannot be planned: its rules already fix how layers are stored; remove them")
    ((number, found),) = offered.items()
    return options_from(recipe, number, found)


def options_from(recipe: Recipe, number: int, offered: tuple[Step, ...]) -> tuple[Option, ...]:
    """Options that replace the step of this number by one of those offered; rules name the step where there are several."""
    named = recipe.steps[number]
    values = [dataclasses.asdict(step) for step in offered]
    base = dataclasses.asdict(named.step)
    varied = [name for name in base if any(own[name] != values[0][name] for own in values) or values[0][name] != base[name]]
    verb = ((named.kind, named.method),) if len(recipe.steps) > 1 else ()
    others = resolved(recipe.steps)
    return tuple(
        Option(
            (*others[:number], NamedStep(named.kind, named.method, step), *others[number + 1 :]),
            (*verb, *((name, own[name]) for name in varied)),
            number,
        )
        for step, own in zip(offered, values, strict=True)
    )


def methods_with_options() -> list[str]:
    """The names of the methods that offer options to a plan."""
    return [name for name, method in registry.usable() if method().options(4.0, "size")]
