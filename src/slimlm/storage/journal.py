"""The journal of a run: what is finished, kept beside the output until all is, so that no more than a block is ever lost.

    OUT.partial/              inside OUT, as slimlm.partial, where OUT is a folder already
      journal.json            what the run is (its identity), notes, finished blocks, records of their layers, checksums
      block-0003.safetensors  the packed tensors of a finished block, under the names that they will have in the checkpoint
      inputs-0003.safetensors the activations with which the next block begins; the file before is removed
      ...                     one small file per note that holds tensors (the calibration windows)
      slimlm.aside/           what a run found that was told to restart, until it has begun (slimlm.storage.set_aside)

A commit writes the block's files, each beside its name, synced and renamed, and then journal.json in the same way, with their
SHA-256 in it. A run that is killed at any moment therefore finds the journal as the last commit left it; files that it does
not name are leftovers. journal.json holds a checksum of itself.

Two runs are the same when their identities are: plain data in which the run says what its result depends on. Weights are
compared whole as well: see `meet_weights`.

Of several ranks (slimlm.distributed) the first keeps the journal. The others hold their share of the activations in a folder of
their own and send it there, so the file of activations is whole, and any number of ranks can go on with it.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.distributed.group import ALONE, Group
from slimlm.storage import set_aside
from slimlm.storage.mapping import MappedFile, map_file
from slimlm.storage.streams import NEW, check_sum, is_plain_name, sha256_of, sync_folder, write_stream, write_tensors, written

FORMAT = 2
INSIDE = "slimlm.partial"
"""The journal's name where the output folder is there already."""
INSIDE_LOG = "slimlm.log.jsonl"
"""The log's name there; see slimlm.run.log."""
PLAN, OWN_TEXT, TEXT = "plan", "own_text", "text"
"""Notes: what was planned; the calibration windows, written by the model itself or drawn from a text."""
WEIGHTS = "weights"
"""The note that holds a checksum of every block's weights."""
MOVING = "moving"
"""The note that names the files that are on their way to the output folder."""
_JOURNAL = "journal.json"
_LOCK = "slimlm.lock"
"""Made before anything else and removed after all else: a folder that lacks it is no journal, and is left alone."""


class Batches(Sequence[Tensor]):
    """Activations in a file, a batch `[windows, length, width]` at a time: each access reads a copy."""

    def __init__(self, file: MappedFile, name: str, windows: int, share: slice) -> None:
        """windows: of a batch. share: those windows of the file that count."""
        self._file = file
        self._batches = file.tensors[name][share].split(windows)

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, which: int) -> Tensor: ...
    @overload
    def __getitem__(self, which: slice) -> list[Tensor]: ...
    def __getitem__(self, which: int | slice) -> Tensor | list[Tensor]:
        if isinstance(which, slice):
            return [self[i] for i in range(len(self))[which]]
        view = self._batches[which]
        copy = view.clone()
        self._file.release([view])
        return copy


@dataclass(frozen=True)
class Finished:
    """A block that is done."""

    name: str
    file: str
    sha256: str
    layers: dict[str, Any]
    """what the checkpoint's config will say of its compressed layers, by full name"""
    records: list[dict[str, Any]]
    """of its layers, as `LayerRecord` fields"""


@dataclass
class Journal:
    """What a run has finished. Use `open_journal`."""

    folder: Path
    group: Group = ALONE
    """the ranks of the run; only the first one's journal is kept"""
    shares: tuple[int, ...] = ()
    """windows of each rank, consecutive ones"""
    in_memory: bool = True
    """whether activations stay in memory beside their file"""
    identity: dict[str, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    blocks: list[Finished] = field(default_factory=list)
    inputs: dict[str, str] | None = None
    """name and checksum of the file that holds the activations with which to go on"""
    seconds: float = 0.0
    """that the finished blocks took, in all runs together"""
    opened: float = field(default_factory=time.monotonic)
    """when this process began, on its own clock"""
    seconds_before: float = 0.0
    """`seconds` at that time"""
    restarting: bool = False
    """whether the journal of the run before is still there, set aside; see `begin`"""

    @property
    def worth(self) -> bool:
        """Whether anything is kept that takes time to make again and outlives a failure."""
        return not self.restarting and self._holds_work

    @property
    def _holds_work(self) -> bool:
        return bool(self.blocks) or bool({PLAN, OWN_TEXT} & self.notes.keys())

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken by now, in all processes that worked on it, what was lost not counted."""
        return self.seconds_before + time.monotonic() - self.opened

    def begin(self) -> None:
        """Say that nothing stands in the way of the first block: only now the run that is to be dropped is."""
        if self.restarting:
            set_aside.drop(self.folder)
            self.restarting = False

    def meet(self, identity: dict[str, Any], alike: Iterable[str] = ()) -> None:
        """Say what this run is: a new journal is begun with it, and one that is there must have the same.

        alike: keys in which the ranks must agree. Raises CheckpointError, with what differs, where another run was begun here,
        and where a rank has another model or another version than the first.
        """
        identity = json.loads(json.dumps(identity))
        if self.group.first:
            self._meet(identity)
        theirs = self.group.told(lambda: identity)
        if others := [words for key in alike for words in _differences(theirs[key], identity[key], key)]:
            raise CheckpointError(f"the ranks are not alike; what the first has, and this one: {'; '.join(others[:5])}")

    def _meet(self, identity: dict[str, Any]) -> None:
        if self.identity is None:
            self.identity = identity
            return
        changed = list(_differences(self.identity, identity))
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CheckpointError(
                f"{self.folder} holds another run, with {len(self.blocks)} finished blocks; what differs: "
                f"{'; '.join(changed[:5])}{more}. Type that run's line again to go on with it, give another output folder, "
                "or add --restart to drop it and begin anew"
            )

    def meet_weights(self, checksums: dict[str, str]) -> None:
        """Say what all weights are, by block: a journal without a note of it takes one, and one that has it must have the same.

        The identity is compared before any tensor is read whole; this finds what it does not see. Raises CheckpointError,
        naming the blocks whose weights have changed.
        """
        noted = self.notes.get(WEIGHTS)
        if noted is None:
            self.note(WEIGHTS, checksums)
        elif changed := [name for name in {**noted, **checksums} if noted.get(name) != checksums.get(name)]:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise CheckpointError(
                f"the run in {self.folder} was begun on other weights: {', '.join(changed[:3])}{more} changed since. Bring the "
                "model's files back to go on, or add --restart to begin anew"
            )

    def note(self, key: str, value: Any) -> None:
        """Keep plain data."""
        self._write(notes={**self.notes, key: value})

    def note_tensor(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{key}.safetensors"
        self.note(key, {"file": name, "sha256": write_tensors(self.folder / name, {key: tensor})})

    def noted_tensor(self, key: str) -> Tensor | None:
        """A tensor that was kept."""
        about = self.notes.get(key)
        if about is None:
            return None
        self._check(about)
        return map_file(self.folder / about["file"]).tensors[key].clone()

    def put_inputs(self, streams: Mapping[str, Iterable[Tensor]]) -> dict[str, Sequence[Tensor]]:
        """Keep the activations with which the first block begins; see `commit`."""
        if self.group.size > 1:
            streams = own = self._computed(streams)
            if not self.group.first:
                self._send(0, own)
                return own
        inputs, held = self._put_inputs("inputs-0000.safetensors", streams)
        self._write(inputs=inputs)
        return held

    def commit(
        self,
        block_name: str,
        tensors: dict[str, Tensor],
        layers: dict[str, Any],
        records: list[dict[str, Any]],
        streams: Mapping[str, Iterable[Tensor]],
    ) -> dict[str, Sequence[Tensor]]:
        """Keep a finished block, and the activations with which the next begins; gives these, in memory or from the file.

        tensors: the block's, by full name. layers, records: see `Finished`. streams: this rank's activations by name, in
        batches `[windows, length, width]`. Raises OSError where the disk refuses; the journal is then as before.
        """
        if self.group.size > 1:
            streams = own = self._computed(streams)
            if not self.group.first:
                self._send(0, own)
                return own
        name = f"block-{len(self.blocks) + 1:04d}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        block = Finished(block_name, name, write_tensors(self.folder / name, tensors), layers, records)
        before = self.inputs
        inputs, held = self._put_inputs(f"inputs-{len(self.blocks) + 1:04d}.safetensors", streams)
        self._write(blocks=[*self.blocks, block], inputs=inputs, seconds=self.elapsed)
        if before is not None:
            (self.folder / before["file"]).unlink(missing_ok=True)
        return held

    @property
    def share(self) -> int:
        """Windows of this rank."""
        return self.shares[self.group.rank]

    def _computed(self, streams: Mapping[str, Iterable[Tensor]]) -> dict[str, Sequence[Tensor]]:
        """Activations of this rank, all computed before it waits for another."""
        return {key: self.spill(key, stream, self.share) for key, stream in streams.items()}

    def _send(self, to: int, streams: Mapping[str, Sequence[Tensor]]) -> None:
        for batches in streams.values():
            self.group.send(to, batches)

    def _put_inputs(
        self, name: str, streams: Mapping[str, Iterable[Tensor]]
    ) -> tuple[dict[str, str], dict[str, Sequence[Tensor]]]:
        """Write the activations of all ranks to a file of their own; gives what the journal says of it, and this rank's."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sources = {key: iter(stream) for key, stream in streams.items()}
        first = next(sources[next(iter(sources))])
        held: dict[str, list[Tensor]] = {key: [] for key in sources}

        def pieces() -> Iterator[Tensor]:
            for number, (key, source) in enumerate(sources.items()):
                for piece in chain([first] if number == 0 else [], source):
                    if self.in_memory:
                        held[key].append(piece)
                    yield piece
                for rank in range(1, self.group.size):
                    yield from self.group.receive(rank)

        about = dict.fromkeys(sources, (first.dtype, (sum(self.shares), *first.shape[1:])))
        inputs = {"file": name, "sha256": write_stream(self.folder / name, about, pieces())}
        return inputs, dict(held) if self.in_memory else self._batches(inputs, len(first), 0)

    def held_inputs(self, batch: int) -> dict[str, Sequence[Tensor]]:
        """This rank's activations with which to go on, `batch` windows at a time, in memory or from a file."""
        assert self.inputs is not None
        file = self.folder / self.inputs["file"]
        names = self.group.told(lambda: list(map_file(file).tensors))
        if not self.group.first:
            return {key: self.spill(key, self.group.receive(0), self.share) for key in names}
        for rank in range(1, self.group.size):
            self._send(rank, self._batches(self.inputs, batch, rank))
        found = self._batches(self.inputs, batch, 0)
        return {key: list(batches) for key, batches in found.items()} if self.in_memory else found

    def _batches(self, about: dict[str, str], batch: int, rank: int) -> dict[str, Sequence[Tensor]]:
        """A rank's share of a file of activations."""
        file = map_file(self.folder / about["file"])
        begin = sum(self.shares[:rank])
        share = slice(begin, begin + self.shares[rank])
        return {key: Batches(file, key, batch, share) for key in file.tensors}

    def spill(self, key: str, batches: Iterable[Tensor], count: int) -> Sequence[Tensor]:
        """Hold activations until they are dropped: in memory, or in a file that the journal does not name."""
        if self.in_memory:
            return list(batches)
        source = iter(batches)
        first = next(source)
        path = self.folder / f"{key}.spilled"
        write_stream(path, {key: (first.dtype, (count, *first.shape[1:]))}, chain([first], source))
        file = map_file(path)
        # The mapping keeps the data; the name is not needed any more.
        path.unlink()
        return Batches(file, key, len(first), slice(count))

    def gathered(self, key: str, batches: Sequence[Tensor], batch: int) -> Sequence[Tensor]:
        """The activations of all ranks, `batch` windows at a time, held on the first one as `spill` does; elsewhere none."""
        if self.group.size == 1:
            return batches
        if not self.group.first:
            self.group.send(0, batches)
            return []
        others = (self.group.receive(rank) for rank in range(1, self.group.size))
        return self.spill(key, _rebatched(chain(batches, *others), batch), sum(self.shares))

    def spill_tensors(self, key: str, tensors: dict[str, Tensor]) -> MappedFile:
        """Hold tensors in a file that the journal does not name."""
        path = self.folder / f"{key}.spilled"
        write_tensors(path, tensors)
        file = map_file(path)
        path.unlink()
        return file

    def tensors(self) -> tuple[dict[str, Tensor], Callable[[Iterable[Tensor]], int]]:
        """All tensors of finished blocks by name, mapped, and what drops their pages; every file is checked first."""
        found: dict[str, Tensor] = {}
        files = []
        for block in self.blocks:
            self._check({"file": block.file, "sha256": block.sha256})
            files.append(map_file(self.folder / block.file))
            found |= files[-1].tensors

        def release(tensors: Iterable[Tensor]) -> int:
            wanted = list(tensors)
            return sum(file.release(wanted) for file in files)

        return found, release

    def check(self) -> None:
        """Raise CheckpointError where a file that the journal names is missing or changed."""
        files = [{"file": block.file, "sha256": block.sha256} for block in self.blocks]
        files += [note for note in self.notes.values() if isinstance(note, dict) and note.keys() == {"file", "sha256"}]
        for about in [*files, *([] if self.inputs is None else [self.inputs])]:
            self._check(about)

    def _check(self, about: dict[str, str]) -> None:
        if not is_plain_name(about["file"]):
            raise self._damaged(f"it names a file outside its folder: {about['file']!r}")
        try:
            check_sum(self.folder / about["file"], about["sha256"])
        except CheckpointError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the unfinished run in {self.folder} is damaged: {reason}. It cannot be gone on with; add --restart to drop it "
            "and begin anew"
        )

    def _write(self, **changes: Any) -> None:
        """Put these fields into journal.json, and only then here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fields = {**vars(self), **changes}
        content = {key: fields[key] for key in ("identity", "notes", "inputs", "seconds")}
        content["blocks"] = [vars(block) for block in fields["blocks"]]
        data = {"format": FORMAT, "sha256": _sum_of(content), "content": content}
        with written(self.folder / _JOURNAL) as file:
            file.write(json.dumps(data, indent=1).encode())
        for key, value in changes.items():
            setattr(self, key, value)

    def read(self) -> None:
        """Take what an earlier run left; raises CheckpointError where it is damaged."""
        path = self.folder / _JOURNAL
        if not path.is_file():
            return
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise CheckpointError(
                    f"{path} has format {data['format']!r}; this slimlm goes on with {FORMAT}. Go on with the slimlm that "
                    "began the run, or add --restart to begin anew"
                )
            content = data["content"]
            if _sum_of(content) != data["sha256"]:
                raise self._damaged(f"{path.name} is not what was written (its checksum differs)")
            self.blocks = [Finished(**block) for block in content["blocks"]]
            self.identity, self.notes, self.inputs = content["identity"], content["notes"], content["inputs"]
            self.seconds = self.seconds_before = content["seconds"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise self._damaged(f"{path.name} cannot be read ({error})") from error
        self.check()

    def hand_out(self) -> None:
        """Let all ranks know what the first one's journal holds."""
        own = {"notes": self.notes, "inputs": self.inputs, "blocks": [vars(block) for block in self.blocks]}
        held = self.group.told(lambda: own)
        self.notes, self.inputs = held["notes"], held["inputs"]
        self.blocks = [Finished(**block) for block in held["blocks"]]

    def tidy(self) -> None:
        """Remove what a killed run left and the journal does not name."""
        if self.identity is None:
            _empty(self.folder)
        for path in self.folder.glob("*"):
            if path.name.endswith((NEW, ".spilled")) or (path.name.startswith(("block-", "inputs-")) and not self._names(path)):
                path.unlink()

    def _names(self, path: Path) -> bool:
        inputs = [] if self.inputs is None else [self.inputs["file"]]
        return path.name in {*(block.file for block in self.blocks), *inputs}

    def remove(self) -> None:
        """Drop everything; what cannot be removed is left, and no longer a journal."""
        with suppress(OSError):
            _empty(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


def _rebatched(pieces: Iterable[Tensor], batch: int) -> Iterator[Tensor]:
    """The same windows, so many in each batch but the last."""
    left: Tensor | None = None
    for piece in pieces:
        left = piece if left is None or not len(left) else torch.cat([left, piece])
        while len(left) >= batch:
            yield left[:batch]
            left = left[batch:]
    if left is not None and len(left):
        yield left


def journal_folder(out: Path) -> Path:
    """Where the journal of a run that writes `out` is: beside it, or inside where it is there already."""
    beside = out.absolute().parent / f"{out.absolute().name}.partial"
    return out.absolute() / INSIDE if out.is_dir() and not beside.is_dir() else beside


@contextmanager
def open_journal(out: Path, *, restart: bool, group: Group = ALONE) -> Iterator[Journal]:
    """The journal of the run that writes `out`, locked meanwhile; one that keeps nothing worth keeping is removed at the end.

    restart: what is there is set aside, dropped by `Journal.begin`, and put back where the run ends or is killed before.
    Ranks other than the first get a journal that knows what the first one's held at the beginning, with a folder for the time
    being. Raises CheckpointError where another process writes the same output, where the journal is
    damaged, or where the disk refuses.
    """
    if group.first:
        with _opened(out, restart=restart) as journal:
            journal.group = group
            journal.hand_out()
            yield journal
        return
    with TemporaryDirectory(prefix="slimlm-") as scratch:
        journal = Journal(Path(scratch), group)
        journal.hand_out()
        yield journal


@contextmanager
def _opened(out: Path, *, restart: bool) -> Iterator[Journal]:
    journal = Journal(journal_folder(out))
    try:
        there = journal.folder.is_dir()
        _made(journal.folder)
        if there and any(journal.folder.iterdir()) and not _is_journal(journal.folder):
            raise CheckpointError(
                f"{journal.folder} is where an unfinished run is kept, but holds something else; move it away"
            )
        lock = FileLock(journal.folder / _LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another process is writing {out}: {journal.folder} is locked. Wait for it, or give another output folder"
        ) from error
    except OSError as error:
        raise _cannot_keep(journal, error) from error
    try:
        try:
            set_aside.settle(journal.folder, _JOURNAL, _LOCK)
            journal.restarting = restart and set_aside.set_aside(journal.folder, _JOURNAL, _LOCK)
            journal.read()
            journal.tidy()
        except OSError as error:
            raise _cannot_keep(journal, error) from error
        try:
            yield journal
        finally:
            if journal.restarting:
                with suppress(OSError):
                    # The next run does what the disk refuses now.
                    set_aside.settle(journal.folder, _JOURNAL, _LOCK)
            elif not journal.worth:
                journal.remove()
    finally:
        lock.release()


def _cannot_keep(journal: Journal, error: OSError) -> CheckpointError:
    return CheckpointError(f"an unfinished run cannot be kept in {journal.folder}: {error.strerror or error}")


def _made(folder: Path) -> None:
    """Make a folder whose name outlives a loss of power."""
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)


def _empty(folder: Path) -> None:
    """Drop a journal: what says what it holds first, so that one that is dropped in part only is empty, not damaged."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != _JOURNAL):
        if path.name in set_aside.FOLDERS:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _is_journal(folder: Path) -> bool:
    """Whether a folder was made by `open_journal`: nothing else is dropped or written over."""
    return (folder / _LOCK).exists()


def moved_already(out: Path) -> set[str]:
    """Names in the folder `out` that belong to an unfinished run: journal, log, and what it was killed while moving there."""
    path = journal_folder(out) / _JOURNAL
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))["content"]["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        # The run itself says what is wrong with its journal.
        return {INSIDE, INSIDE_LOG}
    names = notes.get(MOVING, [])
    return {INSIDE, INSIDE_LOG, *names, *(name + NEW for name in names)}


def _sum_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differences(was: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where two pieces of plain data differ, in words."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            yield from _differences(was.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for i, (one, other) in enumerate(zip(was, now, strict=True)):
            yield from _differences(one, other, f"{where}[{i}]")
    elif was != now:
        yield f"{where} was {_short(was)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def identity_of(files: Iterable[Path]) -> dict[str, str]:
    """What tells weight files from others, by name: size, and SHA-256 of the header and of each tensor's first 4 KiB.

    Other files (.bin) are read whole. So a gigabyte of safetensors costs milliseconds; two models that differ nowhere in
    what is read, and in size neither, are taken for the same.
    """
    found = {}
    for path in files:
        checksum = _sampled(path) if path.suffix == ".safetensors" else sha256_of(path)
        found[path.name] = f"{path.stat().st_size} bytes, {checksum[:32]}"
    return found


_SAMPLE = 4096


def _sampled(path: Path) -> str:
    mapped = map_file(path, pass_over=True)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        sum_of = hashlib.sha256(file.read(length))
    for tensor in mapped.tensors.values():
        if tensor.numel():
            sum_of.update(tensor.reshape(-1).view(torch.uint8)[:_SAMPLE].numpy().data)
    return sum_of.hexdigest()
