"""Models whose activations are float32: GPU kernels unpack weights for them, or the reference does where there is room."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import slimlm
from slimlm.runtime import whole_model
from slimlm.runtime.gpu import device
from slimlm.runtime.kernel_names import Kernels
from slimlm.runtime.linear import CompressedLinear
from slimlm.runtime.memory import free_on_gpu
from slimlm.runtime.whole_model import activation_dtype, describe, use_kernels
from tests.conftest import Checkpoints, random_model, save

UNPACKED = "activations are float32: weights are unpacked for every product; dtype=torch.bfloat16 multiplies them packed"
ONCE = (
    "activations are float32: GPU kernels would unpack weights for every product, and there is room to do it once; "
    "dtype=torch.bfloat16 multiplies them packed"
)


@pytest.fixture(scope="module")
def out(checkpoints: Checkpoints) -> Path:
    return checkpoints("llama", torch.float32).out


@pytest.fixture
def on_fake_gpu(out: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PreTrainedModel]:
    """The checkpoint in a dtype, on a fake GPU, whose free memory lacks some bytes of twice the dense matrices."""

    def opened(dtype: torch.dtype, lacking: int = 0) -> PreTrainedModel:
        model = slimlm.load(out, dtype=dtype, kernels="reference")
        free = sum(2 * 4 * layer.in_features * layer.out_features for layer in layers_of(model)) - lacking
        monkeypatch.setattr(device, "refuses", lambda where: None if where.type == "cuda" else "no GPU")
        monkeypatch.setattr(device, "describe", lambda where: "a GPU")
        monkeypatch.setattr(whole_model, "free_on_gpu", lambda where: free if where.type == "cuda" else 0)
        for layer in layers_of(model):
            layer._compute_device = torch.device("cuda")
        return model

    return opened


def layers_of(model: PreTrainedModel) -> list[CompressedLinear]:
    return [module for module in model.modules() if isinstance(module, CompressedLinear)]


@pytest.mark.parametrize("embedding_bits", [16, 8])
def test_activations_are_what_the_embedding_gives(embedding_bits: int, tmp_path: Path, text_file: Path) -> None:
    model = save(random_model("llama", torch.bfloat16), tmp_path / "model")
    options = {"recipe": "slim", "data": str(text_file), "samples": 4, "length": 32, "device": "cpu"}
    slimlm.compress(model, tmp_path / "out", embedding_bits=embedding_bits, **options)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert activation_dtype(slimlm.load(tmp_path / "out", dtype=dtype, kernels="reference")) == dtype
    assert activation_dtype(torch.nn.Linear(2, 2)) is None


def test_of_itself_a_gpu_with_room_multiplies_dense_matrices_and_says_why(on_fake_gpu: Callable[..., PreTrainedModel]) -> None:
    model = on_fake_gpu(torch.float32)
    use_kernels(model, "auto")
    layers = layers_of(model)
    assert {layer.selection().backend.name for layer in layers} == {"reference"} and {layer.kernels for layer in layers} == {
        "auto"
    }
    assert describe(model) == f"reference; {len(layers)} of {len(layers)} layers; {ONCE}"


@pytest.mark.parametrize(("kernels", "lacking"), [("auto", 1), ("gpu", 0)])
def test_without_room_and_by_name_the_kernels_stay_and_what_they_do_is_said(
    kernels: Kernels, lacking: int, on_fake_gpu: Callable[..., PreTrainedModel]
) -> None:
    model = on_fake_gpu(torch.float32, lacking)
    use_kernels(model, kernels)
    assert str(describe(model)).startswith("gpu a GPU;") and str(describe(model)).endswith(f"; {UNPACKED}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_activations_of_16_bits_are_multiplied_packed_and_nothing_is_said(
    dtype: torch.dtype, on_fake_gpu: Callable[..., PreTrainedModel]
) -> None:
    model = on_fake_gpu(dtype)
    use_kernels(model, "auto")
    assert str(describe(model)).startswith("gpu a GPU;") and "activations" not in str(describe(model))


def test_a_selection_for_other_activations_is_made_again(on_fake_gpu: Callable[..., PreTrainedModel]) -> None:
    model = on_fake_gpu(torch.float32)
    use_kernels(model, "auto")
    model.get_input_embeddings().bfloat16()
    use_kernels(model, "auto")
    assert str(describe(model)).startswith("gpu a GPU;")


def test_loading_reports_it(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "refuses", lambda where: None)
    told: list[str] = []
    slimlm.load(out, kernels="gpu", notify=told.append)
    assert told == [UNPACKED]


def test_a_device_that_is_no_gpu_has_no_room() -> None:
    assert free_on_gpu(torch.device("cpu")) == 0
