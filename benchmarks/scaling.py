"""How much of a compression several processes divide among them: CPU seconds by stage, for 1, 2 and 4 ranks.

One run each, started as a launcher would start it, one thread per rank. Every rank counts its own CPU time (not the clock, so
other work on the machine does not count, nor does waiting but for looking whether something has come):

    windows   running blocks on calibration samples, and the sums of their statistics
    layers    the recipe's steps on the layers of a block
    rest      on every rank: reading, checking, packing, hand-over; on the first also the journal, the files and their check

The critical path is, stage by stage, that of the rank with the most to do; its inverse, relative to one process, is the most
that so many ranks on cores of their own could gain. `share` is the part of the single process's time that is windows or layers.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import slimlm
from compression import RESULTS, make_model, make_text
from slimlm.calibration import capture, measurement
from slimlm.report.tables import plain_table
from slimlm.run import block

WINDOW = 512


class Stages:
    """CPU seconds of this process by stage."""

    def __init__(self) -> None:
        self.seconds = {"windows": 0.0, "layers": 0.0}
        self.inside = False

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, began = True, time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[stage] += time.process_time() - began

        return wrapper


def one_rank(folder: Path, recipe: str, tokens: int) -> dict[str, Any]:
    """Run as whatever rank the environment says; gives its CPU seconds."""
    stages = Stages()
    capture._forward = stages.timed("windows", capture._forward)
    totals = measurement.LayerTotals
    totals.include = stages.timed("windows", totals.include)  # type: ignore[method-assign]
    block.compress_layer = stages.timed("layers", block.compress_layer)
    began = time.process_time()
    out = folder / f"out-{os.environ.get('WORLD_SIZE', '1')}"
    slimlm.compress(
        folder / "model",
        out,
        recipe=recipe,
        data=str(folder / "text.txt"),
        samples=tokens // WINDOW,
        length=WINDOW,
        device="cpu",
    )
    everything = time.process_time() - began
    return {**stages.seconds, "rest": everything - sum(stages.seconds.values())}


def ranks(count: int, folder: Path, recipe: str, tokens: int) -> list[dict[str, float]]:
    """CPU seconds of each of so many ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {**os.environ, "OMP_NUM_THREADS": "1"}
    if count > 1:
        place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(count):
        typed = [sys.executable, __file__, "--rank", str(folder), "--recipe", recipe, "--tokens", str(tokens)]
        own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(typed, env=own, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True))
    told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"one of {count} ranks failed")
    return [json.loads(text.splitlines()[-1]) for text in told]


def run(recipe: str, width: int, blocks: int, tokens: int, counts: list[int]) -> dict[str, Any]:
    """One compression for each number of ranks, and what they come to."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        parameters = make_model(folder / "model", width=width, blocks=blocks)
        make_text(folder / "text.txt", 2 * tokens)
        for count in counts:
            seconds = ranks(count, folder, recipe, tokens)
            critical = sum(max(each[stage] for each in seconds) for stage in seconds[0])
            weights = sorted((folder / f"out-{count}").glob("*.safetensors"))
            checksum = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
            rows.append({"ranks": count, "seconds": seconds, "critical": critical, "weights": checksum})
    single = rows[0]["seconds"][0]
    return {
        "command": f"benchmarks/scaling.py --recipe {recipe} --width {width} --blocks {blocks} --tokens {tokens}",
        "model": f"random Llama, {parameters / 1e6:.1f} M parameters, {blocks} blocks of width {width}",
        "machine": f"{platform.machine()}, one thread per rank, CPU time",
        "versions": {package: version(package) for package in ("slimlm", "torch")},
        "share": (single["windows"] + single["layers"]) / sum(single.values()),
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="slim")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="the first must be 1")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        torch.set_num_threads(1)
        print(json.dumps(one_rank(arguments.rank, arguments.recipe, arguments.tokens)))
        return
    if arguments.ranks[0] != 1:
        parser.error("shares are those of a single process: begin with --ranks 1")
    result = run(arguments.recipe, arguments.width, arguments.blocks, arguments.tokens, arguments.ranks)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"scaling-{arguments.width}-{arguments.recipe}.json").write_text(json.dumps(result, indent=1) + "\n")
    alone = result["rows"][0]["critical"]
    shown = [
        (
            str(row["ranks"]),
            *(" ".join(f"{each[stage]:.1f}" for each in row["seconds"]) for stage in ("windows", "layers", "rest")),
            f"{row['critical']:.1f}",
            f"{alone / row['critical']:.2f}",
            "yes" if row["weights"] == result["rows"][0]["weights"] else "no",
        )
        for row in result["rows"]
    ]
    title = f"{arguments.recipe}: {result['model']}; divided share {result['share']:.1%}; {result['machine']}"
    columns = ("ranks", "windows", "layers", "rest", "critical", "gain", "same bytes")
    Console(width=160).print(plain_table(title, columns, shown))


if __name__ == "__main__":
    main()
