"""How a run is begun, stopped and resumed: its journal, its ranks, and the messages where it ends early."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from slimlm.core.errors import CheckpointError, RanksError, SlimlmError, first_line, is_out_of_memory
from slimlm.distributed.group import ALONE, Group
from slimlm.distributed.launch import join_ranks
from slimlm.events import Notify, Observer, quiet, silent
from slimlm.preflight.checks import check_place, new_parent
from slimlm.storage import checkpoint
from slimlm.storage.journal import Content, Journal, open_journal


@dataclass(frozen=True)
class Run:
    """The journal, ranks and reporting functions of a run, which every stage uses."""

    journal: Journal
    """The journal; on ranks other than the first a copy of its content when the run began."""
    group: Group = ALONE
    """The ranks that share the run."""
    progress: Observer = quiet
    """An observer of the run's events."""
    notify: Notify = silent
    """A function that is given messages for the user."""


@contextmanager
def open_run(out: Path, model: Path, *, restart: bool, progress: Observer, notify: Notify) -> Iterator[Run]:
    """The run that writes `out`: begun, or resumed where its journal holds finished blocks.

    Several ranks are joined; only the first writes, and reports to the user.

    Args:
        out: The output folder.
        model: The model's folder, or its name on the hub.
        restart: Drop the journal of an unfinished run, once the new run has begun.
        progress: An observer of the run's events.
        notify: A function that is given messages for the user.

    Raises:
        CheckpointError: `out` cannot be written, something is in its way, or the journal is damaged or locked.
        RanksError: Another rank has ended.
    """
    with join_ranks() as group:
        if not group.first:
            progress, notify = quiet, silent
        with (
            # Other ranks may be on machines that do not have these folders.
            _place_for(out, model, restart=restart, notify=notify) if group.first else nullcontext(),
            _journal_of(out, group, restart=restart) as journal,
            explaining_stops(journal, notify),
        ):
            if group.first:
                # Checked again under the lock: the process that held it may have finished meanwhile.
                checkpoint.refuse_occupied(out, restart=restart)
            yield Run(journal, group, progress, notify)


@contextmanager
def _place_for(out: Path, model: Path, *, restart: bool, notify: Notify) -> Iterator[None]:
    """Within this context `out` can be written; a folder that was made for it goes again where the run fails."""
    check_place(out, model)
    with new_parent(out, notify):
        checkpoint.refuse_occupied(out, restart=restart)
        yield


@contextmanager
def _journal_of(out: Path, group: Group, *, restart: bool) -> Iterator[Journal]:
    """The journal of the run; ranks other than the first get a copy of it in a temporary folder."""
    if group.first:
        with open_journal(out, restart=restart) as journal:
            group.broadcast(lambda: journal.content.to_dict())
            yield journal
        return
    with TemporaryDirectory(prefix="slimlm-") as folder:
        yield Journal(Path(folder), Content.from_dict(group.broadcast(dict)))


@contextmanager
def explaining_stops(journal: Journal, notify: Notify) -> Iterator[None]:
    """Explain what is kept and how to resume where a run is stopped, or memory or the disk runs out."""

    def kept() -> str:
        if journal.restarting:
            return f"nothing of it is kept; the run that was in {journal.folder} before `restart` is still there"
        if not journal.holds_work:
            return "nothing was finished, and nothing is kept"
        return f"{journal.content.finished} are kept in {journal.folder}; the same call resumes from there"

    try:
        yield
    except KeyboardInterrupt:
        notify(f"stopped: {kept()}")
        raise
    except RanksError as error:
        raise RanksError(f"{error}; {kept()}", reported_here=error.reported_here) from error
    except OSError as error:
        raise CheckpointError(f"reading or writing failed: {error}; {kept()}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SlimlmError(f"memory ran out ({first_line(error)}); {kept()}. Give it more, or fewer `samples`") from error
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise CheckpointError(f"{error}; {kept()}") from error
        raise
