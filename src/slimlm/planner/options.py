"""What a layer may become, what that stores and what it costs to run, before anything is computed."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from slimlm.core import grid
from slimlm.core.grid import LARGEST_CODEBOOK_BITS
from slimlm.core.mask import Pattern
from slimlm.core.parts.base import Entry, group_words
from slimlm.core.parts.codebook import CodebookEntry
from slimlm.core.parts.elementwise import ElementwiseEntry
from slimlm.core.parts.low_rank import LowRankEntry
from slimlm.core.parts.pack import PartEntries
from slimlm.core.parts.plain import PlainEntry
from slimlm.core.parts.pruned import PrunedEntry
from slimlm.core.parts.uniform import UniformEntry
from slimlm.core.solvers.low_rank import rank_of
from slimlm.planner.objective import Objective

_PROMPT, _GENERATED = 512, 128
"""Tokens of the workload that `speed` counts: a prompt and what is generated, one sequence at a time."""
_OPERATIONS_PER_BYTE = 100
"""Operations a machine does in the time in which it moves a byte; until kernels are measured, one figure for all."""


@dataclass(frozen=True)
class Option:
    """One way to store a layer: base and adapter."""

    bits: int
    group_size: grid.GroupSize
    pattern: str | float
    """"" keeps the base dense"""
    rank: float
    adapter_bits: int = 4
    adapter_group_size: int = 128
    table: bool = True
    """whether room for a table of levels is counted; only the search finds out whether one pays"""

    def overrides(self) -> dict[str, Any]:
        """The options of the alternation that this stands for."""
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "pattern": self.pattern,
            "rank": self.rank,
            "adapter_bits": self.adapter_bits,
            "adapter_group_size": self.adapter_group_size,
            "codebook": "auto" if self.table and self.bits <= LARGEST_CODEBOOK_BITS else "none",
        }

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Why a layer of this shape cannot be stored so, or None."""
        if self.rank and rank_of(self.rank, shape) == 0:
            return f"rank {self.rank} is less than rank 1"
        return None if self.pattern == "" else Pattern.parse(self.pattern).refuses("the layer", shape[1])

    def stored_bits(self, shape: tuple[int, int]) -> int:
        """Bits of codes, scales, mask and adapter, padding and a table of levels included; scales at 16 bits.

        The table's few bits are saved where an even grid serves as well; more are stored where some scale is too small for
        float16, and all of the layer's take 32 bits.
        """
        return self.parts(shape).stored_bits(shape)

    def parts(self, shape: tuple[int, int]) -> PartEntries:
        """The parts of a layer of this shape, as they describe themselves."""
        table = self.table and self.bits <= LARGEST_CODEBOOK_BITS
        inner: ElementwiseEntry = (CodebookEntry if table else UniformEntry)(self.bits, self.group_size)
        base: Entry = inner if self.pattern == "" else PrunedEntry(str(self.pattern), inner)
        rank = rank_of(self.rank, shape)
        if not rank:
            return PartEntries(base)
        even = UniformEntry(self.adapter_bits, self.adapter_group_size)
        factor: ElementwiseEntry = PlainEntry(torch.float16) if self.adapter_bits == 16 else even
        return PartEntries(base, adapter=LowRankEntry(rank, factor, factor))

    def operations(self, shape: tuple[int, int]) -> int:
        """Multiplications and additions per token; what n:m drops is not multiplied."""
        out, width = shape
        share = 1.0
        if self.pattern != "" and Pattern.parse(self.pattern).of:
            share = 1 - Pattern.parse(self.pattern).dropped
        return int(2 * out * width * share) + 2 * rank_of(self.rank, shape) * (out + width)

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
        pattern = "dense" if self.pattern == "" else str(self.pattern)
        adapter = f" + rank {self.rank:g} at {self.adapter_bits} bits" if self.rank else ""
        return f"{pattern} {self.bits}-bit, {group_words(self.group_size)}{adapter}"


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


def options_for(like: Option, bits: float, objective: Objective) -> tuple[Option, ...]:
    """The options worth measuring for an average of `bits` per weight; adapters and tables are those of `like`.

    Dense codes of widths around it, the narrow ones also in short groups, two with adapters; for size one 2:4 option, so that
    the table shows where it stands (by bytes alone it seldom wins), for speed several.
    """
    widths = [width for width in (2, 3, 4, 5, 6, 8) if bits - 2.2 < width <= max(3.0, bits + 2)]
    dense: list[tuple[int, int, str, float]] = [(width, 128, "", 0.0) for width in widths]
    dense += [(width, 32, "", 0.0) for width in widths if width <= 3]
    below = [width for width in widths if width <= bits - 0.3] or widths[:1]
    dense += [(width, 128, "", rank) for width, rank in zip(reversed(below), (0.05, 0.1), strict=False)]
    sparse = [(4, 32, "2:4", 0.1)]
    if objective == "speed":
        sparse = [(3, 64, "2:4", 0.1), (4, 64, "2:4", 0.05), *sparse, (4, 32, "2:4", 0.2)]
    return tuple(
        replace(like, bits=width, group_size=group_size, pattern=pattern, rank=rank)
        for width, group_size, pattern, rank in [*dense, *sparse]
    )
