"""Lines that call slimlm, run in processes that are forked from one that has imported it: no line costs a start of Python."""

import importlib
import multiprocessing
import os
import shlex
import sys
from multiprocessing.connection import Connection

_SHELL = set("|&;<>$`*?()\\")
_IMPORTED = ("slimlm.cli.app", "slimlm.pipeline", "transformers.models.llama.modeling_llama")
"""What lines use. `slimlm.cli.app` alone imports neither torch nor transformers."""
_servers: list[Connection] = []


def words_of(line: str) -> list[str] | None:
    """The arguments of a line that only calls slimlm; None where it takes a shell."""
    if not line.startswith("slimlm ") or _SHELL & set(line):
        return None
    return shlex.split(line)


def start() -> None:
    """Import what lines use, and start the process that they are forked from: this one may have several threads later."""
    for name in _IMPORTED:
        importlib.import_module(name)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    context.Process(target=_serve, args=(here, there), daemon=True).start()
    there.close()
    _servers.append(here)


def run(words: list[str]) -> None:
    """Run a line; raises SystemExit where it fails."""
    # What was printed so far comes first.
    sys.stdout.flush()
    [server] = _servers
    server.send(words)
    status = server.recv()
    if status != 0:
        raise SystemExit(f"{shlex.join(words)} ended with status {status}")


def _serve(here: Connection, there: Connection) -> None:
    here.close()
    while True:
        words = there.recv()
        child = os.fork()
        if child == 0:
            return _type(words)
        there.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _type(words: list[str]) -> None:
    from slimlm.cli import main

    sys.argv = words
    main()
