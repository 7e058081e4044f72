"""Become one of several ranks where a launcher (torchrun, or anything that sets what it sets) started several processes."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from slimlm.core.errors import RanksError, SlimlmError
from slimlm.distributed.environment import started
from slimlm.distributed.group import ALONE, Group, Ranks
from slimlm.distributed.liveness import Watch

_RUNS = count()
"""Runs of this process so far: each keeps its own words in the launcher's store."""


@contextmanager
def joined() -> Iterator[Group]:
    """The ranks of this run. An error on one of them ends all, each with RanksError where the error was another's.

    A rank that dies without a word ends the others as soon as its connections break, or after `watch.SILENCE` seconds.
    """
    if started() == 1:
        yield ALONE
        return
    if dist.is_initialized():
        raise RanksError(
            "torch.distributed is set up already in this process; slimlm sets it up itself. Call slimlm.compress before that, "
            "or after torch.distributed.destroy_process_group()"
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = "cpu:gloo,cuda:nccl" if here <= torch.cuda.device_count() else "gloo"
    store, rank, size = _met()
    run = f"slimlm-{next(_RUNS)}"
    watch = Watch(PrefixStore(run, store), rank, size)
    with _terminated() as told_to_end:
        watch.begin()
        group: Ranks | None = None
        try:
            group = Ranks(watch, PrefixStore(f"{run}-group", store), backend, here)
            yield group
        except RanksError:
            raise
        except KeyboardInterrupt:
            watch.look()
            if told_to_end.is_set():
                # Launchers end the other ranks when one is gone.
                watch.find_out()
            watch.record("stopped", stopped=True)
            raise
        except SlimlmError as error:
            watch.record(str(error))
            raise
        except BaseException as error:
            watch.record(f"{type(error).__name__}: {error}")
            raise
        finally:
            watch.end()
            if group is not None:
                group.leave()


@cache
def _met() -> tuple[Store, int, int]:
    """The launcher's store, this rank and the number of ranks; one store serves all runs of a process."""
    try:
        return next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RanksError(f"the {started()} processes did not find one another at {place}: {error}", speaks=True) from error


@contextmanager
def _terminated() -> Iterator[threading.Event]:
    """Meanwhile SIGTERM ends the work as Ctrl-C does; gives what tells the two apart."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def end(*_: Any) -> None:
        told.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
