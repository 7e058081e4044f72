"""Files that are written a tensor at a time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slimlm.storage.mapping import map_file
from slimlm.storage.streams import write_tensors


@pytest.mark.parametrize("length", range(1, 70, 7))
def test_data_begin_at_a_multiple_of_64_bytes_whatever_the_length_of_the_header(length: int, tmp_path: Path) -> None:
    tensors = {"x" * length: torch.arange(5), "y": torch.arange(7, dtype=torch.uint8)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    header = int.from_bytes((tmp_path / "t.safetensors").read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0
    mapped = map_file(tmp_path / "t.safetensors").tensors
    assert mapped["x" * length].data_ptr() % 64 == 0
    for name, tensor in load_file(tmp_path / "t.safetensors").items():
        assert torch.equal(tensor, tensors[name]) and torch.equal(mapped[name], tensors[name])
