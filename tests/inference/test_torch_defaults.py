"""Torch's defaults for new tensors, which a user may have set, reach neither the kernels' memory nor any number."""

from pathlib import Path
from typing import Any

import pytest
import torch

import slimlm
from slimlm.core.defaults import usual_defaults
from slimlm.core.errors import KernelError
from slimlm.runtime.cpu import bindings
from tests import forked
from tests.conftest import needs_kernels

CODE = """
import contextlib, sys, torch, slimlm
from slimlm.inference.generate import generate

ids = torch.arange(1, 13, device="cpu")[None]

def numbers(folder):
    model = slimlm.load(folder, keep=False)
    logits = model(ids).logits
    kept = slimlm.load(folder)(ids).logits
    made = generate(model, ids, max_new_tokens=6, stop_tokens=[])
    wide = slimlm.load(folder, kernels="reference", dtype="float32")(ids).logits
    return logits, kept, wide, made.tokens, made.decode_path

usual = [numbers(folder) for folder in sys.argv[1:]]
for setting in ("bfloat16", "float16", "float64", "meta", "context"):
    here = contextlib.nullcontext()
    if setting == "meta":
        torch.set_default_device("meta")
    elif setting == "context":
        here = torch.device("meta")
    else:
        torch.set_default_dtype(getattr(torch, setting))
    print(setting, flush=True)
    with here:
        for folder, expected in zip(sys.argv[1:], usual):
            found = numbers(folder)
            assert found[-1] == expected[-1], (found[-1], expected[-1])
            for one, other in zip(found[:-1], expected[:-1]):
                assert one.dtype == other.dtype and torch.equal(one, other), (folder, one, other)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
"""


@needs_kernels
def test_opened_models_compute_the_same_whatever_the_defaults_are(
    llama_folder: Path, text_file: Path, tmp_path: Path, server: None
) -> None:
    """In a process of its own, which memory that is written beyond its end would kill."""
    options: dict[str, Any] = {"recipe": "absmax", "data": str(text_file), "samples": 4, "length": 32}
    slimlm.compress(llama_folder, tmp_path / "dense-ends", **options)
    slimlm.compress(llama_folder, tmp_path / "packed-ends", embedding_bits=8, **options)
    said = tmp_path / "said.txt"
    done = forked.start(CODE, [str(tmp_path / "dense-ends"), str(tmp_path / "packed-ends")], said)
    done.join()
    assert done.exitcode == 0, said.read_text()


def test_a_model_is_compressed_the_same_whatever_the_defaults_are(llama_folder: Path, text_file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "slim", "data": str(text_file), "samples": 4, "length": 32}
    slimlm.compress(llama_folder, tmp_path / "usual", **options)
    torch.set_default_dtype(torch.float64)
    try:
        slimlm.compress(llama_folder, tmp_path / "wide", **options)
        assert slimlm.verify(tmp_path / "wide").sound
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    names = "model.safetensors"
    assert (tmp_path / "wide" / names).read_bytes() == (tmp_path / "usual" / names).read_bytes()


def test_the_defaults_are_those_of_before_afterwards_even_after_an_error() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(ValueError, match="mine"), torch.device("meta"), usual_defaults():
            assert torch.empty(0).dtype == torch.float32 and torch.empty(0).device.type == "cpu"
            raise ValueError("mine")
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(6, dtype=torch.bfloat16),
        torch.zeros(5),
        torch.zeros(6, device="meta"),
        torch.zeros(3, 4)[:, :2],
    ],
    ids=["dtype", "size", "device", "strides"],
)
def test_the_library_is_given_no_address_of_another_tensor_than_it_takes(tensor: torch.Tensor) -> None:
    with pytest.raises(KernelError, match=r"were to be given 6 torch\.float32 on the CPU, and the values are"):
        bindings.address(tensor, torch.float32, 6)
    fitting = torch.zeros(2, 3)
    assert bindings.address(fitting, torch.float32, 6) == fitting.data_ptr()
