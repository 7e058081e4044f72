"""The speed of this machine at the operations of a run, measured within seconds: products, memory, writing, the steps."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from slimlm.planner.forms import Steps, brief, drawn_layer, fitting, needs_of
from slimlm.recipe import apply_steps
from slimlm.storage.streams import sha256_of, write_tensors

Clock = Callable[[], float]

_PRODUCT = (2048, 512, 1024)
"""Tokens, inputs and outputs of the measured product."""
_PASSED = 2**22
"""Elements of the vector that is read and written."""
_WRITTEN = 2**25
"""Bytes of the file that is written."""
_ENOUGH = 0.15
"""The least seconds that a measurement lasts."""
_SIDES = (64, 128, 256, 512)
"""Sides of the square layers that steps are tried on."""
_WORTH = 3.0
"""Seconds that a trial of the steps may take; larger layers that are expected to take more are skipped."""
_FULL = 128
"""Side of the layer on which steps are tried with all their rounds; on smaller layers they take fewer than on real ones."""


@dataclass(frozen=True)
class Rates:
    """Measured rates."""

    products: float
    """Operations per second of float32 matrix products."""
    passes: float
    """Bytes per second, read and written, of elementwise operations."""
    written: float
    """Bytes per second to the disk, synced, with the checksum."""


def measured_rates(folder: Path | None, device: torch.device, clock: Clock = time.perf_counter) -> Rates:
    """Measure the rates of the device and of the disk that holds `folder` (None: that of temporary files)."""
    tokens, width, out = _PRODUCT
    x, weight = torch.randn(tokens, width, device=device), torch.randn(out, width, device=device)
    products = 2 * tokens * width * out / _seconds(lambda: x @ weight.T, device, clock)
    vector = torch.ones(_PASSED, device=device)
    passes = 8 * _PASSED / _seconds(lambda: vector.mul_(1.0), device, clock)
    with TemporaryDirectory(dir=folder) as scratch:
        path, content = Path(scratch) / "probe.safetensors", {"x": torch.zeros(_WRITTEN, dtype=torch.uint8)}
        began = clock()
        write_tensors(path, content)
        sha256_of(path)
        written = _WRITTEN / max(clock() - began, 1e-9)
    return Rates(products, passes, written)


def _seconds(work: Callable[[], object], device: torch.device, clock: Clock) -> float:
    """Mean seconds of one call; the first call is not counted."""
    work()
    _wait(device)
    began, count = clock(), 0
    while True:
        work()
        count += 1
        _wait(device)
        if (spent := clock() - began) >= _ENOUGH:
            return spent / count


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class StepCost:
    """Seconds of the steps on a layer: the coefficients of a polynomial in the layer's size."""

    per_layer: float
    """Seconds that do not depend on the size."""
    per_input: float
    """Seconds per input."""
    per_weight: float
    """Seconds per weight."""
    per_weight_and_input: float
    """Seconds per weight and input."""

    def seconds(self, shape: tuple[int, int]) -> float:
        """Seconds of the steps on a layer of shape (out, in)."""
        out, width = shape
        linear = self.per_layer + self.per_input * width
        return linear + (self.per_weight + self.per_weight_and_input * width) * out * width


def measured_steps(
    steps: Steps, largest: int, *, length: int, device: torch.device, clock: Clock = time.perf_counter
) -> StepCost:
    """Measure the steps on square random layers of a few sizes and fit their cost.

    Iterative solvers run all their rounds on one small layer only; the other trials take fewer rounds, and are scaled by the
    ratio of the two on that layer.

    Args:
        steps: The steps.
        largest: The largest side of a layer.
        length: Tokens per sample.
        device: The device of the run.
        clock: A clock in seconds.
    """
    short, trial = brief(steps), _Trial(length, device, clock)
    sides = sorted({min(side, largest) for side in _SIDES})
    trial.seconds(short, sides[0])  # the first call initializes libraries, and is not counted
    found: list[tuple[int, float]] = []
    for side in sides:
        if found and found[-1][1] * (side / found[-1][0]) ** 2 > _WORTH:
            break
        found.append((side, trial.seconds(short, side)))
    full = min(_FULL, found[-1][0])
    factor = 1.0 if short == steps else trial.seconds(steps, full) / dict(found)[full]
    return fitted_cost([(side, factor * seconds) for side, seconds in found])


@dataclass(frozen=True)
class _Trial:
    length: int
    device: torch.device
    clock: Clock

    def seconds(self, steps: Steps, side: int) -> float:
        """Seconds of the steps on a square layer."""
        shape = fitting((side, side), steps)
        layer, stats = drawn_layer(shape, needs_of(steps), dtype=torch.float32, length=self.length, device=self.device)
        _wait(self.device)
        began = self.clock()
        apply_steps(steps, layer, stats).parts()
        _wait(self.device)
        return self.clock() - began


def fitted_cost(found: list[tuple[int, float]]) -> StepCost:
    """The cost, without negative coefficients, that fits (side, seconds) of square layers at least squared relative error."""
    rows = torch.tensor([[1, side, side**2, side**3] for side, _ in found], dtype=torch.float64)
    seconds = torch.tensor([max(spent, 1e-9) for _, spent in found], dtype=torch.float64)
    best, least = torch.zeros(4, dtype=torch.float64), float("inf")
    for count in range(1, min(4, len(found)) + 1):
        for own in combinations(range(4), count):
            chosen = list(own)
            scaled = rows[:, chosen] / seconds[:, None]
            answer = torch.linalg.lstsq(scaled, torch.ones_like(seconds)[:, None], driver="gelsd").solution[:, 0]
            missed = float((scaled @ answer - 1).square().sum())
            if bool((answer >= 0).all()) and missed < least - 1e-12:
                least, best = missed, torch.zeros(4, dtype=torch.float64)
                best[chosen] = answer
    return StepCost(*best.tolist())
