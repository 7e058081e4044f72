"""The limit of open files (`ulimit -n`), which also counts mapped files."""

import contextlib
import sys
from pathlib import Path

from slimlm.core.errors import CheckpointError


def make_room(files: int) -> None:
    """Raise this process's soft limit of open files where it is too low. Windows has no such limit.

    Args:
        files: The number of files to be opened in addition.

    Raises:
        CheckpointError: The hard limit is too low.
    """
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_now() + files
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return
    raise CheckpointError(
        f"a run on this model may have {needed} files open at once, and the system allows {soft} and no more than {hard}; "
        "raise that limit (ulimit -n) and start the run again"
    )


def _open_now() -> int:
    own = Path("/dev/fd")
    return len(list(own.iterdir())) if own.is_dir() else 0
