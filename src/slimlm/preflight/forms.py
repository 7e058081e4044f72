"""What steps make of a layer: found by applying them to a small random one, so that no method has to say it twice."""

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from slimlm.core.grid import LARGEST_CODEBOOK_BITS
from slimlm.core.layer import Layer, Need, Stats
from slimlm.core.mask import Pattern
from slimlm.core.parts.codebook import codebook_bits
from slimlm.core.parts.kernel_layout import MatrixLayout
from slimlm.core.parts.pack import PartEntries
from slimlm.core.solvers.low_rank import rank_of
from slimlm.planner.plan import AUTO_SHARE
from slimlm.recipe import NamedStep, apply_steps

Steps = tuple[NamedStep, ...]

_SMALL = 32
_TRIED_RANK = 0.25
"""In place of the recipe's own, which may be none at all for so small a layer."""
_TOKENS_PER_INPUT = 4


@dataclass(frozen=True)
class Form:
    """How a layer is stored, whatever its shape."""

    parts: PartEntries
    rank: float
    """of adapters, as a share of the smaller side"""
    codebook_bits: int = 0
    """of a codebook that may be kept or not, and that the parts lack"""

    def bits(self, shape: tuple[int, int]) -> int:
        """Stored bits of a layer `(out, in)`; where a codebook may be kept or not, with it."""
        return self.parts.with_rank(rank_of(self.rank, shape)).stored_bits(shape) + self.codebook_bits


@lru_cache(maxsize=256)
def form_of(steps: Steps, dtype: torch.dtype) -> Form:
    """How these steps store a weight of this dtype."""
    tried = tuple(_changed(named, {"rank": _TRIED_RANK} if getattr(named.step, "rank", 0) else {}) for named in brief(steps))
    shape = fitting((_SMALL, _SMALL), steps)
    made = apply_steps(tried, *drawn_layer(shape, needs_of(steps), dtype=dtype, length=8))
    maybe = any(getattr(named.step, "codebook", None) == "auto" for named in steps)
    entries = made.parts().describe()
    return Form(entries, share_of(steps), _spared(entries) if maybe else 0)


def brief(steps: Steps) -> Steps:
    """The steps with few rounds, where they go in rounds."""
    fewer = {"rounds": 2, "polish": 1}
    return tuple(
        _changed(
            named, {name: min(getattr(named.step, name), most) for name, most in fewer.items() if hasattr(named.step, name)}
        )
        for named in steps
    )


def _changed(named: NamedStep, options: dict[str, Any]) -> NamedStep:
    return dataclasses.replace(named, step=dataclasses.replace(named.step, **options))  # type: ignore[type-var]


def _spared(entries: PartEntries) -> int:
    """Bits of the codebook that a base of integers would have where one pays."""
    layout = entries.base.kernel_layout()
    if not isinstance(layout, MatrixLayout) or layout.elements != "integers" or layout.bits > LARGEST_CODEBOOK_BITS:
        return 0
    return codebook_bits(layout.bits)


def resolved(steps: Steps) -> Steps:
    """The steps with the rank whose bits a plan may spend where they leave it to one."""
    return tuple(_changed(n, {"rank": AUTO_SHARE}) if getattr(n.step, "rank", None) == "auto" else n for n in steps)


def share_of(steps: Steps) -> float:
    """The rank that the last repair of the steps has, as a share."""
    ranks = [float(rank) for named in steps if (rank := getattr(named.step, "rank", None)) is not None]
    return ranks[-1] if ranks else 0.0


def needs_of(steps: Steps) -> Need:
    """The statistics that the steps need together."""
    needs = Need.NOTHING
    for named in steps:
        needs |= named.step.needs
    return needs


def fitting(shape: tuple[int, int], steps: Steps) -> tuple[int, int]:
    """This shape with as many more inputs as the steps' pattern wants."""
    out, width = shape
    for named in steps:
        pattern = getattr(named.step, "pattern", "")
        if pattern != "" and (of := Pattern.parse(pattern).of):
            width = -(-width // of) * of
    return out, width


def drawn_layer(
    shape: tuple[int, int], needs: Need, *, dtype: torch.dtype, length: int, device: torch.device | None = None
) -> tuple[Layer, Stats]:
    """A random layer `(out, in)` and the statistics of random inputs, on the device.

    The inputs are mixed of directions whose energy falls off, as those of a real layer do, so that solvers take about as
    many rounds. length: tokens per window, of statistics that are kept by position.
    """
    out, width = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    tokens = _TOKENS_PER_INPUT * width
    weight = draw(out, width) * width**-0.5
    energies = torch.arange(1, width + 1) ** -0.5
    x = (draw(tokens, width) * energies) @ (draw(width, width) * width**-0.5) + 0.02 * draw(tokens, width)
    z = x + 0.1 * x.square().mean().sqrt() * draw(tokens, width)
    found: dict[str, Any] = {
        "mean_abs": (Need.MEAN_ABS, lambda: x.abs().mean(dim=0)),
        "mean_square": (Need.MEAN_SQUARE, lambda: x.square().mean(dim=0)),
        "peak_mean_abs": (Need.PEAK_MEAN_ABS, lambda: 1.2 * x.abs().mean(dim=0)),
        "gram": (Need.GRAM, lambda: x.T @ x / tokens),
        "cross": (Need.CROSS, lambda: z.T @ x / tokens),
        "drift": (Need.DRIFT, lambda: weight @ ((z - x).T @ x) / tokens),
        "peak_abs": (Need.PEAK_ABS, lambda: x.abs().amax(dim=0)),
        "mean_window": (Need.MEAN_WINDOW, lambda: draw(length, width)),
    }
    stats = Stats(tokens, **{name: make() for name, (need, make) in found.items() if needs & need})
    return Layer.of("a random layer", weight.to(device), dtype), stats
