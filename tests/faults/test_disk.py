"""A disk that is full, read-only or another one: the run says so, keeps what is finished, and resumes when there is room."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.conftest import BLOCKS, Bench
from tests.faults.harness import Limits, Moment, kept, same


@dataclass(frozen=True)
class Disk:
    """A tmpfs, mounted for one test."""

    path: Path

    def mount(self, options: str) -> None:
        """Mount it, or change its options."""
        how = f"remount,{options}" if self.path.is_mount() else options
        ended = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(self.path)], capture_output=True, text=True, check=False
        )
        if ended.returncode != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {ended.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    disk = Disk(tmp_path / "disk")
    disk.path.mkdir()
    try:
        yield disk
    finally:
        if disk.path.is_mount():
            subprocess.run(["umount", str(disk.path)], check=True)


def grown(bench: Bench, disk: Disk, sizes: list[str], needed: str) -> list[int]:
    """Give the same command on a disk that grows, until it fits; gives how many blocks were kept after each refusal."""
    written = bench.lines("matched", disk.path / "o")
    journal = disk.path / "o.partial"
    found: list[int] = []
    for size in [*sizes, needed]:
        disk.mount(size)
        ended = bench.run(written, None, Limits(disk_free=2**40))
        if ended.code == 0:
            break
        ended.refused("No space left on device")
        now = kept(journal)
        if now:
            assert f"{len(now)} finished blocks are kept" in ended.said
        assert not found or len(now) >= found[-1], "finished blocks were lost"
        assert not list(disk.path.rglob("*.new")) and not (disk.path / "o").exists()
        found.append(len(now))
    assert ended.code == 0, ended
    bench.same(out=disk.path / "o")
    return found


def test_a_disk_that_is_too_small_is_refused_before_any_work(bench: Bench, disk: Disk) -> None:
    disk.mount("size=16k")
    bench.run(bench.lines("matched", disk.path / "o")).refused("the disk does not suffice")
    assert not list(disk.path.iterdir())


def test_a_disk_that_is_full_and_grows(bench: Bench, disk: Disk) -> None:
    found = grown(bench, disk, [f"size={size}k" for size in (4, 32, 96, 128)], "size=2m")
    assert found[0] == 0 and max(found) >= 1


def test_a_disk_without_room_for_names_that_grows(bench: Bench, disk: Disk) -> None:
    found = grown(bench, disk, [f"nr_inodes={number}" for number in (1, 3, 8, 11)], "nr_inodes=100")
    assert found[0] == 0 and len(found) >= 3


@pytest.mark.slow
def test_a_disk_that_grows_by_a_page_at_a_time(bench: Bench, disk: Disk) -> None:
    """Some seventy starts."""
    found = grown(bench, disk, [f"size={size}k" for size in range(4, 500, 4)], "size=2m")
    assert len(found) > 30 and set(found) == set(range(BLOCKS + 1))


@pytest.mark.slow
def test_a_disk_that_is_too_small_from_the_start(bench: Bench, disk: Disk) -> None:
    """Every size is met by a run that begins, not by one that resumes: some forty starts."""
    for size in range(8, 1000, 24):
        disk.mount(f"size={size}k")
        first = bench.run(bench.lines("matched", disk.path / "o"), None, Limits(disk_free=2**40))
        if first.code == 0:
            break
        first.refused("No space left on device")
        disk.mount("size=2m")
        bench.run(bench.lines("matched", disk.path / "o")).done()
        bench.same(out=disk.path / "o")
        shutil.rmtree(disk.path / "o")
    assert first.code == 0


def test_a_tokenizer_that_does_not_fit(bench: Bench, disk: Disk) -> None:
    """The library that writes it has errors of its own."""
    disk.mount("size=2m")
    written = bench.lines("matched", disk.path / "o")
    held = bench.start(written, Moment(("slimlm.storage.checkpoint:write_config",), 2, after=True, signal=signal.SIGSTOP))
    held.stopped()
    with (disk.path / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(4096))
    held.send(signal.SIGCONT)
    held.ended().refused("No space left on device", f"{BLOCKS} finished blocks are kept")
    (disk.path / "filler").unlink()
    bench.run(written).done()
    bench.same(out=disk.path / "o")


@pytest.mark.parametrize("size", [2_000, 20_000, 30_000])
def test_files_that_may_not_grow(size: int, bench: Bench) -> None:
    """As a quota has it, and where nothing can be mounted."""
    bench.run("matched", None, Limits(file_size=size)).refused("File too large")
    bench.goes_on()


def test_a_disk_that_is_read_only(bench: Bench, disk: Disk) -> None:
    disk.mount("size=2m")
    held = bench.run(bench.lines("matched", disk.path / "o"), Moment(("slimlm.run.block:measure",), 3))
    assert held.code == -signal.SIGKILL
    disk.mount("ro")
    for line in (bench.lines("matched", disk.path / "o"), bench.lines("matched", disk.path / "new" / "o")):
        bench.run(line).refused("cannot write to", "Read-only file system")
    assert len(kept(disk.path / "o.partial")) == 2
    disk.mount("rw")
    assert "resuming after block 2" in bench.run(bench.lines("matched", disk.path / "o")).done().said
    bench.same(out=disk.path / "o")


def test_a_folder_that_becomes_unwritable_in_the_middle(bench: Bench) -> None:
    held = bench.start("matched", Moment(("slimlm.run.block:measure",), 2, signal=signal.SIGSTOP))
    held.stopped()
    if subprocess.run(["chattr", "+i", str(bench.journal)], capture_output=True, check=False).returncode != 0:
        pytest.skip("a folder cannot be made immutable here (chattr +i)")
    try:
        held.send(signal.SIGCONT)
        held.ended().refused("Operation not permitted", "1 finished blocks are kept")
        bench.run().refused("Operation not permitted", "1 finished blocks are kept")
    finally:
        subprocess.run(["chattr", "-i", str(bench.journal)], check=True)
    bench.goes_on()


@pytest.mark.parametrize("parent", ["file", "/proc", "/dev/null"])
def test_a_parent_that_cannot_hold_a_folder(parent: str, bench: Bench) -> None:
    (bench.scratch / "file").write_text("x")
    line = bench.lines("matched", bench.scratch / parent / "o")
    bench.run(line).refused("cannot write to", "give a folder that can be written")


def test_a_file_where_the_journal_would_be(bench: Bench) -> None:
    bench.journal.write_text("mine")
    bench.run().refused("the journal of the run cannot be stored in")
    assert bench.journal.read_text() == "mine"


def test_a_link_to_nowhere(bench: Bench) -> None:
    bench.out.symlink_to(bench.scratch / "gone")
    bench.run().refused("is a link to", "which is not there")
    (bench.scratch / "gone").mkdir()
    bench.run().done()
    same(bench.undisturbed().out, bench.out)


def test_an_output_that_is_on_another_disk_than_its_parent(bench: Bench, disk: Disk) -> None:
    disk.mount("size=2m")
    bench.out.symlink_to(disk.path)
    assert bench.run("matched", Moment(("slimlm.run.block:measure",), 3)).code == -signal.SIGKILL
    assert len(kept(disk.path / "slimlm.partial")) == 2
    assert "resuming after block 2" in bench.run().done().said
    same(bench.undisturbed().out, disk.path)


def test_an_output_that_becomes_another_disk_than_its_journal(bench: Bench, disk: Disk) -> None:
    out = disk.path
    disk.path.rmdir()
    written = bench.lines("matched", out)
    assert bench.run(written, Moment(("slimlm.run.block:measure",), 3)).code == -signal.SIGKILL
    disk.path.mkdir()
    disk.mount("size=2m")
    bench.run(written).done()
    bench.same(out=out)
