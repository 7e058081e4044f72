"""Time of one layer's solver steps, compared with the time of the matrix products that they cannot do without.

    python benchmarks/sweep.py [--size 4096] [--threads 1] [--profile]

A random weight with correlated inputs; medians of three runs after a warm-up, in this process, so that a ratio to the measured
matrix rate holds when the machine's speed drifts. Writes benchmarks/results/sweep-SIZE.json. `--profile` prints where the
time of one sweep goes.
"""

import argparse
import cProfile
import json
import platform
import pstats
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from slimlm.core.grid import Grid
from slimlm.core.mask import Pattern
from slimlm.core.solvers import linalg
from slimlm.core.solvers.base_descent import descend_base
from slimlm.core.solvers.inverse import inverse_of
from slimlm.core.solvers.low_rank import AdapterFormat, low_rank_part
from slimlm.core.solvers.order import order_of
from slimlm.core.solvers.sweep import rounded_sweep, unrounded_sweep
from slimlm.report.tables import plain_table

RESULTS = Path(__file__).parent / "results"
RUNS = 3


def seconds_of(work: Callable[[], Any]) -> float:
    """Median wall seconds after a warm-up."""
    work()
    taken = []
    for _ in range(RUNS):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


def steps_of(size: int) -> dict[str, tuple[Callable[[], Any], float]]:
    """Each step and the multiplications and additions of its matrix products."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = 0.02 * draw(size, size)
    inputs = draw(2 * size, size) @ (torch.eye(size) + 0.5 * draw(size, size) / size**0.5)
    covariance = inputs.T @ inputs / len(inputs)
    pattern, grid = Pattern.parse("2:4"), Grid.of_bits(4)
    order = order_of(covariance.diagonal(), group_size=32, pattern=pattern)
    dense_order = order_of(covariance.diagonal(), group_size=128, pattern=None)
    inverse = inverse_of(covariance[order.inputs][:, order.inputs], damp=0.01)
    dense_inverse = inverse_of(covariance[dense_order.inputs][:, dense_order.inputs], damp=0.01)
    base = rounded_sweep(weight, inverse, order, grid=grid, pattern=pattern)
    rank = size // 10
    left, _ = linalg.best_low_rank(weight - base.value, covariance, rank)
    form = AdapterFormat(0.1, 4, 128, True)
    natural = inverse_of(covariance, damp=0.01)
    # A sweep's products are a triangle of updates; coordinate descent has that, its first gradient and its scales' steps.
    one, cube = size**2 * 2.0 * rank, 2.0 * size**3
    return {
        "invert the covariance (float64)": (lambda: inverse_of(covariance, damp=0.01), cube),
        "GPTQ, 4 bits, groups of 128": (
            lambda: rounded_sweep(weight, dense_inverse, dense_order, grid=grid),
            cube / 2,
        ),
        "SparseGPT, 2:4": (lambda: unrounded_sweep(weight, inverse, order, pattern=pattern), cube / 2),
        "both, groups of 32, scales searched": (
            lambda: rounded_sweep(weight, inverse, order, grid=grid, pattern=pattern),
            cube / 2,
        ),
        "both, scales from the sweep before": (
            lambda: rounded_sweep(weight, inverse, order, grid=grid, pattern=pattern, start=base),
            cube / 2,
        ),
        "base descent, 2:4": (lambda: descend_base(weight, covariance, base, group_size=32, pattern=pattern), 2 * cube),
        f"best product of rank {rank}, cold": (
            lambda: linalg.best_low_rank(weight - base.value, covariance, rank),
            17 * one + cube / 10,
        ),
        f"best product of rank {rank}, warm": (
            lambda: linalg.best_low_rank(weight - base.value, covariance, rank, start=left),
            11 * one + cube / 10,
        ),
        "that, rounded to 4 bits and refitted": (
            lambda: low_rank_part(weight - base.value, covariance, form, start=left, inverse=natural),
            11 * one + 3 * (cube + 6 * one),
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = arguments.size
    matrix = torch.randn(size, size)
    rate = 2.0 * size**3 / seconds_of(lambda: matrix @ matrix)
    steps = steps_of(size)
    rows = []
    for name, (work, operations) in steps.items():
        taken = seconds_of(work)
        rows.append({"step": name, "seconds": taken, "floor": operations / rate, "ratio": taken * rate / operations})
    result = {
        "layer": f"{size} x {size}",
        "machine": f"{platform.machine()}, {arguments.threads} threads, {rate / 1e9:.0f} GFLOP/s in float32",
        "versions": {package: version(package) for package in ("slimlm", "torch")},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"sweep-{size}.json").write_text(json.dumps(result, indent=1) + "\n")
    shown = [(r["step"], f"{r['seconds']:.2f}", f"{r['floor']:.2f}", f"{r['ratio']:.1f}") for r in rows]
    title = f"{result['layer']}, {result['machine']}"
    Console(width=140).print(plain_table(title, ("step", "seconds", "its matrix products alone", "ratio"), shown))
    if arguments.profile:
        profile = cProfile.Profile()
        profile.runcall(steps["both, scales from the sweep before"][0])
        pstats.Stats(profile).sort_stats("tottime").print_stats(12)


if __name__ == "__main__":
    main()
