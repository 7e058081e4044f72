"""What only a GPU can show: graphs, streams, a whole model. `python -m pytest -m gpu` runs these where there is one.

The laws of the products (test_products.py) run on the GPU, too, where there is one.
"""

from pathlib import Path

import pytest
import torch

import slimlm
from slimlm.inference.generate import generate
from slimlm.runtime.backends.triton import Gpu
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.whole_model import describe
from tests.runtime.gpu.layers import REASON, WHERE, combinations, draw, layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHERE.type != "cuda" or REASON is not None, reason=f"needs an NVIDIA GPU and Triton: {REASON}"),
]


@pytest.mark.parametrize("batch", [1, 16, 64, 200])
@pytest.mark.parametrize("name", ["2:4 groups of 32 + adapter", "groups of 128 + adapter of rows"])
def test_a_captured_product_is_that_of_a_launch_for_inputs_to_come(name: str, batch: int) -> None:
    width, gpu = 2048, Gpu()
    ready = gpu.prepare(layer(combinations(1024, width)[name]).stored())
    x = draw(batch, width).to(WHERE, torch.bfloat16)
    gpu.matmul(x, ready)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = gpu.matmul(x, ready)
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert torch.equal(y, gpu.matmul(x, ready))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_product_waits_for_nothing() -> None:
    gpu, one = Gpu(), layer(combinations()["2:4 groups of 32 + adapter"])
    ready, x = gpu.prepare(one.stored()), draw(3, 264).to(WHERE, torch.float16)
    gpu.matmul(x, ready)
    try:
        torch.cuda.set_sync_debug_mode("error")
        gpu.matmul(x, ready)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, while it compiles
def test_a_compiled_layer_gives_what_it_gives_uncompiled() -> None:
    one = layer(combinations()["2:4 groups of 32 + adapter"])
    one.prepare()
    x = draw(3, 264).to(WHERE, torch.bfloat16)
    assert torch.equal(torch.compile(one, fullgraph=True)(x), one(x))


def test_a_checkpoint_opens_on_the_card_and_writes_what_the_reference_writes(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    slimlm.compress(llama_folder, tmp_path / "out", recipe="slim", data=str(text_file), samples=4, length=32, device="cpu")
    model = slimlm.load(tmp_path / "out", device=WHERE)
    assert str(describe(model)).startswith("gpu triton")
    prompt = torch.arange(8, device=WHERE)[None]
    logits = model(prompt).logits.float()
    reference = slimlm.load(tmp_path / "out", device=WHERE, kernels="reference", dtype=torch.float32)(prompt).logits
    # The activations of two blocks, in float16.
    assert float((logits - reference).abs().max()) < 2e-2 * float(reference.abs().max())
    assert generate(model, prompt, max_new_tokens=4).tokens.shape == (1, 4)


def test_text_from_replayed_steps_is_that_of_the_models_own_forward(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    slimlm.compress(llama_folder, tmp_path / "out", recipe="slim", data=str(text_file), samples=4, length=32, device="cpu")
    model = slimlm.load(tmp_path / "out", device=WHERE)
    made = generate(model, torch.arange(8, device=WHERE)[None], max_new_tokens=16)
    assert made.decode_path == "fast decode with torch, replayed from a CUDA graph"
    assert "launches" in str(describe(model)), "queries, keys and values are one launch"
    again = generate(model, torch.arange(8, device=WHERE)[None], max_new_tokens=16)
    assert torch.equal(again.tokens, made.tokens), "the second text goes by the first one's graph"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_a_gpu_that_is_not_the_current_one_generates_the_same_text(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    slimlm.compress(llama_folder, tmp_path / "out", recipe="slim", data=str(text_file), samples=4, length=32, device="cpu")
    made = []
    for where in ("cuda:0", "cuda:1"):
        model = slimlm.load(tmp_path / "out", device=where)
        made.append(generate(model, torch.arange(8, device=where)[None], max_new_tokens=16))
    assert made[1].decode_path == "fast decode with torch, replayed from a CUDA graph" and torch.equal(
        made[0].tokens, made[1].tokens
    )


def test_a_card_holds_the_kernels_layout_alone_and_what_is_saved_is_what_was_opened(
    llama_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    slimlm.compress(llama_folder, tmp_path / "out", recipe="slim", data=str(text_file), samples=4, length=32, device="cpu")
    model = slimlm.load(tmp_path / "out", device=WHERE)
    here = slimlm.load(tmp_path / "out", kernels="reference").state_dict()
    assert all(torch.equal(tensor.cpu(), here[name]) for name, tensor in model.state_dict().items())
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    assert {tensor.device.type for one in layers for tensor in one.packed().values()} == {"cpu"}
