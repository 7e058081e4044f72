"""Estimates compared with real runs: `slimlm plan` says, `slimlm compress` does, both on one thread, in seconds of CPU time.

    python benchmarks/estimates.py examples/pystd-5m --data stdlib --samples 32 --length 512 --recipes slim gptq

Each recipe has a process of its own, so that its peak of memory is its own. CPU time, because other work on the machine would
lengthen the two by different shares.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import slimlm
from slimlm import pipeline
from slimlm.preflight.estimate import timed


def compared(model: str, recipe: str, data: str, samples: int, length: int) -> dict[str, object]:
    """An estimate and the run that it is of."""
    torch.set_num_threads(1)
    pipeline.timed = lambda job, folder, device: timed(job, folder, device, time.process_time)
    began = time.process_time()
    said = slimlm.estimate(model, recipe=recipe, samples=samples, length=length, device="cpu")
    probing = time.process_time() - began
    with TemporaryDirectory() as scratch:
        began = time.process_time()
        record = slimlm.compress(
            model, Path(scratch) / "out", recipe=recipe, data=data, samples=samples, length=length, device="cpu"
        ).record
        took = time.process_time() - began
    assert said.total_seconds is not None and record.peak_memory is not None
    return {
        "model": Path(model).name,
        "recipe": recipe,
        "tokens": record.calibration["tokens"],
        "probing": probing,
        "said": said.seconds,
        "seconds": [said.total_seconds, took, said.total_seconds / took],
        "memory": [said.memory.peak, record.peak_memory, said.memory.peak / record.peak_memory],
        "bits_per_weight": [said.bits_per_weight, record.bits_per_weight],
        "bytes": [said.stored_bytes, record.stored_bytes],
    }


def main() -> None:
    """Print a line of JSON per recipe."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model")
    asked.add_argument("--data", default="stdlib")
    asked.add_argument("--samples", type=int, default=32)
    asked.add_argument("--length", type=int, default=512)
    asked.add_argument("--recipes", nargs="+", default=["slim", "gptq", "best-24"])
    given = asked.parse_args()
    if len(given.recipes) == 1:
        print(json.dumps(compared(given.model, given.recipes[0], given.data, given.samples, given.length)), flush=True)
        return
    for recipe in given.recipes:
        more = ["--data", given.data, "--samples", str(given.samples), "--length", str(given.length), "--recipes", recipe]
        subprocess.run([sys.executable, __file__, given.model, *more], check=True)


if __name__ == "__main__":
    main()
