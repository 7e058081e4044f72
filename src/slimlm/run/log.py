"""The log of a run: JSON lines in a file next to the output, a line per layer, written when blocks are finished.

    OUT.log.jsonl             inside OUT, as slimlm.log.jsonl, where OUT is a folder already as the run begins

    {"event": "run", ...}     when compressing begins or is resumed: time (UTC), recipe, model, calibration, device, versions,
                              blocks, and `after`, the number of blocks that an earlier run had finished
    {"event": "layer", ...}   block (its number), name, shape, parts, bits, bits_per_weight, sparsity, rank, error,
                              output_error (see LayerRecord), tokens, seconds, reconstruction, notes
    {"event": "block", ...}   block, name, error (mean of its layers), seconds; after the lines of its layers
    {"event": "end", ...}     bits_per_weight, stored_bytes, quality, seconds of all runs together, peak_memory
    {"event": "stopped", ...} in place of `end`: why (the class of the error, without its message)

Lines are only ever appended, so the log survives a killed process, is continued when a run is resumed, and stays when the run
is done; a restarted run appends its own `run` with `after` 0. A new log without any block is removed where its run fails. A
block's lines are written after it is in the journal. Where a run was killed between the two, the next one appends them, with
`seconds` null. An incomplete last line of a killed run is cut off. Folder names are private: of models, texts and recipes only
the last name is logged.
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from slimlm.events import BlockDone, Event, LayerDone
from slimlm.record import LayerRecord, Record
from slimlm.run.config import environment
from slimlm.run.prepare import Prepared
from slimlm.run.resume import Run
from slimlm.storage.journal import INSIDE_LOG, journal_folder


def log_path(out: Path) -> Path:
    """The path of the log of a run that writes `out`: next to its journal, which is next to `out` or inside it."""
    inside = journal_folder(out).parent == out.absolute()
    return out.absolute() / INSIDE_LOG if inside else out.absolute().with_name(out.absolute().name + ".log.jsonl")


@dataclass
class RunLog:
    """An observer that writes the log; see `open_log`."""

    path: Path | None
    """The file; None: nothing is logged."""
    _layers: dict[str, LayerDone] = field(default_factory=dict)
    """The layers of the current block that are done, by full name."""

    def __call__(self, event: Event) -> None:
        """Log the finished layers and blocks of an event."""
        if self.path is None:
            return
        if event.layer is not None:
            self._layers[event.layer.record.name] = event.layer
        logged = blocks_of(self.path) if any(block.seconds is None for block in event.blocks) else set()
        lines = [line for block in event.blocks if block.number not in logged for line in self._lines_of(block)]
        if event.blocks:
            self._layers.clear()
        if lines:
            self.add(*lines)

    def _lines_of(self, block: BlockDone) -> Iterator[dict[str, Any]]:
        for record in block.records:
            done = self._layers.get(record.name)
            yield {
                "event": "layer",
                "block": block.number,
                **_figures(record),
                "tokens": None if done is None else done.tokens,
                "seconds": None if done is None else round(done.seconds, 3),
                "reconstruction": record.reconstruction,
                "notes": record.notes,
            }
        seconds = None if block.seconds is None else round(block.seconds, 3)
        yield {"event": "block", "block": block.number, "name": block.name, "error": block.error, "seconds": seconds}

    def add(self, *lines: dict[str, Any]) -> None:
        """Append lines and sync them to the disk."""
        if self.path is None:
            return
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())

    def end(self, record: Record) -> None:
        """Append the last line of a run that is complete."""
        self.add(
            {
                "event": "end",
                "bits_per_weight": record.bits_per_weight,
                "stored_bytes": record.stored_bytes,
                "quality": record.quality,
                "divergence": None if record.divergence is None else dataclasses.asdict(record.divergence),
                "seconds": round(record.seconds, 3),
                "peak_memory": record.peak_memory,
            }
        )


def _figures(record: LayerRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "shape": record.shape,
        "parts": record.parts,
        "bits": record.bits,
        "bits_per_weight": record.bits_per_weight,
        "sparsity": record.sparsity,
        "rank": record.rank,
        "error": record.error,
        "output_error": record.output_error,
    }


def blocks_of(path: Path) -> set[int]:
    """The numbers of the blocks in the log: those of its last run and of the runs that it resumed."""
    found: set[int] = set()
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            # The file was edited; its other lines are still used.
            continue
        if isinstance(entry, dict) and entry.get("event") == "run" and entry.get("after") == 0:
            found.clear()
        if isinstance(entry, dict) and entry.get("event") == "block":
            found.add(entry["block"])
    return found


@contextmanager
def open_log(prepared: Prepared, run: Run) -> Iterator[RunLog]:
    """The log of a run, begun with its header (see the head of this file); where the run stops, the reason is logged.

    Only the first of several ranks writes a log. Raises OSError where the disk refuses.
    """
    if prepared.config.out is None or not run.group.first:
        yield RunLog(None)
        return
    path = log_path(prepared.config.out)
    new = not path.exists()
    _cut_half_line(path)
    log = RunLog(path)
    log.add(_header(prepared, run))
    try:
        yield log
    except BaseException as error:
        # On a full disk the run's own error must be the one that is reported.
        with suppress(OSError):
            if new and not blocks_of(path):
                path.unlink()
            else:
                log.add({"event": "stopped", "why": type(error).__name__})
        raise


def _header(prepared: Prepared, run: Run) -> dict[str, Any]:
    return {
        "event": "run",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": prepared.config.model_name,
        "recipe": prepared.recipe.to_dict(),
        "calibration": prepared.calibration,
        "device": str(prepared.device),
        "blocks": len(prepared.blocks),
        "after": len(run.journal.blocks),
        "skipped": prepared.skipped,
        "versions": environment(),
    }


def _cut_half_line(path: Path) -> None:
    """Cut the file off after its last complete line."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
