"""Checks of memory, disk and folders before a run: too little is refused, and the user is warned of little."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from slimlm.core.errors import CheckpointError, DataError, DoesNotFitError
from slimlm.data.documents import pieces
from slimlm.data.mixture import Data, portions_of
from slimlm.data.rows import Reading
from slimlm.events import Notify
from slimlm.preflight.estimate import Memory, memory_of
from slimlm.preflight.needs import RunNeeds, folder_bytes
from slimlm.runtime.memory import format_bytes, total_and_free
from slimlm.storage import checkpoint
from slimlm.storage.journal import journal_folder

_TIGHT = 0.9
"""The share of the free memory or disk from which the user is warned."""


def existing(out: Path) -> Path:
    """The nearest folder above `out` that exists already."""
    folder = out.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def free_on_disk(folder: Path) -> int:
    """Bytes free on the disk of a folder."""
    return shutil.disk_usage(folder).free


def check_memory(memory: Memory, allowed: int | None) -> str | None:
    """A warning where memory is tight.

    Args:
        memory: The memory that the run needs, and the machine's.
        allowed: The argument `memory`, in bytes; a larger value than the machine's memory counts (swap).

    Raises:
        DoesNotFitError: The machine has less than the run holds at least.
    """
    if memory.total is None:
        return None
    available = max(memory.total, allowed or 0)
    needed = memory.least
    if needed > available:
        raise DoesNotFitError(
            f"the memory does not suffice: one block in float32, with the data that the recipe needs for it, takes at least "
            f"{format_bytes(needed)}, and there are {format_bytes(available)}. {_smaller(memory)}; or use a machine with more. "
            "If there is more than slimlm sees (swap), give its size as `memory`"
        )
    if memory.free is not None and memory.peak - memory.process > _TIGHT * memory.free:
        return (
            f"memory is tight: about {format_bytes(memory.peak)} at most, of which "
            f"{format_bytes(memory.process)} are in use already, and {format_bytes(memory.free)} are free. {_lighter(memory)}"
        )
    return None


def _smaller(memory: Memory) -> str:
    """Advice which recipe needs less memory."""
    if 2 * memory.covariances > memory.least:
        return (
            f"{format_bytes(memory.covariances)} of it are covariances, summed for all inputs of a stage together (of "
            "a mixture, for every expert): use a recipe without them (slim, absmax); fewer `samples` do not help"
        )
    return (
        "A recipe that does not compare with the original model holds the block once (gptq), one without covariances needs "
        "still less (slim, absmax)"
    )


def _lighter(memory: Memory) -> str:
    """Advice what to change, by what takes the most memory."""
    if not memory.on_disk and 2 * memory.activations >= memory.peak - memory.process:
        return "Fewer `samples`, or a smaller `memory` (activations go to the disk then), take less"
    if 2 * memory.covariances >= memory.block >= max(memory.begin, memory.end):
        return "Most of it are covariances: a recipe without them (slim, absmax) takes less, fewer `samples` do not"
    return (
        "Fewer `samples`, a smaller `memory` (activations go to the disk then), a recipe that does not compare with the "
        "original model (gptq) or one without covariances (slim, absmax) take less"
    )


def check_device(run: RunNeeds, device: torch.device) -> str | None:
    """Raise DoesNotFitError where a block and the data that the recipe needs for it exceed the whole memory of the GPU."""
    if device.type != "cuda":
        return None
    _, total = torch.cuda.mem_get_info(device)
    if run.least_on_device > total:
        raise DoesNotFitError(
            f"{device} has {format_bytes(total)}, and one block in float32, with the data that the recipe needs, takes at "
            f"least {format_bytes(run.least_on_device)}; use `device` cpu, a recipe that does not compare with the original "
            "model (gptq), or one without covariances (slim, absmax)"
        )
    return None


def check_disk(run: RunNeeds, out: Path, journal: Path) -> str | None:
    """A warning where the run nearly fills the disk.

    Args:
        run: The needs of the run.
        out: The output folder.
        journal: The journal's folder; files of an unfinished run in it count as free, because the needs count them, too.

    Raises:
        DoesNotFitError: The disk does not suffice.
    """
    free = free_on_disk(existing(out)) + folder_bytes(journal) + _converted_elsewhere(run, existing(out), journal)
    needed, converted = run.disk_bytes, run.dense.converted_bytes
    if needed > free:
        raise DoesNotFitError(
            f"the disk does not suffice: writing {out} takes {format_bytes(needed)} at most "
            f"({format_bytes(run.stored_bytes)} for the output; finished blocks and {format_bytes(run.activations_bytes)} of "
            f"activations in the journal{f', and {format_bytes(converted)} of converted weights' if converted else ''}), and "
            f"{format_bytes(free)} are free. Give an `out` on another disk, or fewer `samples`"
        )
    if needed > _TIGHT * free:
        return f"the disk will be nearly full: {format_bytes(needed)} at most, of {format_bytes(free)} that are free"
    return None


def _converted_elsewhere(run: RunNeeds, disk: Path, journal: Path) -> int:
    """Bytes of converted files on the disk of the folder `disk` that are not in the journal, as an estimate makes them."""
    device, inside = disk.stat().st_dev, journal.resolve()
    sizes = [path.stat() for path in run.dense.converted if inside not in path.resolve().parents]
    return sum(about.st_size for about in sizes if about.st_dev == device)


def check_whole(size: int, allowed: int | None) -> str | None:
    """Raise DoesNotFitError where the whole model in float32, of `size` bytes, exceeds all memory of the machine."""
    total, _ = total_and_free()
    if total is not None and size > max(total, allowed or 0):
        raise DoesNotFitError(
            f"text of the model's own needs the whole model in memory, {format_bytes(size)} in float32, and there are "
            f"{format_bytes(total)}; give calibration text from a file"
        )
    return None


def check_place(out: Path, model: Path) -> None:
    """Raise CheckpointError where `out` cannot be written; nothing is created.

    Args:
        out: The output folder. Something may be there, it may lie inside the model's folder, or too far below what exists.
        model: The model's folder, or its name on the hub.
    """
    source, place = model.resolve(), out.resolve()
    if model.is_dir() and source in place.parents:
        raise CheckpointError(
            f"`out={out}` lies inside the model's folder {model}, whose files would no longer be the original's alone; give a "
            f"folder elsewhere, such as {source.with_name(f'{source.name}-{out.name}')}"
        )
    parent = out.absolute().parent
    if not parent.exists() and not parent.parent.exists():
        raise CheckpointError(
            f"`out={out}`: neither {parent} nor the folder above it exists, so the path may be mistyped; make {parent} first, "
            f"or give an `out` below {existing(out)}"
        )
    checkpoint.refuse_taken(out)


@contextmanager
def new_parent(out: Path, notify: Notify) -> Iterator[None]:
    """Within this context the folder above `out` may be made; the user is notified, and where the run fails it goes again."""
    parent = out.absolute().parent
    made = not parent.exists()
    if made:
        notify(f"{parent} does not exist yet and is made")
    try:
        yield
    except BaseException:
        if made:
            # An unfinished run, which stays, or another program's file may be in it.
            with suppress(OSError):
                parent.rmdir()
        raise


def check_text(data: Data) -> None:
    """Raise DataError where a file or folder of the text does not exist; nothing is read or downloaded."""
    for portion in portions_of(data):
        if portion.source != "self":
            pieces(portion.source, "calibration", Reading())


def problems_of(
    run: RunNeeds, device: torch.device, out: Path | None, allowed: int | None, data: Data | None = None
) -> tuple[str, ...]:
    """The messages of everything that the checks before a run would refuse or warn of."""
    checks: list[Callable[[], str | None]] = [
        lambda: check_device(run, device),
        lambda: check_memory(memory_of(run, allowed), allowed),
        lambda: check_whole(run.dense.whole_bytes, allowed) if data == "self" else None,
        lambda: None if out is None else check_disk(run, out, journal_folder(out)),
        lambda: None if out is None else check_place(out, run.dense.folder),
        lambda: None if data is None else check_text(data),
    ]
    found = []
    for check in checks:
        try:
            found.append(check())
        except (DoesNotFitError, CheckpointError, DataError) as error:
            found.append(str(error))
    return tuple(text for text in found if text is not None)
