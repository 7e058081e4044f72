"""Programs that run in processes forked from one that has imported slimlm: they cost no start of Python."""

import multiprocessing
import os
import sys
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_IMPORTED = [
    "slimlm.cli.app",
    "slimlm.pipeline",
    "transformers.models.llama.modeling_llama",
    "tests.faults.harness",
    "tests.forked",
]


def start_server() -> None:
    """Start the process that others are forked from, with one thread: so forking is sound, and sums are the same everywhere."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTED)
    own = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start(code: str, arguments: list[str], said: Path, environment: Mapping[str, str] | None = None) -> ForkServerProcess:
    """Run a program as `python -c` would, with these variables besides; standard output and error go to a file."""
    process = multiprocessing.get_context("forkserver").Process(
        target=_run, args=(code, arguments, said, dict(environment or {}))
    )
    process.start()
    return process


def _run(code: str, arguments: list[str], said: Path, environment: dict[str, str]) -> None:
    print_to(said)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(compile(code, "<forked>", "exec"), {"__name__": "__main__"})


def print_to(said: Path) -> None:
    """Send this process's standard output and error to a file."""
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
