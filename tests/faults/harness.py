"""The command line in processes of its own, with a signal at a named moment, and limits on what the system gives it.

They are forked from the server of tests/forked.py, so that a run costs no start of Python.
"""

import functools
import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from tests.forked import print_to

DEADLINE = 600
"""seconds after which a run is said to hang; a run takes a few"""


@dataclass(frozen=True)
class Moment:
    """A call of a function, and the signal that the process then sends to itself."""

    where: tuple[str, ...]
    """functions as module:name; their calls are counted together"""
    number: int = 1
    """which call"""
    after: bool = False
    """when the call is done, not before it"""
    signal: int = signal.SIGKILL
    since: str | None = None
    """a function, as module:name; calls are counted from its end on"""
    half: bool = False
    """the file that the call would write (its first argument) is left half written, under its name for unfinished files"""


@dataclass(frozen=True)
class Limits:
    """What a process may have, over what it has when it begins."""

    memory: int | None = None
    """bytes of address space"""
    files: int | None = None
    """open files"""
    more_files: bool = False
    """the limit may be raised"""
    file_size: int | None = None
    """bytes in one file"""
    since: str | None = None
    """a function, as module:name, at whose calls they begin to hold, over what the process has then; None: from the start"""
    disk_free: int | None = None
    """what the check before a run is given as free, as where somebody else fills the disk after it"""


class Child(Protocol):
    """What is used of a process of either context."""

    pid: int | None
    exitcode: int | None

    def join(self, timeout: float | None = None) -> None:
        """Wait for its end."""

    def kill(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    code: int
    """the exit status; a signal's number, negative, where one ended it"""
    said: str
    """on standard output and error, white space joined"""

    def refused(self, *words: str) -> "Ended":
        """Check that it ended with a message and not in a traceback, these among them."""
        assert self.code == 2, self
        assert "Traceback" not in self.said, self.said
        assert "slimlm: " in self.said, self.said
        for wanted in words:
            assert wanted in self.said, self.said
        return self

    def done(self) -> "Ended":
        """Check that it came to its end."""
        assert self.code == 0, self
        return self


@dataclass(frozen=True)
class Run:
    """A run that resumes."""

    process: Child
    said: Path

    def send(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def send_after(self, seconds: float, number: int) -> None:
        """Send it a signal after a time, unless it has ended by then."""
        self.process.join(seconds)
        self.send(number)

    def ended(self) -> Ended:
        """Wait for its end."""
        self.process.join(DEADLINE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise AssertionError(f"it hangs: {self.said.read_text()}")
        return Ended(self.process.exitcode, " ".join(self.said.read_text(errors="replace").split()))

    def stopped(self) -> None:
        """Wait until it has stopped itself (SIGSTOP)."""
        for _ in range(DEADLINE * 20):
            self.process.join(0.05)
            assert self.process.exitcode is None, f"it ended before that moment: {self.said.read_text()}"
            if Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return
        raise AssertionError("it never came to that moment")


def start(line: list[str], said: Path, moment: Moment | None = None, limits: Limits | None = None) -> Run:
    """Run `slimlm` with these arguments; what it says goes to a file."""
    said.touch()
    process = multiprocessing.get_context("forkserver").Process(target=_child, args=(line, said, moment, limits))
    process.start()
    return Run(process, said)


def _child(line: list[str], said: Path, moment: Moment | None, limits: Limits | None) -> None:
    print_to(said)
    from slimlm.cli.app import main

    # Whoever starts the tests in the background has it ignored, and so would their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if moment is not None:
        _arm(moment)
    sys.argv = ["slimlm", *line]
    if limits is not None and limits.since is not None:
        _wrap(limits.since, functools.partial(_limited, limits))
    elif limits is not None:
        _limit(limits)
    main()


def _arm(moment: Moment) -> None:
    calls, counted = count(1), [moment.since is None]

    def begin(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def run(*arguments: Any, **options: Any) -> Any:
            made = real(*arguments, **options)
            counted[0] = True
            return made

        return run

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def run(*arguments: Any, **options: Any) -> Any:
            if not counted[0] or next(calls) != moment.number:
                return real(*arguments, **options)
            if moment.half:
                new = arguments[0].with_name(arguments[0].name + ".new")
                new.write_bytes(b"\0" * 1000)
            made = real(*arguments, **options) if moment.after else None
            os.kill(os.getpid(), moment.signal)
            return made if moment.after else real(*arguments, **options)

        return run

    for place in moment.where:
        _wrap(place, dying)
    if moment.since is not None:
        _wrap(moment.since, begin)


def _wrap(place: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, _, name = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, last = name.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    setattr(owner, last, around(getattr(owner, last)))


def _limited(limits: Limits, real: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def run(*arguments: Any, **options: Any) -> Any:
        _limit(limits)
        return real(*arguments, **options)

    return run


def _limit(limits: Limits) -> None:
    import resource

    if limits.disk_free is not None:
        _wrap("slimlm.preflight.checks:free_on_disk", lambda _: lambda _: limits.disk_free)
    if limits.file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_size, limits.file_size))
    if limits.files is not None:
        most = len(list(Path("/proc/self/fd").iterdir())) - 1 + limits.files
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1] if limits.more_files else most
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if limits.memory is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + limits.memory, now + limits.memory))


def checkpoint_files(folder: Path) -> set[str]:
    """The names in a folder, but for a log."""
    return {path.name for path in folder.iterdir()} - {"slimlm.log.jsonl"}


def same(one: Path, other: Path) -> None:
    """The same files with the same bytes, but for a log; of the record all but the times and the memory."""
    assert checkpoint_files(one) == checkpoint_files(other)
    for name in checkpoint_files(one):
        path = one / name
        if path.name == "slimlm.json":
            records = [json.loads((folder / path.name).read_text()) for folder in (one, other)]
            first, second = ({k: v for k, v in r.items() if k not in ("seconds", "peak_memory")} for r in records)
            assert first == second
        else:
            assert path.read_bytes() == (other / path.name).read_bytes(), path.name


def kept(journal: Path) -> list[str]:
    """The names of the blocks that a journal says are finished."""
    try:
        content = json.loads((journal / "journal.json").read_text())["content"]
    except FileNotFoundError:
        return []
    return [block["name"] for block in content["blocks"]]
