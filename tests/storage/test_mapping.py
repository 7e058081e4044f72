"""Tensors of a mapped file have the values of the file, cost no memory until read, and give it back."""

import mmap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.storage.mapping import MappedFiles, map_and_unlink, map_file
from tests.memory import MIB, needs_smaps, resident


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def several() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(37, 5, generator=generator)
    return {
        "float32": values,
        "bfloat16": values.bfloat16(),
        "float16": values.half()[:, :3].contiguous(),
        "uint8": (values * 50).to(torch.uint8)[:13],
        "int64": (values * 1000).long(),
        "bool": values > 0,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }


def large(path: Path) -> Path:
    """Three tensors of 16 MiB, one after another."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(256, (3, 16 * MIB), generator=generator, dtype=torch.uint8)
    return written(path, dict(zip("abc", drawn, strict=True)))


def total(tensor: Tensor) -> int:
    return int(tensor.view(-1, 4096).sum(dtype=torch.int64))


def test_mapped_tensors_equal_those_of_the_safetensors_library(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", several())
    mapped = map_file(path)
    assert mapped.tensors.keys() == several().keys()
    assert mapped.metadata == {"format": "pt"}
    for name, tensor in load_file(path).items():
        assert mapped.tensors[name].dtype == tensor.dtype
        assert mapped.tensors[name].shape == tensor.shape
        assert torch.equal(mapped.tensors[name], tensor), name


def test_tensors_outlive_the_mapping_s_own_name_and_the_file(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", several())
    tensor = map_file(path).tensors["float32"]
    path.unlink()
    assert torch.equal(tensor, several()["float32"])


def test_each_tensor_has_a_storage_of_its_own_size(tmp_path: Path) -> None:
    for tensor in map_file(written(tmp_path / "x.safetensors", several())).tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", several())
    map_file(path).tensors["float32"].zero_()
    assert torch.equal(map_file(path).tensors["float32"], several()["float32"])


def test_data_that_the_file_does_not_align_are_read_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    values = torch.tensor([1.5, -2.25])
    header = (
        b'{"byte":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"values":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07" + values.numpy().tobytes())
    mapped = map_file(path).tensors
    assert mapped["byte"].tolist() == [7]
    assert torch.equal(mapped["values"], values)


@pytest.mark.parametrize("spoil", ["cut", "empty", "text", "longer"])
def test_a_file_that_is_damaged_is_named(tmp_path: Path, spoil: str) -> None:
    path = written(tmp_path / "x.safetensors", several())
    data = path.read_bytes()
    path.write_bytes({"cut": data[:-1], "empty": b"", "text": b"no tensors at all", "longer": data + b"12345678"}[spoil])
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a readable safetensors file"):
        map_file(path)


@needs_smaps
def test_mapping_reads_next_to_nothing(tmp_path: Path) -> None:
    path = large(tmp_path / "x.safetensors")
    mapped = map_file(path)
    assert resident(path) < 4 * MIB
    total(mapped.tensors["b"])
    # A fault brings in some neighbouring pages that the system has at hand.
    assert 16 * MIB <= resident(path) < 20 * MIB


@needs_smaps
def test_released_pages_leave_memory_and_come_back_with_their_values(tmp_path: Path) -> None:
    path = large(tmp_path / "x.safetensors")
    mapped = map_file(path)
    sums = {name: total(tensor) for name, tensor in mapped.tensors.items()}
    assert resident(path) >= 48 * MIB
    dropped = mapped.release([mapped.tensors["b"]])
    # The pages at its two ends hold its neighbours' bytes too, and stay.
    assert 16 * MIB - 2 * mmap.PAGESIZE <= dropped <= 16 * MIB
    assert resident(path) <= 33 * MIB
    assert {name: total(tensor) for name, tensor in mapped.tensors.items()} == sums
    assert torch.equal(mapped.tensors["b"], load_file(path)["b"])


@needs_smaps
def test_a_page_shared_by_two_released_neighbours_goes_too(tmp_path: Path) -> None:
    path = large(tmp_path / "x.safetensors")
    mapped = map_file(path)
    one, other = (mapped.release([mapped.tensors[name]]) for name in "ab")
    assert mapped.release([mapped.tensors["b"], mapped.tensors["a"]]) > one + other


def test_memory_that_is_no_view_of_the_file_is_never_released(tmp_path: Path) -> None:
    mapped = map_file(written(tmp_path / "x.safetensors", {"a": torch.ones(3 * MIB)}))
    other = map_file(written(tmp_path / "y.safetensors", {"a": torch.full((3 * MIB,), 2.0)}))
    copy = mapped.tensors["a"].clone()
    other.tensors["a"].add_(1)
    assert mapped.release([copy, other.tensors["a"], torch.empty(5, device="meta")]) == 0
    assert bool((copy == 1).all()) and bool((other.tensors["a"] == 3).all())


def test_the_neighbours_of_a_released_tensor_keep_what_was_written_to_them(tmp_path: Path) -> None:
    tensors = {name: torch.full((10_000,), ord(name), dtype=torch.uint8) for name in "abc"}
    mapped = map_file(written(tmp_path / "x.safetensors", tensors))
    mapped.tensors["a"].fill_(1)
    mapped.tensors["c"].fill_(2)
    mapped.release([mapped.tensors["b"]])
    assert bool((mapped.tensors["a"] == 1).all()) and bool((mapped.tensors["c"] == 2).all())
    assert bool((mapped.tensors["b"] == ord("b")).all())


def test_several_files_are_one_set_of_tensors_that_gives_its_pages_back(tmp_path: Path) -> None:
    big = torch.arange(2**14, dtype=torch.float32)
    for name in ("a", "b"):
        save_file({name: big.clone()}, tmp_path / f"{name}.safetensors")
    files = MappedFiles.of([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])
    assert list(files.files) == ["a.safetensors", "b.safetensors"] and files.tensors.keys() == {"a", "b"}
    assert all(torch.equal(tensor, big) for tensor in files.tensors.values())
    one = files.release([files.tensors["b"]])
    assert one == files.files["b.safetensors"].release([files.tensors["b"]])
    assert files.release(iter(files.tensors.values())) == 2 * one
    assert files.release([torch.ones(2**14)]) == 0
    assert all(torch.equal(tensor, big) for tensor in files.tensors.values())


def test_a_file_without_a_name_keeps_its_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5.0)}, tmp_path / "a.safetensors")
    file = map_and_unlink(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == [] and torch.equal(file.tensors["a"], torch.arange(5.0))
