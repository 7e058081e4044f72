"""Join the ranks of a run where a launcher (torchrun, or a compatible one) started several processes."""

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
from slimlm.distributed.environment import world_size
from slimlm.distributed.group import ALONE, Group, Ranks
from slimlm.distributed.liveness import Watch

_RUNS = count()
"""The number of runs of this process so far: each has a prefix of its own in the launcher's store."""


@contextmanager
def join_ranks() -> Iterator[Group]:
    """The ranks of this run. An error on one of them ends all; the others raise RanksError.

    A rank that dies without a message ends the others as soon as its connections break, or after `liveness.SILENCE` seconds.
    """
    if world_size() == 1:
        yield ALONE
        return
    if dist.is_initialized():
        raise RanksError(
            "torch.distributed is set up already in this process; slimlm sets it up itself. Call slimlm.compress before that, "
            "or after torch.distributed.destroy_process_group()"
        )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    backend = "cpu:gloo,cuda:nccl" if local_size <= torch.cuda.device_count() else "gloo"
    store, rank, size = _rendezvous()
    run = f"slimlm-{next(_RUNS)}"
    watch = Watch(PrefixStore(run, store), rank, size)
    with _sigterm_as_interrupt() as terminated:
        watch.start()
        group: Ranks | None = None
        try:
            group = Ranks(watch, PrefixStore(f"{run}-group", store), backend, local_size)
            yield group
        except RanksError:
            raise
        except KeyboardInterrupt:
            watch.check()
            if terminated.is_set():
                # Launchers terminate the other ranks when one has ended.
                watch.check_after_a_moment()
            watch.post_reason("stopped", stopped=True)
            raise
        except SlimlmError as error:
            watch.post_reason(str(error))
            raise
        except BaseException as error:
            watch.post_reason(f"{type(error).__name__}: {error}")
            raise
        finally:
            watch.stop()
            if group is not None:
                group.disconnect()


@cache
def _rendezvous() -> tuple[Store, int, int]:
    """The launcher's store, this rank and the number of ranks; one store serves all runs of a process."""
    try:
        return next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RanksError(
            f"the {world_size()} processes did not find one another at {place}: {error}", reported_here=True
        ) from error


@contextmanager
def _sigterm_as_interrupt() -> Iterator[threading.Event]:
    """A context in which SIGTERM raises KeyboardInterrupt as Ctrl-C does; only SIGTERM sets the event."""
    terminated = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield terminated
        return

    def terminate(*_: Any) -> None:
        terminated.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield terminated
    finally:
        signal.signal(signal.SIGTERM, before)
