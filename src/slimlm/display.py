"""The progress of a run, on standard error: one live display on a terminal, a line per block elsewhere.

    slimlm.compress(model, out, progress=True)

Both are observers (slimlm.events) that compute their state from events with `Progress`.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TextIO

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slimlm.core.errors import SlimlmError
from slimlm.distributed.environment import global_rank
from slimlm.events import BlockDone, Doing, Event, Observer, TuningProgress, quiet
from slimlm.record import LayerRecord

Clock = Callable[[], float]

Show = Observer | bool | Literal["auto"]
"""What shows a run's progress: an observer of its events; True: a display on a terminal, lines elsewhere; False: nothing;
"auto": a display on a terminal, lines in a notebook, nothing elsewhere."""

_DOING: dict[Doing, str] = {
    "read": "read the weights",
    "measure": "measure the inputs of layers",
    "steps": "compress layers",
    "reconstruct": "block reconstruction",
    "propagate": "compute the block's outputs",
}
_LINE_EVERY = 10.0
"""Seconds between two lines of a stage, or of a block that takes so long."""
_OVERTIME = 0.1
"""A block that takes longer than the mean is taken to need this share of its time so far in addition."""


@dataclass(frozen=True)
class Error:
    """The mean error of some layers."""

    kind: str
    """"output error" where all of them have that, else "diagonal error"; `LayerRecord` defines both."""
    mean: float
    """The mean."""

    @classmethod
    def of(cls, records: Sequence[LayerRecord]) -> "Error | None":
        """The mean error of these layers; None: there are none."""
        if not records:
            return None
        measured = [record.output_error for record in records if record.output_error is not None]
        complete = len(measured) == len(records)
        errors = measured if complete else [record.error for record in records]
        return cls("output error" if complete else "diagonal error", sum(errors) / len(errors))


@dataclass
class Progress:
    """How far a run is, computed from its events."""

    clock: Clock = time.monotonic
    stage: str = ""
    done: int = 0
    total: int = 0
    doing: Doing | None = None
    name: str = ""
    layers: tuple[str, ...] = ()
    last: LayerRecord | None = None
    """The layer that was finished last."""
    tuning: TuningProgress | None = None
    """What steps of tuning have found so far."""
    began: float = 0.0
    """The time when the stage began, by the clock."""
    finished: list[BlockDone] = field(default_factory=list)
    _done_before: int = 0
    """Units of the stage that were done when this run began it."""
    _block_began: float = 0.0
    """The time when the work on the current block began."""

    def __post_init__(self) -> None:
        self.began = self.clock()

    def __call__(self, event: Event) -> None:
        if event.stage != self.stage:
            self.began, self._done_before = self.clock(), event.done
            self.finished, self.last = [], None
        # What goes on before the first block, and between blocks, is no part of one.
        if event.blocks or (event.doing is not None and event.name != self.name):
            self._block_began = self.clock()
        self.stage, self.done, self.total = event.stage, event.done, event.total
        self.doing, self.name, self.layers = event.doing, event.name, event.layers
        self.finished += event.blocks
        self.tuning = event.tuning
        if event.layer is not None:
            self.last = event.layer.record

    @property
    def error(self) -> "Error | None":
        """Mean error of the layers of all finished blocks."""
        return Error.of([record for block in self.finished for record in block.records])

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began, in this run."""
        return self.clock() - self.began

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the stage ends, at the mean time of the units that this run has finished; None before the first."""
        units, to_come = self.done - self._done_before, self.total - self.done
        if units <= 0:
            return None
        spent = [block.seconds for block in self.finished if block.seconds is not None]
        if not spent:
            return self.elapsed / units * to_come
        if to_come == 0:
            return 0.0
        mean, current = sum(spent) / len(spent), self._in_block
        return mean * (to_come - 1) + max(mean - current, _OVERTIME * current)

    @property
    def least_seconds_left(self) -> float | None:
        """During the first block of this run: the seconds left if no block takes longer than it has taken so far."""
        if self.doing is None or self.done > self._done_before:
            return None
        return self._in_block * (self.total - self.done - 1)

    @property
    def time_left(self) -> str:
        """What is known of the time left, after a comma; empty where nothing is."""
        if (seconds := self.seconds_left) is not None:
            return f", about {duration(seconds)} left"
        least = self.least_seconds_left
        return "" if least is None or least < 1 else f", at least {duration(least)} left"

    @property
    def _in_block(self) -> float:
        return self.clock() - self._block_began


def duration(seconds: float) -> str:
    """A time to read: 42 s, 3:07 min, 2:05 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d} h"


class Display:
    """A live display for terminals: the stage with a bar, the current block, errors and times."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.progress = Progress(clock)

    def __call__(self, event: Event) -> None:
        self.progress(event)

    def __rich__(self) -> ConsoleRenderable:
        progress = self.progress
        if not progress.stage:
            return Text("")
        bar = Table.grid(padding=(0, 2))
        unit = "blocks" if progress.finished or progress.doing else ""
        bar.add_row(
            Text(progress.stage, style="bold"),
            ProgressBar(total=max(1, progress.total), completed=progress.done, width=40),
            Text(f"{progress.done} of {progress.total} {unit}".rstrip()),
        )
        rows = [("time", f"{duration(progress.elapsed)}{progress.time_left}")]
        if progress.doing is not None:
            layers = f": {', '.join(progress.layers)}" if progress.layers else ""
            rows.insert(0, (f"block {progress.done + 1}", progress.name))
            rows.insert(1, ("now", f"{_DOING[progress.doing]}{layers}"))
        if progress.tuning is not None:
            rows[:0] = _of_tuning(progress.tuning, progress)
        last = None if progress.last is None else Error.of([progress.last])
        errors: dict[str, list[str]] = {}
        if (mean := progress.error) is not None:
            errors.setdefault(mean.kind, []).append(f"{mean.mean:.4f} mean of {_layers(progress)}")
        if progress.last is not None and last is not None:
            errors.setdefault(last.kind, []).append(f"last {last.mean:.4f} ({progress.last.name.rpartition('.')[2]})")
        for kind, texts in errors.items():
            rows.insert(-1, (kind, ", ".join(texts)))
        grid = Table.grid(padding=(0, 2))
        for name, text in rows:
            grid.add_row(Text(name, style="dim"), Text(text, overflow="ellipsis", no_wrap=True))
        return Group(bar, grid)


def _of_tuning(found: TuningProgress, progress: Progress) -> Iterator[tuple[str, str]]:
    """Names and values of what steps of tuning have found."""
    yield "held back", _held_back(found)
    if found.loss is not None:
        yield "last step", f"loss {found.loss:.4g}"
    if (seconds := progress.seconds_left) is not None and progress.total > progress.done:
        speed = found.tokens / progress.done * (progress.total - progress.done) / max(seconds, 1e-9)
        yield "speed", f"{speed:.0f} tokens/s"


def _held_back(found: TuningProgress) -> str:
    """The losses of the given model, of the best form, and of the last where it is worse, on windows that are held back."""
    text = f"loss {found.given.loss:.4g} -> {found.best.loss:.4g}"
    if found.given.divergence is not None and found.best.divergence is not None:
        text += f", KL to the original {found.given.divergence.mean.value:.4g} -> {found.best.divergence.mean.value:.4g}"
    return f"{text}, last {found.last.loss:.4g}" if found.last.loss > found.best.loss else text


def _layers(progress: Progress) -> str:
    count = sum(len(block.records) for block in progress.finished)
    return "1 layer" if count == 1 else f"{count} layers"


class Lines:
    """A line per finished block; for other stages, and in long blocks, at most one every ten seconds."""

    def __init__(self, file: TextIO, clock: Clock = time.monotonic) -> None:
        self.progress, self.file = Progress(clock), file
        self._last_line: float | None = None

    def __call__(self, event: Event) -> None:
        new = event.stage != self.progress.stage
        self.progress(event)
        now = self.progress.clock()
        if event.blocks:
            self._say(self._of_blocks())
        elif new:
            self._say(self.progress.stage)
        elif self._last_line is not None and now - self._last_line < _LINE_EVERY:
            return
        elif event.doing is not None:
            self._say(self._of_current_block())
        elif 0 < event.done < event.total:
            held_back = "" if event.tuning is None else f": {_held_back(event.tuning)}, on windows held back"
            self._say(f"{event.stage} {event.done}/{event.total}{held_back}{self.progress.time_left}")

    def _of_current_block(self) -> str:
        """What is being done to the block that is not finished yet."""
        progress = self.progress
        assert progress.doing is not None
        return f"block {progress.done + 1}/{progress.total} {progress.name}: {_DOING[progress.doing]}{progress.time_left}"

    def _of_blocks(self) -> str:
        """The block finished last, and the mean error of all so far."""
        progress, block = self.progress, self.progress.finished[-1]
        what = f"block {block.number}/{progress.total} {block.name}"
        if block.seconds is None:
            return f"{what}: finished by an earlier run, as are the blocks before it"
        own, mean = Error.of(block.records), progress.error
        error = "nothing to compress" if own is None else f"{own.kind} {own.mean:.4f}"
        if mean is not None:
            kind = "" if own is not None and own.kind == mean.kind else f"{mean.kind} "
            error += f" (mean {kind}so far {mean.mean:.4f})"
        return f"{what}: {error}, {block.seconds:.1f} s{progress.time_left}"

    def _say(self, text: str) -> None:
        self._last_line = self.progress.clock()
        self.file.write(f"{text}\n")
        self.file.flush()


@contextmanager
def progress_on(console: Console, *, silent: bool = False, lines: bool = False) -> Iterator[Observer]:
    """An observer that shows a run's progress on this console while the context lasts.

    Args:
        console: A terminal gets a live display, anything else lines on standard error.
        silent: Show nothing.
        lines: Show lines in any case.
    """
    if silent:
        yield quiet
    elif lines or not console.is_terminal:
        yield Lines(sys.stderr)
    else:
        display = Display()
        with Live(display, console=console, refresh_per_second=4, transient=True):
            yield display


@contextmanager
def shown(progress: Show) -> Iterator[Observer]:
    """The observer of a run's progress that is asked for, while the context lasts; ranks other than the first show nothing.

    Raises:
        SlimlmError: It is neither an observer nor one of the values of `Show`.
    """
    if callable(progress):
        yield progress
        return
    if not isinstance(progress, bool) and not (isinstance(progress, str) and progress == "auto"):
        raise SlimlmError(
            f'`progress` is of type {type(progress).__name__}; give True, False, "auto" or a function of an Event'
        )
    console = Console(stderr=True)
    wanted = progress is True or (progress == "auto" and (console.is_terminal or console.is_jupyter))
    # In a notebook a live display would need the notebook's own widgets.
    with progress_on(console, silent=not wanted or global_rank() > 0, lines=console.is_jupyter) as observer:
        yield observer
