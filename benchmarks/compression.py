"""Where the time of a compression goes: per layer and per stage, and the arithmetic that each stage cannot do without.

    python benchmarks/compression.py [--recipe slim] [--width 2048] [--blocks 3] [--tokens 4096] [--label after]
    python benchmarks/compression.py --model FOLDER --data TEXT [--recipe slim] [--tokens 16384] [--label after]

Compresses a model and a text that are given, or makes a Llama of random weights (width x 2.75 inside, as TinyLlama) in a
temporary folder and random tokens, with the real `slimlm.compress`, and times the stages of that run, each without the stages
inside it: the sections that slimlm.core.profiling announces. Clocks are the process's CPU time on one thread; other work slows
memory and shared cores, so ratios within one run are what counts.

A stage's floor is the floating-point operations that its algorithm needs (the formulas stand in `FLOORS`; a symmetric product
counts half) at the rate of a matrix product of that dtype, measured in the same process before and after; work on elements,
which has no products, counts the bytes that it has to read and write at the rate of a copy. Writes
benchmarks/results/compression-WIDTH-RECIPE-LABEL.json.
"""

import argparse
import json
import platform
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import slimlm
from slimlm.calibration import capture, measurement
from slimlm.core.parts.pack import Parts
from slimlm.core.profiling import Call, profiling
from slimlm.core.solvers import linalg
from slimlm.core.solvers.low_rank import REFITS, AdapterFormat
from slimlm.core.statistics.base import Batch, Sizes
from slimlm.core.statistics.covariance import Covariance
from slimlm.report.tables import plain_table
from slimlm.runtime.linear import CompressedLinear

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 2048


@dataclass(frozen=True)
class Work:
    """What a call cannot do without."""

    single: float = 0.0
    """operations in float32"""
    double: float = 0.0
    """operations in float64"""
    bytes: float = 0.0
    """bytes read and written"""


def of_statistics(totals: measurement.LayerTotals, batch: Batch) -> Work:
    """Of a symmetric product half is needed; what else is measured passes over the inputs once."""
    count, width = batch.inputs.shape
    out = 0 if batch.output_residuals is None else batch.output_residuals.shape[1]
    sizes = Sizes(out, width, batch.length)
    products = sum(sizes.inputs**2 if own is Covariance else own.operations(sizes) for own in totals.needs)
    return Work(single=float(products) * count, bytes=4.0 * count * width)


def of_inverse(covariance: Tensor, **_: Any) -> Work:
    """A factorization and the inverse of a triangle, n^3 / 3 each."""
    return Work(double=2 / 3 * len(covariance) ** 3)


def of_reference(weight: Tensor, covariance: Tensor, *_: Any) -> Work:
    """A factorization and two triangular solves."""
    return Work(double=len(covariance) ** 3 / 3 + 2.0 * weight.numel() * len(covariance))


def of_sweep(weight: Tensor, *_: Any, **__: Any) -> Work:
    """A triangle of updates; weight, remaining weights, values and errors pass through memory once."""
    return Work(single=weight.numel() * weight.shape[1], bytes=16.0 * weight.numel())


def of_base_descent(weight: Tensor, *_: Any, **__: Any) -> Work:
    """The gradient, and a triangle of updates."""
    return Work(single=3.0 * weight.numel() * weight.shape[1], bytes=16.0 * weight.numel())


def of_adapter_descent(error: Tensor, covariance: Tensor, part: Any) -> Work:
    """R H, L^T E twice, H (L^T E - ...), the triangles of updates and a solve per input."""
    (out, width), rank = error.shape, part.rank
    return Work(single=rank * (2.0 * width**2 + 4.0 * out * width + 2.0 * width**2 + width**2 + out * rank + 4 * width * rank))


def of_low_rank(error: Tensor, input_weights: Tensor, rank: int, *, start: Tensor | None = None) -> Work:
    """What subspace iteration, or the exact eigenproblem where it is used, multiplies; 10 n^3 for an eigenproblem."""
    (out, width), side = error.shape, min(error.shape)
    one, root = 2.0 * out * width * rank, 0.0 if input_weights.ndim == 1 else 2.0 * width**2 * rank
    problem = out if input_weights.ndim == 2 else side
    if problem <= linalg.EXACT_UP_TO or rank > problem // 3:
        square = out * width * problem
        if input_weights.ndim == 2:
            return Work(single=2.0 * out * width**2 + square + one, double=10.0 * problem**3)
        return Work(single=one, double=square + 10.0 * problem**3)
    iterations = linalg.ITERATIONS if start is None else linalg.WARM_ITERATIONS
    products = (1 + 2 * iterations if input_weights.ndim == 1 else 2 * iterations) + 3
    qr = (iterations + 1) * 4.0 * out * rank**2
    return Work(single=products * one + (iterations + 1) * root + qr + 2.0 * out * rank**2, double=10.0 * rank**3)


def of_adapter(error: Tensor, input_weights: Tensor, _: Any, form: AdapterFormat, **__: Any) -> Work:
    """Rounds of R H E^T, which judges one left factor and gives the next, and of the right factor between them; sweeps too."""
    (out, width), rank = error.shape, form.rank_of((error.shape[0], error.shape[1]))
    rounds = 1 + (REFITS if form.refit else 0)
    products = (2 * rounds - 1) * 2.0 * out * width * rank
    if input_weights.ndim == 1:
        return Work(single=products, bytes=rounds * 8.0 * error.numel())
    return Work(single=products + rounds * 3.0 * width**2 * rank)


def of_objective(error: Tensor, input_weights: Tensor) -> Work:
    """E H; under weights of single inputs only sums over elements."""
    return Work(single=2.0 * error.numel() * len(input_weights) if input_weights.ndim == 2 else 0.0)


def of_search(candidates: int) -> Callable[..., Work]:
    """Seven operations for each candidate and point; many points are binned or sorted first, and read once."""

    def work(points: Tensor, *_: Any, coarse: int = 0, **__: Any) -> Work:
        tried = (coarse or 48) + 29 if candidates == 0 else candidates
        return Work(single=0.0 if points.shape[1] > 2048 else 7.0 * tried * points.numel(), bytes=8.0 * points.numel())

    return work


def of_search_scales(weight: Tensor, **_: Any) -> Work:
    """The weight, read to bin it and to fit the scale twice."""
    return Work(bytes=12.0 * weight.numel())


def of_weight(count: float) -> Callable[..., Work]:
    """Something that passes over a weight so many times, in bytes per element."""

    def work(first: Any, *others: Any, **_: Any) -> Work:
        for thing in (first, *others):
            if isinstance(thing, Tensor):
                return Work(bytes=count * thing.numel())
            if isinstance(thing, Parts):
                return Work(bytes=count * thing.shape[0] * thing.shape[1])
            if isinstance(thing, CompressedLinear):
                return Work(bytes=count * thing.out_features * thing.in_features)
        return Work()

    return work


def of_forward(block_run: capture.BlockRun, _: int, hidden: Tensor) -> Work:
    """Every layer's product and the attention, of a whole pass: one that ends early, or replays what was kept, takes less."""
    windows, length, width = hidden.shape
    tokens = windows * length
    weights = sum(
        m.out_features * m.in_features for m in block_run.block.modules() if isinstance(m, torch.nn.Linear | CompressedLinear)
    )
    return Work(single=2.0 * tokens * weights + 2.0 * tokens * length * width)


FLOORS: dict[tuple[str, str], Callable[..., Work]] = {
    ("calibration forward", "forward"): of_forward,
    ("statistics", "include"): of_statistics,
    ("inverse", "inverse_of"): of_inverse,
    ("reference", "_reference"): of_reference,
    ("scale search", "best_scale"): of_search(0),
    ("scale search", "nearby_scale"): of_search(9),
    ("scale search", "signed_scale"): of_search(2),
    ("scale search", "search_scales"): of_search_scales,
    ("encode", "encode"): of_weight(9.0),
    ("mask", "choose"): of_weight(5.0),
    ("sweep", "sweep"): of_sweep,
    ("base descent", "descend_base"): of_base_descent,
    ("adapter descent", "descend_adapter"): of_adapter_descent,
    ("low-rank solve", "best_low_rank"): of_low_rank,
    ("adapter rounding", "_rounded"): of_adapter,
    ("adapter rounding", "_swept"): of_adapter,
    ("objective", "weighted_square"): of_objective,
    ("objective", "gradient_of"): of_objective,
    ("packing", "from_parts"): of_weight(5.0),
    ("unpacking", "prepare"): of_weight(5.0),
}
"""By section and function what its calls cannot do without; of the others no floor is claimed."""
INSIDE_ONE = {"adapter rounding"}
"""Sections that also own the sweeps and objectives inside them."""


class Clock:
    """CPU seconds and floors by section: a profiler (slimlm.core.profiling)."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.work: dict[str, list[Work]] = defaultdict(list)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[str] = []
        self._since = time.process_time()

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1] if self._open else "the rest"] += now - self._since
        self._since = now

    def start(self) -> None:
        self._since = time.process_time()

    def stop(self) -> None:
        self._switch()

    def begin(self, call: Call) -> None:
        """The time until now belongs to the section outside; what follows to this one."""
        owner = next((section for section in self._open if section in INSIDE_ONE), None)
        owned = owner is not None and call.section in ("sweep", "objective")
        self._switch()
        self._open.append(str(owner) if owned else call.section)
        floor = FLOORS.get((call.section, call.function))
        if floor is not None and not owned:
            self.work[call.section].append(floor(*call.arguments, **call.keywords))
        self.calls[call.section] += 1

    def end(self) -> None:
        """The time since then belongs to the section that ends."""
        self._switch()
        self._open.pop()


def rate_of(dtype: torch.dtype, size: int = 2048) -> float:
    """Operations per CPU second of a matrix product, the best of three."""
    matrix = torch.randn(size, size, dtype=dtype)
    taken = []
    for _ in range(4):
        began = time.process_time()
        matrix @ matrix
        taken.append(time.process_time() - began)
    return 2.0 * size**3 / min(taken[1:])


def copy_rate() -> float:
    """Bytes read and written per CPU second by a copy that fits no cache."""
    source = torch.ones(2**26)
    target = torch.empty_like(source)
    taken = []
    for _ in range(4):
        began = time.process_time()
        target.copy_(source)
        taken.append(time.process_time() - began)
    return 8.0 * source.numel() / min(taken[1:])


def make_model(folder: Path, *, width: int, blocks: int) -> int:
    """Write a Llama of random weights with a tokenizer of whole words; returns its number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def make_text(path: Path, tokens: int) -> None:
    """Random words, the next one near the last, so that inputs correlate."""
    generator = torch.Generator().manual_seed(1)
    steps = torch.randint(-40, 41, (tokens,), generator=generator).cumsum(0) % VOCABULARY
    path.write_text(" ".join(f"w{i}" for i in steps.tolist()))


def given_or_made(arguments: argparse.Namespace, folder: Path) -> tuple[Path, Path, str]:
    """The model and the text that were named, or random ones; and what they are."""
    if arguments.model is not None:
        return arguments.model, arguments.data, arguments.model.name
    parameters = make_model(folder / "model", width=arguments.width, blocks=arguments.blocks)
    make_text(folder / "text.txt", 2 * arguments.tokens)
    about = f"random Llama, {parameters / 1e6:.0f} M parameters, {arguments.blocks} blocks of width {arguments.width}"
    return folder / "model", folder / "text.txt", about


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """One compression, watched."""
    rates = [(rate_of(torch.float32), rate_of(torch.float64), copy_rate())]
    clock = Clock()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model, text, about = given_or_made(arguments, folder)
        with profiling(clock):
            clock.start()
            result = slimlm.compress(
                model,
                folder / "out",
                recipe=arguments.recipe,
                data=str(text),
                samples=arguments.tokens // 512,
                length=512,
                device="cpu",
            )
            clock.stop()
    rates.append((rate_of(torch.float32), rate_of(torch.float64), copy_rate()))
    single, double, copied = (max(pair) for pair in zip(*rates, strict=True))
    rows = []
    for stage, seconds in sorted(clock.seconds.items(), key=lambda entry: -entry[1]):
        floor = sum(w.single / single + w.double / double + w.bytes / copied for w in clock.work[stage])
        rows.append({"stage": stage, "calls": clock.calls[stage], "seconds": seconds, "floor": floor})
    return {
        "command": f"benchmarks/compression.py {shlex.join(sys.argv[1:])}",
        "model": about,
        "machine": f"{platform.machine()}, 1 thread, CPU time; products {single / 1e9:.0f} GFLOP/s in float32, "
        f"{double / 1e9:.0f} in float64, copies {copied / 1e9:.0f} GB/s",
        "rates": rates,
        "versions": {package: version(package) for package in ("slimlm", "torch")},
        "seconds": sum(clock.seconds.values()),
        "seconds_per_layer": sum(clock.seconds.values()) / len(result.record.layers),
        "errors": {layer.name: layer.error for layer in result.record.layers},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="slim")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--label", default="after")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if (arguments.model is None) != (arguments.data is None):
        parser.error("--model and --data go together")
    result = run(arguments)
    RESULTS.mkdir(exist_ok=True)
    which = arguments.width if arguments.model is None else arguments.model.name
    name = f"compression-{which}-{Path(arguments.recipe).stem}-{arguments.label}.json"
    (RESULTS / name).write_text(json.dumps(result, indent=1) + "\n")
    shown = [
        (
            r["stage"],
            str(r["calls"]),
            f"{r['seconds']:.2f}",
            *((f"{r['floor']:.2f}", f"{r['seconds'] / r['floor']:.1f}") if r["floor"] else ("", "")),
        )
        for r in result["rows"]
    ]
    title = f"{arguments.recipe}: {result['model']}; {result['seconds']:.1f} s; {result['machine']}"
    Console(width=140).print(plain_table(title, ("stage", "calls", "seconds", "floor", "ratio"), shown))


if __name__ == "__main__":
    main()
