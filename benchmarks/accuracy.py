"""One table and one picture per model: what every recipe costs in bits and in perplexity.

    python benchmarks/accuracy.py MODEL --data CALIBRATION --text EVALUATION      # the table
    python benchmarks/accuracy.py MODEL --data ... --text ... --ablation          # what each ingredient of `best-24` brings
    python benchmarks/accuracy.py --made                                          # a tiny random model on its own text
    python benchmarks/accuracy.py MODEL --markdown                                # tables for docs/, from the results alone

Measured are the shipped recipes, baselines at other bits and groups (written here as recipes), and `slimlm compress --bits`
at each budget. Every compression is a process of its own, as a user would start it, so that its time and peak memory are
its own; both include starting Python and verifying the result. All else is measured here, in float32:

perplexity    on windows of the model's context over the whole text (and over its first 100,000 tokens, which is what
              published figures often cover); the median of the seeds, and the least and the largest
layer error   ||(W - W') x||^2 / ||W x||^2, mean over layers; x are the inputs in the dense model, on held-out windows
drift         ||y - y'||^2 / ||W x||^2, mean over layers; y' is the output in the compressed model on its own inputs, so
              that the errors of earlier layers count
bits          of the linear layers in the blocks: everything stored for them over their weights

The results file is written after every row and keeps those that are not measured again, so a long run can be done in
pieces (--only, --seeds, --missing). A compression that fails is reported and does not end the run.
"""

import argparse
import hashlib
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import slimlm
from slimlm.calibration.capture import BlockInputs, BlockRun, enter, run
from slimlm.calibration.measurement import measure
from slimlm.core.solvers.linalg import weighted_square
from slimlm.core.statistics.covariance import Covariance
from slimlm.data.windows import sample_from_model, tokens_of, windows_of
from slimlm.evaluation.compare import OpenModel, open_any
from slimlm.evaluation.perplexity import perplexity
from slimlm.models.structure import blocks_of, context_length, linears_of, weight_of
from slimlm.recipe import Recipe, open_recipe, recipe_from_dict, shipped, to_toml
from slimlm.report.tables import plain_table
from slimlm.runtime.linear import CompressedLinear

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIRST = 100_000
PROBES = 32
"""Windows of the evaluation text on which layers are compared."""
TOKENS_AT_ONCE = 2048
MADE_WINDOWS, MADE_SEED = 128, 10_000
"""The text of the made model; the seed is none that calibration would use."""

Data = dict[str, Any]


# What is measured


@dataclass(frozen=True)
class Entry:
    """One line of the table, before it is measured."""

    name: str
    kind: str
    """"ours", "baseline", "budget" or "ablation" """
    recipe: Recipe | None = None
    bits: float | None = None
    """the budget, where there is no recipe"""

    def options(self, folder: Path) -> list[str]:
        """What the command line says; a recipe is written out in full, to a file in `folder`."""
        if self.recipe is None:
            return ["--bits", str(self.bits)]
        path = folder / "recipe.toml"
        path.write_text(to_toml(self.recipe), encoding="utf-8")
        return ["--recipe", str(path)]

    @property
    def family(self) -> str:
        """What its bits are spent on."""
        if self.recipe is None:
            return "budget"
        steps = [named.step for named in self.recipe.steps]
        sparse = any(getattr(step, "pattern", "") != "" for step in steps)
        adapted = any(getattr(step, "rank", 0.0) != 0.0 for step in steps)
        return ("2:4" if sparse else "dense") + (" + low rank" if adapted else "")

    def seeds(self, seeds: Sequence[int]) -> Sequence[int]:
        """Of these the ones that make a difference: one is enough where the calibration text is not read."""
        blind = self.recipe is not None and not self.recipe.needs and self.recipe.block_reconstruction is None
        return seeds[:1] if blind else seeds


def table_entries(budgets: Sequence[float]) -> list[Entry]:
    """The shipped recipes, the baselines at other bits that none of them is, and the budgets."""
    known = {name: open_recipe(name) for name in shipped()}
    entries = [Entry(name, "ours" if name.startswith("best-24") else "baseline", recipe) for name, recipe in known.items()]
    taken = [recipe.steps for recipe in known.values() if not recipe.sequential and recipe.block_reconstruction is None]
    variants = {name: recipe_of(name, steps) for name, steps in baselines().items()}
    entries += [Entry(name, "baseline", recipe) for name, recipe in variants.items() if recipe.steps not in taken]
    return entries + [Entry(f"budget-{bits:g}", "budget", bits=bits) for bits in budgets]


def baselines() -> dict[str, list[Data]]:
    """Steps of the baselines by name: METHOD-BITS-GROUP."""
    found: dict[str, list[Data]] = {}
    for method in ("absmax", "gptq"):
        for bits in (2, 3, 4, 5):
            for group_size, called in ((32, "32"), (128, "128"), ("per-channel", "row")):
                found[f"{method}-{bits}-{called}"] = [{"quantize": method, "bits": bits, "group_size": group_size}]
    for bits in (2, 3, 4):
        rounded = {"quantize": "gptq", "bits": bits, "group_size": 128}
        found[f"gptq-{bits}-128+qera"] = [rounded, {"compensate": "qera", "rank": 0.1, "bits": 4}]
    joint = next(named.to_dict() for named in open_recipe("sparsegpt-gptq").steps)
    for bits in (3, 4):
        for group_size in (32, 128):
            found[f"sparsegpt-gptq-{bits}-{group_size}"] = [{**joint, "bits": bits, "group_size": group_size}]
            rounded = {"quantize": "gptq", "bits": bits, "group_size": group_size}
            found[f"wanda-gptq-{bits}-{group_size}"] = [{"prune": "wanda", "pattern": "2:4"}, rounded]
    return found


def ablation_entries() -> list[Entry]:
    """From SLiM as printed to `best-24` and beyond, one ingredient switched on at a time."""
    best = open_recipe("best-24").to_dict()
    [joint] = [step for step in best["steps"] if "joint" in step]
    group_size, rank = joint["group_size"], joint["rank"]
    paper = [named.to_dict() for named in open_recipe("slim-paper").steps]
    groups: list[Data] = [{"quantize": "slim_quant", "group_size": group_size}, {"prune": "wanda", "pattern": "2:4"}]
    off = {**joint, "rounds": 1, "descent_rounds": 0, "asymmetric": 0.0, "codebook": "none", "adapter_bits": 16}
    matched = open_recipe("best-24-matched").to_dict() if "best-24-matched" in shipped() else {}
    rungs: list[tuple[str, list[Data], Data]] = [
        ("slim-paper", paper, {}),
        (f"groups-of-{group_size}", [*groups, {"compensate": "slim_lora", "rank": rank, "bits": 16}], {}),
        ("full-covariance", [*groups, {"compensate": "qera", "rank": rank, "bits": 16}], {}),
        ("sweep", [off], {}),
    ]
    for name, options in [
        ("rounds-4", {"rounds": 4}),
        ("rounds-16", {"rounds": 16}),
        ("fitted-codebooks", {"codebook": joint["codebook"]}),
        ("coordinate-descent", {"descent_rounds": joint["descent_rounds"]}),
        ("asymmetric", {"asymmetric": joint["asymmetric"]}),
    ]:
        off = {**off, **options}
        rungs.append((name, [off], {}))
    rungs.append(("sequential", [off], {"sequential": True}))
    rungs.append(("4-bit-adapters", [{**off, "adapter_bits": 4}], {"sequential": True}))
    rungs.append(
        (
            "block-reconstruction",
            [{**off, "adapter_bits": 4}],
            {"sequential": True, "block_reconstruction": matched.get("block_reconstruction", {})},
        )
    )
    return [
        Entry(f"{number:02}-{name}", "ablation", recipe_of(name, steps, **keys))
        for number, (name, steps, keys) in enumerate(rungs)
    ]


def recipe_of(name: str, steps: list[Data], **keys: Any) -> Recipe:
    """A recipe from plain data, checked."""
    return recipe_from_dict({"name": name, "summary": "of the accuracy benchmark", "steps": steps, **keys}, source=name)


# Measuring


@dataclass(frozen=True)
class Ground:
    """What every row is measured on."""

    source: str
    """the model's folder or name"""
    data: str
    """calibration text"""
    samples: int
    dense: OpenModel
    windows: Tensor
    """evaluation, `[count, length]`"""
    probes: Tensor
    """some of those windows, evenly spread"""
    covariances: dict[str, Tensor]
    """`[in, in]` of the inputs of each linear layer in the dense model on the probes, by full name"""

    @classmethod
    def of(cls, source: str, data: str, samples: int, text: str | None, max_tokens: int | None) -> "Ground":
        """Open the model and read the text; without one the model writes its own."""
        dense = open_any(source)
        length = min(context_length(dense.model) or 2048, 2048)
        if text is None:
            start = dense.tokenizer.bos_token_id
            pieces = sample_from_model(dense.model, samples=MADE_WINDOWS, length=length, seed=MADE_SEED, start=start)
            windows = torch.cat(list(pieces))
        else:
            tokens = tokens_of(dense.tokenizer, text, "evaluation", at_most=max_tokens)
            windows = windows_of(tokens, length, source=text)
        probes = windows[torch.linspace(0, len(windows) - 1, min(PROBES, len(windows))).long()]
        return cls(source, data, samples, dense, windows, probes, covariances(dense.model, probes))

    def settings(self, name: str, text: str | None) -> Data:
        """What must be the same for rows to stand in one table."""
        length = self.windows.shape[1]
        evaluated = "text that the model wrote" if text is None else Path(text).name
        calibrated = "text that the model wrote" if self.data == "self" else Path(self.data).name
        return {
            "model": name,
            "calibration": f"{self.samples} windows of {length} tokens of {calibrated}",
            "evaluation": f"{self.windows[:, 1:].numel()} tokens of {evaluated}, windows of {length}",
            "layers": f"compared on {self.probes.numel()} of these tokens",
        }


def covariances(model: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Mean x^T x of the inputs of every linear layer in the blocks, by full name."""
    covariance_of, blocks, device = {}, blocks_of(model), torch.device("cpu")
    inputs = enter(model, blocks, windows)
    for name, block in blocks.items():
        stats = measure(BlockRun(block, name, inputs, device), linears_of(block), frozenset({Covariance}))
        covariance_of |= {f"{name}.{layer}": s[Covariance] for layer, s in stats.items()}
        inputs = BlockInputs(list(run(BlockRun(block, name, inputs, device))), inputs.arguments)
    return covariance_of


def dense_weight(linear: nn.Module) -> Tensor:
    """What a linear layer multiplies with, float32 `[out, in]`: its weight, or the sum of its parts."""
    if isinstance(linear, CompressedLinear):
        return linear.parts().dense()
    return weight_of(linear).float()


def layer_error(dense: nn.Module, other: nn.Module, covariance_of: dict[str, Tensor]) -> float:
    """Mean over layers of ||(W - W') x||^2 / ||W x||^2."""
    shares = []
    for name, covariance in covariance_of.items():
        weight = dense_weight(dense.get_submodule(name))
        error = weight - dense_weight(other.get_submodule(name))
        shares.append(weighted_square(error, covariance) / max(weighted_square(weight, covariance), 1e-30))
    return sum(shares) / len(shares)


def output_drift(dense: nn.Module, other: nn.Module, names: Sequence[str], windows: Tensor) -> float:
    """Mean over layers of ||y - y'||^2 / ||W x||^2, each model on its own inputs."""
    squares = dict.fromkeys(names, (0.0, 0.0))
    for batch in windows.split(max(1, TOKENS_AT_ONCE // windows.shape[1])):
        outputs: dict[str, Tensor] = {}

        def compare(name: str, theirs: Tensor, outputs: dict[str, Tensor] = outputs) -> None:
            own, bias = outputs[name], getattr(dense.get_submodule(name), "bias", None)
            error, total = squares[name]
            size = own if bias is None else own - bias
            squares[name] = error + float((own - theirs).square().sum()), total + float(size.square().sum())

        with torch.no_grad():
            with watched(dense, names, outputs.__setitem__):
                dense(batch, use_cache=False)
            with watched(other, names, compare):
                other(batch, use_cache=False)
    return sum(error / max(total, 1e-30) for error, total in squares.values()) / len(squares)


@contextmanager
def watched(model: nn.Module, names: Sequence[str], receive: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within this context `receive` is called with the name and output of each of these layers as it runs."""

    def hook_for(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: receive(name, output)

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def figures(opened: OpenModel, windows: Tensor) -> Data:
    """Size, and perplexity on all windows and on those of the first 100,000 tokens."""
    pieces = windows.tensor_split([FIRST // windows.shape[1]])
    first, *rest = (perplexity(opened.model, piece) for piece in pieces if len(piece))
    log_loss = sum(math.log(p.value) * p.tokens for p in (first, *rest)) / sum(p.tokens for p in (first, *rest))
    return {
        "bits_per_weight": opened.bits_per_weight,
        "bytes": opened.bytes,
        "perplexity": math.exp(log_loss),
        "perplexity_first_100k": first.value,
    }


def compressed(ground: Ground, entry: Entry, seed: int) -> Data:
    """Compress in a process of its own and measure the result; raises CalledProcessError where that fails."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        line = [sys.executable, "-c", "from slimlm.cli.app import main; main()", "compress", ground.source, "--out", str(out)]
        # The steps are compared, so embedding and head are the original's in every row.
        line += ["--embedding-bits", "16"]
        line += ["--data", ground.data, "--samples", str(ground.samples), "--seed", str(seed), "--json"]
        began = time.monotonic()
        done = subprocess.run(BlockRun([*line, *entry.options(Path(scratch))], check=True, capture_output=True, text=True))
        wall = time.monotonic() - began
        record = json.loads(done.stdout)
        opened = open_any(str(out))
        return {
            "entry": entry.name,
            "kind": entry.kind,
            "family": entry.family,
            "seed": seed,
            **figures(opened, ground.windows),
            "layer_error": layer_error(ground.dense.model, opened.model, ground.covariances),
            "drift": output_drift(ground.dense.model, opened.model, list(ground.covariances), ground.probes),
            "seconds": wall,
            "peak_memory": record["peak_memory"],
            "source": source_state(),
        }


def source_state() -> str:
    """A short hash of slimlm's source, which tells rows measured before a change from those after it."""
    folder = Path(slimlm.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".toml")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


# The results file


def opened_results(path: Path, settings: Data) -> Data:
    """An earlier run's results, or empty ones; ends the program where those were measured otherwise."""
    if not path.is_file():
        return {**settings, "rows": []}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    for key, value in settings.items():
        if earlier[key] != value:
            raise SystemExit(
                f"{path.name} was measured otherwise ({key}: {earlier[key]}; now: {value}), and rows of both cannot stand in "
                "one table. Move it away, or give another folder with --results"
            )
    return earlier


def add(path: Path, settings: Data, dense: Data, row: Data | None = None) -> None:
    """Write a row into the file, in place of an earlier one of the same entry and seed; the others stay."""
    results = opened_results(path, settings)
    results["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    results["versions"] = {package: version(package) for package in ("slimlm", "torch", "transformers")}
    results["dense"] = dense
    rows = {(r["entry"], r["seed"]): r for r in results.pop("rows")}
    rows |= {} if row is None else {(row["entry"], row["seed"]): row}
    results["rows"] = [rows[key] for key in sorted(rows)]
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


# Tables


@dataclass(frozen=True)
class Line:
    """An entry over its seeds: medians, the least and the largest perplexity, and the least seconds: other work only adds."""

    name: str
    kind: str
    family: str
    bits: float
    bytes: int
    perplexity: float
    low: float
    high: float
    rise: float
    rise_first: float
    layer_error: float
    drift: float
    seconds: float
    peak_memory: int | None
    seeds: int


def lines_of(results: Data) -> list[Line]:
    """One line per entry, by rising bits."""
    dense, rows = results["dense"], results["rows"]
    lines = []
    for name in dict.fromkeys(row["entry"] for row in rows):
        own = [row for row in rows if row["entry"] == name]
        mid = {key: median(row[key] for row in own) for key, value in own[0].items() if isinstance(value, float | int)}
        perplexities = [row["perplexity"] for row in own]
        peaks = [row["peak_memory"] for row in own if row["peak_memory"] is not None]
        lines.append(
            Line(
                name,
                own[0]["kind"],
                own[0]["family"],
                mid["bits_per_weight"],
                round(mid["bytes"]),
                mid["perplexity"],
                min(perplexities),
                max(perplexities),
                mid["perplexity"] - dense["perplexity"],
                mid["perplexity_first_100k"] - dense["perplexity_first_100k"],
                mid["layer_error"],
                mid["drift"],
                min(row["seconds"] for row in own),
                max(peaks) if peaks else None,
                len(own),
            )
        )
    return sorted(lines, key=lambda line: line.bits)


@dataclass(frozen=True)
class Shown:
    """A table as text; the first column is a name, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def markdown(self) -> str:
        """As docs/ shows it."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        return "\n".join([f"{self.title}\n", *("| " + " | ".join(row) + " |" for row in (self.columns, rule, *self.rows))])


def spread_of(line: Line) -> str:
    return f"{line.low:.3f} to {line.high:.3f}" if line.seeds > 1 else "one seed"


def full_table(results: Data, lines: Sequence[Line]) -> Shown:
    """Every entry but the ablation's."""
    dense = results["dense"]
    columns = ("recipe", "bits/weight", "bytes", "perplexity", "spread", "rise", "first 100k")
    columns += ("layer error", "output error", "seconds", "peak MB")
    first = ("dense", f"{dense['bits_per_weight']:.3f}", str(dense["bytes"]), f"{dense['perplexity']:.3f}", *[""] * 7)
    rows = [
        (
            line.name,
            f"{line.bits:.3f}",
            str(line.bytes),
            f"{line.perplexity:.3f}",
            spread_of(line),
            f"{line.rise:.3f}",
            f"{line.rise_first:.3f}",
            f"{line.layer_error:.5f}",
            f"{line.drift:.5f}",
            f"{line.seconds:.1f}",
            "" if line.peak_memory is None else f"{line.peak_memory / 1e6:.0f}",
        )
        for line in lines
        if line.kind != "ablation"
    ]
    return Shown(f"{results['model']}: {results['evaluation']}", columns, [first, *rows])


def ablation_table(results: Data, lines: Sequence[Line]) -> Shown:
    """The ladder in its order; the share is of the first rung's rise."""
    own = sorted((line for line in lines if line.kind == "ablation"), key=lambda line: line.name)
    columns = ("ingredient", "bits/weight", "layer error", "output error", "perplexity", "spread", "rise", "share", "seconds")
    rows = [
        (
            f"{'+ ' if number else ''}{line.name.partition('-')[2]}",
            f"{line.bits:.3f}",
            f"{line.layer_error:.5f}",
            f"{line.drift:.5f}",
            f"{line.perplexity:.3f}",
            spread_of(line),
            f"{line.rise:.3f}",
            f"{line.rise / own[0].rise:.1%}" if own[0].rise > 0 else "",
            f"{line.seconds:.1f}",
        )
        for number, line in enumerate(own)
    ]
    return Shown(f"{results['model']}, ablation", columns, rows)


def verdict_table(results: Data, lines: Sequence[Line]) -> Shown:
    """At each budget slimlm and the best baseline that needs no more bits."""
    columns = ("budget", "best baseline", "its bits", "its perplexity", "slimlm's bits", "slimlm's perplexity", "difference")
    rows = []
    for line in sorted((line for line in lines if line.kind == "budget"), key=budget_of):
        budget = budget_of(line)
        within = [other for other in lines if other.kind == "baseline" and other.bits <= budget + 1e-9]
        best = min(within, key=lambda other: other.perplexity, default=None)
        theirs = ("none measured", "", "") if best is None else (best.name, f"{best.bits:.3f}", f"{best.perplexity:.3f}")
        difference = "" if best is None else f"{line.perplexity - best.perplexity:+.3f}"
        own = f"{line.bits:.3f}{' (over)' if line.bits > budget + 5e-4 else ''}"
        rows.append((f"{budget:g}", *theirs, own, f"{line.perplexity:.3f}", difference))
    return Shown(f"{results['model']}, at each budget (a difference below zero is slimlm's)", columns, rows)


def budget_of(line: Line) -> float:
    return float(line.name.removeprefix("budget-"))


def tables_of(results: Data) -> list[Shown]:
    """Those that have something to show."""
    lines = lines_of(results)
    found = [full_table(results, lines), verdict_table(results, lines), ablation_table(results, lines)]
    return [found[0], *(shown for shown in found[1:] if shown.rows)]


def stale_note(results: Data) -> str | None:
    """Which rows are of another state of the source than today's."""
    now = source_state()
    stale = sorted({row["entry"] for row in results["rows"] if row["source"] != now})
    return f"measured with another state of slimlm's source than today's: {', '.join(stale)}" if stale else None


# The picture

COLOURS = {"dense": "tab:blue", "dense + low rank": "tab:green", "2:4": "tab:orange", "2:4 + low rank": "tab:red"}
FLOOR = 1e-4


def picture(results: Data, path: Path) -> None:
    """Rise in perplexity over the dense model against true bits per weight; without matplotlib it says so."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is missing (python -m pip install '.[benchmark]')", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in lines_of(results) if line.kind != "ablation"]
    if not lines:
        return
    figure, axes = pyplot.subplots(figsize=(13, 9), dpi=110)
    axes.set_yscale("log")
    for family, colour in COLOURS.items():
        for ours, marker, size, suffix in ((False, "o", 4, ""), (True, "*", 13, ", slimlm's own")):
            own = [line for line in lines if line.family == family and (line.kind == "ours") == ours]
            if own:
                _points(axes, own, color=colour, marker=marker, markersize=size, linestyle="", label=family + suffix)
    budgets = [line for line in lines if line.kind == "budget"]
    if budgets:
        _points(
            axes, budgets, color="black", marker="D", markersize=5, linestyle="-", linewidth=1, label="slimlm compress --bits"
        )
    axes.set_xlabel("bits per weight of the linear layers, everything counted")
    axes.set_ylabel("perplexity less the dense model's")
    axes.set_title(f"{results['model']} (dense perplexity {results['dense']['perplexity']:.3f}): {results['evaluation']}")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="best")
    figure.tight_layout()
    _labels(figure, axes, lines)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _height(rise: float) -> float:
    """Where a rise is drawn; none at all has no place on a logarithmic axis."""
    return max(rise, FLOOR)


def _points(axes: Any, lines: Sequence[Line], **style: Any) -> None:
    bits, rises = [line.bits for line in lines], [_height(line.rise) for line in lines]
    axes.plot(bits, rises, **style)
    dense = [line.perplexity - line.rise for line in lines]
    axes.vlines(
        bits,
        [_height(line.low - d) for line, d in zip(lines, dense, strict=True)],
        [_height(line.high - d) for line, d in zip(lines, dense, strict=True)],
        color=style["color"],
        alpha=0.5,
        linewidth=1,
    )


def _labels(figure: Any, axes: Any, lines: Sequence[Line]) -> None:
    """Names next to their points, each in the nearest place where it covers no other name and no point."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    spots = [tuple(axes.transData.transform((line.bits, _height(line.rise)))) for line in lines]
    reaches = [9 if line.kind == "ours" else 5 for line in lines]
    taken = [(x - reach, y - reach, x + reach, y + reach) for (x, y), reach in zip(spots, reaches, strict=True)]
    legend = axes.get_legend().get_window_extent(renderer)
    taken.append((legend.x0, legend.y0, legend.x1, legend.y1))
    inside = axes.get_window_extent(renderer)
    for line, (x, y), reach in zip(lines, spots, reaches, strict=True):
        name = line.name if line.rise > FLOOR else f"{line.name} ({line.rise:+.4f})"
        style = {"weight": "bold"} if line.kind in ("ours", "budget") else {}
        label = axes.annotate(name, (x, y), xycoords="figure pixels", fontsize=7, ha="left", va="center", **style)
        extent = label.get_window_extent(renderer)
        width, height = extent.width, extent.height
        for left, middle in _places(x, y, width, reach + 3):
            box = (left, middle - height / 2, left + width, middle + height / 2)
            fits = inside.x0 <= box[0] and box[2] <= inside.x1 and inside.y0 <= box[1] and box[3] <= inside.y1
            if fits and not any(_overlap(box, other) for other in taken):
                break
        taken.append(box)
        label.set_position((left, middle))
        if math.hypot(max(left - x, x - left - width, 0), middle - y) > 14:
            end = min(max(x, left), left + width)
            axes.annotate(
                "", (x, y), (end, middle), xycoords="figure pixels", arrowprops={"arrowstyle": "-", "lw": 0.4, "alpha": 0.6}
            )


def _places(x: float, y: float, width: float, nearest: int) -> Iterator[tuple[float, float]]:
    """Left edge and middle of a label about a point, near places first."""
    for distance in range(nearest, 200, 6):
        for turn in (0, 4, 1, 7, 3, 5, 2, 6):
            across, up = math.cos(turn * math.pi / 4), math.sin(turn * math.pi / 4)
            left = x + distance * across - (width if across < -0.1 else 0 if across > 0.1 else width / 2)
            yield left, y + distance * up


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# The command line


def read_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model folder or hub name")
    parser.add_argument("--made", action="store_true", help="the tests' tiny random Llama in place of a model, on its own text")
    parser.add_argument("--data", help="calibration text")
    parser.add_argument("--text", help="evaluation text")
    parser.add_argument("--samples", type=int, default=128, help="calibration samples")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max-tokens", type=int, default=None, help="of the evaluation text")
    parser.add_argument("--bits", type=float, nargs="*", default=[3.0, 3.5, 4.0, 4.5], help="budgets")
    parser.add_argument("--ablation", action="store_true", help="measure the ablation instead of the table")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="entries to measure, such as 'gptq-*'")
    parser.add_argument("--missing", action="store_true", help="measure only rows that the results do not hold yet")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--list", action="store_true", help="print the entries' names and measure nothing")
    parser.add_argument("--markdown", action="store_true", help="print the results as markdown and measure nothing")
    arguments = parser.parse_args()
    if not arguments.list and (arguments.model is None) != arguments.made:
        parser.error("give either a model or --made")
    if not (arguments.list or arguments.markdown or arguments.made) and not (arguments.data and arguments.text):
        parser.error("give calibration text with --data and evaluation text with --text")
    return arguments


def main() -> None:
    arguments = read_line()
    entries = ablation_entries() if arguments.ablation else table_entries(arguments.bits)
    entries = [entry for entry in entries if any(fnmatchcase(entry.name, pattern) for pattern in arguments.only)]
    if not entries:
        raise SystemExit(f"no entry is called {' or '.join(arguments.only)}; --list shows them")
    if arguments.list:
        print("\n".join(entry.name for entry in entries))
        return
    name = "made" if arguments.made else Path(arguments.model).name
    path = arguments.results / f"accuracy-{name}.json"
    if arguments.markdown:
        shown = tables_of(json.loads(path.read_text(encoding="utf-8")))
        print("\n\n".join(table.markdown() for table in shown))
        return
    arguments.results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source, data, text = arguments.model, arguments.data, arguments.text
        if arguments.made:
            source, data, text = made_model(Path(scratch)), "self", None
        ground = Ground.of(source, data, arguments.samples, text, arguments.max_tokens)
        failures = measure_all(ground, ground.settings(name, text), entries, arguments, path)
    results = json.loads(path.read_text(encoding="utf-8"))
    picture(results, path.with_suffix(".png"))
    console = Console(width=160)
    for shown in tables_of(results):
        console.print(plain_table(shown.title, shown.columns, shown.rows), "")
    for note in [stale_note(results), *failures]:
        if note is not None:
            console.print(note, markup=False, highlight=False)
    if failures:
        sys.exit(1)


def measure_all(ground: Ground, settings: Data, entries: list[Entry], arguments: argparse.Namespace, path: Path) -> list[str]:
    """Measure entry by entry into the results file; gives messages on what failed."""
    there = {(row["entry"], row["seed"]) for row in opened_results(path, settings)["rows"]} if arguments.missing else set()
    dense = figures(ground.dense, ground.windows)
    add(path, settings, dense)
    failures = []
    for entry in entries:
        for seed in entry.seeds(arguments.seeds):
            if (entry.name, seed) in there:
                continue
            try:
                row = compressed(ground, entry, seed)
            except subprocess.CalledProcessError as error:
                said = (error.stderr.strip().splitlines() or ["(nothing said)"])[-1]
                failures.append(f"{entry.name}, seed {seed}, failed: {said}")
                print(failures[-1], file=sys.stderr, flush=True)
                continue
            add(path, settings, dense, row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return failures


def made_model(folder: Path) -> str:
    """The tests' random Llama with its byte tokenizer."""
    sys.path.insert(0, str(ROOT))
    from tests.conftest import random_model, save

    return str(save(random_model("llama"), folder / "made"))


if __name__ == "__main__":
    main()
