"""Peak memory of compressing a random model: as blocks are streamed, and how it grows with their number.

    python benchmarks/streaming.py --blocks 8                       # writes the model once, then compresses it

Each run is a process of its own; its peak is what the system counted for it (VmHWM), pages of mapped files included.
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

from slimlm.storage.streams import described, in_file_order, write_stream

_CHILD = """
import json, sys, time
from pathlib import Path
import slimlm
model, out, recipe, samples, length, memory = sys.argv[1:]
began = time.monotonic()
slimlm.compress(model, out, recipe=recipe, data="stdlib", samples=int(samples), length=int(length), memory=int(memory))
status = Path("/proc/self/status").read_text().splitlines()
peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
print(json.dumps({"peak": peak, "seconds": time.monotonic() - began}))
"""


def random_dense(folder: Path, blocks: int, width: int, tokenizer: Path) -> int:
    """Write a random Llama in bfloat16, one shard per block; gives the number of its parameters."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        vocab_size=32000,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with torch.device("meta"):
        state = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    where = {}
    for part in sorted({_shard(name) for name in state}):
        about = described({name: tensor for name, tensor in state.items() if _shard(name) == part})
        order = in_file_order(about)
        write_stream(folder / part, {name: about[name] for name in order}, (_values(state[name]) for name in order))
        where |= dict.fromkeys(order, part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(tensor.numel() for tensor in state.values())


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
    given = asked.parse_args()
    for blocks in given.blocks:
        with TemporaryDirectory() as scratch:
            model, out = Path(scratch) / "dense", Path(scratch) / "out"
            model.mkdir()
            began = time.monotonic()
            parameters = random_dense(model, blocks, given.width, given.tokenizer)
            written = time.monotonic() - began
            line = [sys.executable, "-c", _CHILD, model, out, given.recipe, given.samples, given.length, given.memory]
            ended = subprocess.run(list(map(str, line)), capture_output=True, text=True)
            if ended.returncode:
                sys.exit(ended.stderr)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            found = json.loads(ended.stdout.splitlines()[-1])
            about = {"blocks": blocks, "parameters": parameters, "bytes": size, "recipe": given.recipe, "writing": written}
            print(json.dumps(about | found), flush=True)


if __name__ == "__main__":
    main()
