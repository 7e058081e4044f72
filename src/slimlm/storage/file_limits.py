"""Room for mapped files: each holds one of the open files that the system allows a process (`ulimit -n`)."""

import contextlib
import sys
from pathlib import Path

from slimlm.core.errors import CheckpointError


def make_room(files: int) -> None:
    """Let this process open so many files more, which raises its soft limit where that is too low.

    Raises CheckpointError where the hard limit is lower than that. Does nothing on Windows, which has no such limit.
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
        "raise that (ulimit -n) and type the same line again"
    )


def _open_now() -> int:
    own = Path("/dev/fd")
    return len(list(own.iterdir())) if own.is_dir() else 0
