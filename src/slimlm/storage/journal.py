"""The journal of a run: its finished blocks, stored next to the output until the run is done, so that at most a block is lost.

    OUT.partial/              inside OUT, as slimlm.partial, where OUT is a folder already
      journal.json            the run's identity, notes, finished blocks, records of their layers, checksums
      block-0003.safetensors  the packed tensors of a finished block, under the names that they will have in the checkpoint
      inputs-0003.safetensors the inputs of the next block; the previous file is removed
      state-0000060.safetensors of a run that tunes: the trained values, the optimizer's and the best form after so many steps
      ...                     one small file per note that holds tensors (the calibration samples)
      slimlm.aside/           the journal that a restarted run found, until it has begun (slimlm.storage.set_aside)

A commit writes the block's files, each under a temporary name, synced and renamed, and then journal.json in the same way, with
their SHA-256 in it. After a kill at any moment the journal is therefore in the state of the last commit; files that it does not
name are leftovers. journal.json holds a checksum of itself.

Two runs are the same when their identities are equal: plain data that the result depends on. All weights are compared as well:
see `Journal.match_weights`.

Of several ranks (slimlm.distributed) the first writes the journal; see slimlm.run.transport for the activations of the others.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from slimlm.core.errors import CheckpointError
from slimlm.storage import set_aside
from slimlm.storage.identity import differences
from slimlm.storage.mapping import TEMPORARY, MappedFiles, map_file
from slimlm.storage.streams import NEW, check_sum, is_plain_name, sync_folder, write_tensors, written

FORMAT = 2
INSIDE = "slimlm.partial"
"""The journal's name where the output folder exists already."""
INSIDE_LOG = "slimlm.log.jsonl"
"""The log's name in that folder; see slimlm.run.log."""
PLAN, OWN_TEXT, TEXT = "plan", "own_text", "text"
"""Notes: the plan; the calibration samples, written by the model itself or drawn from a text."""
HELD_BACK, DENSE_OUTPUTS = "held_back", "dense_outputs"
"""Notes: windows of the calibration text that are held back; the last block's outputs for them in the original model."""
WEIGHTS = "weights"
"""The note that holds a checksum of every block's weights."""
DENSE = "dense"
"""The note that holds the original model's perplexity on a few of the samples."""
STATE, STEPS, TEACHER = "state", "steps", "teacher"
"""Notes of a run that tunes: the trained values, what it has found after how many steps, and the original's hidden states."""
MOVING = "moving"
"""The note that names the files that are being moved to the output folder."""
_JOURNAL = "journal.json"
_LOCK = "slimlm.lock"
"""The lock file. It is created first and removed last: a folder without it is no journal, and is not touched."""


@dataclass(frozen=True)
class StoredFile:
    """A file of the journal."""

    file: str
    """The file's name in the journal's folder."""
    sha256: str
    """The file's checksum."""


@dataclass(frozen=True)
class BlockContent:
    """The data of a finished block that are stored."""

    name: str
    """The block's full name."""
    tensors: dict[str, Tensor]
    """Its tensors, by full name, as the checkpoint will hold them."""
    layers: dict[str, Any]
    """The entries of its compressed layers in the checkpoint's config, by full name."""
    records: list[dict[str, Any]]
    """The records of its layers, as `LayerRecord` fields."""


@dataclass(frozen=True)
class FinishedBlock:
    """A finished block in the journal."""

    name: str
    """The block's full name."""
    file: str
    """The name of the file that holds its tensors."""
    sha256: str
    """That file's checksum."""
    layers: dict[str, Any]
    """See `BlockContent`."""
    records: list[dict[str, Any]]
    """See `BlockContent`."""

    @property
    def stored(self) -> StoredFile:
        """The file that holds its tensors."""
        return StoredFile(self.file, self.sha256)


@dataclass(frozen=True)
class Content:
    """The content of journal.json."""

    identity: dict[str, Any] | None = None
    """The run's identity; None where no run was begun."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Plain data by name; of a note that holds a tensor, the fields of its `StoredFile`."""
    blocks: tuple[FinishedBlock, ...] = ()
    """The finished blocks, in the model's order."""
    inputs: StoredFile | None = None
    """The file of the next block's inputs."""
    seconds: float = 0.0
    """The time that the finished blocks took, in all runs together."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "identity": self.identity,
            "notes": dict(self.notes),
            "inputs": None if self.inputs is None else asdict(self.inputs),
            "seconds": self.seconds,
            "blocks": [vars(block) for block in self.blocks],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Content":
        """The inverse of `to_dict`; raises KeyError or TypeError where `data` is something else."""
        return cls(
            identity=data["identity"],
            notes=data["notes"],
            blocks=tuple(FinishedBlock(**block) for block in data["blocks"]),
            inputs=None if data["inputs"] is None else StoredFile(**data["inputs"]),
            seconds=data["seconds"],
        )

    @property
    def holds_work(self) -> bool:
        """Whether there is anything that takes long to compute again."""
        return bool(self.blocks) or bool({PLAN, OWN_TEXT, STATE, TEACHER} & self.notes.keys())

    @property
    def finished(self) -> str:
        """What is finished, such as "3 finished blocks"."""
        if STEPS in self.notes:
            return f"{self.notes[STEPS]['done']} finished steps"
        return f"{len(self.blocks)} finished blocks"

    @property
    def files(self) -> list[StoredFile]:
        """Every file that journal.json names."""
        noted = [note for note in self.notes.values() if isinstance(note, dict) and note.keys() == {"file", "sha256"}]
        inputs = [] if self.inputs is None else [self.inputs]
        return [*(block.stored for block in self.blocks), *(StoredFile(**note) for note in noted), *inputs]


class Journal:
    """The journal of a run; `open_journal` opens the one of an output folder."""

    def __init__(self, folder: Path, content: Content | None = None, *, restarting: bool = False) -> None:
        """Make a journal of a folder that exists.

        Args:
            folder: The journal's folder.
            content: The content of its journal.json; None: there is none.
            restarting: Whether the journal of an earlier run is set aside in the folder.
        """
        self.folder = folder
        self._content = Content() if content is None else content
        self._restarting = restarting
        self._opened = time.monotonic()
        self._seconds_before = self._content.seconds

    @property
    def content(self) -> Content:
        """The content of journal.json."""
        return self._content

    @property
    def blocks(self) -> tuple[FinishedBlock, ...]:
        """The finished blocks, in the model's order."""
        return self._content.blocks

    @property
    def notes(self) -> Mapping[str, Any]:
        """Plain data by name."""
        return self._content.notes

    @property
    def inputs(self) -> Path | None:
        """The file of the next block's inputs; None before the first block's are computed."""
        return None if self._content.inputs is None else self.folder / self._content.inputs.file

    @property
    def restarting(self) -> bool:
        """Whether the journal of an earlier run is still set aside in the folder; see `begin`."""
        return self._restarting

    @property
    def holds_work(self) -> bool:
        """Whether it holds anything that takes long to compute again and remains after a failure."""
        return not self._restarting and self._content.holds_work

    @property
    def elapsed(self) -> float:
        """Seconds that the run has taken so far, in all processes that worked on it; lost work is not counted."""
        return self._seconds_before + time.monotonic() - self._opened

    def begin(self) -> None:
        """Drop the journal that `restart` replaces, once all checks before the first block have passed."""
        if self._restarting:
            set_aside.drop(self.folder)
            self._restarting = False

    # The run's identity

    def match_identity(self, identity: dict[str, Any]) -> None:
        """Begin a new journal with this identity, or compare it with the identity in the journal.

        Raises:
            CheckpointError: The journal is another run's; the message says what differs.
        """
        identity = json.loads(json.dumps(identity))
        if self._content.identity is None:
            # It is written with the first note, so that a run that is refused before leaves nothing.
            self._content = replace(self._content, identity=identity)
            return
        changed = list(differences(self._content.identity, identity))
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CheckpointError(
                f"{self.folder} holds another run, with {self._content.finished}; what differs: "
                f"{'; '.join(changed[:5])}{more}. Repeat that run's call to resume it, give another output folder, "
                "or pass `restart` to drop it and start again"
            )

    def match_weights(self, checksums: dict[str, str]) -> None:
        """Store the checksums of all weights, by block, or compare them with those in the journal.

        The identity covers only samples of the weights; this finds changes anywhere in them.

        Raises:
            CheckpointError: Weights have changed; the message names the blocks.
        """
        noted = self.notes.get(WEIGHTS)
        if noted is None:
            self.note(WEIGHTS, checksums)
        elif changed := [name for name in {**noted, **checksums} if noted.get(name) != checksums.get(name)]:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise CheckpointError(
                f"the run in {self.folder} was begun on other weights: {', '.join(changed[:3])}{more} changed since. Bring the "
                "model's files back to resume it, or pass `restart` to start again"
            )

    # Its content

    def note(self, key: str, value: Any) -> None:
        """Store plain data."""
        self._write(replace(self._content, notes={**self.notes, key: value}))

    def note_tensor(self, key: str, tensor: Tensor) -> None:
        """Store a tensor of any shape `[...]`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{key}.safetensors"
        self.note(key, asdict(StoredFile(name, write_tensors(self.folder / name, {key: tensor}))))

    def noted_tensor(self, key: str) -> Tensor | None:
        """A tensor that was stored with `note_tensor`; None where there is none."""
        noted = self.notes.get(key)
        if noted is None:
            return None
        stored = StoredFile(noted["file"], noted["sha256"])
        self._check(stored)
        return map_file(self.folder / stored.file).tensors[key].clone()

    def note_file(self, key: str, name: str, sha256: str) -> None:
        """Name a file of this folder, which is complete and on the disk."""
        self.note(key, asdict(StoredFile(name, sha256)))

    def noted_file(self, key: str) -> Path | None:
        """The path of a file that a note names; None where there is none."""
        noted = self.notes.get(key)
        return None if noted is None else self.folder / noted["file"]

    def commit_steps(self, steps: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Store the state of a run that tunes in place of the previous one, which is dropped afterwards.

        Args:
            steps: Plain data; `done` is the number of steps that are done.
            tensors: All tensors of the state, of any shapes `[...]`, by name.
        """
        former = self.noted_file(STATE)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"state-{steps['done']:07d}.safetensors"
        state = asdict(StoredFile(path.name, write_tensors(path, tensors)))
        notes = {**self.notes, STATE: state, STEPS: steps}
        self._write(replace(self._content, notes=notes, seconds=self.elapsed))
        if former is not None and former != path:
            former.unlink(missing_ok=True)

    def write_block(self, block: BlockContent) -> FinishedBlock:
        """Write the tensors of the next block to a file, which the journal names only after `commit`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = f"block-{len(self.blocks) + 1:04d}.safetensors"
        checksum = write_tensors(self.folder / file, block.tensors)
        return FinishedBlock(block.name, file, checksum, block.layers, block.records)

    def inputs_path(self, blocks: int) -> Path:
        """The path of the file of the inputs of the block after so many."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"inputs-{blocks:04d}.safetensors"

    def commit_inputs(self, inputs: StoredFile) -> None:
        """Name the file of the first block's inputs."""
        self._write(replace(self._content, inputs=inputs))

    def commit(self, block: FinishedBlock, inputs: StoredFile) -> None:
        """Name a finished block and the file of the next block's inputs, and then drop the previous inputs.

        Both files must be complete and on the disk. Raises OSError where the disk refuses; the journal is then as before.
        """
        former = self.inputs
        self._write(replace(self._content, blocks=(*self.blocks, block), inputs=inputs, seconds=self.elapsed))
        if former is not None:
            former.unlink(missing_ok=True)

    def tensors(self) -> MappedFiles:
        """The tensors of all finished blocks, mapped; every file is checked first."""
        for block in self.blocks:
            self._check(block.stored)
        return MappedFiles.of(self.folder / block.file for block in self.blocks)

    def check(self) -> None:
        """Raise CheckpointError where a file that the journal names is missing or changed."""
        for stored in self._content.files:
            self._check(stored)

    def _check(self, stored: StoredFile) -> None:
        if not is_plain_name(stored.file):
            raise _damaged(self.folder, f"it names a file outside its folder: {stored.file!r}")
        try:
            check_sum(self.folder / stored.file, stored.sha256)
        except CheckpointError as error:
            raise _damaged(self.folder, str(error)) from error

    def _write(self, content: Content) -> None:
        """Write journal.json, and change this object's content after that."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = content.to_dict()
        data = {"format": FORMAT, "sha256": _checksum(plain), "content": plain}
        with written(self.folder / _JOURNAL) as file:
            file.write(json.dumps(data, indent=1).encode())
        self._content = content

    # Its folder

    def tidy(self) -> None:
        """Remove leftovers of a killed run: files that the journal does not name."""
        if self._content.identity is None:
            _empty(self.folder)
        named = {stored.file for stored in self._content.files}
        for path in self.folder.glob("*"):
            leftover = path.name.startswith(("block-", "inputs-", "state-")) and path.name not in named
            if path.name.endswith((NEW, TEMPORARY)) or leftover:
                path.unlink()

    def remove(self) -> None:
        """Remove the journal; files that cannot be removed stay, but are no journal any more."""
        with suppress(OSError):
            _empty(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)


def journal_folder(out: Path) -> Path:
    """The folder of the journal of a run that writes `out`: next to it, or inside it where it exists already."""
    beside = out.absolute().parent / f"{out.absolute().name}.partial"
    return out.absolute() / INSIDE if out.is_dir() and not beside.is_dir() else beside


@contextmanager
def open_journal(out: Path, *, restart: bool = False) -> Iterator[Journal]:
    """The journal of the run that writes `out`, locked in this context; a journal without work is removed at the end.

    Args:
        out: The output folder.
        restart: Set aside a journal that is there; `Journal.begin` drops it, and it is restored where the run ends before.

    Raises:
        CheckpointError: Another process writes the same output, the journal is damaged, or the disk refuses.
    """
    folder = journal_folder(out)
    lock = _locked(folder, out)
    try:
        try:
            set_aside.recover(folder, _JOURNAL, _LOCK)
            restarting = restart and set_aside.set_aside(folder, _JOURNAL, _LOCK)
            journal = Journal(folder, _read(folder), restarting=restarting)
            journal.check()
            journal.tidy()
        except OSError as error:
            raise _cannot_store(folder, error) from error
        try:
            yield journal
        finally:
            if journal.restarting:
                with suppress(OSError):
                    # Where the disk refuses now, the next run restores it.
                    set_aside.recover(folder, _JOURNAL, _LOCK)
            elif not journal.holds_work:
                journal.remove()
    finally:
        lock.release()


def _locked(folder: Path, out: Path) -> FileLock:
    """The lock of a journal's folder, which is created where it does not exist."""
    try:
        there = folder.is_dir()
        _make(folder)
        if there and any(folder.iterdir()) and not _is_journal(folder):
            raise CheckpointError(f"{folder} is the folder of an unfinished run, but holds other files; move it away")
        lock = FileLock(folder / _LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another process is writing {out}: {folder} is locked. Wait for it, or give another output folder"
        ) from error
    except OSError as error:
        raise _cannot_store(folder, error) from error
    return lock


def _read(folder: Path) -> Content:
    """The content of an earlier run's journal.json; raises CheckpointError where it is damaged."""
    path = folder / _JOURNAL
    if not path.is_file():
        return Content()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise CheckpointError(
                f"{path} has format {data['format']!r}; this slimlm resumes runs of format {FORMAT}. Resume it with the "
                "slimlm that began it, or pass `restart` to start again"
            )
        if _checksum(data["content"]) != data["sha256"]:
            raise _damaged(folder, f"{path.name} is not what was written (its checksum differs)")
        return Content.from_dict(data["content"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{path.name} cannot be read ({error})") from error


def _damaged(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the unfinished run in {folder} is damaged: {reason}. It cannot be resumed; pass `restart` to drop it and start again"
    )


def _cannot_store(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"the journal of the run cannot be stored in {folder}: {error.strerror or error}")


def _make(folder: Path) -> None:
    """Create a folder and sync its name to the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    sync_folder(folder.parent)


def _empty(folder: Path) -> None:
    """Remove a journal's files, journal.json first, so that one that is removed only in part is empty, not damaged."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != _JOURNAL):
        if path.name in set_aside.FOLDERS:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _is_journal(folder: Path) -> bool:
    """Whether a folder was created by `open_journal`; no other folder is removed or overwritten."""
    return (folder / _LOCK).exists()


def moved_already(out: Path) -> set[str]:
    """Names in the folder `out` that belong to an unfinished run: its journal, its log, and files that it was moving there."""
    path = journal_folder(out) / _JOURNAL
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))["content"]["notes"]
    except (OSError, ValueError, KeyError, TypeError):
        # The run itself reports what is wrong with its journal.
        return {INSIDE, INSIDE_LOG}
    names = notes.get(MOVING, [])
    return {INSIDE, INSIDE_LOG, *names, *(name + NEW for name in names)}


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
