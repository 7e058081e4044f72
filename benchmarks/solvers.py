"""The steps of a recipe on real layers, in C++ and as written with torch: seconds by section, and how much the outputs err.

    python benchmarks/solvers.py MODEL --data TEXT [--blocks 0 15] [--samples 32] [--length 512]

MODEL is a Llama-like folder. The covariances of the inputs are measured in the original model; then a recipe's step is
applied to every layer of the blocks twice, without the library's loops and with them. Clocks are the process's CPU time on one
thread. The reference is the original weight: statistics that compare with the original model are left out. Writes
benchmarks/results/solvers.json.
"""

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from results_file import this_run
from slimlm.calibration.samples import Calibration, draw_samples
from slimlm.core.layer import Layer
from slimlm.core.output_error import relative_output_error
from slimlm.core.profiling import Call, profiling
from slimlm.core.statistics.base import Stats
from slimlm.core.statistics.covariance import Covariance
from slimlm.events import silent
from slimlm.kernels import compression
from slimlm.models.lazy import open_lazy
from slimlm.models.structure import blocks_of, linears_of
from slimlm.recipe import apply_steps, recipe_from_dict

RESULTS = Path(__file__).parent / "results"
DENSE: dict[str, Any] = {"joint": "alternation", "group_size": 64, "pattern": "", "rank": 0.0, "asymmetric": 0.0}
GPTQ: dict[str, Any] = {"quantize": "gptq", "group_size": 64}
FORMS: dict[str, dict[str, Any]] = {
    "best": {**DENSE, "bits": 4},
    "best, zeros": {**DENSE, "bits": 4, "zero": True},
    "best, 3 bits": {**DENSE, "bits": 3},
    "best, 3 bits, zeros": {**DENSE, "bits": 3, "zero": True},
    "best-24": {"joint": "alternation", "asymmetric": 0.0},
    "gptq, groups of 64": GPTQ,
    "gptq, zeros": {**GPTQ, "zero": True},
    "gptq, zeros, act-order": {**GPTQ, "zero": True, "order": "activation"},
}
"""The steps of recipes, and near them: zeros beside codebooks, and orders of the inputs."""


class Clock:
    """CPU seconds of each section, without those inside it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[tuple[str, float, list[float]]] = []

    def begin(self, call: Call) -> None:
        self._open.append((call.section, time.process_time(), [0.0]))

    def end(self) -> None:
        section, began, (inside,) = self._open.pop()
        whole = time.process_time() - began
        self.seconds[section] += whole - inside
        if self._open:
            self._open[-1][2][0] += whole


def measured(model: nn.Module, samples: Tensor, numbers: list[int]) -> dict[str, tuple[Tensor, Stats]]:
    """The weight and the statistics of the inputs of every layer of some blocks, by full name."""
    blocks = {name: block for i, (name, block) in enumerate(blocks_of(model).items()) if i in numbers}
    linears = {f"{name}.{layer}": linear for name, block in blocks.items() for layer, linear in linears_of(block).items()}
    totals: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        totals[name] = totals.get(name, 0) + rows.T @ rows

    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
    with torch.no_grad():
        for batch in samples.split(4):
            model(batch, use_cache=False)
    count = samples.numel()
    found: dict[str, tuple[Tensor, Stats]] = {}
    for name, linear in linears.items():
        same = [stats for _, stats in found.values() if torch.equal(stats[Covariance], totals[name] / count)]
        stats = same[0] if same else Stats(count, {Covariance: totals[name] / count})
        found[name] = linear.weight.detach().clone(), stats
    return found


def timed(form: str, layers: dict[str, tuple[Tensor, Stats]]) -> dict[str, Any]:
    """Bits per weight, CPU seconds by section, and the geometric mean of the layers' relative output errors."""
    clock, logs, bits = Clock(), [], 0
    steps = recipe_from_dict({"name": form, "steps": [FORMS[form]]}, source="benchmarks/solvers.py").steps
    began = time.process_time()
    with profiling(clock):
        for name, (weight, stats) in layers.items():
            made = apply_steps(steps, Layer.of(name, weight, torch.float16), stats).parts()
            bits += made.storage_bits()
            logs.append(math.log(relative_output_error(weight, made.dense(), stats)))
    everything = time.process_time() - began
    per_weight = bits / sum(weight.numel() for weight, _ in layers.values())
    sections = {section: round(seconds, 3) for section, seconds in clock.seconds.most_common()}
    return {
        "bits": round(per_weight, 4),
        "seconds": round(everything, 3),
        "error": math.exp(sum(logs) / len(logs)),
        "sections": sections,
    }


def with_torch(form: str, layers: dict[str, tuple[Tensor, Stats]]) -> dict[str, Any]:
    """The same without the library's loops."""
    with patch.object(compression, "available", lambda: False):
        return timed(form, layers)


def fresh(layers: dict[str, tuple[Tensor, Stats]]) -> dict[str, tuple[Tensor, Stats]]:
    """The same with empty caches, which layers of the same inputs share."""
    new = {id(stats): Stats(stats.tokens, dict(stats.values)) for _, stats in layers.values()}
    return {name: (weight, new[id(stats)]) for name, (weight, stats) in layers.items()}


def main() -> None:
    """Measure, print and write."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model", type=Path)
    asked.add_argument("--data", required=True)
    asked.add_argument("--blocks", type=int, nargs="+", default=[0, 15])
    asked.add_argument("--samples", type=int, default=32)
    asked.add_argument("--length", type=int, default=512)
    given = asked.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        lazy = open_lazy(str(given.model), Path(scratch), silent)
        samples = draw_samples(lazy, Calibration(given.data, given.samples, given.length), silent).samples
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    layers = measured(model, samples, given.blocks)
    rows = {}
    for form in FORMS:
        rows[form] = {"torch": with_torch(form, fresh(layers)), "library": timed(form, fresh(layers))}
        print(form, json.dumps(rows[form]))
    about = {**this_run("solvers.py"), "layers": len(layers), "form": FORMS, "rows": rows}
    asked_for = f"--blocks {' '.join(map(str, given.blocks))} --samples {given.samples} --length {given.length}"
    about["command"] = f"python benchmarks/solvers.py MODEL --data {Path(given.data).name} {asked_for}"
    (RESULTS / "solvers.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
