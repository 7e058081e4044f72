"""What the journal and streaming cost: a compression with them, and the same steps on a model that is whole in memory.

    python benchmarks/overhead.py                                        # random Llamas, two sizes, recipe slim
    python benchmarks/overhead.py --model examples/pystd-5m --samples 64

Each is a process of its own, one after the other by turns. "memory" opens the model with `from_pretrained`, compresses its
blocks with the same functions, keeps everything in memory, and writes one file at the end, without a checksum and without
waiting for the disk. "streamed" is `slimlm.compress` up to the check of what it wrote. Seconds are the wall clock's, medians
over rounds, from the call on (imports are not in it); ratios are of the two runs of a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

import slimlm
from results_file import Results, this_run
from slimlm.calibration.capture import BlockInputs, BlockRun, enter, run_through
from slimlm.data.windows import choose_windows, tokens_of, windows_of
from slimlm.events import Event
from slimlm.models.dense import open_dense
from slimlm.models.structure import blocks_of
from slimlm.recipe import open_recipe
from slimlm.run.block import BlockTask, compress_block, stored_tensors
from streaming import random_dense

RESULTS = Path(__file__).parent / "results" / "overhead.json"
EXAMPLE = Path(__file__).parent.parent / "examples" / "pystd-5m"
STAGES = ("before", "blocks", "writing")
_CPU = torch.device("cpu")


def in_memory(model: str, out: Path, recipe: str, samples: int, length: int) -> list[float]:
    """Compress without journal and streaming; gives when each stage ended."""
    began = time.perf_counter()
    steps, dense = open_recipe(recipe), open_dense(model)
    tokens = tokens_of(dense.tokenizer, "stdlib", "calibration", at_most=8 * samples * length)
    windows = choose_windows(windows_of(tokens, length, source="stdlib"), samples, 0)
    blocks = blocks_of(dense.model)
    flow = enter(dense.model, blocks, windows)
    ends, stored, about = [time.perf_counter() - began], {}, {}
    for name, block in blocks.items():
        compress_block(BlockTask(name, block, flow, steps, dense.dtypes, _CPU))
        flow = BlockInputs(list(run_through(BlockRun(block, name, flow, _CPU))), flow.arguments)
        tensors, layers = stored_tensors(block, name, dense.dtypes)
        stored |= tensors
        about |= layers
    ends.append(time.perf_counter() - began)
    others = {n: t.to(dense.dtypes[n]) for n, t in dense.model.state_dict().items() if not n.startswith(tuple(blocks))}
    out.mkdir()
    save_file({name: tensor.clone() for name, tensor in {**others, **stored}.items()}, out / "model.safetensors")
    (out / "config.json").write_text(json.dumps(about))
    return [*ends, time.perf_counter() - began]


def streamed(model: str, out: Path, recipe: str, samples: int, length: int) -> list[float]:
    """Compress as users do; gives when each stage ended, the last of them where the check begins."""
    began, ends = time.perf_counter(), {}

    def note(event: Event) -> None:
        ends.setdefault((event.stage, event.done), time.perf_counter() - began)

    slimlm.compress(model, out, recipe=recipe, data="stdlib", samples=samples, length=length, progress=note)
    return [ends["compress", 0], ends["write", 0], ends["verify", 0]]


WAYS = {"memory": in_memory, "streamed": streamed}


def main() -> None:
    """Measure, print a line of JSON per round and the medians, and keep these."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", help="a folder, in place of the random models")
    asked.add_argument("--widths", type=int, nargs="+", default=[512, 1024])
    asked.add_argument("--recipe", default="slim", help="one without asymmetric calibration, such as slim")
    asked.add_argument("--samples", type=int, default=128)
    asked.add_argument("--length", type=int, default=512)
    asked.add_argument("--rounds", type=int, default=3)
    asked.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    given = asked.parse_args()
    if (recipe := open_recipe(given.recipe)).needs_original or recipe.block_reconstruction is not None:
        asked.error(f"{given.recipe} runs the original block, too, which has no counterpart here; give slim or gptq")
    with TemporaryDirectory() as scratch:
        if given.way:
            ends = WAYS[given.way](given.model, Path(scratch) / "out", given.recipe, given.samples, given.length)
            print(json.dumps(ends))
            return
        results = Results(RESULTS, ("model", "recipe", "samples", "length"), this_run("overhead.py"))
        for name, model in [(given.model, given.model)] if given.model else random_models(Path(scratch), given.widths):
            results.add(measured(Path(name).name, str(model), given))
            results.write()


def random_models(scratch: Path, widths: list[int]) -> list[tuple[str, Path]]:
    """Random Llamas of four blocks, written to the disk."""
    found = [(f"random-{width}", scratch / str(width)) for width in widths]
    for width, (_, folder) in zip(widths, found, strict=True):
        folder.mkdir()
        random_dense(folder, 4, width, EXAMPLE)
    return found


def measured(name: str, model: str, given: argparse.Namespace) -> dict[str, Any]:
    """A row: seconds of each stage and in all for both, and the median ratio."""
    size = [f"--{key}={getattr(given, key)}" for key in ("recipe", "samples", "length")]
    rounds = []
    for _ in range(given.rounds):
        ends = {}
        for way in WAYS:
            line = [sys.executable, __file__, f"--way={way}", f"--model={model}", *size]
            ends[way] = json.loads(subprocess.run(line, stdout=subprocess.PIPE, check=True).stdout)
        rounds.append(ends)
        print(json.dumps({"model": name, **ends}), flush=True)
    row: dict[str, Any] = {"model": name, "recipe": given.recipe, "samples": given.samples, "length": given.length}
    for way in WAYS:
        parts = [[end - begin for begin, end in zip([0.0, *r[way]], r[way], strict=False)] for r in rounds]
        row[way] = {stage: statistics.median(p[i] for p in parts) for i, stage in enumerate(STAGES)}
        row[way]["all"] = statistics.median(r[way][-1] for r in rounds)
    row["ratio"] = statistics.median(r["streamed"][-1] / r["memory"][-1] for r in rounds)
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    main()
