"""Peak memory of compressing a random model: as blocks are streamed, and how it grows with their number.

    python benchmarks/streaming.py --blocks 8                                     # writes the model once, then compresses it
    python benchmarks/streaming.py --width 2560 --blocks 40 --recipe slim --folder big      # 3.0 billion weights, 6.0 GB

Each run is a process of its own; its peak is what the system counted for it (VmHWM), pages of mapped files included. With
--folder model and output are kept there, and a run that was stopped resumes; its seconds are then those since it resumed.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama_shape import LlamaShape
from slimlm.storage.streams import described, in_file_order, write_stream

_CHILD = """
import json, sys, time
from pathlib import Path
import slimlm
model, out, recipe, samples, length, memory = sys.argv[1:]
began = time.monotonic()
def note(event):
    if event.stage == "compress" and event.done != note.done:
        note.done = event.done
        print(f"{time.monotonic() - began:.0f} s: {event.done} of {event.total} blocks", file=sys.stderr, flush=True)
note.done = 0
slimlm.compress(
    model, out, recipe=recipe, data="stdlib", samples=int(samples), length=int(length), memory=int(memory), progress=note
)
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
print(json.dumps({"peak": peak, "seconds": time.monotonic() - began}))
"""


def random_dense(folder: Path, blocks: int, width: int, tokenizer: Path) -> None:
    """Write a random Llama in bfloat16, one shard per block."""
    shape = LlamaShape.of_width(width, blocks)
    shape.config().save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    state = shape.meta_model().state_dict()
    where = {}
    for part in sorted({_shard(name) for name in state}):
        about = described({name: tensor for name, tensor in state.items() if _shard(name) == part})
        order = in_file_order(about)
        write_stream(folder / part, {name: about[name] for name in order}, (_values(state[name]) for name in order))
        where |= dict.fromkeys(order, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _shard(name: str) -> str:
    pieces = name.split(".")
    return f"block-{int(pieces[2]):04d}.safetensors" if "layers" in pieces else "rest.safetensors"


def _values(like: torch.Tensor) -> torch.Tensor:
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    generator = torch.Generator().manual_seed(like.numel())
    return (torch.randn(like.shape, generator=generator) * like.shape[1] ** -0.5).to(like.dtype)


def main() -> None:
    """Measure and print one line of JSON per run."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    asked.add_argument("--width", type=int, default=2048)
    asked.add_argument("--recipe", default="absmax")
    asked.add_argument("--samples", type=int, default=4)
    asked.add_argument("--length", type=int, default=256)
    asked.add_argument("--memory", type=int, default=2**30, help="bytes")
    asked.add_argument("--tokenizer", type=Path, default=Path(__file__).parent.parent / "examples" / "pystd-5m")
    asked.add_argument("--folder", type=Path, help="keeps the model and what becomes of it")
    given = asked.parse_args()
    with TemporaryDirectory() as scratch:
        for blocks in given.blocks:
            print(json.dumps(measured(given, blocks, (given.folder or Path(scratch)) / f"{given.width}-{blocks}")), flush=True)


def measured(given: argparse.Namespace, blocks: int, folder: Path) -> dict[str, object]:
    """Write the model where it is not there yet, compress it, and give what that took."""
    model, out = folder / "dense", folder / f"out-{given.recipe}"
    began = time.monotonic()
    if not model.exists():
        written = folder / "unfinished"
        written.mkdir(parents=True, exist_ok=True)
        random_dense(written, blocks, given.width, given.tokenizer)
        written.rename(model)
    about = {"blocks": blocks, "width": given.width, "recipe": given.recipe, "writing": time.monotonic() - began}
    line = [sys.executable, "-c", _CHILD, model, out, given.recipe, given.samples, given.length, given.memory]
    ended = subprocess.run(list(map(str, line)), stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(ended.returncode)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    with torch.device("meta"):
        parameters = sum(tensor.numel() for tensor in LlamaForCausalLM(LlamaConfig.from_pretrained(model)).parameters())
    return {**about, "parameters": parameters, "bytes": size, **json.loads(ended.stdout.splitlines()[-1])}


if __name__ == "__main__":
    main()
