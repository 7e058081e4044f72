"""Perplexity, true size, time and memory of recipes on a model, beside the dense one.

    python benchmarks/quality.py MODEL --data CALIBRATION --text EVALUATION [--seeds 0 1 2] [--recipes slim ...]

Every compression is a process of its own, as a user would start it, so that its time and peak memory are its own; both
include starting Python and verifying the result. Perplexity is measured in float32 on windows of the model's context over
the whole text, and again on its first 100,000 tokens, which is what published figures often cover. Writes
benchmarks/results/quality-MODEL.json, keeping an earlier run's rows of recipes that are not measured now, and prints a table.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from slimlm.data.documents import documents
from slimlm.data.windows import token_stream, windows_of
from slimlm.evaluate.compare import OpenModel, open_any
from slimlm.evaluate.perplexity import perplexity
from slimlm.models.structure import context_length
from slimlm.recipe import shipped
from slimlm.report.tables import plain_table

RESULTS = Path(__file__).parent / "results"
FIRST = 100_000


def figures(opened: OpenModel, windows: torch.Tensor) -> dict[str, Any]:
    """Perplexity on all windows and on those of the first 100,000 tokens."""
    pieces = windows.tensor_split([FIRST // windows.shape[1]])
    first, *rest = (perplexity(opened.model, piece) for piece in pieces if len(piece))
    log_loss = sum(math.log(p.value) * p.tokens for p in (first, *rest)) / sum(p.tokens for p in (first, *rest))
    return {
        "bits_per_weight": opened.bits_per_weight,
        "bytes": opened.bytes,
        "perplexity": math.exp(log_loss),
        "perplexity_first_100k": first.value,
    }


def compressed(arguments: argparse.Namespace, recipe: str, seed: int, windows: torch.Tensor) -> dict[str, Any]:
    """Compress in a process of its own and measure the result."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        line = [sys.executable, "-c", "from slimlm.cli import main; main()", "compress", arguments.model, "-o", str(out)]
        line += ["--recipe", recipe, "--data", arguments.data, "--seed", str(seed), "--samples", str(arguments.samples)]
        began = time.monotonic()
        done = subprocess.run([*line, "--json"], check=True, stdout=subprocess.PIPE, text=True)
        wall = time.monotonic() - began
        record = json.loads(done.stdout)
        opened = open_any(str(out))
        return {
            "recipe": recipe,
            "seed": seed,
            **figures(opened, windows),
            "seconds": wall,
            "peak_memory": record["peak_memory"],
            "mean_layer_error": sum(layer["error"] for layer in record["layers"]) / len(record["layers"]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", default=list(shipped()))
    parser.add_argument("--max-tokens", type=int, default=None, help="of the evaluation text")
    arguments = parser.parse_args()

    dense = open_any(arguments.model)
    length = min(context_length(dense.model) or 2048, 2048)
    tokens = token_stream(dense.tokenizer, documents(arguments.text, "evaluation"), at_most=arguments.max_tokens)
    windows = windows_of(tokens, length, source=arguments.text)
    name = Path(arguments.model).name
    evaluation = f"{windows[:, 1:].numel()} tokens of {Path(arguments.text).name}, windows of {length}"
    rows = [{"recipe": "dense", "seed": 0, **figures(dense, windows), "seconds": 0.0, "peak_memory": None}]
    rows += kept(RESULTS / f"quality-{name}.json", evaluation, arguments.recipes)
    for recipe in arguments.recipes:
        for seed in arguments.seeds:
            rows.append(compressed(arguments, recipe, seed, windows))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)

    result = {
        "model": name,
        "calibration": f"{arguments.samples} windows of {length} tokens of {Path(arguments.data).name}",
        "evaluation": evaluation,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("slimlm", "torch", "transformers")},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"quality-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    Console(width=140).print(plain_table(result["evaluation"], COLUMNS, summary(rows)))


def kept(path: Path, evaluation: str, recipes: list[str]) -> list[dict[str, Any]]:
    """An earlier run's rows of the other recipes, where it measured on the same text."""
    if not path.is_file():
        return []
    earlier = json.loads(path.read_text())
    if earlier["evaluation"] != evaluation:
        return []
    return [row for row in earlier["rows"] if row["recipe"] not in ("dense", *recipes)]


COLUMNS = ("recipe", "bits/weight", "bytes", "perplexity", "rise (mean; all seeds)", "rise, first 100k", "seconds", "peak MB")


def summary(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """One line per recipe over its seeds."""
    dense = rows[0]
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == recipe]
        rises = [row["perplexity"] - dense["perplexity"] for row in own]
        first = [row["perplexity_first_100k"] - dense["perplexity_first_100k"] for row in own]
        lines.append(
            (
                recipe,
                f"{own[0]['bits_per_weight']:.3f}",
                str(own[0]["bytes"]),
                f"{sum(row['perplexity'] for row in own) / len(own):.3f}",
                f"{sum(rises) / len(rises):.3f} ({', '.join(f'{r:.2f}' for r in rises)})",
                f"{sum(first) / len(first):.2f} ({', '.join(f'{r:.2f}' for r in first)})",
                f"{sorted(row['seconds'] for row in own)[len(own) // 2]:.1f}",
                "" if own[0]["peak_memory"] is None else f"{max(row['peak_memory'] for row in own) / 1e6:.0f}",
            )
        )
    return lines


if __name__ == "__main__":
    main()
