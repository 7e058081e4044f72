"""Timing of products, with the least disturbance by other programs on the machine.

Contenders are timed one after another in random order, round after round, in one process; figures are the median and the 20th
percentile over rounds. Each has so many copies of its weights that none is still in a cache when it is used again, as in a
model, where other layers come between. With one thread the clock is the process's CPU time, which does not count other
programs. With several threads it is the wall clock, which is meaningful on an idle machine only: rounds in which other programs
took much of the processor are repeated, and their share is recorded with the figures, as is the load average.
"""

import itertools
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimlm.kernels import native, processor
from slimlm.runtime import waiting

ROTATED = 160_000_000
"""Bytes of weights that a contender goes through before it uses the first again: several times the largest caches."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Contender:
    """One way to multiply by a weight `[out, in]`."""

    name: str
    """The name."""
    bytes: int
    """Bytes of the weight that one product reads."""
    calls: Callable[[Tensor], Sequence[Call]]
    """A function from an input `[batch, in]` to the products by each copy of the weight."""
    products: int = 1
    """The number of products in one call."""
    output: Callable[[Any], Tensor] = torch.as_tensor
    """A function from the result of a call to a tensor `[batch, out]`."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one product."""

    seconds: float
    """The median over rounds."""
    fast: float
    """The 20th percentile over rounds."""
    rounds: int
    """The number of rounds."""

    @classmethod
    def of(cls, taken: Sequence[float]) -> "Timing":
        """The timing of rounds that took so many seconds each."""
        fast = quantiles(taken, n=5, method="inclusive")[0] if len(taken) > 1 else taken[0]
        return cls(median(taken), fast, len(taken))


@dataclass(frozen=True)
class Effort:
    """The time that measuring may take."""

    rounds: int = 9
    """The number of rounds."""
    burst: float = 0.02
    """Seconds for which a contender is timed in one round, if its copies last that long."""
    rotated: int = ROTATED
    """Bytes of weights of a contender; see `ROTATED`."""
    pause: float = 0.005
    """Seconds before a contender is timed, in which waiting threads of the previous one stop."""
    disturbed: float = 0.08
    """A share of the processor's time; with several threads, rounds in which other programs take more are repeated."""
    most_repeats: int = 3
    """The most times that the rounds are run to get undisturbed ones."""

    def copies(self, bytes_: int) -> int:
        """The number of copies of a weight of this many bytes."""
        return max(1, -(-self.rotated // bytes_))


USUAL = Effort()
QUICK = Effort(rounds=3, burst=0.002, rotated=40_000_000)


@dataclass
class _Runner:
    contender: Contender
    calls: Sequence[Call]
    cycle: Iterator[Call] = field(init=False)
    burst: int = 1
    """The number of calls timed in one round; with the untimed one before them at most one pass over the copies."""

    def __post_init__(self) -> None:
        self.cycle = itertools.cycle(self.calls)

    def warm(self, effort: Effort, clock: Callable[[], float]) -> None:
        """Find out how many calls a burst holds."""
        next(self.cycle)()
        taken = self.timed(1, clock)
        fitting = round(effort.burst / max(taken, 1e-7))
        self.burst = max(1, min(fitting, len(self.calls) - 1))

    def timed(self, count: int, clock: Callable[[], float]) -> float:
        """Seconds of one call."""
        calls = [next(self.cycle) for _ in range(count)]
        began = clock()
        for call in calls:
            call()
        return (clock() - began) / count


def clock_for(threads: int) -> Callable[[], float]:
    """The clock in seconds: CPU time of this process for one thread, the wall clock for several."""
    return time.process_time if threads == 1 else time.perf_counter


@dataclass(frozen=True)
class Race:
    """The result of a comparison."""

    timings: dict[str, Timing]
    """The timings by the contenders' names."""
    elsewhere: float | None
    """The share of the processor's time that other programs took meanwhile; None where the system does not report it."""
    load: float | None
    """The load average at the end."""


def race(contenders: Sequence[Contender], x: Tensor, *, threads: int, effort: Effort, seed: int = 0) -> Race:
    """The time of one product x W^T by each contender.

    Args:
        contenders: the ways to multiply.
        x: `[batch, in]`.
        threads: of torch, which must be set to as many (`at_threads`).
        effort: how long to measure.
        seed: of the order of contenders in each round.
    """
    clock, order = clock_for(threads), random.Random(seed)
    runners = [_Runner(contender, contender.calls(x)) for contender in contenders]
    rounds: list[tuple[float, dict[str, float]]] = []
    limit = effort.rounds * (1 if threads == 1 else effort.most_repeats)
    known = True
    with torch.inference_mode():
        for runner in runners:
            runner.warm(effort, clock)
        while len(rounds) < limit and _quiet(rounds, effort) < effort.rounds:
            before = processor_seconds()
            seconds = _round(order.sample(runners, len(runners)), effort, clock)
            taken = taken_elsewhere(before, processor_seconds())
            known = known and taken is not None
            rounds.append((taken or 0.0, seconds))
    # The quietest rounds; with one thread all of them.
    quietest = sorted(rounds, key=lambda each: each[0])[: effort.rounds]
    timings = {c.name: Timing.of([seconds[c.name] for _, seconds in quietest]) for c in contenders}
    return Race(timings, fmean(taken for taken, _ in quietest) if known else None, load_average())


def _quiet(rounds: Sequence[tuple[float, Any]], effort: Effort) -> int:
    return sum(taken <= effort.disturbed for taken, _ in rounds)


def _round(runners: Sequence[_Runner], effort: Effort, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of one product by each contender, one after another."""
    taken = {}
    for runner in runners:
        time.sleep(effort.pause)
        next(runner.cycle)()
        taken[runner.contender.name] = runner.timed(runner.burst, clock) / runner.contender.products
    return taken


def processor_seconds() -> tuple[float, float, float] | None:
    """Seconds since the start, of all cores together: passed, and worked by all processes; and worked by this process."""
    try:
        ticks = [int(each) for each in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
        rate = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal
    idle = ticks[3] + ticks[4]
    return sum(ticks) / rate, (sum(ticks) - idle) / rate, time.process_time()


def taken_elsewhere(before: tuple[float, float, float] | None, after: tuple[float, float, float] | None) -> float | None:
    """The share of the cores' time between two calls of `processor_seconds` in which other processes worked."""
    if before is None or after is None:
        return None
    passed, worked, own = (late - early for early, late in zip(before, after, strict=True))
    return min(1.0, max(0.0, worked - own) / max(passed, 0.01))


def dense(name: str, weights: Sequence[Tensor]) -> Contender:
    """The contender that multiplies by copies of a dense weight `[out, in]` with torch, in the weight's dtype."""
    dtype = weights[0].dtype

    def calls(x: Tensor) -> list[Call]:
        own = x.to(dtype)
        return [partial(F.linear, own, weight) for weight in weights]

    return Contender(name, weights[0].numel() * weights[0].element_size(), calls)


def random_dense(name: str, shape: tuple[int, int], dtype: torch.dtype, copies: int) -> Contender:
    """The contender that multiplies by copies of a random dense weight of a shape (out, in) with torch."""
    first = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    return dense(name, [first, *(first.clone() for _ in range(copies - 1))])


def read_bandwidth(threads: int, *, bytes_: int = 268_435_456, rounds: int = 9) -> float:
    """Bytes per second at which so many threads read memory: the best round of the best of torch's reductions.

    A product of a weight that is read once can hardly be faster than its bytes at this rate. Torch's loops neither
    prefetch nor use huge pages, so kernels that do may read somewhat faster.
    """
    values = torch.ones(bytes_ // 16384, 4096)
    vector, clock = torch.ones(4096), clock_for(threads)
    reductions: list[Call] = [partial(values.sum, dim=1), partial(values.mv, vector), values.sum]
    best = float("inf")
    with at_threads(threads):
        for _ in range(rounds):
            for reduction in reductions:
                began = clock()
                reduction()
                best = min(best, clock() - began)
    return values.numel() * 4 / best


@contextmanager
def at_threads(count: int) -> Iterator[None]:
    """Within this context torch, and with it slimlm's kernels, use as many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_average() -> float | None:
    """The mean number of processes that could run in the last minute, this one included; None where it is not reported."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def machine() -> dict[str, Any]:
    """What the figures depend on: the processor, its cores, how threads wait, the kernels' variant, and the load now."""
    return {
        "processor": processor.name(),
        "features": [feature for feature in processor.INTERESTING if feature in processor.features()],
        "cores": os.cpu_count(),
        "waiting_threads": waiting.policy(),
        "platform": f"{platform.system()} {platform.machine()}",
        "kernels": native.status().active,
        "load_average": load_average(),
    }
