"""How fast one product x W^T is: slimlm's kernels compared with torch, ONNX Runtime and llama.cpp's ggml, on this processor.

    python benchmarks/kernel_speed.py                        # three shapes, four batches, one and two threads: twenty minutes
    python benchmarks/kernel_speed.py --quick                # one small shape, a minute
    python benchmarks/kernel_speed.py --threads 1 --only 'torch float32' 'slimlm*'
    python benchmarks/kernel_speed.py --markdown             # the tables for docs/, from the results alone

How it is measured stands at the head of slimlm/bench/layer_speed.py: weights that no cache holds, contenders in turn in random
order, medians; CPU time with one thread, wall time with more. Every row has the load average and the share of the
processor that other programs took; figures of several threads taken on a busy machine say little. The error is the
largest difference to a float64 product by the weight that a contender stands for, over the largest output: of the
arithmetic, not of the rounding to 4 bits. Rows are kept with the run that they came from, so a long run can be done in
pieces.

A competitor that is not installed, or takes no such shape, is named with the reason: in the results, and at the end.
(This file is not called kernels.py, because transformers would import it in place of the package of that name.)
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from competitors import COMPETITORS, Entry, MissingError, entry, random_weight
from random_checkpoint import Kind
from results_file import Data, Results, slug, this_run
from slimlm.bench import layer_speed
from slimlm.bench.layer_speed import Call, Contender, Effort
from slimlm.kernels import native, processor
from slimlm.report.tables import plain_table
from slimlm.runtime.backends import Stored, cpu
from slimlm.runtime.cpu.bindings import PackedProducts, Precision

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES, QUICK_SHAPES = [(4096, 4096), (4096, 11008), (768, 3072)], [(768, 3072)]
BATCHES, QUICK_BATCHES = [1, 4, 16, 128], [1, 16]
BASELINE = "torch float32"
ERROR_BATCH = 4
KINDS = {
    "dense g128": Kind(128, sparse=False),
    "dense g32": Kind(32, sparse=False),
    "2:4 one scale": Kind("per-tensor"),
    "2:4 one scale, codebook": Kind("per-tensor", table=True),
    "2:4 g32": Kind(32),
    "2:4 g32, codebook": Kind(32, table=True),
    "2:4 one scale + adapter": Kind("per-tensor", rank=0.1),
    "2:4 one scale, codebook + adapter": Kind("per-tensor", table=True, rank=0.1),
    "2:4 g32 + adapter": Kind(32, rank=0.1),
    "2:4 g32, codebook + adapter": Kind(32, table=True, rank=0.1),
}
"""slimlm's layers: 4 bits; adapters of rank 0.1 x the smaller side, 4 bits in groups of 128."""


# Contenders


def torch_dense(shape: tuple[int, int], effort: Effort) -> list[Entry]:
    """torch's own products, by float32 and by bfloat16."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = random_weight(shape).to(dtype)
        copies = [weight.clone() for _ in range(effort.copies(weight.nbytes))]
        contender = layer_speed.dense(f"torch {str(dtype).removeprefix('torch.')}", copies)
        found.append(entry(contender, shape, weight.float))
    return found


def slimlm_packed(shape: tuple[int, int], effort: Effort, only: Sequence[str]) -> list[Entry]:
    """slimlm's kernels by the kinds of layers asked for, with 8-bit (fast) and 16-bit (precise) activations."""
    if native.library() is None:
        raise MissingError(f"there are no CPU kernels: {native.status().reason}")
    found, generator = [], torch.Generator().manual_seed(0)
    for name, kind in KINDS.items():
        if not any(_wanted(f"slimlm {name}, {precision}", only) for precision in ("fast", "precise")):
            continue
        parts = kind.parts(shape, generator)
        tensors = parts.tensors()
        blob = cpu.pack(Stored(shape, parts.describe(), tensors, None))
        copies = [PackedProducts([blob.clone()], [None], [shape[0]], shape[1]) for _ in range(effort.copies(blob.numel()))]
        bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / (shape[0] * shape[1])
        for precision in ("fast", "precise"):
            contender = Contender(f"slimlm {name}, {precision}", blob.numel(), partial(_packed_calls, copies, precision))
            found.append(Entry(contender, bits, parts.dense))
    return found


def _packed_calls(copies: Sequence[PackedProducts], precision: Precision, x: Tensor) -> list[Call]:
    def call(packed: PackedProducts) -> Tensor:
        return packed(x, precision)[0]

    return [partial(call, packed) for packed in copies]


def _wanted(name: str, only: Sequence[str]) -> bool:
    return name == BASELINE or any(fnmatchcase(name, pattern) for pattern in only)


def makers(shape: tuple[int, int], threads: int, effort: Effort, only: Sequence[str]) -> dict[str, Callable[[], list[Entry]]]:
    """Who is to be measured, by name; each gives its entries or raises MissingError."""
    own: dict[str, Callable[[], list[Entry]]] = {
        "torch": partial(torch_dense, shape, effort),
        "slimlm": partial(slimlm_packed, shape, effort, only),
    }
    return own | {name: partial(make, shape, threads, effort) for name, make in COMPETITORS.items()}


def entries_of(shape: tuple[int, int], threads: int, effort: Effort, only: Sequence[str]) -> tuple[list[Entry], dict[str, str]]:
    """Everybody whose name fits a pattern, the baseline always; and who is missing, and why."""
    found, missing = [], {}
    for name, make in makers(shape, threads, effort, only).items():
        try:
            found += make()
        except MissingError as reason:
            missing[name] = str(reason)
    return [e for e in found if _wanted(e.contender.name, only)], missing


# Measuring


def error_of(entry: Entry, x: Tensor) -> float:
    """Largest difference to the float64 product over its largest magnitude, for x `[batch, in]`."""
    exact = x.double() @ entry.weight().double().T
    call = entry.contender.calls(x)[0]
    with torch.inference_mode():
        found = entry.contender.output(call())
    return float((found.double() - exact).abs().max() / exact.abs().max())


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: Sequence[tuple[int, int]]
    batches: Sequence[int]
    threads: Sequence[int]
    only: Sequence[str]
    effort: Effort


def rows_of(plan: Plan, results: Results) -> Iterator[Data]:
    """Measure row by row; who is missing goes into the results."""
    errors: dict[tuple[Any, ...], float] = {}
    for threads in plan.threads:
        with layer_speed.at_threads(threads):
            bandwidth = layer_speed.read_bandwidth(threads)
            for shape in plan.shapes:
                entries, missing = entries_of(shape, threads, plan.effort, plan.only)
                results.missing |= missing
                probe = random_input(ERROR_BATCH, shape)
                for e in entries:
                    key = (shape, e.contender.name)
                    errors[key] = errors[key] if key in errors else error_of(e, probe)
                for batch in plan.batches:
                    yield from _rows(entries, shape, batch, threads, bandwidth, errors, plan.effort)
                del entries


def _rows(
    entries: Sequence[Entry],
    shape: tuple[int, int],
    batch: int,
    threads: int,
    bandwidth: float,
    errors: dict[tuple[Any, ...], float],
    effort: Effort,
) -> Iterator[Data]:
    race = layer_speed.race([e.contender for e in entries], random_input(batch, shape), threads=threads, effort=effort)
    timings = race.timings
    for e in entries:
        name, timing = e.contender.name, timings[e.contender.name]
        moved = e.contender.bytes + 4 * batch * sum(shape)
        yield {
            "shape": list(shape),
            "batch": batch,
            "threads": threads,
            "contender": name,
            "seconds": timing.seconds,
            "seconds_p20": timing.fast,
            "rounds": timing.rounds,
            "ratio": timings[BASELINE].seconds / timing.seconds,
            "ratio_p20": timings[BASELINE].fast / timing.fast,
            "bits_per_weight": e.bits_per_weight,
            "bytes_moved": moved,
            "bytes_per_second": moved / timing.seconds,
            "read_bandwidth": bandwidth,
            "error": errors[shape, name],
            "load_average": race.load,
            "elsewhere": race.elsewhere,
        }


def random_input(batch: int, shape: tuple[int, int]) -> Tensor:
    """x `[batch, in]`."""
    return torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(1))


# What is shown


def table(rows: Sequence[Data], shape: Sequence[int], threads: int) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """Title, columns and a row per contender: milliseconds and, in brackets, times as fast as torch float32."""
    own = [row for row in rows if row["shape"] == list(shape) and row["threads"] == threads]
    batches = sorted({row["batch"] for row in own})
    loads = [row["load_average"] for row in own if row["load_average"] is not None]
    others = [row["elsewhere"] for row in own if row["elsewhere"] is not None]
    load = f"; load average {min(loads):.1f} to {max(loads):.1f}" if loads else ""
    load += f", others took {min(others):.0%} to {max(others):.0%} of the processor" if others else ""
    bandwidth = own[0]["read_bandwidth"] / 1e9
    clock = "one thread, CPU time" if threads == 1 else f"{threads} threads, wall time"
    title = f"{shape[0]} x {shape[1]}, {clock}{load}; torch reads {bandwidth:.1f} GB/s"
    lines = []
    for name in dict.fromkeys(row["contender"] for row in own):
        by_batch = {row["batch"]: row for row in own if row["contender"] == name}
        some = next(iter(by_batch.values()))
        cells = [f"{by_batch[b]['seconds'] * 1e3:.3g} ({by_batch[b]['ratio']:.2f})" if b in by_batch else "" for b in batches]
        rate = f"{by_batch[batches[0]]['bytes_per_second'] / 1e9:.1f}" if batches[0] in by_batch else ""
        lines.append((name, f"{some['bits_per_weight']:.2f}", *cells, rate, f"{some['error']:.1e}"))
    columns = ("", "bits/weight", *(f"batch {b}, ms" for b in batches), f"GB/s at {batches[0]}", "error")
    return title, columns, lines


def tables(results: Data) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """One for each shape and number of threads that was measured."""
    there = dict.fromkeys((tuple(row["shape"]), row["threads"]) for row in results["rows"])
    return [table(results["rows"], shape, threads) for shape, threads in there]


COMPARED = [
    ("slimlm 2:4 one scale + adapter, fast", "torch float32"),
    ("slimlm 2:4 one scale + adapter, fast", "ONNX Runtime"),
    ("slimlm 2:4 one scale + adapter, fast", "ggml Q4"),
    ("slimlm dense g128, fast", "ONNX Runtime"),
    ("slimlm dense g128, fast", "ggml Q4"),
    ("slimlm 2:4 one scale, fast", "slimlm dense g128, fast"),
    ("slimlm 2:4 one scale + adapter, fast", "slimlm dense g128, fast"),
    ("slimlm 2:4 g32, codebook + adapter, fast", "torch float32"),
    ("slimlm 2:4 g32, codebook + adapter, fast", "ggml Q4"),
]
"""Contenders, and those that they are set against: the fastest of all whose names begin so."""


def ratios(results: Data) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]] | None:
    """Title, columns, rows: how many times as fast ours are, by shape, threads and batch; None without a comparison."""
    rows, lines = results["rows"], []
    for shape, threads, batch in sorted({(tuple(r["shape"]), r["threads"], r["batch"]) for r in rows}):
        own = [r for r in rows if (tuple(r["shape"]), r["threads"], r["batch"]) == (shape, threads, batch)]
        cells = []
        for ours, theirs in COMPARED:
            time = [r["seconds"] for r in own if r["contender"] == ours]
            times = [r["seconds"] for r in own if r["contender"].startswith(theirs)]
            cells.append(f"{min(times) / time[0]:.2f}" if time and times else "")
        if any(cells):
            lines.append((f"{shape[0]} x {shape[1]}", str(threads), str(batch), *cells))
    columns = ("shape", "threads", "batch", *(f"{ours.removeprefix('slimlm ')} / {theirs}" for ours, theirs in COMPARED))
    return ("Times as fast", columns, lines) if lines else None


def markdown(results: Data) -> str:
    """The tables as docs/ shows them, how they compare, and who is missing."""
    pieces, compared = [], ratios(results)
    for title, columns, lines in [*tables(results), *([compared] if compared else [])]:
        rule = ["---", *["---:"] * (len(columns) - 1)]
        pieces.append("\n".join([f"{title}\n", *("| " + " | ".join(row) + " |" for row in (columns, rule, *lines))]))
    return "\n\n".join([*pieces, *missing_words(results)])


def missing_words(results: Data) -> list[str]:
    """A line for each competitor that was not measured."""
    return [f"not measured: {name}: {reason}" for name, reason in results["missing"].items()]


PICTURED = {
    "torch bfloat16": ("0.6", "o"),
    "torch int4 g128, bfloat16 activations": ("tab:brown", "o"),
    "ONNX Runtime MatMulNBits b128": ("tab:green", "s"),
    "ggml Q4_0, repacked": ("tab:olive", "^"),
    "ggml Q4_K, repacked": ("tab:cyan", "^"),
    "slimlm dense g128, fast": ("tab:blue", "D"),
    "slimlm dense g128, precise": ("tab:purple", "D"),
    "slimlm 2:4 one scale, fast": ("tab:orange", "*"),
    "slimlm 2:4 g32 + adapter, fast": ("tab:red", "*"),
    "slimlm 2:4 g32 + adapter, precise": ("tab:pink", "*"),
}
"""Colour and marker of those in the picture; all are in the tables."""


def picture(results: Data, path: Path) -> str | None:
    """Times as fast as torch float32 by batch, a panel for each shape and number of threads; why there is none, or None."""
    try:
        import matplotlib
    except ImportError:
        return "no picture: matplotlib is missing (python -m pip install '.[benchmark]')"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = results["rows"]
    shapes, threads = list(dict.fromkeys(tuple(r["shape"]) for r in rows)), sorted({r["threads"] for r in rows})
    batches = sorted({row["batch"] for row in rows})
    size = (max(10, 5 * len(shapes)), 4 * len(threads) + 1.2)
    figure, panels = pyplot.subplots(len(threads), len(shapes), figsize=size, dpi=110, squeeze=False, sharey="row")
    for panel, (count, shape) in zip(panels.flat, [(t, s) for t in threads for s in shapes], strict=True):
        for name, (colour, marker) in PICTURED.items():
            own = [r for r in rows if (tuple(r["shape"]), r["threads"], r["contender"]) == (shape, count, name)]
            own.sort(key=lambda row: row["batch"])
            points = [row["batch"] for row in own], [row["ratio"] for row in own]
            if own:
                panel.plot(*points, color=colour, marker=marker, linewidth=1, label=name)
        panel.axhline(1, color="black", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
        panel.set_title(f"{shape[0]} x {shape[1]}, {'one thread' if count == 1 else f'{count} threads'}", fontsize=10)
        panel.grid(alpha=0.2)
        panel.set_xlabel("batch")
    for row in panels:
        row[0].set_ylabel("times as fast as torch float32")
    handles = {label: handle for p in panels.flat for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncol=3, fontsize=8)
    figure.tight_layout(rect=(0, 1.2 / size[1], 1, 1))
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
    return None


# The command line


def shape_of(text: str) -> tuple[int, int]:
    """OUTxIN."""
    out, _, width = text.partition("x")
    if not (out.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text}: a shape is OUTxIN, such as 4096x11008")
    return int(out), int(width)


def read_line(line: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="OUTxIN")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="contenders, such as 'slimlm*fast'")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--rotated-mb", type=int, default=None, help="weights that each contender goes through, in MB")
    parser.add_argument(
        "--disturbed", type=float, default=0.08, help="with several threads, repeat rounds in which others take more"
    )
    parser.add_argument("--quick", action="store_true", help="one small shape, few rounds; a file of its own")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--markdown", action="store_true", help="print the results as markdown and measure nothing")
    return parser.parse_args(line)


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the command line asks for."""
    effort = layer_speed.QUICK if arguments.quick else Effort()
    effort = Effort(
        arguments.rounds or effort.rounds,
        effort.burst,
        effort.rotated if arguments.rotated_mb is None else arguments.rotated_mb * 1_000_000,
        effort.pause,
        arguments.disturbed,
    )
    shapes = arguments.shapes or (QUICK_SHAPES if arguments.quick else SHAPES)
    batches = arguments.batches or (QUICK_BATCHES if arguments.quick else BATCHES)
    return Plan(shapes, batches, arguments.threads, arguments.only, effort)


def main() -> None:
    arguments = read_line()
    path = arguments.results / f"kernels-{slug(processor.name())}{'-quick' if arguments.quick else ''}.json"
    if arguments.markdown:
        print(markdown(json.loads(path.read_text(encoding="utf-8"))))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    run = this_run("kernel_speed.py", "onnxruntime", "llama-cpp-python", "gguf")
    results = Results(path, ("shape", "batch", "threads", "contender"), run)
    results.missing = {}
    for row in rows_of(plan_of(arguments), results):
        results.add(row)
        results.write()
        print(json.dumps(row), file=sys.stderr, flush=True)
    found, console = results.to_dict(), Console(width=160)
    for title, columns, lines in tables(found):
        console.print(plain_table(title, columns, lines), "")
    for words in [*missing_words(found), picture(found, path.with_suffix(".png"))]:
        if words is not None:
            console.print(words, markup=False, highlight=False)


if __name__ == "__main__":
    main()
