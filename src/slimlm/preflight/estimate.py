"""The estimate of a run's needs, as plain data.

Stored sizes are exact except where they depend on the weights (a codebook that does not pay, scales too small for float16).
Memory and time are estimates; docs/estimates.md compares them with real runs.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slimlm.core.solvers.inverse import tokens_needed
from slimlm.planner.forms import Steps, brief
from slimlm.planner.options import options_of
from slimlm.preflight.needs import RunNeeds
from slimlm.preflight.rates import Clock, Rates, StepCost, measured_rates, measured_steps
from slimlm.preflight.times import planning_seconds, seconds_of
from slimlm.runtime.memory import resident, total_and_free

_LARGEST_TRIAL = 512
"""The largest side of the random layers that steps are timed on."""
_KEPT_UP_TO = 0.8
"""The share of the free memory up to which the passes of a block keep tensors for later ones."""


@dataclass(frozen=True)
class Memory:
    """The memory of a run and of the machine, in bytes."""

    process: int
    """The memory that the process holds already."""
    begin: int
    """The memory that is held, in addition, before the first block: while a plan is made, or the first inputs computed."""
    block: int
    """The memory that is held, in addition, while a block is worked on."""
    end: int
    """The memory that is held, in addition, while embedding and head are rounded."""
    activations: int
    """The memory of activations, which are held all the time unless they are on the disk."""
    on_disk: bool
    """Whether activations are on the disk."""
    least: int
    """A lower bound of the memory that is held at one time, without `process`."""
    total: int | None
    """The memory of the machine; None where it is not known."""
    free: int | None
    """The free memory of the machine; None where it is not known."""
    room: int | None = None
    """The memory that is left for what the passes of a block keep for later ones; None: it is not known."""
    kept: int = 0
    """The part of it that they take, about, while a block is worked on."""
    covariances: int = 0
    """The part of `least` that statistics (mostly covariances) of inputs that are measured together take."""

    @property
    def peak(self) -> int:
        """The most at one time."""
        return self.process + max(self.begin, self.block + self.kept, self.end) + (0 if self.on_disk else self.activations)


@dataclass(frozen=True)
class Times:
    """The time of a run."""

    stages: dict[str, float]
    """Seconds by stage."""
    per_sample: float
    """Seconds that each further calibration sample adds."""


@dataclass(frozen=True)
class Estimate:
    """The needs of a run."""

    model: str
    """The model's name."""
    recipe: str
    """The recipe's name."""
    summary: str
    """The recipe's summary."""
    blocks: int
    """The number of blocks."""
    layers: dict[str, tuple[int, int]]
    """The shapes (out, in) of the layers that are compressed, by full name."""
    layer_bits: dict[str, int]
    """The stored bits of these layers, by full name."""
    skipped: dict[str, str]
    """The layers that are not compressed, and why."""
    bits_per_weight: float
    """The stored bits per weight of the compressed layers together."""
    planned: bool
    """Whether a plan is yet to choose how layers are stored, within the bits asked for."""
    original_bytes: int
    """The size of the original model's tensors."""
    stored_bytes: int
    """The size of the compressed model's tensors."""
    samples: int
    """The number of calibration samples."""
    tokens: int
    """The number of calibration tokens."""
    tokens_needed: int | None
    """The tokens that the covariance of the widest layer needs; None where the recipe needs no covariance."""
    memory: Memory
    """The memory of the run and of the machine."""
    disk: int
    """The most bytes that output and journal take at one time."""
    disk_free: int | None
    """Bytes free on the disk of the output; None where no output was named."""
    seconds: dict[str, float] | None
    """Seconds by stage; None where nothing was measured."""
    seconds_per_sample: float | None
    """Seconds that each further calibration sample adds; None where nothing was measured."""
    problems: tuple[str, ...]
    """Messages: the reasons for which `compress` would refuse, and warnings of little memory or disk."""

    @property
    def total_seconds(self) -> float | None:
        """The time of all stages together."""
        return None if self.seconds is None else sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, totals included."""
        data = asdict(self)
        data["memory"]["peak"] = self.memory.peak
        return {**data, "total_seconds": self.total_seconds}


def memory_of(run: RunNeeds, allowed: int | None, *, processes: int = 1) -> Memory:
    """The memory of a run.

    Args:
        run: The needs of the run.
        allowed: Bytes that activations may take; None: half of the free memory.
        processes: The number of processes that share this machine's memory.
    """
    total, free = (None if size is None else size // processes for size in total_and_free())
    limit = allowed if allowed is not None else None if free is None else free // 2
    on_disk = limit is not None and run.held_bytes > limit
    held = 0 if on_disk else run.held_bytes
    rooms = [] if limit is None else [limit - held]
    rooms += [] if free is None else [int(_KEPT_UP_TO * free) - held - run.working_bytes]
    room = max(0, min(rooms)) if rooms else None
    return Memory(
        process=resident() or 0,
        begin=max(run.beginning_bytes, run.planning_bytes),
        block=run.working_bytes,
        end=run.ending_bytes,
        activations=run.held_bytes,
        on_disk=on_disk,
        least=run.least_bytes,
        total=total,
        free=free,
        room=room,
        kept=run.kept_bytes if room is None else min(run.kept_bytes, room),
        covariances=run.statistics_bytes,
    )


def estimate_of(
    run: RunNeeds,
    *,
    name: str,
    memory: Memory,
    disk_free: int | None,
    times: Times | None,
    problems: tuple[str, ...],
) -> Estimate:
    """The estimate of a run.

    Args:
        run: The needs of the run.
        name: The model's name.
        memory: See `memory_of`.
        disk_free: Bytes free on the disk of the output.
        times: See `timed`.
        problems: See `slimlm.preflight.checks.problems_of`.
    """
    needed = run.widest_needed
    return Estimate(
        model=name,
        recipe=run.recipe.name,
        summary=run.recipe.summary,
        blocks=len(run.blocks),
        layers=run.shapes,
        layer_bits=run.layer_bits,
        skipped=run.skipped,
        bits_per_weight=run.bits_per_weight,
        planned=run.planned,
        original_bytes=run.dense.bytes,
        stored_bytes=run.stored_bytes,
        samples=run.sample_count,
        tokens=run.tokens,
        tokens_needed=None if needed is None else tokens_needed(needed),
        memory=memory,
        disk=run.disk_bytes,
        disk_free=disk_free,
        seconds=None if times is None else times.stages,
        seconds_per_sample=None if times is None else times.per_sample,
        problems=problems,
    )


def timed(run: RunNeeds, folder: Path | None, device: torch.device, clock: Clock = time.perf_counter) -> Times:
    """The time of a run, from rates that are measured here within seconds.

    Args:
        run: The needs of the run.
        folder: A folder on the disk that will be written to; None: that of temporary files.
        device: The device of the run.
        clock: A clock in seconds.
    """
    rates: Rates = measured_rates(folder, device, clock)
    costs: dict[Steps, StepCost] = {}
    largest: dict[Steps, int] = {}
    for name, shape in run.shapes.items():
        largest[run.steps(name)] = min(_LARGEST_TRIAL, max(largest.get(run.steps(name), 0), *shape))
    for steps, side in largest.items():
        costs[steps] = measured_steps(steps, side, length=run.length, device=device, clock=clock)
    if not run.planned:
        return times_of(run, lambda needs: seconds_of(needs, rates, lambda name: costs[run.steps(name)]))
    trials = {
        steps: measured_steps(brief(steps), side, length=run.length, device=device, clock=clock)
        for steps, side in largest.items()
    }
    # What is counted, bits or operations, changes the number of options little.
    options = len(options_of(run.recipe, run.bits, "size"))

    def stages(needs: RunNeeds) -> dict[str, float]:
        plan = planning_seconds(needs, rates, lambda name: trials[run.steps(name)], options)
        return {"plan": plan, **seconds_of(needs, rates, lambda name: costs[run.steps(name)])}

    return times_of(run, stages)


def times_of(run: RunNeeds, stages: Callable[[RunNeeds], dict[str, float]]) -> Times:
    """The time of a run by its stages, and that of a further sample: the mean over as many more as there are."""
    found, twice = stages(run), stages(replace(run, sample_count=2 * run.sample_count))
    return Times(found, (sum(twice.values()) - sum(found.values())) / run.sample_count)
