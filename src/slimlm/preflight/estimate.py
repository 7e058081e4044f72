"""The estimate: everything that is known of a run before it, as plain data.

What is stored is exact but for what only the weights tell (a codebook that does not pay, scales too small for float16).
Memory and time are estimates; docs/estimates.md compares them with real runs.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from slimlm.core.solvers.inverse import tokens_needed
from slimlm.planner.forms import Steps
from slimlm.preflight.needs import RunNeeds
from slimlm.preflight.rates import Clock, Rates, StepCost, measured_rates, measured_steps
from slimlm.preflight.times import seconds_of
from slimlm.runtime.memory import resident, total_and_free

_LARGEST_TRIAL = 512


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    process: int
    """what the process holds already"""
    begin: int
    """beside that, while the first inputs are computed"""
    block: int
    """while a block is worked on"""
    end: int
    """while embedding and head are rounded"""
    activations: int
    """held all the time, where they stay in memory"""
    on_disk: bool
    """whether they are on the disk instead"""
    least: int
    """what is surely held at one time, of the process not even what it holds already"""
    total: int | None
    free: int | None
    covariances: int = 0
    """of `least`, what the statistics (mostly covariances) of inputs that are measured together take"""

    @property
    def peak(self) -> int:
        """The most at one time."""
        return self.process + max(self.begin, self.block, self.end) + (0 if self.on_disk else self.activations)


@dataclass(frozen=True)
class Estimate:
    """What a run will need."""

    model: str
    recipe: str
    summary: str
    blocks: int
    layers: dict[str, tuple[int, int]]
    """that are compressed, by full name: shape (out, in)"""
    layer_bits: dict[str, int]
    skipped: dict[str, str]
    """what is not compressed, and why"""
    bits_per_weight: float
    planned: bool
    """whether what layers become is yet to be planned, within the bits asked for"""
    original_bytes: int
    stored_bytes: int
    tokens: int
    tokens_needed: int | None
    """for the covariance of the widest layer, where the recipe asks for one"""
    memory: Memory
    whole_bytes: int | None
    """of the whole model in float32, where a plan has to open it"""
    disk: int
    """bytes of output and journal at the fullest moment"""
    disk_free: int | None
    seconds: dict[str, float] | None
    """by stage; None where nothing was measured"""
    problems: tuple[str, ...]
    """for which `compress` would refuse, and what is tight, in words"""

    @property
    def total_seconds(self) -> float | None:
        """Of all stages."""
        return None if self.seconds is None else sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, totals included."""
        data = asdict(self)
        data["memory"]["peak"] = self.memory.peak
        return {**data, "total_seconds": self.total_seconds}


def memory_of(run: RunNeeds, allowed: int | None, *, processes: int = 1) -> Memory:
    """What the run holds; `allowed`: bytes that activations may take (None: half of what is free).

    processes: how many on this machine are to share its memory.
    """
    total, free = (None if size is None else size // processes for size in total_and_free())
    limit = allowed if allowed is not None else None if free is None else free // 2
    return Memory(
        process=resident() or 0,
        begin=run.beginning_bytes,
        block=run.working_bytes,
        end=run.ending_bytes,
        activations=run.held_bytes,
        on_disk=limit is not None and run.held_bytes > limit,
        least=run.least_bytes,
        total=total,
        free=free,
        covariances=run.statistics_bytes,
    )


def estimate_of(
    run: RunNeeds,
    *,
    name: str,
    memory: Memory,
    disk_free: int | None,
    seconds: dict[str, float] | None,
    problems: tuple[str, ...],
) -> Estimate:
    """Put together what is known. name: the model's, as it is shown. seconds: see `timed`."""
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
        tokens=run.tokens,
        tokens_needed=None if needed is None else tokens_needed(needed),
        memory=memory,
        whole_bytes=run.dense.whole_bytes if run.planned else None,
        disk=run.disk_bytes,
        disk_free=disk_free,
        seconds=seconds,
        problems=problems,
    )


def timed(run: RunNeeds, folder: Path | None, device: torch.device, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Seconds of each stage, from rates measured here within seconds. folder: on the disk that will be written to."""
    rates: Rates = measured_rates(folder, device, clock)
    costs: dict[Steps, StepCost] = {}
    largest: dict[Steps, int] = {}
    for name, shape in run.shapes.items():
        largest[run.steps(name)] = min(_LARGEST_TRIAL, max(largest.get(run.steps(name), 0), *shape))
    for steps, side in largest.items():
        costs[steps] = measured_steps(steps, side, length=run.length, device=device, clock=clock)
    return seconds_of(run, rates, lambda name: costs[run.steps(name)])
