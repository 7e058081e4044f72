"""Opening, and changing kernels, while other threads do the same or multiply."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import torch

import slimlm
from slimlm.runtime.whole_model import packed_layers
from tests.conftest import Checkpoints, needs_kernels

IDS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(3))


def test_models_that_threads_open_are_those_that_one_opens(checkpoints: Checkpoints) -> None:
    folders = [checkpoints(family, dtype).out for family in ("llama", "gpt2") for dtype in (torch.bfloat16, torch.float16)]
    expected = [slimlm.load(folder)(IDS).logits for folder in folders]

    def opened(turn: int) -> bool:
        at = turn % len(folders)
        return torch.equal(slimlm.load(folders[at])(IDS).logits, expected[at])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(opened, range(16)))


@needs_kernels
def test_a_forward_is_right_while_another_thread_changes_kernels(packed: Path) -> None:
    model = slimlm.load(packed)
    results = {}
    for kernels in ("precise", "fast", "reference"):
        slimlm.use_kernels(model, kernels)
        results[kernels] = model(IDS).logits
    expected, size = results["reference"], float(results["reference"].abs().max())
    done = Event()

    def change() -> None:
        while not done.is_set():
            for kernels in ("precise", "fast", "reference"):
                slimlm.use_kernels(model, kernels)

    with ThreadPoolExecutor(3) as pool:
        changing = pool.submit(change)
        try:
            for logits in pool.map(lambda _: model(IDS).logits, range(40)):
                # Each layer ran on one of the three, of which "fast" differs most.
                assert float((logits - expected).abs().max()) < 0.1 * size
        finally:
            done.set()
        changing.result()
    slimlm.use_kernels(model, "precise")
    assert torch.equal(model(IDS).logits, results["precise"])
    assert {layer.selection().backend.name for layer in packed_layers(model).values()} == {"cpu"}
