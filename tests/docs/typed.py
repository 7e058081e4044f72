"""Lines that call slimlm, run in processes that are forked from one that has imported it: no line costs a start of Python."""

import multiprocessing
import shlex
import sys

_SHELL = set("|&;<>$`*?()\\")


def words_of(line: str) -> list[str] | None:
    """The arguments of a line that only calls slimlm; None where it takes a shell."""
    if not line.startswith("slimlm ") or _SHELL & set(line):
        return None
    return shlex.split(line)


def start() -> None:
    """Start the process that lines are forked from. With one thread, so that forking is sound."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["slimlm.cli.app", "tests.docs.typed"])


def run(words: list[str]) -> None:
    """Run a line; raises SystemExit where it fails."""
    process = multiprocessing.get_context("forkserver").Process(target=_type, args=(words,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"{shlex.join(words)} ended with status {process.exitcode}")


def _type(words: list[str]) -> None:
    from slimlm.cli import main

    sys.argv = words
    main()
