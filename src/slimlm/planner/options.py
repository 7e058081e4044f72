"""What a plan may choose from and spend: options that a step offers, and what they store and cost to run."""

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
"""Operations a machine does in the time in which it moves a byte; until kernels are measured, one figure for all."""
_FLOAT = torch.float16
"""What a layer is stored in where an option leaves it unrounded."""


@dataclass(frozen=True)
class Option:
    """One way to store a layer: the recipe's steps, one of them with other values of its options."""

    steps: Steps
    """for the layer"""
    overrides: tuple[tuple[str, Any], ...]
    """what a rule of a recipe says for it"""
    number: int = 0
    """of the step that is varied"""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: all options of the step that is varied, and what is special to this one in words."""
        return {**dataclasses.asdict(self.steps[self.number].step), "words": str(self)}

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of this shape (out, in) cannot be stored so, or None."""
        return refusal_of(self.steps, "the layer", shape)

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits of codes, scales, mask and adapter, padding and a table of levels included; scales at 16 bits.

        The table's few bits are saved where an even grid serves as well; more are stored where some scale is too small for
        float16, and all of the layer's take 32 bits.
        """
        return form_of(self.steps, _FLOAT).bits(shape)

    def operations(self, shape: tuple[int, int]) -> int:
        """Multiplications and additions per token; what n:m drops is not multiplied."""
        out, width = shape
        share = 1.0
        for pattern in (named.step.sparsity for named in self.steps):
            if pattern is not None and pattern.of:
                share = 1 - pattern.dropped
        return int(2 * out * width * share) + 2 * rank_of(share_of(self.steps), shape) * (out + width)

    def cost(self, shape: tuple[int, int], objective: Objective) -> float:
        """Stored bits, or for speed the bits that could be moved in the time of one prompt and its continuation.

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
    """What a plan may choose from and spend."""

    options: tuple[Option, ...]
    bits: float
    """asked for, or those of `reference`; per weight"""
    objective: Objective
    reference: Option | None = None
    """its cost in all layers is the budget; None: the cost of plain dense layers of `bits`"""

    def cost(self, shapes: list[tuple[int, int]]) -> float:
        """What may be spent on layers of these shapes."""
        if self.reference is None:
            return budget_of(shapes, self.bits, self.objective)
        return sum(self.reference.cost(shape, self.objective) for shape in shapes)


def budget_of(shapes: list[tuple[int, int]], bits: float, objective: Objective) -> float:
    """The cost that may be spent: what plain dense layers of `bits` per weight would cost."""
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
    """What the recipe's one step that offers options lets a plan choose from.

    Args:
        recipe: One of its steps must offer options, and only one; the others stay as they are.
        bits: The budget per weight; None: only what the step leaves to a plan ("auto").
        objective: What the budget counts.

    Raises:
        RecipeError: No step offers options, or several do, or rules say already what layers become.
    """
    offered = {i: found for i, named in enumerate(recipe.steps) if (found := named.step.options(bits, objective))}
    steps = ", ".join(dict.fromkeys(f"{named.kind} {named.method}" for named in recipe.steps))
    if not offered:
        raise RecipeError(
            f"recipe {recipe.name} cannot be planned: none of its steps ({steps}) offers a plan anything to choose from; the "
            f"methods that do are {', '.join(methods_with_options())}"
        )
    if len(offered) > 1:
        raise RecipeError(
            f"recipe {recipe.name} cannot be planned: a plan varies one step, and several of its steps ({steps}) offer "
            "options; leave one of them"
        )
    if recipe.rules:
        raise RecipeError(f"recipe {recipe.name} cannot be planned: its rules say already what layers become; take them out")
    ((number, found),) = offered.items()
    return options_from(recipe, number, found)


def options_from(recipe: Recipe, number: int, offered: tuple[Step, ...]) -> tuple[Option, ...]:
    """The options that the step of this number becomes one of; a rule names the step where there are others beside it."""
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
    """The names of the methods that offer a plan options."""
    found = [(name, registry.find(kind, name)()) for kind in registry.KINDS for name in registry.names(kind)]
    return [name for name, step in found if step.options(4.0, "size")]
