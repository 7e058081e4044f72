"""How a run comes along, on standard error: one live display on a terminal, a line per block elsewhere.

Both are observers (slimlm.events) and ask `Course` for what there is to say; neither knows what makes the events.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console, ConsoleRenderable, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from slimlm.events import BlockDone, Doing, Event, Observer, quiet
from slimlm.record import LayerRecord

Clock = Callable[[], float]

_WORDS: dict[Doing, str] = {
    "read": "read the weights",
    "measure": "measure the inputs",
    "steps": "compress",
    "reconstruct": "reconstruct the block",
    "propagate": "pass on and keep",
}
_APART = 10.0
"""Seconds between two lines of a stage that is no compression."""


@dataclass
class Course:
    """Where a run is, from its events: what the displays show."""

    clock: Clock = time.monotonic
    stage: str = ""
    done: int = 0
    total: int = 0
    doing: Doing | None = None
    name: str = ""
    layers: tuple[str, ...] = ()
    last: LayerRecord | None = None
    """the layer finished last"""
    began: float = 0.0
    """when the stage did"""
    finished: list[BlockDone] = field(default_factory=list)
    _here: int = 0
    """of the stage's units, those that this run began with"""

    def __post_init__(self) -> None:
        self.began = self.clock()

    def __call__(self, event: Event) -> None:
        if event.stage != self.stage:
            self.began, self._here = self.clock(), event.done
            self.finished, self.last = [], None
        self.stage, self.done, self.total = event.stage, event.done, event.total
        self.doing, self.name, self.layers = event.doing, event.name, event.layers
        self.finished += event.blocks
        if event.layer is not None:
            self.last = event.layer.record

    @property
    def error(self) -> float | None:
        """Mean relative output error of the layers of all finished blocks."""
        errors = [record.error for block in self.finished for record in block.records]
        return sum(errors) / len(errors) if errors else None

    @property
    def elapsed(self) -> float:
        """Seconds since the stage began, in this run."""
        return self.clock() - self.began

    @property
    def left(self) -> float | None:
        """Seconds that the stage will take yet, at the pace of the units this run has finished; None before the first."""
        here = self.done - self._here
        if here <= 0:
            return None
        spent = [block.seconds for block in self.finished if block.seconds is not None]
        pace = sum(spent) / len(spent) if spent else self.elapsed / here
        running = sum(spent) if spent else self.elapsed
        return max(0.0, pace * (self.total - self.done) - max(0.0, self.elapsed - running))


def duration(seconds: float) -> str:
    """A time for people: 42 s, 3:07 min, 2:05 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d} h"


class Display:
    """What a terminal shows, kept up to date: stage and bar; and of the block at hand what is done, errors and times."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.course = Course(clock)

    def __call__(self, event: Event) -> None:
        self.course(event)

    def __rich__(self) -> ConsoleRenderable:
        course = self.course
        if not course.stage:
            return Text("")
        bar = Table.grid(padding=(0, 2))
        unit = "blocks" if course.finished or course.doing else ""
        bar.add_row(
            Text(course.stage, style="bold"),
            ProgressBar(total=max(1, course.total), completed=course.done, width=40),
            Text(f"{course.done} of {course.total} {unit}".rstrip()),
        )
        left = "" if course.left is None else f", about {duration(course.left)} left"
        rows = [("time", f"{duration(course.elapsed)}{left}")]
        if course.doing is not None:
            layers = f": {', '.join(course.layers)}" if course.layers else ""
            rows.insert(0, (f"block {course.done + 1}", course.name))
            rows.insert(1, ("now", f"{_WORDS[course.doing]}{layers}"))
        errors = [] if course.error is None else [f"{course.error:.4f} mean of {_layers(course)}"]
        if course.last is not None:
            errors.append(f"last {course.last.error:.4f} ({course.last.name.rpartition('.')[2]})")
        if errors:
            rows.insert(-1, ("error", ", ".join(errors)))
        grid = Table.grid(padding=(0, 2))
        for name, words in rows:
            grid.add_row(Text(name, style="dim"), Text(words, overflow="ellipsis", no_wrap=True))
        return Group(bar, grid)


def _layers(course: Course) -> str:
    count = sum(len(block.records) for block in course.finished)
    return "1 layer" if count == 1 else f"{count} layers"


class Lines:
    """A line per finished block; of other stages one as they begin, and between, at most every ten seconds, the time left."""

    def __init__(self, file: TextIO, clock: Clock = time.monotonic) -> None:
        self.course, self.file = Course(clock), file
        self._spoke: float | None = None

    def __call__(self, event: Event) -> None:
        new = event.stage != self.course.stage
        self.course(event)
        now = self.course.clock()
        if event.blocks:
            self._say(self._of_blocks())
        elif new:
            self._say(self.course.stage)
        elif event.doing is None and 0 < event.done < event.total and (self._spoke is None or now - self._spoke >= _APART):
            self._say(f"{event.stage} {event.done}/{event.total}{self._left()}")

    def _of_blocks(self) -> str:
        """The block finished last, and the error of all so far."""
        course, block = self.course, self.course.finished[-1]
        what = f"block {block.number}/{course.total} {block.name}"
        if block.seconds is None:
            return f"{what}: finished by an earlier run, as are those before it"
        error = "nothing to compress" if block.error is None else f"error {block.error:.4f}"
        mean = "" if course.error is None else f" (so far {course.error:.4f})"
        return f"{what}: {error}{mean}, {block.seconds:.1f} s{self._left()}"

    def _left(self) -> str:
        left = self.course.left
        return "" if left is None else f", about {duration(left)} left"

    def _say(self, text: str) -> None:
        self._spoke = self.course.clock()
        self.file.write(f"{text}\n")
        self.file.flush()


@contextmanager
def shown(console: Console, *, silent: bool = False) -> Iterator[Observer]:
    """An observer that shows a run's progress on this console while the block lasts, or nothing at all."""
    if silent:
        yield quiet
    elif not console.is_terminal:
        yield Lines(sys.stderr)
    else:
        display = Display()
        with Live(display, console=console, refresh_per_second=4, transient=True):
            yield display
