"""Stored tensors that stay on the CPU while their layer multiplies on another device, which here is a fake one."""

from pathlib import Path

import pytest
import torch

import slimlm
from slimlm.core.parts.pack import Parts
from slimlm.runtime.backends import Stored
from slimlm.runtime.backends.triton import Gpu, PreparedOnGpu
from slimlm.runtime.embedding import TiedLinear
from slimlm.runtime.gpu import device
from slimlm.runtime.linear import CompressedLinear
from tests.conftest import random_model, save
from tests.runtime.gpu.layers import codes, draw, pruned

FAKE_GPU = torch.device("meta")


def offloaded() -> tuple[CompressedLinear, dict[str, torch.Tensor]]:
    """A layer that multiplies on another device, and the equal tensors on the CPU."""
    layer = CompressedLinear.from_parts(Parts(pruned(codes((8, 16), 8))), draw(8))
    rest = layer.packed()
    there = layer.to(FAKE_GPU)
    there.selection()
    there.offload(rest)
    return there, rest


def test_saving_reads_what_is_on_the_cpu() -> None:
    layer, rest = offloaded()
    state = layer.state_dict()
    assert all(state[name] is not None and torch.equal(state[name], tensor) for name, tensor in rest.items())
    assert layer.stored().device == FAKE_GPU and {t.device.type for t in layer.packed().values()} == {"cpu"}


def test_what_is_offloaded_is_unpacked_where_the_layer_multiplies() -> None:
    _, rest = offloaded()
    one = CompressedLinear.from_parts(Parts(pruned(codes((8, 16), 8))), None)
    stored = Stored((8, 16), one.entries, rest, None, compute_device=torch.device("cpu"))
    assert torch.equal(stored.parts().base.dense(), one.parts().base.dense())


@pytest.mark.parametrize("change", ["half", "same place"])
def test_a_cast_or_a_move_to_where_it_is_leaves_it_offloaded(change: str) -> None:
    layer, rest = offloaded()
    selection = layer.selection()
    layer.half() if change == "half" else layer.to(FAKE_GPU)
    assert layer.stored().device == FAKE_GPU and layer.selection() is selection
    assert all(now is rest[name] for name, now in layer.packed().items())
    assert layer.bias is not None and (layer.bias.dtype == torch.float16) == (change == "half")


def test_a_move_ends_offloading_and_the_selection() -> None:
    layer, rest = offloaded()
    # As `to("cpu")` would, which a tensor without values cannot follow.
    layer._apply(lambda tensor: tensor if tensor.device.type == "cpu" else torch.zeros_like(tensor, device="cpu"))
    assert layer.stored().device == torch.device("cpu") and layer._selection is None
    assert all(torch.equal(now, rest[name]) for name, now in layer.packed().items())


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_a_layer_is_offloaded_before_the_next_is_laid_out(
    tied: bool, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a GPU holds a checkpoint's tensors once, and one layer twice."""
    model = save(random_model("llama-tied" if tied else "llama", torch.bfloat16), tmp_path / "model")
    options = {"embedding_bits": 4} if tied else {}
    slimlm.compress(model, tmp_path / "out", recipe="slim", data=str(text_file), samples=4, length=32, device="cpu", **options)
    twice, most, moved = set[int](), [0], set[int]()
    lay_out, offload = Gpu.prepare, CompressedLinear.offload

    def prepare(self: Gpu, stored: Stored) -> PreparedOnGpu:
        twice.add(id(stored.tensors["weight"]))
        most.append(len(twice))
        return lay_out(self, stored)

    def counted(self: CompressedLinear, elsewhere: dict[str, torch.Tensor]) -> None:
        twice.discard(id(self.packed()["weight"]))
        moved.add(id(self))
        offload(self, elsewhere)

    monkeypatch.setattr(device, "refuses", lambda where: None)
    monkeypatch.setattr(Gpu, "prepare", prepare)
    monkeypatch.setattr(CompressedLinear, "offload", counted)
    found = slimlm.load(tmp_path / "out", kernels="gpu")
    layers = [module for module in found.modules() if isinstance(module, CompressedLinear)]
    assert layers and all(isinstance(layer.prepared(), PreparedOnGpu) for layer in layers)
    assert moved == {id(layer) for layer in layers if not isinstance(layer, TiedLinear)}
    assert max(most) == 1 and len(twice) == tied, "an embedding stays on the GPU, where it is looked up"
