"""How a sweep and coordinate descent divide the inputs: in halves, at borders, until a leaf is left.

What is decided in the left half is applied to the right half in one product of matrices, so nearly all arithmetic is in such
products. The inputs of a leaf are decided one after another. Borders are the places along the inputs where pieces begin,
ascending from 0: those of groups that share a scale, of the units of a mask, of leaves.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

LEAF = 4
"""Inputs that are decided one after another without a product of matrices in between; under n:m there are m of them."""


def middle_of(low: int, high: int, kinds: Iterable[list[int]]) -> int | None:
    """Where the inputs from low up to high are divided, or None where they are a leaf.

    Args:
        low: the first of the inputs.
        high: the end of the inputs.
        kinds: borders of each kind, the coarsest first, so that no coarse piece is divided before it stands alone.

    Returns:
        The border nearest the middle, of the first kind that has any inside.
    """
    for borders in kinds:
        inside = borders[bisect_right(borders, low) : bisect_left(borders, high)]
        if inside:
            return min(inside, key=lambda border: abs(2 * border - low - high))
    return None


def end_of(borders: list[int], low: int, width: int) -> int:
    """The end of the piece that begins at `low`, of `width` inputs in all."""
    after = bisect_right(borders, low)
    return borders[after] if after < len(borders) else width


def divided(borders: list[int], width: int, size: int) -> list[int]:
    """Finer borders: the pieces of `width` inputs in all are cut further into pieces of `size` inputs."""
    stops = [*borders[1:], width]
    return [place for low, high in zip(borders, stops, strict=True) for place in range(low, high, size)]
