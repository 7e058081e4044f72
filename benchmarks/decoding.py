"""What one token costs per block besides its matrix products: transformers' forward and slimlm's torch decoder.

    python benchmarks/decoding.py [--threads 1] [--steps 40] [--batch 1]

Random Llamas after a prompt of 100 tokens. Each round takes one token by every way in turn, in this process; medians of
the process's CPU time, which a busy machine distorts less than the clock (with several threads it counts their waiting, too).
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM

from llama_shape import LlamaShape
from slimlm.inference.decode.grouped import direct_call
from slimlm.inference.decode.torch_decoder import TorchDecoder
from slimlm.report.tables import plain_table

PROMPT = 100
# With a small vocabulary, so that the blocks are what is measured.
SIZES = {
    "64 wide, 8 blocks": LlamaShape(64, 128, 8, 4, 2, vocabulary=256),
    "768 wide, 12 blocks": LlamaShape(768, 2048, 12, 12, 12, vocabulary=256),
}


def llama(shape: LlamaShape) -> LlamaForCausalLM:
    """A random float32 Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(shape.config(dtype="float32")).eval()


def ways_of(model: LlamaForCausalLM, batch: int, steps: int) -> dict[str, Callable[[], object]]:
    """One token by transformers' forward, by the torch decoder, and the products of the linear layers alone."""
    prompt = torch.randint(256, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    cache, token = DynamicCache(), prompt[:, 0]
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    step = TorchDecoder(model, batch=batch, length=PROMPT + steps)
    step.fill(cache)
    layers = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    products = [(direct_call(layer), torch.randn(batch, layer.in_features)) for layer in layers]
    return {
        "transformers": lambda: model(token[:, None], past_key_values=cache),
        "torch decoder": lambda: step(token),
        "products alone": lambda: [product(x) for product, x in products],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, shape in SIZES.items():
        ways = ways_of(llama(shape), arguments.batch, arguments.steps)
        taken: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.steps):
            for way, work in ways.items():
                with torch.no_grad() if way == "transformers" else torch.inference_mode():
                    began = time.process_time()
                    work()
                    taken[way].append((time.process_time() - began) * 1e6 / shape.blocks)
        rows.append((name, *(f"{median(each):.0f} ({min(each):.0f})" for each in taken.values())))
    title = f"microseconds per block and token, median (least); {arguments.threads} threads, batch {arguments.batch}"
    Console(width=140).print(plain_table(title, ("random Llama", *taken), rows))


if __name__ == "__main__":
    main()
