"""The estimate: everything that is known of a run before it, as plain data.

What is stored is exact but for what only the weights tell (a table of levels that does not pay, scales too small for float16).
Memory and time are estimates; docs/estimates.md compares them with real runs.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from slimlm.core.solvers.sweep import tokens_needed
from slimlm.planner.forms import Steps
from slimlm.preflight.job import Job
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
    left: dict[str, str]
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


def memory_of(job: Job, allowed: int | None, *, processes: int = 1) -> Memory:
    """What the run holds; `allowed`: bytes that activations may take (None: half of what is free).

    processes: how many on this machine are to share its memory.
    """
    total, free = (None if size is None else size // processes for size in total_and_free())
    limit = allowed if allowed is not None else None if free is None else free // 2
    return Memory(
        process=resident() or 0,
        begin=job.beginning_bytes,
        block=job.working_bytes,
        end=job.ending_bytes,
        activations=job.held_bytes,
        on_disk=limit is not None and job.held_bytes > limit,
        least=job.least_bytes,
        total=total,
        free=free,
        covariances=job.statistics_bytes,
    )


def estimate_of(
    job: Job,
    *,
    name: str,
    memory: Memory,
    disk_free: int | None,
    seconds: dict[str, float] | None,
    problems: tuple[str, ...],
) -> Estimate:
    """Put together what is known. name: the model's, as it is shown. seconds: see `timed`."""
    needed = job.widest_needed
    return Estimate(
        model=name,
        recipe=job.recipe.name,
        summary=job.recipe.summary,
        blocks=len(job.blocks),
        layers=job.shapes,
        layer_bits=job.layer_bits,
        left=job.left,
        bits_per_weight=job.bits_per_weight,
        planned=job.planned,
        original_bytes=job.dense.bytes,
        stored_bytes=job.stored_bytes,
        tokens=job.tokens,
        tokens_needed=None if needed is None else tokens_needed(needed),
        memory=memory,
        whole_bytes=job.dense.whole_bytes if job.planned else None,
        disk=job.disk_bytes,
        disk_free=disk_free,
        seconds=seconds,
        problems=problems,
    )


def timed(job: Job, folder: Path | None, device: torch.device, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Seconds of each stage, from rates measured here within seconds. folder: on the disk that will be written to."""
    rates: Rates = measured_rates(folder, device, clock)
    costs: dict[Steps, StepCost] = {}
    largest: dict[Steps, int] = {}
    for name, shape in job.shapes.items():
        largest[job.steps(name)] = min(_LARGEST_TRIAL, max(largest.get(job.steps(name), 0), *shape))
    for steps, side in largest.items():
        costs[steps] = measured_steps(steps, side, length=job.length, device=device, clock=clock)
    return seconds_of(job, rates, lambda name: costs[job.steps(name)])
