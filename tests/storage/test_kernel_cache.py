"""Packed layers are made once, kept whole or not at all, and whatever stands in the way is reported."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects
from safetensors import safe_open
from torch import Tensor

from slimlm.storage.kernel_cache import ALIGNMENT, CacheWriter, cache_path, load_or_pack, open_cache

SIZES = {"model.layers.0.up": 1, "model.layers.0.down": 64, "model.layers.1.up": 4097, 'odd "name" é': 640, "none": 0}


def blob(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randint(256, (SIZES[name],), generator=generator, dtype=torch.uint8)


class Told(list[str]):
    """Collects the messages."""

    def __call__(self, text: str) -> None:
        self.append(text)


def sound(_: Tensor) -> bool:
    return True


def never(name: str) -> Tensor:
    raise AssertionError(f"{name} was made again")


def made(
    folder: Path, make: Callable[[str], Tensor] = blob, *, print_: str = "f1", layout: str = "fake-1"
) -> tuple[dict, Told]:
    told = Told()
    return load_or_pack(folder, layout, print_, list(SIZES), make, sound, told), told


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == SIZES.keys() and all(torch.equal(found[name], blob(name)) for name in SIZES)


def test_what_was_made_is_what_is_kept_and_is_not_made_again(tmp_path: Path) -> None:
    first, told = made(tmp_path)
    again, told_again = made(tmp_path, never)
    assert same(first) and same(again)
    assert told == told_again == []


def test_every_layer_is_aligned_in_the_file_and_in_memory(tmp_path: Path) -> None:
    first, _ = made(tmp_path)
    again, _ = made(tmp_path, never)
    for found in (first, again):
        assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in found.values())


def test_the_cache_is_a_safetensors_file_that_names_its_layout_and_checkpoint(tmp_path: Path) -> None:
    made(tmp_path)
    with safe_open(cache_path(tmp_path, "fake-1"), "pt") as file:
        assert {"layout": "fake-1", "fingerprint": "f1"}.items() <= file.metadata().items()
        for name in SIZES:
            assert torch.equal(file.get_tensor(name), blob(name))


def test_layers_are_made_one_at_a_time_and_none_is_held(tmp_path: Path) -> None:
    import weakref

    alive: list[weakref.ref[Tensor]] = []

    def make(name: str) -> Tensor:
        # The result before this one is freed by now, but for the name that the caller's loop still has for it.
        assert sum(ref() is not None for ref in alive) == 0
        fresh = blob(name)
        alive.append(weakref.ref(fresh))
        return fresh

    assert same(made(tmp_path, make)[0])
    assert len(alive) == len(SIZES)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"print_": "f2"}, "was made from another checkpoint"), ({"layout": "fake-2"}, "layout fake-1, not 1, fake-2")],
)
def test_a_stale_cache_is_named_and_made_again(tmp_path: Path, change: dict[str, str], words: str) -> None:
    made(tmp_path)
    path = cache_path(tmp_path, "fake-1")
    if "layout" in change:
        path = path.rename(cache_path(tmp_path, change["layout"]))
    found, told = made(tmp_path, **change)
    assert same(found)
    assert len(told) == 1 and str(path) in told[0] and words in told[0]
    assert made(tmp_path, never, **change)[1] == []


def test_a_cache_of_fewer_layers_is_made_again_with_all_of_them(tmp_path: Path) -> None:
    told = Told()
    load_or_pack(tmp_path, "fake-1", "f1", list(SIZES)[:2], blob, sound, told)
    found, said = made(tmp_path)
    assert same(found)
    assert told == said == []


def test_a_cache_of_more_layers_serves_those_asked_for(tmp_path: Path) -> None:
    made(tmp_path)
    some = list(SIZES)[1:3]
    told = Told()
    found = load_or_pack(tmp_path, "fake-1", "f1", some, never, sound, told)
    assert list(found) == some and told == []


def test_layers_whose_bytes_are_not_sound_are_named_and_made_again(tmp_path: Path) -> None:
    made(tmp_path)
    damaged = list(SIZES)[2]
    told = Told()
    size = blob(damaged).numel()
    found = load_or_pack(tmp_path, "fake-1", "f1", list(SIZES), blob, lambda packed: packed.numel() != size, told)
    assert same(found)
    assert len(told) == 1 and f"holds 1 damaged layers, {damaged} among them" in told[0]


@pytest.mark.parametrize("spoil", ["cut", "empty", "text", "header"])
def test_a_damaged_cache_is_named_and_made_again(tmp_path: Path, spoil: str) -> None:
    made(tmp_path)
    path = cache_path(tmp_path, "fake-1")
    data = path.read_bytes()
    spoilt = {"cut": data[:-64], "empty": b"", "text": b"not a cache of anything", "header": data[:20] + b"\0" + data[21:]}
    path.write_bytes(spoilt[spoil])
    found, told = made(tmp_path)
    assert same(found)
    assert len(told) == 1 and str(path) in told[0] and "is damaged" in told[0]
    assert made(tmp_path, never)[1] == []


def test_a_mapped_cache_keeps_its_values_while_another_takes_its_place(tmp_path: Path) -> None:
    first, _ = made(tmp_path)
    made(tmp_path, lambda name: blob(name) + 1, print_="f2")
    assert same(first)


def test_a_folder_that_cannot_be_written_to_is_told_once_and_done_without(tmp_path: Path) -> None:
    # A file where the folder should be refuses every user, root too.
    (tmp_path / ".cache").write_text("in the way")
    found, told = made(tmp_path)
    assert same(found)
    assert len(told) == 1 and "cannot be stored" in told[0] and "each load packs again" in told[0]


@pytest.mark.parametrize("at", ["fsync", "rename"])
def test_a_disk_that_is_full_at_the_end_is_told_once_and_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync" if at == "fsync" else "pathlib.Path.replace", full)
    found, told = made(tmp_path)
    assert same(found)
    assert len(told) == 1 and "No space left on device" in told[0]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_disk_that_is_full_half_way_is_told_once_and_done_without(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        found, told = made(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert same(found)
    assert len(told) == 1 and "File too large" in told[0]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_error_of_the_packing_is_not_taken_for_one_of_the_disk(tmp_path: Path) -> None:
    def broken(name: str) -> Tensor:
        raise OSError("a library is missing")

    with pytest.raises(OSError, match="a library is missing"):
        made(tmp_path, broken)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_half_a_cache_never_bears_the_name(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, "fake-1", "f1", list(SIZES)) as writer:
        for name in SIZES:
            writer.add(name, blob(name))
            assert open_cache(tmp_path, "fake-1", "f1", list(SIZES), sound, Told()) is None
        writer.finish()
    found = open_cache(tmp_path, "fake-1", "f1", list(SIZES), sound, Told())
    assert found is not None and same(found)


def test_what_a_killed_process_left_is_removed_after_an_hour_and_not_before(tmp_path: Path) -> None:
    path = cache_path(tmp_path, "fake-1")
    path.parent.mkdir(parents=True)
    old, young = (path.with_name(f".{path.name}.partial-{name}") for name in ("old", "young"))
    for left in (old, young):
        left.write_bytes(b"half")
    os.utime(old, (time.time() - 4000,) * 2)
    made(tmp_path)
    assert not old.exists() and young.exists()


def test_the_hub_s_tools_do_not_upload_the_cache(tmp_path: Path) -> None:
    made(tmp_path)
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert list(filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS)) == []


@pytest.mark.parametrize("count", [1, 7, 400])
def test_the_header_has_room_for_any_number_of_layers(tmp_path: Path, count: int) -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(count)]
    found = load_or_pack(
        tmp_path, "fake-1", "f1", names, lambda name: torch.full((65,), len(name), dtype=torch.uint8), sound, Told()
    )
    assert [int(found[name][-1]) for name in names] == [len(name) for name in names]
